"""Packs that are not full: completed as fast as backends answer, with nobody held up and no shard sent twice."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qsfs.backend.limits import RateLimit, with_limits
from qsfs.errors import Unavailable
from qsfs.format.extent import PackKind
from qsfs.format.shard import parse_shard_key
from qsfs.remote import complete
from qsfs.remote.complete import Completer
from qsfs.remote.context import PACKS_IN_FLIGHT
from qsfs.remote.flush import Flusher
from qsfs.remote.stored import StoredPack
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
            await trio.lowlevel.checkpoint()
            tried.append(number)
            return True

        monkeypatch.setattr(complete, "pack_row", look)
        completer = Completer(machine.context, DirectReader(world))
        monkeypatch.setattr(completer, "complete", one)
        rounds = 0
        while not tried:
            before = len(looked)
            async with trio.open_nursery() as nursery:
                begun = await completer.complete_packs(nursery)
            assert len(set(looked[before:])) <= 128
            assert begun == len(tried)
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


async def many_lack(machine: FlushMachine, flusher: Flusher, files: int) -> set[int]:
    """Packs that lack a shard each, since the last backend is away: their numbers."""
    machine.backends[3].down = True
    for number in range(files):
        machine.write(machine.create(f"f{number}"), 0, random.Random(number).randbytes(50 * 16 * PAGE))
        await flusher.sync()
    return set(machine.context.ledger.incomplete)


async def four(tmp_path: Path, clock: MockClock) -> FlushMachine:
    """A machine of which each pack has a shard on every backend."""
    machine = FlushMachine(await make_world(4, k=2, m=2), tmp_path / "cache")
    machine.clock = VirtualClock(clock)
    return machine


class LateReader(DirectReader):
    """Reads as slowly as one over a network; `stuck` says for which packs it never does."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.stuck: Callable[[StoredPack], bool] = lambda pack: False
        self.fails = False
        self.reads: list[float] = []
        self.now = self.most = 0

    async def shards(self, pack: StoredPack, wanted: Collection[int]) -> dict[int, memoryview]:
        self.reads.append(trio.current_time())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await trio.sleep(math.inf if self.stuck(pack) else 0.1)
            if self.fails:
                raise Unavailable("no answer")
            return await super().shards(pack, wanted)
        finally:
            self.now -= 1


def read_by(flusher: Flusher, reader: LateReader) -> LateReader:
    flusher._upkeep._completer._reader = reader
    return reader


async def test_what_a_backend_missed_is_made_up_for_as_fast_as_backends_answer(tmp_path: Path, clock):
    """Not a few packs a second however fast they are: after a day away that would go on for days."""
    machine = await four(tmp_path, clock)
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        lacking = await many_lack(machine, flusher, 15)
        assert len(lacking) >= 200
        reader = read_by(flusher, LateReader(machine.world))
        machine.backends[3].delay = lambda call: 0.1 if call == "set" else 0.0
        machine.backends[3].down = False
        await until(lambda: reader.reads)
        begun = trio.current_time()
        await until(lambda: not machine.context.ledger.incomplete)
        # 0.2 s each, of four at a time.
        assert trio.current_time() - begun < len(lacking) * 0.2 / 4 * 1.5 + 2
        assert reader.most <= 4
        # Of metadata packs some are listed by no head any more.
        rows = [row for number, row in pack_rows(machine).items() if number in lacking and row.kind == PackKind.DATA]
        assert len(rows) >= 180 and all(-1 not in row.placement for row in rows)


async def test_completing_takes_no_place_of_new_packs(tmp_path: Path, clock):
    """However many shards the backend that is back takes its time for: a cut is published as if there were none."""
    machine = await four(tmp_path, clock)
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        lacking = await many_lack(machine, flusher, 4)
        back = machine.backends[3]
        back.delay = lambda call: 30.0 if call == "set" else 0.0
        read_by(flusher, LateReader(machine.world))
        back.down = False
        least = PACKS_IN_FLIGHT
        while len(flusher._upkeep._completer._begun) < 4:
            await trio.sleep(0.05)
        for _ in range(400):
            await trio.sleep(0.05)
            least = min(least, machine.context.packs.value)
        assert least == PACKS_IN_FLIGHT
        machine.write(machine.create("new"), 0, page("x") * 16)
        begun = trio.current_time()
        await flusher.sync()
        # Of each of its packs, data and metadata, the grace in which it could become full.
        assert trio.current_time() - begun < 6
        assert lacking & machine.context.ledger.incomplete.keys()


async def test_a_pack_whose_shards_do_not_come_holds_up_no_other_that_can_be_completed(tmp_path: Path, clock):
    machine = await four(tmp_path, clock)
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        lacking = await many_lack(machine, flusher, 4)
        stuck = pack_rows(machine)[min(lacking)].pack_id
        reader = read_by(flusher, LateReader(machine.world))
        reader.stuck = lambda pack: pack.ref.pack_id == stuck
        machine.backends[3].down = False
        await until(lambda: reader.reads)
        begun = trio.current_time()
        await until(lambda: machine.context.ledger.incomplete.keys() == {min(lacking)})
        assert trio.current_time() - begun < 60


async def test_packs_that_cannot_be_read_now_are_not_tried_one_after_the_other_without_a_pause(
    tmp_path: Path, clock, expect_log
):
    """That would take from all who read; once one was completed it goes on at full speed."""
    expect_log("could not be completed: no answer", logging.WARNING)
    machine = await four(tmp_path, clock)
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        lacking = await many_lack(machine, flusher, 15)
        reader = read_by(flusher, LateReader(machine.world))
        reader.fails = True
        machine.backends[3].down = False
        await until(lambda: reader.reads)
        await trio.sleep(30)
        assert 10 <= len(reader.reads) <= 30 * 2 + 8
        reader.fails = False
        await trio.sleep(30)
        assert len(lacking & machine.context.ledger.incomplete.keys()) <= 30 * 2 + 8
        await until(lambda: not machine.context.ledger.incomplete)


@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_who_waits_for_a_rate_is_not_held_up_by_completing(tmp_path: Path, clock, direction: str):
    """Only one pack at a time stands in the line before cuts and reads."""
    machine = await four(tmp_path, clock)
    limit = RateLimit(0)
    backends = machine.backends
    machine.backends = [with_limits(backend, **{direction: limit}) for backend in backends]  # type: ignore[misc]
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        backends[3].down = True
        for number in range(4):
            machine.write(machine.create(f"f{number}"), 0, random.Random(number).randbytes(50 * 16 * PAGE))
            await flusher.sync()
        limit.rate = 1000
        limit.charge(100_000_000)
        reader = read_by(flusher, LateReader(machine.world))
        backends[3].down = False
        await trio.sleep(5)
        assert reader.reads and reader.most == 1 and machine.context.ledger.incomplete
        limit.rate = 0
        await until(lambda: not machine.context.ledger.incomplete)
        assert reader.most == 4


async def test_no_pack_is_completed_twice_at_a_time(tmp_path: Path, clock):
    """Who empties a backend completes packs too; whoever is late leaves shards that no row names."""
    machine = await four(tmp_path, clock)
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        await many_lack(machine, flusher, 1)
        read_by(flusher, LateReader(machine.world))
        completer = flusher._upkeep._completer
        machine.backends[3].delay = lambda call: 5.0 if call == "set" else 0.0
        machine.backends[3].down = False
        await until(lambda: completer._begun)
        number = min(completer._begun)
        ends: list[bool] = []

        async def one() -> None:
            ends.append(await completer.complete(number))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
        assert ends == [False] * 3
        await until(lambda: not machine.context.ledger.incomplete)
        sets = Counter(key for call, key in machine.backends[3].calls if call == "set" and parse_shard_key(key))
        assert max(sets.values()) == 1
