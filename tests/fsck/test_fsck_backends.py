"""fsck of the backends: every shard and copy that is not what was written is named and mended."""

from __future__ import annotations

import dataclasses

import pytest

from qsfs.errors import BackendUnavailable
from qsfs.format.head import head_key
from qsfs.format.identity import identity_key
from qsfs.format.shard import encode_shards
from qsfs.format.superblock import SUPERBLOCK_KEY
from qsfs.fsck.check import Backends, fsck
from qsfs.fsck.report import Report, Severity
from qsfs.remote.members import Candidate
from qsfs.store.schema import ExtentRow, PackRow, PackState, Table, u64, u64_pair
from tests.fsck.conftest import TIMING, Checked, kinds
from tests.remote.small_fs import LIMITS, SECRET, noise


@pytest.fixture(autouse=True)
def damage_is_logged(expect_log):
    expect_log(r"read from others", optional=True)


def place(checked: Checked, name: str, shard: int):
    """(backend number, key) of a shard of a file's pack."""
    fs = checked.fs
    row = PackRow.decode(checked.get(Table.PACKS, u64(checked.packs[name][0])))
    from qsfs.format.shard import shard_key

    key = shard_key(fs.keys.fsid, row.owner_epoch, row.pack_id, shard)
    return row.placement[shard], key, row.pack_id.hex()


async def check(checked: Checked, candidates: list[Candidate], **options: bool) -> Report:
    """A check by way of these connections."""
    backends = Backends(candidates, SECRET, TIMING)
    return await fsck(checked.directory, LIMITS, clock=checked.fs.clock, backends=backends, **options)


async def test_sound_backends_are_clean(checked: Checked):
    for options in ({}, {"deep": True}, {"deep": True, "repair": True}):
        report = await checked.fsck(remote=True, **options)
        assert report.findings == [] and report.failures == [], options
        assert report.exit_code == 0
        # Three data packs and the metadata pack of the head, six shards each.
        assert report.checked["packs"] == 4 and report.checked["shards"] == 24


async def test_a_check_writes_nothing_to_backends(checked: Checked):
    before = [store.keys() for store in checked.fs.world.data]
    backend, key, _ = place(checked, "big", 2)
    checked.fs.world.data[backend - 1].lose(key)
    before[backend - 1].remove(key)
    await checked.fsck(remote=True, deep=True)
    assert [store.keys() for store in checked.fs.world.data] == before


async def test_a_missing_shard_is_named_and_rebuilt(checked: Checked):
    backend, key, pack = place(checked, "big", 2)
    store = checked.fs.world.data[backend - 1]
    right = store.peek(key)
    store.lose(key)
    report = await checked.fsck(remote=True)
    (finding,) = report.findings
    assert finding.kind == "shard-missing" and report.exit_code == 4
    assert finding.subject["pack"] == pack and finding.subject["shard"] == 2
    assert finding.subject["backend"] == f"backend host{backend}:9900/qsfs"
    assert pack in finding.message and f"host{backend}:9900" in finding.message
    report = await checked.fsck(remote=True, repair=True)
    assert report.exit_code == 1
    assert store.peek(key) == right
    assert (await checked.fsck(remote=True, deep=True)).exit_code == 0


@pytest.mark.parametrize("how", ["flipped", "cut", "swapped", "empty", "foreign"])
async def test_a_wrong_shard_is_seen_by_a_deep_check_and_replaced(checked: Checked, how: str):
    backend, key, pack = place(checked, "big", 1)
    store = checked.fs.world.data[backend - 1]
    right = store.peek(key)
    other_backend, other_key, _ = place(checked, "big", 4)
    other = checked.fs.world.data[other_backend - 1].peek(other_key)
    wrong = {
        "flipped": right[:900] + bytes([right[900] ^ 4]) + right[901:],
        "cut": right[:-7],
        "swapped": other,
        "empty": b"",
        "foreign": b"something else altogether",
    }[how]
    store.rot(key, lambda value: wrong)
    assert (await checked.fsck(remote=True)).exit_code == 0, "presence only"
    report = await checked.fsck(remote=True, deep=True)
    (finding,) = report.findings
    assert finding.kind == "shard-wrong" and report.exit_code == 4
    assert finding.subject["pack"] == pack and finding.subject["shard"] == 1
    assert finding.subject["backend"] == f"backend host{backend}:9900/qsfs"
    assert (await checked.fsck(remote=True, deep=True, repair=True)).exit_code == 1
    assert store.peek(key) == right
    assert (await checked.fsck(remote=True, deep=True)).exit_code == 0


async def test_any_m_wrong_or_missing_are_rebuilt(checked: Checked):
    rights = {}
    for name in ("big", "small", "cold"):
        for shard in (0, 5):
            backend, key, _ = place(checked, name, shard)
            store = checked.fs.world.data[backend - 1]
            rights[backend, key] = store.peek(key)
            if shard:
                store.lose(key)
            else:
                store.rot(key, lambda value: value[1:])
    assert (await checked.fsck(remote=True, deep=True, repair=True)).exit_code == 1
    assert {at: checked.fs.world.data[at[0] - 1].peek(at[1]) for at in rights} == rights


async def test_a_quick_repair_finds_the_rot_that_it_meets(checked: Checked):
    """One shard is missing; another of the same pack turns out to be rotten while it is read."""
    gone, gone_key, _ = place(checked, "big", 0)
    rotten, rotten_key, _ = place(checked, "big", 1)
    right = checked.fs.world.data[rotten - 1].peek(rotten_key)
    checked.fs.world.data[gone - 1].lose(gone_key)
    checked.fs.world.data[rotten - 1].rot(rotten_key, lambda value: value[:-1])
    assert (await checked.fsck(remote=True, repair=True)).exit_code == 1
    assert checked.fs.world.data[rotten - 1].peek(rotten_key) == right
    assert (await checked.fsck(remote=True, deep=True)).exit_code == 0


async def test_more_than_m_are_lost_and_the_files_are_named(checked: Checked):
    for shard in (0, 1, 2):
        backend, key, pack = place(checked, "cold", shard)
        checked.fs.world.data[backend - 1].lose(key)
    before = [store.keys() for store in checked.fs.world.data]
    report = await checked.fsck(remote=True, repair=True)
    assert report.exit_code == 4
    (finding,) = [finding for finding in report.findings if finding.kind == "pack-lost"]
    assert pack in finding.message and f"inode {checked.numbers['cold']}" in finding.message
    assert [store.keys() for store in checked.fs.world.data] == before, "nothing is deleted, nothing stored"


@pytest.mark.parametrize("deep", [False, True])
async def test_backends_that_do_not_answer_prove_nothing(checked: Checked, deep: bool):
    before = [store.keys() for store in checked.fs.world.data]
    report = await checked.fsck(remote=True, deep=deep, repair=True, down=(2, 5))
    assert report.count() == 0
    assert report.exit_code == 8
    assert any("host2:9900" in reason for reason in report.failures)
    assert [store.keys() for store in checked.fs.world.data] == before


@pytest.mark.parametrize("deep", [False, True])
async def test_backends_that_fail_once_they_said_who_they_are_prove_nothing(checked: Checked, deep: bool):
    before = [store.keys() for store in checked.fs.world.data]
    shards = {place(checked, name, shard)[1] for name in ("big", "small", "cold") for shard in range(6)}

    def fail(_: str, key: bytes) -> None:
        if key in shards:
            raise BackendUnavailable("backend host: connection reset")

    candidates = checked.fs.candidates()
    for number in (1, 2, 3, 4):
        checked.fs.connections[number].gate = fail
    report = await check(checked, candidates, deep=deep, repair=True)
    assert report.count() == 0 and report.exit_code == 8
    assert [store.keys() for store in checked.fs.world.data] == before


@pytest.mark.parametrize("deep", [False, True])
async def test_an_address_that_has_not_shown_its_identity_lacks_nothing(checked: Checked, deep: bool):
    """Something else may listen where a backend was: that it has no shard does not say that it is lost."""
    kept = {number: checked.fs.world.data[number - 1].keys() for number in range(4, 9)}
    candidates = checked.fs.candidates()

    def unknown(call: str, key: bytes) -> None:
        if call == "get" and key == identity_key(checked.fs.keys.fsid):
            raise BackendUnavailable("backend host: connection reset")

    for number in (1, 2, 3):
        store = checked.fs.world.data[number - 1]
        for key in list(store.keys()):
            store.lose(key)
        checked.fs.connections[number].gate = unknown
    report = await check(checked, candidates, deep=deep, repair=True)
    assert report.count() == 0 and report.exit_code == 8
    assert {number: checked.fs.world.data[number - 1].keys() for number in kept} == kept


async def test_a_pack_is_not_called_lost_while_a_backend_is_silent(checked: Checked):
    """What is missing where it was placed may lie where nobody answers."""
    for shard in (0, 1, 2):
        backend, key, pack = place(checked, "cold", shard)
        checked.fs.world.data[backend - 1].lose(key)
    holders = {place(checked, "cold", shard)[0] for shard in range(6)}
    (spare, *_) = set(range(1, 9)) - holders
    report = await checked.fsck(remote=True, down=(spare,))
    assert "pack-lost" not in kinds(report)
    assert any(f"pack {pack}: only 3 of its shards were found, 4 are needed" in why for why in report.failures)
    assert "pack-lost" in kinds(await checked.fsck(remote=True))


async def test_backends_that_the_configuration_leaves_out_prove_nothing(checked: Checked):
    """Their shards may well be there: no pack is called lost, and nothing is stored elsewhere."""
    before = [store.keys() for store in checked.fs.world.data]
    for deep in (False, True):
        report = await check(checked, checked.fs.candidates()[3:], deep=deep, repair=True)
        assert report.count() == 0 and report.exit_code == 8
        assert any("entry 1 of the fleet" in reason for reason in report.failures)
    assert [store.keys() for store in checked.fs.world.data] == before


async def test_all_backends_down(checked: Checked):
    report = await checked.fsck(remote=True, down=tuple(range(1, 9)))
    assert report.exit_code == 8 and report.count() == 0


async def test_a_shard_that_moved_is_found_and_its_place_recorded(checked: Checked):
    backend, key, _ = place(checked, "big", 3)
    """A place that is new to the pack has not been looked at a second time: nothing is evicted for it yet."""
    stores = checked.fs.world.data
    number = checked.packs["big"][0]
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    looked = dataclasses.replace(row, state=int(PackState.FULL | PackState.LOOKED))
    checked.put(Table.PACKS, u64(number), looked.encode())
    spare = next(number for number in range(1, 9) if number not in row.placement)
    stores[spare - 1].put(key, stores[backend - 1].peek(key))
    stores[backend - 1].lose(key)
    report = await checked.fsck(remote=True, repair=True)
    assert [(f.kind, f.severity) for f in report.findings] == [("shard-elsewhere", Severity.WARNING)]
    assert report.exit_code == 0
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    assert row.placement[3] == spare and row.state == PackState.FULL
    assert checked.get(Table.CHANGED, bytes((Table.PACKS,)) + u64(checked.packs["big"][0])) is not None
    assert (await checked.fsck(remote=True)).findings == []


async def test_a_pack_that_was_only_written_becomes_full(checked: Checked):
    number = checked.packs["big"][0]
    backend, key, _ = place(checked, "big", 5)
    checked.fs.world.data[backend - 1].lose(key)
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    placement = (*row.placement[:5], -1)
    checked.put(Table.PACKS, u64(number), dataclasses.replace(row, placement=placement, state=0).encode())
    report = await checked.fsck(remote=True)
    assert [f.kind for f in report.findings] == ["shard-unstored"] and report.exit_code == 0
    assert (await checked.fsck(remote=True, repair=True)).exit_code == 0
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    assert -1 not in row.placement and row.state == PackState.FULL
    assert len(set(row.placement)) == 6
    assert (await checked.fsck(remote=True, deep=True)).findings == []


async def test_a_pack_that_was_mended_in_part_is_not_called_full(checked: Checked):
    number = checked.packs["big"][0]
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    for shard in (4, 5):
        backend, key, _ = place(checked, "big", shard)
        checked.fs.world.data[backend - 1].lose(key)
    placement = (*row.placement[:4], -1, -1)
    checked.put(Table.PACKS, u64(number), dataclasses.replace(row, placement=placement, state=0).encode())
    for store in checked.fs.world.data:
        store.read_only = True
    spare = next(number for number in range(1, 9) if number not in placement)
    checked.fs.world.data[spare - 1].read_only = False
    report = await checked.fsck(remote=True, repair=True)
    assert report.exit_code == 8
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    assert sorted(row.placement[4:]) == [-1, spare] and row.state == 0


async def test_a_shard_goes_elsewhere_where_its_backend_takes_nothing(checked: Checked):
    backend, key, _ = place(checked, "big", 2)
    store = checked.fs.world.data[backend - 1]
    store.lose(key)
    store.read_only = True
    report = await checked.fsck(remote=True, repair=True)
    assert report.exit_code == 1
    row = PackRow.decode(checked.get(Table.PACKS, u64(checked.packs["big"][0])))
    assert row.placement[2] != backend and len(set(row.placement)) == 6
    assert (await checked.fsck(remote=True, deep=True)).exit_code == 0


async def test_a_rebuilt_shard_counts_once_it_was_read_back(checked: Checked):
    """A backend that acknowledges and does not keep: the shard goes to another one, and the row says so."""
    backend, key, _ = place(checked, "big", 2)
    store = checked.fs.world.data[backend - 1]
    store.lose(key)
    candidates = checked.fs.candidates()

    def forget(call: str, asked: bytes) -> None:
        if call == "get" and asked == key and key in store.keys():  # noqa: SIM118
            store.lose(key)

    checked.fs.connections[backend].gate = forget
    await check(checked, candidates, repair=True)
    now, _, _ = place(checked, "big", 2)
    assert now != backend
    assert checked.fs.world.data[now - 1].peek(key) is not None
    assert (await checked.fsck(remote=True, deep=True)).exit_code == 0


async def test_shards_that_authenticate_but_do_not_belong(checked: Checked):
    """A shard with the right keys and the wrong bytes is told from the others by encoding again."""
    fs = checked.fs
    number = checked.packs["big"][0]
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    backend, key, _ = place(checked, "big", 1)
    from qsfs.format.pack import Pack
    from qsfs.remote.stored import StoredPack

    ref = StoredPack.of_row(row, fs.world.code).ref
    forged = encode_shards(Pack(ref, noise(ref.body_length), ()), fs.code, fs.keys)[1]
    right = fs.world.data[backend - 1].peek(key)
    fs.world.data[backend - 1].rot(key, lambda value: forged)
    report = await checked.fsck(remote=True, deep=True)
    (finding,) = report.findings
    assert finding.kind == "shard-wrong" and "does not belong" in finding.message
    assert finding.subject["shard"] == 1
    assert (await checked.fsck(remote=True, deep=True, repair=True)).exit_code == 1
    assert fs.world.data[backend - 1].peek(key) == right


async def test_rows_that_name_another_extent_than_the_pack_holds(checked: Checked):
    number = checked.numbers["cold"]
    row = ExtentRow.decode(0, checked.get(Table.EXTENTS, u64_pair(number, 0)))
    wrong = dataclasses.replace(row, write_number=row.write_number + 1)
    checked.put(Table.EXTENTS, u64_pair(number, 0), wrong.encode())
    assert (await checked.fsck(remote=True)).exit_code == 0
    report = await checked.fsck(remote=True, deep=True)
    assert kinds(report) == ["extent-index"]


async def test_metadata_packs_of_kept_generations_are_checked_too(checked: Checked):
    head = checked.fs.head
    pack = head.snapshot[0]
    from qsfs.format.shard import shard_key

    key = shard_key(checked.fs.keys.fsid, pack.ref.owner_epoch, pack.ref.pack_id, 0)
    store = checked.fs.world.data[pack.placement[0] - 1]
    right = store.peek(key)
    store.lose(key)
    report = await checked.fsck(remote=True)
    assert kinds(report) == ["shard-missing"]
    assert (await checked.fsck(remote=True, repair=True)).exit_code == 1
    assert store.peek(key) == right


# copies


async def test_superblocks_are_checked_and_refilled(checked: Checked):
    stores = checked.fs.world.data
    right = stores[0].peek(SUPERBLOCK_KEY)
    stores[2].lose(SUPERBLOCK_KEY)
    stores[4].rot(SUPERBLOCK_KEY, lambda value: value[:-1])
    report = await checked.fsck(remote=True)
    assert kinds(report) == ["copy-missing", "copy-wrong"]
    assert {f.subject["backend"] for f in report.findings} == {
        "backend host3:9900/qsfs",
        "backend host5:9900/qsfs",
    }
    assert (await checked.fsck(remote=True, repair=True)).exit_code == 1
    assert all(store.peek(SUPERBLOCK_KEY) == right for store in stores)


async def test_an_older_superblock_is_replaced(checked: Checked):
    from qsfs.format.keys import wrap_keys
    from qsfs.format.superblock import encode_superblock, open_superblock, replace_slots
    from tests.remote.small_fs import SECRET

    fs = checked.fs
    old = fs.world.data[0].peek(SUPERBLOCK_KEY)
    superblock, keys = open_superblock(old, SECRET)
    slots = wrap_keys(SECRET, keys, slot_number=2, clock=fs.clock)
    new = encode_superblock(replace_slots(superblock, slots), keys, fs.clock)
    for store in fs.world.data[1:]:
        store.put(SUPERBLOCK_KEY, new)
    report = await checked.fsck(remote=True)
    (finding,) = report.findings
    assert finding.kind == "copy-wrong" and "older superblock" in finding.message
    assert (await checked.fsck(remote=True, repair=True)).exit_code == 1
    assert fs.world.data[0].peek(SUPERBLOCK_KEY) == new


async def test_heads_are_checked_and_refilled(checked: Checked):
    fs = checked.fs
    key = head_key(fs.keys.fsid, fs.sealed.ref)
    fs.world.control[0].lose(key)
    fs.world.control[1].rot(key, lambda value: value[:-1])
    report = await checked.fsck(remote=True)
    found = {(f.kind, f.severity.value) for f in report.findings}
    assert found == {("copy-missing", "warning"), ("copy-wrong", "error")}
    assert (await checked.fsck(remote=True, repair=True)).exit_code == 1
    assert all(store.peek(key) == fs.sealed.value for store in fs.world.control)


async def test_a_head_on_fewer_than_a_quorum_is_an_error(checked: Checked):
    fs = checked.fs
    key = head_key(fs.keys.fsid, fs.sealed.ref)
    for store in fs.world.control[:3]:
        store.lose(key)
    assert kinds(await checked.fsck(remote=True)) == ["copy-missing"]


async def test_a_head_that_nobody_has_is_not_invented(checked: Checked):
    fs = checked.fs
    key = head_key(fs.keys.fsid, fs.sealed.ref)
    for store in fs.world.control:
        store.lose(key)
    report = await checked.fsck(remote=True, repair=True)
    assert "copy-lost" in kinds(report) and report.exit_code & 4


async def test_owner_records_are_refilled(checked: Checked):
    from qsfs.format.head import owner_key
    from tests.remote.small_fs import OWNER

    fs = checked.fs
    key = owner_key(fs.keys.fsid, OWNER)
    right = fs.world.control[0].peek(key)
    for store in fs.world.control[2:6]:
        store.lose(key)
    assert kinds(await checked.fsck(remote=True)) == ["copy-missing"]
    assert (await checked.fsck(remote=True, repair=True)).exit_code == 1
    assert all(store.peek(key) == right for store in fs.world.control)


async def test_a_backend_that_came_back_empty_is_filled_again(checked: Checked):
    fs = checked.fs
    store, control = fs.world.data[3], fs.world.control[3]
    before = {key: store.peek(key) for key in list(store.keys())}
    heads = {key: control.peek(key) for key in list(control.keys())}
    store.clear()
    control.clear()
    report = await checked.fsck(remote=True)
    assert "backend-emptied" in kinds(report)
    report = await checked.fsck(remote=True, repair=True)
    assert report.exit_code == 1, list(report.sentences())
    identity = identity_key(fs.keys.fsid)
    for key, value in before.items():
        if key != identity:
            assert store.peek(key) == value
    for key, value in heads.items():
        if key != identity:
            assert control.peek(key) == value
    assert (await checked.fsck(remote=True, deep=True)).exit_code == 0


async def test_swapped_backends_are_told_by_their_identities(checked: Checked):
    """Two backends under each other's address: nothing is missing, nothing is rebuilt."""
    fs = checked.fs
    fs.world.data[0], fs.world.data[1] = fs.world.data[1], fs.world.data[0]
    fs.world.control[0], fs.world.control[1] = fs.world.control[1], fs.world.control[0]
    report = await checked.fsck(remote=True, deep=True)
    assert report.exit_code == 0


async def test_a_backend_with_a_foreign_identity_is_left_alone(checked: Checked):
    fs = checked.fs
    key = identity_key(fs.keys.fsid)
    fs.world.data[3].rot(key, lambda value: value[:-1])
    before = {k: fs.world.data[3].peek(k) for k in list(fs.world.data[3].keys())}
    report = await checked.fsck(remote=True, repair=True)
    assert report.exit_code & 8
    assert {k: fs.world.data[3].peek(k) for k in list(fs.world.data[3].keys())} == before


async def test_the_wrong_key_or_other_backends(checked: Checked):
    from qsfs.fsck.check import Backends, fsck
    from tests.remote.small_fs import LIMITS

    backends = Backends(checked.fs.candidates(), b"x" * 32)
    report = await fsck(checked.directory, LIMITS, clock=checked.fs.clock, backends=backends)
    assert report.exit_code == 8 and "key" in report.failures[0]


async def test_repair_goes_by_the_fewest_spare_shards(checked: Checked):
    order = []
    for name, shards in (("big", (0,)), ("small", (0, 1)), ("cold", (4,))):
        for shard in shards:
            backend, key, pack = place(checked, name, shard)
            checked.fs.world.data[backend - 1].lose(key)
        order.append(pack)
    from qsfs.health.packs import PackDoctor

    done = []
    original = PackDoctor.rebuild

    async def rebuild(self, look, body, numbers):
        done.append(look.pack.name)
        return await original(self, look, body, numbers)

    PackDoctor.rebuild = rebuild
    try:
        assert (await checked.fsck(remote=True, repair=True)).exit_code == 1
    finally:
        PackDoctor.rebuild = original
    assert done[0] == order[1] and len(done) == 3
