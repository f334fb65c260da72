"""Packs that are not full: nobody waits while they are looked through, and no shard is sent twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qsfs.remote import complete
from qsfs.remote.complete import Completer
from qsfs.store.packs import pack_row
from qsfs.store.schema import PAGE, PackRow, Table, u64
from tests.remote.flush_machine import DirectReader, FlushMachine
from tests.remote.flushing import VirtualClock, flushing, pack_rows, page, until
from tests.remote.harness import World, make_world


def incomplete(machine: FlushMachine, numbers: range, placement: tuple[int, ...]) -> None:
    """Packs that lie at `placement`, recorded with the open group."""
    example = next(iter(pack_rows(machine).values()))
    for number in numbers:
        row = replace(
            example, pack_id=number.to_bytes(16, "big"), state=0, live=4096, unnamed_since_ns=0, placement=placement
        )
        machine.store.layers.put(Table.PACKS, u64(number), row.encode())
        machine.context.ledger.note(number, row)


async def test_packs_that_cannot_become_full_hold_nobody_up(
    world: World, machine: FlushMachine, clock, monkeypatch: pytest.MonkeyPatch
):
    """While a backend is away each pack lacks a shard; one that can be completed comes to its turn nevertheless."""
    async with machine.mounted():
        machine.write(machine.create("a"), 0, page("x"))
        await machine.committer.commit()
        await machine.precopy()
        members = [member.number for member in machine.fleet_members]
        incomplete(machine, range(1000, 2000), (*members, -1))
        incomplete(machine, range(2000, 2001), (*members[1:], -1))
        looked: list[int] = []
        tried: list[int] = []

        def look(store: object, number: int) -> PackRow | None:
            looked.append(number)
            return pack_row(machine.store, number)

        async def one(number: int) -> bool:
            tried.append(number)
            await trio.lowlevel.checkpoint()
            return True

        monkeypatch.setattr(complete, "pack_row", look)
        completer = Completer(machine.context, DirectReader(world))
        monkeypatch.setattr(completer, "complete", one)
        rounds = 0
        while not tried:
            before = len(looked)
            done = await completer.complete_packs(2)
            assert len(looked) - before <= 128
            assert done == len(tried)
            rounds += 1
        assert tried == [2000]
        assert rounds <= 9, "each is looked at once in a round"


async def test_a_pack_that_is_being_recorded_is_not_taken_for_dead(machine: FlushMachine, clock):
    """Nothing lives in it between two steps; it would be neither completed nor looked at any more."""
    async with flushing(machine) as flusher:
        number = machine.create("a")
        machine.write(number, 0, page("x") * 16)
        await flusher.sync()
        pack = next(pack for pack, row in pack_rows(machine).items() if row.live == 16 * PAGE)
        dead, extents = flusher._upkeep.dead, machine.store.extents
        before = dead.report()["packs"]
        with extents.recording(pack):
            extents.take(number, 0, 16)
            dead.take_over({pack}, [])
            assert dead.report()["packs"] == before
        await machine.committer.commit()
        await until(lambda: dead.report()["packs"] == before + 1)


async def test_what_is_still_on_its_way_is_not_sent_again(tmp_path: Path, clock):
    """A pack is recorded once it is written; its last shards may take longer."""
    world = await make_world(4, k=2, m=2)
    machine = FlushMachine(world, tmp_path / "cache")
    machine.clock = VirtualClock(clock)
    async with flushing(machine, quiet_seconds=1) as flusher:
        slow = machine.backends[3]
        slow.delay = lambda call: 15.0 if call == "set" else 0.0
        slow.calls.clear()
        number = machine.create("a")
        for part in range(4):
            machine.write(number, part * 100, page("x") * 16)
        await flusher.sync()
        assert machine.context.arriving
        await trio.sleep(200)
        sets = Counter(key for call, key in slow.calls if call == "set")
        assert sets and max(sets.values()) == 1
        assert not machine.context.arriving
        assert not machine.context.ledger.incomplete


async def test_what_a_completion_stores_counts_however_long_it_takes(
    tmp_path: Path, clock, monkeypatch: pytest.MonkeyPatch
):
    """Where the rate is low, or the backend slow, it would else be sent again and again."""
    monkeypatch.setattr(complete, "PACK_SECONDS", 10.0)
    world = await make_world(4, k=2, m=2)
    machine = FlushMachine(world, tmp_path / "cache")
    machine.clock = VirtualClock(clock)
    async with flushing(machine, quiet_seconds=1) as flusher:
        away = machine.backends[3]
        away.down = True
        machine.write(machine.create("a"), 0, page("x"))
        await flusher.sync()
        await until(lambda: not machine.context.arriving and machine.context.ledger.incomplete)
        lacking = set(machine.context.ledger.incomplete)
        away.calls.clear()
        away.delay = lambda call: 30.0 if call == "set" else 0.0
        away.down = False
        await until(lambda: not lacking & machine.context.ledger.incomplete.keys())
        sets = Counter(key for call, key in away.calls if call == "set")
        assert max(sets.values()) == 1
        assert all(-1 not in pack_rows(machine)[number].placement for number in lacking)
