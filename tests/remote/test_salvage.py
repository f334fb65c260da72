"""Backends that lose what they had acknowledged: what the cache still has is neither evicted nor given up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from qsfs.format.extent import PackKind
from qsfs.format.shard import parse_shard_key
from qsfs.remote.chain import listed_ids
from qsfs.remote.flush import Flusher
from qsfs.remote.salvage import Salvage
from qsfs.remote.second_look import SecondLook
from qsfs.store.eviction import Evictor
from qsfs.store.schema import PAGE, PackRow, PackState, Table, u64
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.flushing import flushing, pack_rows, page, until
from tests.remote.harness import World


def lose(world: World, row: PackRow, leave: int) -> None:
    """All but `leave` shards of a pack go, with what their backends had not written to their disks."""
    for place in row.placement[: len(row.placement) - leave]:
        store = world.data[place - 1]
        for key in list(store.keys()):
            named = parse_shard_key(key)
            if named is not None and named.pack_id == row.pack_id:
                store.lose(key)


async def written(flusher: Flusher, machine: FlushMachine) -> tuple[int, PackRow]:
    """A published file "a" of 16 pages, and the pack that it lies in."""
    machine.write(machine.create("a"), 0, page("x") * 16)
    await flusher.sync()
    return next((number, row) for number, row in pack_rows(machine).items() if row.live == 16 * PAGE)


@pytest.mark.parametrize("leave", [0, 1])
async def test_what_is_local_of_a_lost_pack_is_uploaded_anew(
    world: World, machine: FlushMachine, clock, expect_log, leave: int
):
    """Fewer shards are left than it takes; the next generation has the data again, in full packs."""
    expect_log("gone|lacks shards|fewer shards than it needs|acknowledged", optional=True)
    async with flushing(machine) as flusher:
        number, row = await written(flusher, machine)
        lose(world, row, leave)
        await until(lambda: number not in pack_rows(machine) or not pack_rows(machine)[number].live)
        await flusher.sync()
        await until(lambda: not machine.context.ledger.incomplete)
        assert restore(world).files["a"] == page("x") * 16


async def test_a_page_whose_local_bytes_are_damaged_is_not_uploaded(
    world: World, machine: FlushMachine, clock, expect_log
):
    """It alone is lost: the others are uploaded anew, and generations go on."""
    expect_log("gone|lacks shards|fewer shards than it needs|acknowledged|fail their checksum", optional=True)
    async with flushing(machine) as flusher:
        number, row = await written(flusher, machine)
        await machine.committer.commit()
        damage(machine, next(iter(machine.store.scan(Table.VALUES, b"", None)))[0])
        lose(world, row, 1)
        await until(lambda: flusher._upkeep.salvage.salvaged_pages)
        await until(lambda: pack_rows(machine)[number].live == PAGE)
        before = flusher.status()["generation"]
        machine.create("b")
        await flusher.sync()
        assert flusher.status()["generation"] > before


@pytest.mark.parametrize("state", [PackState.LOOKED, PackState.LOOKED | PackState.FULL])
async def test_no_look_and_no_eviction_takes_too_few_shards_for_enough(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log, state: PackState
):
    """However short the cache is of room, and whatever row an older version has left."""
    expect_log("gone|lacks shards|fewer shards than it needs|acknowledged|short of room", optional=True)
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        number, row = await written(flusher, machine)
        monkeypatch.setattr(flusher._upkeep._completer, "complete_packs", nothing)
        lose(world, row, 1)
        monkeypatch.setattr(Flusher, "short_of_room", property(lambda self: True))
        await trio.sleep(600)
        found = pack_rows(machine)[number]
        assert found.placement.count(-1) == 3
        assert not found.state & PackState.LOOKED
        few = replace(found, state=int(state & ~PackState.FULL))
        machine.store.layers.put(Table.PACKS, u64(number), few.encode())
        await machine.committer.commit()
        evictor = Evictor(machine.store)
        for _ in range(3):
            done = evictor.step(1000, 1000, recent_too=True, written_will_do=True, start_too=True)
            assert not done.bytes


async def test_what_was_recorded_and_is_not_committed_is_uploaded_anew_too(machine: FlushMachine, clock, expect_log):
    """Backends may lose a pack as soon as they have it."""
    expect_log("fewer shards than it needs")
    async with machine.mounted():
        machine.write(machine.create("a"), 0, page("x") * 16)
        await machine.committer.commit()
        await machine.precopy()
        number = next(number for number, row in pack_rows(machine).items() if row.kind == PackKind.DATA)
        assert machine.store.dirty
        salvage = Salvage(machine.context)
        salvage.lost.add(number)
        with machine.store.extents.recording(number):
            await salvage.work()
            assert not salvage.salvaged_pages, "more of it may be recorded yet"
        await salvage.work()
        assert salvage.salvaged_pages == 16


async def test_what_enough_backends_have_is_enough_for_who_is_short_of_room(machine: FlushMachine, clock):
    """And is looked at again until all of them have answered: only then a backend may be retired for it."""
    async with machine.mounted():
        machine.write(machine.create("a"), 0, page("x") * 16)
        await machine.committer.commit()
        await machine.precopy()
        number, row = next((n, row) for n, row in pack_rows(machine).items() if row.kind == PackKind.DATA)
        ledger, look = machine.context.ledger, SecondLook(machine.context)
        away = machine.backends[row.placement[0] - 1]
        away.down = True
        await trio.sleep(machine.look_seconds + 1)
        await look.look(100, written_too=False)
        assert not pack_rows(machine)[number].state & PackState.LOOKED
        await trio.sleep(60)
        await look.look(100, written_too=True)
        found = pack_rows(machine)[number]
        assert found.state & PackState.LOOKED and not found.looked_at
        assert number in ledger.looks
        await machine.committer.commit()
        await trio.sleep(60)
        await look.look(100, written_too=True)
        assert not machine.store.dirty, "what is known is not written again"
        away.down = False
        await trio.sleep(60)
        await look.look(100, written_too=True)
        assert pack_rows(machine)[number].looked_at
        assert number not in ledger.looks


async def test_what_only_a_lost_metadata_pack_held_is_written_anew(
    world: World, machine: FlushMachine, clock, expect_log
):
    """The snapshot's and a delta's, also where nothing is written any more: a restore elsewhere has all again."""
    expect_log("gone|lacks shards|fewer shards than it needs|acknowledged", optional=True)
    async with flushing(machine, cut_seconds=30) as flusher:
        for name in "abc":
            machine.write(machine.create(name), 0, page(name))
            await flusher.sync()
        chain = flusher.generations.chain
        assert chain.deltas
        for pack in chain.all_packs():
            lose(world, pack_rows(machine)[pack.number], 1)
        lost = {pack.ref.pack_id for pack in chain.all_packs()}
        await until(lambda: lost.isdisjoint(listed_ids(flusher.generations.base.head)))
        await until(lambda: not machine.context.ledger.incomplete)
        assert restore(world).files == {name: page(name) for name in "abc"}
        base = flusher.generations.base
        await trio.sleep(3000)
        assert flusher.generations.base.head.generation <= base.head.generation + 1, "then it is at rest"


def damage(machine: FlushMachine, block: bytes) -> None:
    """Changes a bit of the first page of a block in the local store."""
    environment = machine.store.environment
    values = environment.databases[Table.VALUES]
    with environment.write() as txn:
        value = bytearray(txn.get(block, db=values))
        value[0] ^= 1
        txn.put(block, bytes(value), db=values)
    machine.store.layers.renew_view()


async def nothing(most: int) -> int:
    await trio.lowlevel.checkpoint()
    return 0
