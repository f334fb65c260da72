"""Deleting dead packs: space comes back, and whatever a kept generation names stays."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest
import trio

from qsfs import failpoints
from qsfs.errors import BackendUnavailable
from qsfs.format.head import HeadRef, head_key, open_head
from qsfs.remote import chain, dead_packs, metadata, renewal
from qsfs.remote.flush import Flusher
from qsfs.remote.stored import StoredPack
from qsfs.store.schema import PAGE, PackRow, Table, u64
from tests.remote.flush_machine import Crash, DirectReader, FlushMachine, crash, newest_head, read_body, restore
from tests.remote.flushing import flushing, pack_rows, stored_packs, until
from tests.remote.harness import World
from tests.remote.test_snapshot_pins import create

RETENTION = 100.0
POINTS = (
    "flush.cut.sealed",
    "flush.packs.uploaded",
    "test.head.stored",
    "test.head.at-one",
    "flush.head.sent",
    "flush.recorded",
    "flush.precopy.written",
    "flush.precopy.recorded",
)


def generations(world: World) -> dict[HeadRef, dict[str, bytes]]:
    """The newest generation and all that it keeps, each read whole; nothing that they need is missing."""
    newest = newest_head(world)
    assert newest is not None
    ref, head = newest
    found = {ref: restore(world, head).files}
    for kept in head.kept:
        key = head_key(world.keys.fsid, kept.head)
        value = next((v for store in world.control if (v := store.peek(key)) is not None), None)
        assert value is not None
        found[kept.head] = restore(world, open_head(key, value, world.keys)).files
    return found


def renew_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has heads kept short at once, in ranges of a few rows."""
    for name, value in (("LEAST_DELTAS", 4), ("MERGED", 3), ("_NONE_OUTWEIGHS", 1), ("_LEAST_SNAPSHOT", 1)):
        monkeypatch.setattr(chain, name, value)
    for module in (metadata, renewal):
        monkeypatch.setattr(module, "range_bytes", lambda sealer: 400)


async def rewrite(machine: FlushMachine, flusher: Flusher, number: int, byte: int, pages: int = 40) -> None:
    """A new version of a whole file, published."""
    machine.write(number, 0, bytes([byte]) * PAGE * pages)
    await flusher.sync()


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 60))])
async def test_after_any_history_all_kept_generations_can_be_read_and_the_rest_is_gone(
    world: World, machine: FlushMachine, clock, seed: int, monkeypatch: pytest.MonkeyPatch
):
    """Rewrites, truncations, removals, pins, outages, crashes: each kept generation is what it was, all the time.

    With odd seeds deltas are merged, and ranges of the metadata read anew, after nearly every generation.
    """
    if seed % 2:
        renew_often(monkeypatch)
    source = random.Random(seed)
    content: dict[str, bytes] = {}
    numbers: dict[str, int] = {}
    seen: dict[int, dict[str, bytes]] = {}
    recorded: set[bytes] = set()

    def check() -> None:
        # Only what is committed: the row of a pack that was merged lately goes with a crash, and its shards are left.
        rows = machine.store.layers.view.scan(Table.PACKS, b"", None)
        recorded.update(PackRow.decode(bytes(row)).pack_id for _, row in rows)
        for ref, files in generations(world).items():
            assert seen.setdefault(ref.generation, files) == files, f"generation {ref.generation} has changed"

    async def step(flusher: Flusher, mount: int, number: int) -> None:
        name = source.choice("abc")
        if name not in numbers:
            numbers[name] = machine.create(name)
            content[name] = b""
        what = source.randrange(4)
        if what == 0:
            machine.truncate(numbers[name], 0)
            content[name] = b""
        elif what == 1 and content[name]:
            first = source.randrange(len(content[name]) // PAGE)
            data = source.randbytes(PAGE)
            machine.write(numbers[name], first, data)
            content[name] = content[name][: first * PAGE] + data + content[name][(first + 1) * PAGE :]
        else:
            machine.truncate(numbers[name], 0)
            content[name] = bytes([mount * 16 + number + 1]) * PAGE * source.randrange(1, 60)
            machine.write(numbers[name], 0, content[name])
        await machine.committer.commit()
        if source.random() < 0.3:
            failpoints.arm(source.choice(POINTS), crash)
        await flusher.sync()
        failpoints.disarm_all()
        assert restore(world).files == content
        check()
        if source.random() < 0.4:
            await create(flusher, f"{mount}-{number}")
        elif flusher.pinning.snapshots and source.random() < 0.5:
            await flusher.pinning.unpin([source.choice(flusher.pinning.snapshots).name])
        await trio.sleep(source.choice((0, 5, 2 * RETENTION)))
        check()

    for mount in range(4):
        with contextlib.suppress(Crash):
            try:
                async with flushing(machine, quiet_seconds=0.5, retention_seconds=RETENTION) as flusher:
                    for backend in machine.backends:
                        backend.down = False
                    for backend in source.sample(machine.backends, source.randrange(2)):
                        backend.down = True
                    for number in range(4):
                        await step(flusher, mount, number)
            except BaseExceptionGroup as group:
                if not group.split(Crash)[0]:
                    raise
            finally:
                failpoints.disarm_all()
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        check()
        for backend in machine.backends:
            backend.down = False
        await flusher.sync()
        await flusher.pinning.unpin([snapshot.name for snapshot in flusher.pinning.snapshots])
        number = 0
        # What is rewritten now dies now, and waits as long as all others.
        while number < 10 or any(row.kind == 1 and not row.live for row in pack_rows(machine).values()):
            assert number < 40
            machine.create(f"last {number}")
            await flusher.sync()
            check()
            await trio.sleep(RETENTION)
            number += 1
        left = restore(world).files
        assert {n: c for n, c in left.items() if c} == {n: c for n, c in content.items() if c}
        rows = pack_rows(machine).values()
        assert {row.pack_id for row in rows} >= stored_packs(world) & recorded
        assert flusher.status()["dead"]["deleted_packs"] > 0


async def test_rewriting_a_file_for_ever_takes_bounded_space(world: World, machine: FlushMachine, clock):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        sizes = []
        for byte in range(40):
            await rewrite(machine, flusher, number, byte)
            await trio.sleep(RETENTION / 2)
            listed = {pack.ref.pack_id for pack in flusher.generations.chain.all_packs()}
            sizes.append(len(stored_packs(world) - listed))
        assert max(sizes[20:]) <= max(sizes[:20])
        assert restore(world).files == {"a": bytes([39]) * PAGE * 40}


async def test_metadata_that_a_new_snapshot_replaced_goes(world: World, machine: FlushMachine, clock):
    async with flushing(machine, retention_seconds=RETENTION, snapshot_ratio=0.01) as flusher:
        number = machine.create("a")
        for byte in range(40):
            await rewrite(machine, flusher, number, byte, pages=1)
            await trio.sleep(RETENTION / 2)
        rows = [row for row in pack_rows(machine).values() if row.kind == 2]
        listed = {pack.ref.pack_id for pack in flusher.generations.chain.all_packs()}
        assert listed <= {row.pack_id for row in rows}
        assert flusher.status()["dead"]["packs"] < 40
        generations(world)


async def test_a_pinned_generation_stays_whole_and_goes_once_it_is_not_pinned_any_more(
    world: World, machine: FlushMachine, clock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        await rewrite(machine, flusher, number, 1)
        needed = {row.pack_id for row in pack_rows(machine).values()}
        first = (await create(flusher, "keep")).head
        for byte in range(2, 12):
            await rewrite(machine, flusher, number, byte)
            await trio.sleep(RETENTION)
        assert needed <= stored_packs(world)
        assert generations(world)[first] == {"a": bytes([1]) * PAGE * 40}
        deleted = flusher.status()["dead"]["deleted_packs"]
        assert deleted > 0, "what died between the pin and now is not kept by it"
        await flusher.pinning.unpin(["keep"])
        for byte in range(12, 22):
            await rewrite(machine, flusher, number, byte)
            await trio.sleep(RETENTION)
        assert first not in generations(world)
        data = {row.pack_id for row in pack_rows(machine).values()}
        assert not (needed - data) & stored_packs(world) and needed - data


async def test_a_pin_from_before_a_restart_still_keeps_what_it_names(
    world: World, machine: FlushMachine, clock
):
    """The new mount never held that head: it reads on the backends what it names, and until then nothing goes."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        await rewrite(machine, flusher, number, 1)
        first = (await create(flusher, "keep")).head
        await rewrite(machine, flusher, number, 2)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        for byte in range(3, 13):
            await rewrite(machine, flusher, number, byte)
            await trio.sleep(RETENTION)
        assert generations(world)[first] == {"a": bytes([1]) * PAGE * 40}
        assert flusher.status()["dead"]["deleted_packs"] > 0


async def test_nothing_goes_before_its_time(world: World, machine: FlushMachine, clock):
    """A reader of the generation before has the whole retention time to finish or to move on."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        await rewrite(machine, flusher, number, 1)
        old = {row.pack_id for row in pack_rows(machine).values()}
        began = trio.current_time()
        for byte in range(2, 8):
            await rewrite(machine, flusher, number, byte)
        while trio.current_time() - began < RETENTION:
            machine.create(str(trio.current_time()))
            await flusher.sync()
            assert old <= stored_packs(world)
            await trio.sleep(RETENTION / 10)
        for _ in range(3):
            machine.create(str(trio.current_time()))
            await flusher.sync()
            await trio.sleep(RETENTION / 5)
        assert not old <= stored_packs(world)


async def test_without_another_head_nothing_goes_however_long_it_takes(
    world: World, machine: FlushMachine, clock
):
    """A mount that was taken over meanwhile publishes none, so it deletes nothing."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        for byte in range(1, 6):
            await rewrite(machine, flusher, number, byte)
        await flusher._upkeep.dead.work()
        stored = stored_packs(world)
        machine.publisher.reach = 1
        machine.create("never published")
        await trio.sleep(20 * RETENTION)
        assert stored <= stored_packs(world)


async def test_a_count_of_live_bytes_that_is_wrong_costs_space_and_no_data(
    world: World, machine: FlushMachine, clock, expect_log
):
    expect_log(r"nothing lives in it, but inode \d+ has pages of it; it stays", count=1)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        await rewrite(machine, flusher, number, 1)
        ((pack, row),) = [(n, r) for n, r in pack_rows(machine).items() if r.kind == 1 and r.live][:1]
        machine.store.layers.put(Table.PACKS, u64(pack), dataclasses.replace(row, live=0).encode())
        machine.store.extents.emptied.add(pack)
        for index in range(5):
            machine.create(str(index))
            await flusher.sync()
            await trio.sleep(RETENTION)
        assert row.pack_id in stored_packs(world)
        assert machine.content(number) == bytes([1]) * PAGE * 40


def refuse_deletes(machine: FlushMachine, place: int) -> list[bytes]:
    """Has the backend with this number answer everything but DEL; returns what it is asked to delete."""
    asked: list[bytes] = []

    def gate(call: str, key: bytes) -> None:
        if call == "delete":
            asked.append(key)
            raise BackendUnavailable("no answer")

    machine.backends[place - 1].gate = gate
    return asked


async def rewrite_once_and_let_it_die(machine: FlushMachine, flusher: Flusher) -> tuple[set[bytes], int]:
    """The data packs of a file's first version, due for deletion, and the number of a backend that refuses that."""
    number = machine.create("a")
    await rewrite(machine, flusher, number, 1)
    old = [row for row in pack_rows(machine).values() if row.kind == 1]
    place = old[0].placement[0]
    refuse_deletes(machine, place)
    for byte in range(2, 6):
        await rewrite(machine, flusher, number, byte)
    for index in range(4):
        machine.create(str(index))
        await flusher.sync()
        await trio.sleep(RETENTION)
    return {row.pack_id for row in old if place in row.placement}, place


async def test_a_damaged_row_costs_space_and_no_data(world: World, machine: FlushMachine, clock, expect_log):
    """What its row calls dead and the pack does not confirm stays, and nothing else waits for it."""
    expect_log(r"does not fit the pack .*; it stays", count=1)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        await rewrite(machine, flusher, number, 1)
        pack, row = next((n, r) for n, r in pack_rows(machine).items() if r.kind == 1 and r.live)
        damaged = dataclasses.replace(row, live=0, digest=bytes(32))
        machine.store.layers.put(Table.PACKS, u64(pack), damaged.encode())
        machine.store.extents.emptied.add(pack)
        other = machine.create("b")
        for byte in range(10):
            await rewrite(machine, flusher, other, byte)
            await trio.sleep(RETENTION)
        assert row.pack_id in stored_packs(world)
        assert flusher.status()["dead"]["deleted_packs"] > 0


async def test_a_backend_that_does_not_answer_is_asked_again_and_nothing_is_taken_for_done(
    world: World, machine: FlushMachine, clock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        left, place = await rewrite_once_and_let_it_die(machine, flusher)
        assert left <= {row.pack_id for row in pack_rows(machine).values()}
        assert flusher.status()["dead"]["unanswered"] == [machine.backends[place - 1].name]
        asked = refuse_deletes(machine, place)
        for backend in machine.backends:
            backend.calls.clear()
        await trio.sleep(3 * dead_packs.AGAIN_SECONDS)
        assert len(asked) <= 4 * len(left), "asked about once a minute"
        others = [b for n, b in enumerate(machine.backends, start=1) if n != place]
        assert not [call for backend in others for call, _ in backend.calls if call == "delete"]
        machine.backends[place - 1].gate = lambda call, key: None
        await until(lambda: not left & {row.pack_id for row in pack_rows(machine).values()})
        assert not left & stored_packs(world)
        assert flusher.status()["dead"]["unanswered"] == []


async def test_a_crash_between_two_backends_is_made_good_after_the_restart(
    world: World, machine: FlushMachine, clock
):
    """The row goes last: it is what tells that there is something left to delete."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        left, place = await rewrite_once_and_let_it_die(machine, flusher)
    assert left <= stored_packs(world)
    machine.backends[place - 1].gate = lambda call, key: None
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        for index in range(6):
            machine.create(f"again {index}")
            await flusher.sync()
            await trio.sleep(RETENTION)
        assert not left & stored_packs(world)
        assert not left & {row.pack_id for row in pack_rows(machine).values()}


async def test_the_packs_of_an_owner_above_ours_are_left_alone(world: World, machine: FlushMachine, clock):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        await rewrite(machine, flusher, number, 1)
        pack, row = next((n, r) for n, r in pack_rows(machine).items() if r.kind == 1)
        above = dataclasses.replace(row, owner_epoch=99)
        machine.store.layers.put(Table.PACKS, u64(pack), above.encode())
        asked: list[bytes] = []
        for backend in machine.backends:
            backend.gate = lambda call, key: asked.append(key) if call == "delete" else None
        for byte in range(2, 8):
            await rewrite(machine, flusher, number, byte)
            await trio.sleep(RETENTION)
        foreign = StoredPack.of_row(above, world.code)
        assert not {foreign.key(world.keys.fsid, n) for n in range(world.code.n)} & set(asked)


async def test_an_index_of_any_length_is_read_from_the_end_of_its_pack(
    world: World, machine: FlushMachine, clock
):
    async with flushing(machine) as flusher:
        for name in range(60):
            machine.write(machine.create(str(name)), 0, random.Random(name).randbytes(PAGE))
        await flusher.sync()
        reader = DirectReader(world)
        for row in pack_rows(machine).values():
            if row.kind == 1:
                pack = StoredPack.of_row(row, world.code)
                entries = await dead_packs.read_index(reader, pack, world.keys)
                assert sum(entry.pages for entry in entries) * PAGE == row.live
                assert read_body(world, pack.ref)


