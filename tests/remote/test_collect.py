"""Collecting what no head names: all of it goes in the end, and never anything that a head names."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio

from qsfs import failpoints
from qsfs.errors import BackendUnavailable
from qsfs.format.extent import PackKind, PackRef
from qsfs.format.head import head_key, open_head
from qsfs.format.shard import shard_key
from qsfs.remote import collect
from qsfs.remote.collect import AbandonedCollector
from qsfs.store.schema import PAGE, PackRow, Table
from tests.remote.flush_machine import Crash, FlushMachine, crash, newest_head, restore
from tests.remote.flushing import flushing, stored_packs, until
from tests.remote.harness import World

POINTS = (
    "flush.cut.pack",
    "flush.cut.sealed",
    "flush.packs.uploaded",
    "test.head.stored",
    "test.head.at-one",
    "flush.head.sent",
    "flush.recorded",
    "flush.precopy.written",
)


def restore_kept(world: World) -> dict[str, bytes]:
    """Reads the newest generation, which is returned, and all that it keeps, whole."""
    newest = newest_head(world)
    assert newest is not None
    _, head = newest
    for kept in head.kept:
        key = head_key(world.keys.fsid, kept.head)
        value = next((v for store in world.control if (v := store.peek(key)) is not None), None)
        assert value is not None
        restore(world, open_head(key, value, world.keys))
    return restore(world).files


def pack(seed: int = 0) -> PackRef:
    ids = random.Random(seed)
    return PackRef(ids.randbytes(16), bytes(32), PackKind.DATA, 1, 1, 8, 4)


def plant(world: World, ref: PackRef) -> None:
    for number, store in enumerate(world.data[:4]):
        store.put(shard_key(world.keys.fsid, ref.owner_epoch, ref.pack_id, number), b"shard")


@pytest.mark.parametrize("seed", range(8))
async def test_after_any_crashes_and_outages_only_garbage_is_gone(
    world: World, machine: FlushMachine, clock, seed: int
):
    """Every newest head restores whole all the time, and what was abandoned goes once all backends are back."""
    source = random.Random(seed)
    content: dict[str, bytes] = {}
    numbers: dict[str, int] = {}
    for mount in range(4):
        with contextlib.suppress(Crash):
            try:
                async with flushing(machine, quiet_seconds=0.5) as flusher:
                    for backend in machine.backends:
                        backend.down = False
                    for backend in source.sample(machine.backends, source.randrange(2)):
                        backend.down = True
                    for step in range(3):
                        name = source.choice("abc")
                        if name not in numbers:
                            numbers[name] = machine.create(name)
                        content[name] = bytes([mount * 16 + step + 1]) * PAGE * source.randrange(1, 60)
                        machine.store.truncate_data(machine.store.inode(numbers[name]), 0, 0)
                        machine.write(numbers[name], 0, content[name])
                        await machine.committer.commit()
                        if source.random() < 0.5:
                            failpoints.arm(source.choice(POINTS), crash)
                        await flusher.sync()
                        failpoints.disarm_all()
                        assert restore_kept(world) == content
                        await trio.sleep(source.choice((0, 5)))
            except BaseExceptionGroup as group:
                if not group.split(Crash)[0]:
                    raise
            finally:
                failpoints.disarm_all()
        restore_kept(world)
    async with flushing(machine) as flusher:
        for backend in machine.backends:
            backend.down = False
        machine.create("last")
        await flusher.sync()
        await trio.sleep(40)
        machine.create("very last")
        await flusher.sync()
        await until(lambda: machine.spool.abandoned == [])
        left = restore_kept(world)
        assert {n: c for n, c in left.items() if c} == {n: c for n, c in content.items() if c}
        rows = machine.store.scan(Table.PACKS, b"", None)
        named = {PackRow.decode(row).pack_id for _, row in rows}
        assert named <= stored_packs(world)


async def test_the_pack_table_is_read_in_short_transactions(
    world: World, machine: FlushMachine, clock, monkeypatch
):
    """One long one would keep LMDB from reusing anything meanwhile."""
    monkeypatch.setattr(collect, "_STEP_SECONDS", -1.0)
    async with flushing(machine) as flusher:
        for name in "abcd":
            machine.write(machine.create(name), 0, name.encode() * PAGE)
            await flusher.sync()
        rows = machine.store.scan(Table.PACKS, b"", None)
        ids = {PackRow.decode(row).pack_id for _, row in rows}
        assert len(ids) > 4
        collector = AbandonedCollector(machine.context)
        assert await collector._in_tables(ids | {b"?" * 16}) == ids
        _, resume = collector._some_in_tables(ids, b"")
        assert resume is not None


async def test_backends_that_are_down_are_left_alone_and_asked_once_they_are_back(
    world: World, machine: FlushMachine, clock
):
    """And those that have answered are not asked again."""
    async with machine.mounted():
        ref = pack()
        plant(world, ref)
        machine.spool.add_abandoned([ref])
        members = {member.number: member for member in machine.fleet_members}
        silent, quiet = machine.backends[0], members[1]
        tried: list[str] = []

        def refuse(call: str, key: bytes) -> None:
            tried.append(call)
            raise BackendUnavailable("connection refused")

        silent.gate = refuse
        for _ in range(3):
            await quiet.probe()
        tried.clear()
        for backend in machine.backends:
            backend.calls.clear()
        collector = AbandonedCollector(machine.context)
        known = frozenset({ref.pack_id})
        assert not await collector.collect(known, frozenset(), machine.epoch)
        assert [call for backend in machine.backends for call, _ in backend.calls if call == "delete"]
        assert tried == []
        deleted = collector.deleted
        for backend in machine.backends:
            backend.calls.clear()
        assert not await collector.collect(known, frozenset(), machine.epoch), "too early to try again"
        await trio.sleep(collect._AGAIN_SECONDS)
        silent.gate = lambda call, key: None
        await quiet.probe()
        assert await collector.collect(known, frozenset(), machine.epoch)
        asked = [any(call == "delete" for call, _ in backend.calls) for backend in machine.backends]
        assert asked == [True] + [False] * 5
        assert collector.deleted > deleted and machine.spool.abandoned == []
        assert ref.pack_id not in stored_packs(world)


async def test_what_a_head_that_may_have_been_sent_lists_is_kept(machine: FlushMachine, clock):
    """Whatever the list of abandoned packs says."""
    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        machine.publisher.reach = 1
        machine.create("a")
        nursery.start_soon(flusher.sync)
        await until(lambda: machine.publisher.attempts > 3)
        sealed = max(machine.spool.heads.values(), key=lambda sealed: sealed.ref)
        head = open_head(sealed.key, sealed.value, machine.world.keys)
        listed = {pack.ref.pack_id for packs in (head.snapshot, *head.deltas) for pack in packs}
        base = {pack.ref.pack_id for pack in flusher.generations.chain.all_packs()}
        assert listed - base
        assert listed | base <= flusher._named()
        machine.publisher.reach = 6
