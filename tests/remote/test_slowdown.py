"""Applications that write faster than backends take it, for hours: generations are made nevertheless.

A byte costs the backends one and a half here, so who writes as many as they take writes too many.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from qsfs.errors import Corrupt
from qsfs.remote.ahead import Ahead
from qsfs.remote.flush import Flusher
from qsfs.remote.slowdown import Slowdown
from qsfs.store.schema import BLOCK_SIZE, PAGE
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.flushing import VirtualClock, flushing, until
from tests.remote.harness import World
from tests.remote.test_outage import MIB, SMALL, patient  # noqa: F401 (used by name)
from tests.remote.test_rates import limited

RATE = 10_000
ROOMY = replace(SMALL, map_bytes=400 * MIB, high_bytes=280 * MIB, low_bytes=260 * MIB, full_bytes=300 * MIB)
MINUTE = 60.0
HOUR = 3600.0


@pytest.fixture
def machine(world: World, clock, tmp_path: Path) -> FlushMachine:
    machine = FlushMachine(world, tmp_path / "cache", limits=ROOMY)
    machine.clock = VirtualClock(clock)
    return machine


@dataclass
class Writer:
    """Writes a file in order, `rate` bytes a second if it is let."""

    machine: FlushMachine
    rate: float
    content: bytearray = field(default_factory=bytearray)
    written: int = 0
    ended: bool = False

    async def run(self) -> None:
        source = random.Random(3)
        machine, store = self.machine, self.machine.store
        number, place = machine.create("a"), 0
        while not self.ended:
            data = source.randbytes(64 * PAGE)
            while store.allowance.used_up:
                await trio.sleep(5)
                if self.ended:
                    return
            machine.write(number, place // PAGE, data)
            store.allowance.spend(len(data))
            self.content += data
            self.written += len(data)
            place += len(data)
            await machine.committer.commit()
            await trio.sleep(len(data) / self.rate)


@dataclass
class Heads:
    """What is published while it watches."""

    generations: set[int] = field(default_factory=set)
    oldest: float = 0.0
    slowed: bool = False
    upload_rate: float = 0.0

    async def run(self, flusher: Flusher) -> None:
        while True:
            await trio.sleep(10)
            status = flusher.status()
            self.generations.add(status["generation"])
            self.oldest = max(self.oldest, status["exposure"]["written"]["age"])
            self.slowed = self.slowed or status["writers_slowed"]


async def load(machine: FlushMachine, writer: Writer, seconds: float) -> tuple[Heads, bytes]:
    """So many seconds of a writer above backends that take `RATE`; then its end, and what a restore finds."""
    meter, _, _ = limited(machine, upload=RATE)
    heads = Heads()
    settings = {"cut_seconds": 30.0, "cut_bytes": 6 * MIB, "slow_writers_seconds": 5 * MINUTE}
    async with flushing(machine, **settings) as flusher, trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        nursery.start_soon(heads.run, flusher)
        await trio.sleep(seconds)
        writer.ended = True
        heads.upload_rate = meter.rate(trio.current_time() - seconds / 2, trio.current_time())
        with trio.fail_after(HOUR):
            await flusher.sync()
            await until(lambda: not flusher.status()["exposure"]["written"]["bytes"])
        assert not flusher.status()["writers_slowed"] and not machine.store.allowance.limited
        nursery.cancel_scope.cancel()
    return heads, restore(machine.world).files["a"]


async def test_a_writer_that_is_too_fast_for_hours_is_slowed_until_a_generation_can_be_made(
    machine: FlushMachine, expect_log, clock
):
    """What the machine's loss costs stays bounded, however large the cache is."""
    expect_log("written faster than backends take it for")
    writer = Writer(machine, RATE)
    heads, found = await load(machine, writer, 3 * HOUR)
    assert heads.slowed
    assert len(heads.generations) >= 5
    assert heads.oldest < 1.6 * HOUR
    assert heads.upload_rate > 0.9 * RATE, "who is slowed does not slow the uploads"
    assert found == bytes(writer.content)


async def test_a_cut_is_taken_once_what_is_dirty_gets_no_less_and_is_little_enough(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock
):
    """A writer nearly as fast as quick uploads: at each look as much is dirty again as left since the last."""
    looks = 0

    def dirty(self: Ahead, most: int) -> int:
        nonlocal looks
        looks += 1
        flusher._precopier.bytes_recorded += 20 * MIB
        return min(most + 1, 40 * MIB)

    async with flushing(machine) as flusher:
        monkeypatch.setattr(Ahead, "_dirty_bytes", dirty)
        monkeypatch.setattr(Ahead, "_dirty_blocks", 40 * MIB // BLOCK_SIZE)
        await Ahead(machine.context, flusher._precopier, 0.0).pages(256 * MIB)
    assert looks == 1


async def test_an_outage_is_no_waiting_and_holds_nobody_back(machine: FlushMachine, clock, expect_log):
    """Whoever wrote through two hours of it has the whole time to go before being slowed; one that begins lets go."""
    expect_log("written faster than backends take it for 6")
    async with flushing(machine):
        allowance, slowdown = machine.store.allowance, Slowdown(machine.context, 600)
        uploader = machine.uploader

        async def waits(seconds: float) -> None:
            end = trio.current_time() + seconds
            while trio.current_time() < end:
                slowdown.uploaded(MIB, 4 * MIB)
                await trio.sleep(10)

        uploader.waiting[b"pack"] = "too few backends"
        await waits(2 * HOUR)
        assert not allowance.limited
        uploader.waiting.clear()
        await waits(9 * MINUTE)
        assert not allowance.limited
        await waits(2 * MINUTE)
        assert allowance.limited and not allowance.used_up
        uploader.waiting[b"pack"] = "too few backends"
        await slowdown.look()
        assert not allowance.limited
        uploader.waiting.clear()


async def test_who_is_slowed_goes_on_when_no_cut_can_be_made_for_another_reason(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """Nobody would grant anything then; and it may be a write that mends what is wrong."""
    expect_log("no generation could be made: a page is damaged")

    async def damaged(order: object) -> None:
        raise Corrupt("a page is damaged")

    async with flushing(machine, cut_seconds=10) as flusher:
        assert flusher.generations is not None
        monkeypatch.setattr(flusher.generations, "seal", damaged)
        machine.store.allowance.hold_back()
        machine.write(machine.create("a"), 0, bytes(PAGE))
        await until(lambda: flusher.last_error)
        assert not machine.store.allowance.limited
        monkeypatch.undo()


async def test_an_unmount_ends_it_for_good(machine: FlushMachine, clock):
    """What the kernel still holds is handed over at full speed."""
    async with flushing(machine):
        allowance = machine.store.allowance
        allowance.hold_back()
        allowance.end()
        allowance.hold_back()
        assert not allowance.limited
