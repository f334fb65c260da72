"""Restore: from backends and key alone comes the file system as it was at its cut, or nothing at all."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import stat

import pytest
import trio

from qsfs import failpoints
from qsfs.backend.limits import RateLimit, with_limits
from qsfs.clock import FixedClock
from qsfs.errors import (
    CacheError,
    Corrupt,
    DataLost,
    FormatMismatch,
    KeyFileError,
    NotFound,
    QsfsError,
    QuorumUnavailable,
    SplitHeads,
    Unavailable,
)
from qsfs.format.head import KeptGeneration
from qsfs.format.shard import shard_key
from qsfs.format.superblock import SUPERBLOCK_KEY
from qsfs.remote import aside as aside_module
from qsfs.remote import restore as restore_module
from qsfs.remote.aside import drop_second_names, set_aside
from qsfs.remote.base import BASE_KEY, RETURNS_KEY, local_head, rejected_heads
from qsfs.remote.generation import GENERATION
from qsfs.remote.readable import Wanted
from qsfs.remote.rebuild import AsideFile
from qsfs.remote.restore import restore
from qsfs.remote.survey import Timing
from qsfs.store.schema import (
    PAGE,
    REMOTE_TABLES,
    ROOT_INODE,
    Entry,
    InodeFlag,
    Table,
    split_u64_pair,
    u64,
    u64_pair,
)
from qsfs.store.store import FSID_KEY, NEXT_INODE, NEXT_PACK, Store
from tests.remote.harness import make_head, plant
from tests.remote.small_fs import LIMITS, OWNER, SECRET, SmallFs, noise

TIMING = Timing(attempt=2.0, retry=0.01, retry_most=0.02, grace=0.2)


class Original(SmallFs):
    """A file system, and machines that restore it."""

    async def restore(self, directory, down=(), **options):
        directory.mkdir(exist_ok=True)
        options.setdefault("timing", TIMING)
        options.setdefault("secret", SECRET)
        options.setdefault("deadline_seconds", 10.0)
        return await restore(
            options.pop("candidates", None) or self.candidates(down),
            directory=directory,
            limits=LIMITS,
            clock=self.clock,
            **options,
        )

    def restored(self, directory) -> Original:
        """A machine that works on what was restored in `directory`."""
        return Original(self.world, directory)


def rows_of(fs: SmallFs, *, without: frozenset[Table] = frozenset()) -> dict[Table, dict[bytes, bytes]]:
    """The rows that a generation holds."""
    return {
        table: dict(fs.store.scan(table, b"", None))
        for table in sorted(REMOTE_TABLES)
        if table not in without
    }


@pytest.fixture
async def fs(scratch):
    fs = await Original.make(scratch / "cache")
    fs.add_superblock()
    yield fs
    fs.close()


async def a_small_tree(fs):
    directory = fs.create("dir", mode=stat.S_IFDIR | 0o750)
    files = {
        "a": fs.write("a", noise(20 * PAGE)),
        "b": fs.write("b", noise(3 * PAGE + 17, 2), parent=directory),
    }
    fs.commit()
    for number in files.values():
        fs.upload(number)
    fs.commit()
    return directory, files


async def test_what_the_download_rate_holds_up_is_not_late(fs, scratch, autojump_clock):
    """A deadline is for backends that do not answer."""
    await a_small_tree(fs)
    fs.publish()
    limit = RateLimit()
    candidates = [dataclasses.replace(c, data=with_limits(c.data, download=limit)) for c in fs.candidates()]

    def say(progress):
        if progress.step == "reading metadata":
            limit.rate = 10

    begun = trio.current_time()
    report = await fs.restore(scratch / "new", candidates=candidates, deadline_seconds=5.0, say=say)
    assert report.tally.files == 2 and trio.current_time() - begun > 50


async def test_everything_comes_back(fs, scratch):
    _, files = await a_small_tree(fs)
    fs.publish()
    said = []
    report = await fs.restore(scratch / "new", say=said.append)
    assert (report.tally.files, report.tally.directories, report.withstands >= 0) == (2, 2, True)
    assert any("generation 1 of epoch 1" in sentence for sentence in report.sentences)
    assert said[-1].step == "restored"
    new = fs.restored(scratch / "new")
    skip = frozenset({Table.PACKS, Table.COUNTERS})
    assert rows_of(new, without=skip) == rows_of(fs, without=skip)
    assert dict(new.store.scan(Table.COOKIES, b"", None)) == dict(fs.store.scan(Table.COOKIES, b"", None))
    for name, number in files.items():
        assert new.read(number, 0, 3) == [None] * 3, f"{name} stays remote"
    async with new.fetching() as fetcher:
        for number in files.values():
            await fetcher.fetch(number, 0, 20)
            assert new.read(number, 0, 20) == fs.read(number, 0, 20)
    new.close()


async def test_the_restored_head_is_the_base_and_not_ours(fs, scratch):
    await a_small_tree(fs)
    fs.publish(generation=5)
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    base = local_head(new.store, BASE_KEY, fs.keys)
    assert base is not None and base.sealed.ref == fs.sealed.ref and not base.ours
    assert new.store.local(FSID_KEY) == fs.keys.fsid
    assert new.store.counter(GENERATION) == 5
    assert new.store.write_number > fs.head.write_number
    assert new.store.counter(NEXT_INODE) == 4
    new.close()


async def test_numbers_in_use_are_never_given_out_again(fs, scratch):
    """The counters of the rows may be behind what the head knows, and both behind the rows themselves."""
    await a_small_tree(fs)
    rows = [
        (int(table), key, value)
        for table, found in rows_of(fs).items()
        for key, value in found.items()
        if table is not Table.COUNTERS
    ]
    fs.publish(rows=rows, counters={"next-inode": 2, "other": 9})
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    assert new.store.counter(NEXT_INODE) == 4
    packs = [int.from_bytes(key, "big") for key, _ in new.store.scan(Table.PACKS, b"", None)]
    assert new.store.counter(NEXT_PACK) == max(packs) == 3
    assert new.store.counter(b"other") == 9
    new.close()


@pytest.mark.parametrize("lost", list(itertools.combinations(range(1, 9), 2))[::3])
async def test_any_m_backends_may_be_gone(fs, scratch, lost):
    _, files = await a_small_tree(fs)
    fs.publish()
    report = await fs.restore(scratch / "new", down=lost)
    assert any("Left out" in sentence for sentence in report.sentences)
    new = fs.restored(scratch / "new")
    for place in lost:
        new.backends[place].down = True
    async with new.fetching() as fetcher:
        await fetcher.fetch(files["a"], 0, 20)
    assert new.read(files["a"], 0, 20) == fs.read(files["a"], 0, 20)
    new.close()


async def test_deltas_follow_the_snapshot(fs, scratch):
    _, files = await a_small_tree(fs)
    fs.publish()
    snapshot = fs.head.snapshot
    before = rows_of(fs)
    with fs.store.change() as change:
        change.delete(Table.ENTRIES, u64(ROOT_INODE) + b"a")
        change.delete(Table.COOKIES, next(k for k, v in fs.store.scan(Table.COOKIES, b"", None) if v == b"a"))
        change.remove(files["a"])
    new_file = fs.write("c", b"new")
    fs.store.work_off_truncations(1000)
    fs.commit()
    fs.upload(new_file)
    after = rows_of(fs)
    delta = []
    for table, rows in after.items():
        delta += [(int(table), key, value) for key, value in rows.items() if before[table].get(key) != value]
        delta += [(int(table), key, None) for key in before[table] if key not in rows]
    plant(
        fs.world,
        make_head(
            fs.world,
            OWNER,
            2,
            fs.sealed.ref,
            snapshot=snapshot,
            deltas=((fs.metadata(delta),),),
            write_number=fs.store.layers.committed_write_number,
        ),
    )
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    skip = frozenset({Table.PACKS, Table.COUNTERS})
    assert rows_of(new, without=skip) == rows_of(fs, without=skip)
    assert new.store.get(Table.ENTRIES, u64(ROOT_INODE) + b"a") is None
    assert new.store.inode(files["a"]) is None
    new.close()


async def test_local_only_files_come_back_empty(fs, scratch):
    number = fs.write("lock.mdb", noise(PAGE), flags=int(InodeFlag.LOCAL_ONLY))
    fs.commit()
    fs.publish()
    report = await fs.restore(scratch / "new")
    assert report.tally.emptied == 1
    new = fs.restored(scratch / "new")
    assert (new.inode(number).size, new.inode(number).allocated) == (0, 0)
    new.close()


async def test_files_of_a_validator_are_put_beside(fs, scratch):
    directory = fs.create("unit", mode=stat.S_IFDIR | 0o750)
    inner = fs.create("files", mode=stat.S_IFDIR | 0o750, parent=directory)
    number = fs.write("unit_file", noise(PAGE), flags=int(InodeFlag.RESTORE_ASIDE), parent=inner)
    fs.commit()
    fs.upload(number)
    fs.publish(generation=12)
    report = await fs.restore(scratch / "new")
    assert report.tally.aside == [AsideFile("/unit/files/unit_file", "unit_file.restored-12")]
    assert any("sign twice" in sentence for sentence in report.sentences)
    new = fs.restored(scratch / "new")
    assert new.store.get(Table.ENTRIES, u64(inner) + b"unit_file") is None
    row = new.store.get(Table.ENTRIES, u64(inner) + b"unit_file.restored-12")
    entry = Entry.decode(row)
    assert entry.inode == number
    assert not new.inode(number).flags & InodeFlag.RESTORE_ASIDE
    cookies = {split_u64_pair(k): v for k, v in new.store.scan(Table.COOKIES, b"", None)}
    assert cookies[inner, entry.cookie] == b"unit_file.restored-12"
    marks = {key for key, _ in new.store.scan(Table.CHANGED, b"", None)}
    entries = bytes((Table.ENTRIES,)) + u64(inner)
    assert {entries + b"unit_file", entries + b"unit_file.restored-12"} <= marks, (
        "the next generation must carry what the restore changed"
    )
    new.close()


async def test_a_name_that_is_taken_or_too_long_is_put_beside_too(fs, scratch):
    long = "x" * 255
    for name in ("u", long):
        fs.write(name, b"1", flags=int(InodeFlag.RESTORE_ASIDE))
    fs.write("u.restored-3", b"2")
    fs.commit()
    fs.publish(generation=3)
    report = await fs.restore(scratch / "new")
    assert {aside.name for aside in report.tally.aside} == {"u.restored-3-2", "x" * 244 + ".restored-3"}


async def test_entries_with_cookies_that_are_taken_or_to_come_are_all_listed(fs, scratch):
    """What a damaged generation holds: each name gets a place in its directory, and keeps it."""
    for name in ("a", "b", "c", "d"):
        fs.write(name, name.encode())
    fs.commit()
    with fs.store.change() as change:
        for name, cookie in ((b"a", 5), (b"b", 5), (b"c", 5), (b"d", 90)):
            entry = Entry.decode(fs.store.get(Table.ENTRIES, u64(ROOT_INODE) + name))
            row = dataclasses.replace(entry, cookie=cookie)
            change.put(Table.ENTRIES, u64(ROOT_INODE) + name, row.encode())
        change.patch(ROOT_INODE, next_cookie=4)
    fs.commit()
    fs.publish()
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    cookies = dict(new.store.scan(Table.COOKIES, b"", None))
    assert sorted(cookies.values()) == [b"a", b"b", b"c", b"d"]
    assert int.from_bytes(max(cookies)[8:], "big") < new.inode(ROOT_INODE).next_cookie
    for key, name in cookies.items():
        entry = Entry.decode(new.store.get(Table.ENTRIES, u64(ROOT_INODE) + name))
        assert key == u64_pair(ROOT_INODE, entry.cookie)
    new.close()


async def test_a_metadata_pack_of_fewer_chunks_than_its_head_says_is_refused(fs, scratch):
    await a_small_tree(fs)
    fs.publish()
    pack = fs.head.snapshot[0]
    more = dataclasses.replace(pack, chunks=pack.chunks + 1)
    plant(fs.world, dataclasses.replace(fs.head, snapshot=(more,), generation=2, predecessor=fs.sealed.ref))
    with pytest.raises(Corrupt, match="chunks, its head says"):
        await fs.restore(scratch / "new")
    assert not (scratch / "new" / "data.mdb").exists()


async def test_pending_truncations_are_kept(fs, scratch):
    number = fs.remote_file("a", noise(8 * PAGE))
    fs.store.blocks.truncate(fs.inode(number), 2, fs.store.next_write())
    fs.commit()
    fs.publish()
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    assert [new.store.blocks.remote_extent(number, page) is None for page in range(8)] == [
        False,
        False,
        *[True] * 6,
    ]
    assert new.inode(number).allocated == 8
    while not new.store.work_off_truncations(4):
        pass
    assert new.inode(number).allocated == 2
    new.close()


async def test_what_only_this_machine_knew_is_not_there(fs, scratch):
    """Residency and orphans are local."""
    await a_small_tree(fs)
    fs.publish()
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    for table in (Table.BLOCKS, Table.VALUES, Table.DIRTY, Table.ORPHANS, Table.SPILL_BLOCKS):
        assert list(new.store.scan(table, b"", None)) == []
    new.close()


async def test_metadata_packs_of_the_head_are_known_afterwards(fs, scratch):
    await a_small_tree(fs)
    fs.publish()
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    ids = {new.pack_row(int.from_bytes(k, "big")).pack_id for k, _ in new.store.scan(Table.PACKS, b"", None)}
    assert {pack.ref.pack_id for pack in fs.head.snapshot} <= ids
    new.close()


async def test_live_bytes_and_allocation_are_counted_anew(fs, scratch):
    number = fs.remote_file("a", noise(8 * PAGE))
    fs.inode(number).allocated = 77
    fs.store.inodes.touch(fs.inode(number))
    fs.store.layers.put(Table.PACKS, u64(1), dataclasses.replace(fs.pack_row(1), live=0).encode())
    fs.commit()
    fs.publish()
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    assert new.inode(number).allocated == 8
    assert new.pack_row(1).live == 8 * PAGE
    new.close()


# refusals


async def test_a_directory_with_a_file_system_is_refused_and_can_be_set_aside(fs, scratch, monkeypatch):
    await a_small_tree(fs)
    fs.publish()
    await fs.restore(scratch / "new")
    before = (scratch / "new" / "data.mdb").read_bytes()
    with pytest.raises(CacheError, match="already"):
        await fs.restore(scratch / "new")
    assert (scratch / "new" / "data.mdb").read_bytes() == before
    flushed = []
    monkeypatch.setattr(aside_module, "flush_directory", flushed.append)
    aside = set_aside(scratch / "new", fs.clock)
    assert flushed == [scratch, *2 * [aside, scratch / "new"]], "where it lies is durable before where it lay"
    monkeypatch.undo()
    assert aside is not None and (aside / "data.mdb").read_bytes() == before
    await fs.restore(scratch / "new")


async def test_nothing_is_set_aside_for_what_is_not_there(fs, scratch):
    """Neither for a wrong number nor for too few backends: the next takeover would restore the newest."""
    await a_small_tree(fs)
    fs.publish(generation=2)
    directory = scratch / "new"
    await fs.restore(directory)
    cleared = []

    def clear() -> None:
        cleared.append(set_aside(directory, FixedClock(1)))

    with pytest.raises(NotFound):
        await fs.restore(directory, wanted=Wanted(generation=1), clear=clear)
    with pytest.raises(QuorumUnavailable):
        await fs.restore(directory, candidates=fs.candidates(silent=(1, 2, 3, 4, 5, 6)), clear=clear)
    assert not cleared and (directory / "data.mdb").exists()
    await fs.restore(directory, wanted=Wanted(generation=2), clear=clear)
    assert len(cleared) == 1 and (cleared[0] / "data.mdb").exists() and (directory / "data.mdb").exists()


async def test_nothing_is_set_aside_before_the_store_is_built(fs, scratch, monkeypatch):
    """Metadata that do not come leave a machine with what it had, fsynced and not published yet perhaps."""
    await a_small_tree(fs)
    fs.publish(generation=2)
    directory = scratch / "new"
    await fs.restore(directory)
    cleared = []

    async def silent(*_: object) -> None:
        raise Unavailable("metadata pack 1 is not here")

    with monkeypatch.context() as patched:
        patched.setattr(restore_module, "load", silent)
        with pytest.raises(Unavailable):
            await fs.restore(directory, clear=lambda: cleared.append(set_aside(directory, FixedClock(1))))
    assert not cleared and (directory / "data.mdb").exists()


def test_a_second_name_of_the_store_goes_and_another_store_stays(scratch):
    """One that a rollback left that died before it had replaced the store; never what was really set aside."""
    directory, names = scratch / "cache", ("data.mdb", "journal.0")
    for path in (directory, scratch / "cache.aside-1", scratch / "cache.aside-2"):
        path.mkdir()
    for name in names:
        (directory / name).write_text("live")
        (scratch / "cache.aside-1" / name).hardlink_to(directory / name)
        (scratch / "cache.aside-2" / name).write_text("of before")
    drop_second_names(directory)
    assert sorted(path.name for path in scratch.iterdir()) == ["cache", "cache.aside-2"]
    assert all((directory / name).read_text() == "live" for name in names)
    drop_second_names(scratch / "none")


async def test_setting_aside_is_one_rename_and_what_follows_is_finished_later(fs, scratch):
    """Whoever dies in between leaves no store without its journal: the directory holds none, and refuses another."""
    await a_small_tree(fs)
    fs.publish()
    directory = scratch / "new"
    await fs.restore(directory)
    for name in ("journal.0", "journal.1"):
        (directory / name).write_bytes(b"synced")
    (directory / "spool").mkdir()
    (directory / "mount.lock").write_bytes(b"")
    state = {path.name: path.is_file() and path.read_bytes() for path in directory.iterdir()}
    del state["mount.lock"]

    def die() -> None:
        raise KeyboardInterrupt

    failpoints.arm("aside.store", die)
    with pytest.raises(KeyboardInterrupt):
        set_aside(directory, fs.clock)
    failpoints.disarm_all()
    assert not (directory / "data.mdb").exists() and (directory / "journal.0").read_bytes() == b"synced"
    with pytest.raises(CacheError, match="set-aside' goes on"):
        await fs.restore(directory)
    fs.clock.time_ns = lambda: 10**18
    aside = set_aside(directory, fs.clock)
    assert aside is not None and [path.name for path in directory.iterdir()] == ["mount.lock"]
    assert {path.name: path.is_file() and path.read_bytes() for path in aside.iterdir()} == state
    await fs.restore(directory)
    other = set_aside(directory, fs.clock)
    assert other not in (None, aside) and len(list(scratch.glob("new.aside-*"))) == 2


async def test_a_spool_that_holds_heads_is_refused(fs, scratch):
    fs.publish()
    (scratch / "new" / "spool").mkdir(parents=True)
    (scratch / "new" / "spool" / "head-x").write_bytes(b"x")
    with pytest.raises(CacheError, match="spool"):
        await fs.restore(scratch / "new")


async def test_the_wrong_key_opens_nothing(fs, scratch):
    fs.publish()
    with pytest.raises(KeyFileError):
        await fs.restore(scratch / "new", secret=b"x" * 32)


async def test_no_superblock_and_no_head_are_told_apart(fs, scratch):
    with pytest.raises(NotFound, match="head"):
        await fs.restore(scratch / "new")
    for store in fs.world.data:
        store.lose(SUPERBLOCK_KEY)
    with pytest.raises(NotFound, match="no file system"):
        await fs.restore(scratch / "new")
    with pytest.raises(QuorumUnavailable):
        await fs.restore(scratch / "new", down=(1, 2, 3, 4, 5, 6, 7, 8))


async def test_rotten_superblocks_are_passed_over_and_named(fs, scratch):
    await a_small_tree(fs)
    fs.publish()
    for store in fs.world.data[:7]:
        store.rot(SUPERBLOCK_KEY, lambda value: value[:-1] + bytes([value[-1] ^ 1]))
    report = await fs.restore(scratch / "new")
    assert sum("Superblock" in sentence for sentence in report.sentences) == 7


async def test_too_few_backends_to_be_sure_need_force(fs, scratch):
    await a_small_tree(fs)
    fs.publish()
    # Q is 6 of 8: a published head may be missed by two, so a third must answer.
    silent = (1, 2, 3, 4, 5, 6)
    with pytest.raises(QuorumUnavailable, match="--force"):
        await fs.restore(scratch / "new", candidates=fs.candidates(silent=silent))
    assert not (scratch / "new" / "data.mdb").exists()
    report = await fs.restore(scratch / "new", candidates=fs.candidates(silent=silent), force=True)
    assert (report.base, report.withstands) == (fs.sealed.ref, -1)


async def test_an_older_generation_is_restored_by_choice_only(fs, scratch):
    await a_small_tree(fs)
    fs.publish(generation=1)
    old = fs.sealed.ref
    fs.write("later", b"x")
    fs.commit()
    fs.publish(generation=2, kept=(KeptGeneration(old, 5, ()),))
    new = await fs.restore(scratch / "newest")
    assert new.base.generation == 2 and new.tally.files == 3
    with pytest.raises(NotFound, match="--generation names an older generation"):
        await fs.restore(scratch / "chosen", wanted=Wanted(head=old.digest.hex()))
    chosen = await fs.restore(scratch / "chosen", wanted=Wanted(generation=1))
    assert chosen.base == old and chosen.tally.files == 2


async def test_an_older_generation_is_restored_where_the_newest_cannot_be_read(fs, scratch, expect_log):
    """Of the newest only its head is read, and remembered: what is restored is no mount's before a takeover."""
    await a_small_tree(fs)
    fs.publish(generation=1)
    old, packs = fs.sealed.ref, {pack.ref.pack_id for pack in fs.head.snapshot}
    fs.write("later", b"x")
    fs.commit()
    fs.publish(generation=2, kept=(KeptGeneration(old, 5, ("mine",)),))
    for listed in (pack for pack in fs.head.snapshot if pack.ref.pack_id not in packs):
        for number, place in enumerate(listed.placement):
            fs.world.data[place - 1].lose(shard_key(fs.keys.fsid, listed.ref.owner_epoch, listed.ref.pack_id, number))
    expect_log("absent; it is read from others", logging.WARNING, count=6)
    with pytest.raises(DataLost):
        await fs.restore(scratch / "newest")
    with pytest.raises(NotFound, match="mine"):
        await fs.restore(scratch / "none", wanted=Wanted(snapshot="yours"))
    for name, wanted in (("number", Wanted(generation=1)), ("name", Wanted(snapshot="mine"))):
        report = await fs.restore(scratch / name, wanted=wanted)
        assert (report.base, report.newest, report.tally.files) == (old, fs.sealed.ref, 2)
        new = SmallFs(fs.world, scratch / name)
        base, newest = (local_head(new.store, key, fs.keys) for key in (BASE_KEY, RETURNS_KEY))
        assert base.sealed.ref == old and newest.sealed.ref == fs.sealed.ref and not newest.ours
        new.close()


async def test_split_heads_stop_and_list_both(fs, scratch):
    await a_small_tree(fs)
    fs.publish(generation=2)
    other = plant(fs.world, dataclasses.replace(fs.head, time_ns=fs.head.time_ns + 1))
    with pytest.raises(SplitHeads, match=r"generation 2 .*generation 2 "):
        await fs.restore(scratch / "new")
    report = await fs.restore(scratch / "new", wanted=Wanted(head=fs.sealed.ref.digest.hex()[:8]))
    assert report.base == fs.sealed.ref
    new = SmallFs(fs.world, scratch / "new")
    assert rejected_heads(new.store) == {other.ref}, "a takeover need not ask again"
    new.close()


async def test_metadata_that_do_not_come_leave_nothing_behind(fs, scratch):
    await a_small_tree(fs)
    fs.publish()
    pack = fs.head.snapshot[0]
    candidates = fs.candidates()

    def refuse(call, key):
        from qsfs.errors import BackendUnavailable
        from qsfs.format.shard import parse_shard_key

        if call == "get" and parse_shard_key(key) is not None:
            raise BackendUnavailable("backend x: no shards now")

    for place in pack.placement[:3]:
        fs.connections[place].gate = refuse
    with pytest.raises(Unavailable, match="metadata pack"):
        await fs.restore(scratch / "new", candidates=candidates, deadline_seconds=1.0)
    assert not (scratch / "new" / "data.mdb").exists()
    await fs.restore(scratch / "new")


async def test_any_m_shards_of_the_metadata_may_be_wrong(fs, scratch, expect_log):
    expect_log(r"read from others", logging.WARNING)
    await a_small_tree(fs)
    fs.publish()
    from qsfs.format.shard import shard_key

    pack = fs.head.snapshot[0]
    for number in (0, 3):
        key = shard_key(fs.keys.fsid, pack.ref.owner_epoch, pack.ref.pack_id, number)
        fs.world.data[pack.placement[number] - 1].rot(key, lambda value: value[:-1])
    await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    assert rows_of(new)[Table.ENTRIES] == rows_of(fs)[Table.ENTRIES]
    new.close()


@pytest.mark.parametrize("point", ["restore.rows", "restore.derived", "restore.complete"])
async def test_a_restore_that_crashes_is_repeated_never_half_used(fs, scratch, point):
    await a_small_tree(fs)
    fs.publish()

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    failpoints.arm(point, crash)
    with pytest.raises(Crash):
        await fs.restore(scratch / "new")
    failpoints.disarm(point)
    assert not (scratch / "new" / "data.mdb").exists()
    await fs.restore(scratch / "new")
    assert not (scratch / "new" / "restoring").exists()
    new = fs.restored(scratch / "new")
    assert rows_of(new)[Table.ENTRIES] == rows_of(fs)[Table.ENTRIES]
    new.close()


async def test_a_crash_after_the_rename_leaves_a_whole_store(fs, scratch):
    await a_small_tree(fs)
    fs.publish()

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    failpoints.arm("restore.renamed", crash)
    with pytest.raises(Crash):
        await fs.restore(scratch / "new")
    new = fs.restored(scratch / "new")
    assert rows_of(new)[Table.ENTRIES] == rows_of(fs)[Table.ENTRIES]
    new.close()


async def test_rows_that_are_no_file_system_are_refused(fs, scratch):
    fs.publish(rows=[(int(Table.ENTRIES), u64(1) + b"x", Entry(2, 3, 8).encode())])
    with pytest.raises(Corrupt, match="no root"):
        await fs.restore(scratch / "new")
    fs.publish(2, rows=[(int(Table.BLOCKS), b"x" * 16, b"y")])
    with pytest.raises(Corrupt, match="cannot be"):
        await fs.restore(scratch / "new")
    assert not (scratch / "new" / "data.mdb").exists()


async def test_another_layout_is_refused(fs, scratch):
    fs.publish(schema_version=99)
    with pytest.raises(FormatMismatch, match="schema 99"):
        await fs.restore(scratch / "new")


async def test_a_cache_too_small_for_the_metadata_says_so(fs, scratch):
    rows = [(int(Table.XATTRS), u64(i) + b"name", noise(1900, i)) for i in range(400)]
    fs.publish(rows=rows)
    (scratch / "new").mkdir()
    with pytest.raises(CacheError, match=r"larger \[cache\] size"):
        await restore(
            fs.candidates(),
            secret=SECRET,
            directory=scratch / "new",
            limits=dataclasses.replace(LIMITS, map_bytes=256 << 10),
            clock=fs.clock,
            timing=TIMING,
        )
    assert not (scratch / "new" / "data.mdb").exists()


async def test_a_restored_store_is_one_that_opens_and_works(fs, scratch):
    await a_small_tree(fs)
    fs.publish()
    await fs.restore(scratch / "new")
    store = Store(scratch / "new", LIMITS, fs.clock)
    store.check_identity(fs.keys.fsid)
    assert store.root_exists()
    store.close()
    new = fs.restored(scratch / "new")
    number = new.write("new file", noise(PAGE))
    assert number == 5
    new.commit()
    new.upload(number)
    new.close()
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("seed", range(25))
async def test_any_damage_gives_the_right_file_system_or_an_error(fs, scratch, expect_log, seed):
    expect_log(r"read from others|nothing is stored there until it shows its identity", optional=True)
    await a_small_tree(fs)
    fs.publish()
    source = random.Random(seed)
    share = source.choice((0.05, 0.2, 0.5))
    for store in [*fs.world.data, *fs.world.control]:
        for key in list(store.keys()):
            if source.random() < share:
                what = source.randrange(3)
                if what == 0:
                    store.lose(key)
                elif what == 1:
                    store.rot(key, lambda value: value[: source.randrange(len(value) + 1)])
                else:
                    at = source.randrange(1 << 20)
                    store.rot(
                        key,
                        lambda value, at=at: (
                            value[: at % len(value)] + b"\x5a" + value[at % len(value) + 1 :]
                            if value
                            else b""
                        ),
                    )
    try:
        await fs.restore(scratch / "new", force=True, deadline_seconds=1.0)
    except QsfsError:
        assert not (scratch / "new" / "data.mdb").exists()
        return
    new = fs.restored(scratch / "new")
    skip = frozenset({Table.PACKS, Table.COUNTERS})
    assert rows_of(new, without=skip) == rows_of(fs, without=skip)
    new.close()
