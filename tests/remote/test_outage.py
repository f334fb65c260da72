"""Outages of days, and backends that come and go: nothing is lost, grows or spins, and then all is caught up."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from qsfs.daemon import probing
from qsfs.remote import exposure_limit, upkeep, upload
from qsfs.remote.context import PACKS_IN_FLIGHT
from qsfs.remote.flush import Flusher
from qsfs.store.eviction import Evictor
from qsfs.store.limits import Limits
from qsfs.store.schema import PAGE, Table
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.flushing import VirtualClock, flushing, until
from tests.remote.harness import World

HOUR = 3600.0
DAY = 24 * HOUR
MIB = 1 << 20
SMALL = Limits(
    map_bytes=40 * MIB,
    journal_bytes=MIB,
    spool_bytes=8 * MIB,
    group_bytes=2 * MIB,
    uncovered_bytes=MIB,
    largest_append=64 << 10,
    high_bytes=10 * MIB,
    low_bytes=8 * MIB,
    full_bytes=12 * MIB,
)
PATIENT = 60.0
"""Seconds between two looks of what looks every second or so: the virtual days of a test have to pass quickly."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "UPKEEP_SECONDS", PATIENT)
    monkeypatch.setattr(exposure_limit, "_IDLE_SECONDS", PATIENT)
    monkeypatch.setattr(upload, "ROUND_SECONDS", PATIENT)
    monkeypatch.setattr(upload, "_LOOKS_A_PAUSE", 1)
    monkeypatch.setattr(upload, "LAST_PAUSE", PATIENT)
    monkeypatch.setattr(probing, "_ROUND_SECONDS", PATIENT)


@pytest.fixture
def machine(world: World, clock, tmp_path: Path) -> FlushMachine:
    machine = FlushMachine(world, tmp_path / "cache", limits=SMALL)
    machine.clock = VirtualClock(clock)
    return machine


@dataclass
class Writer:
    """An application that writes all the time and waits, as a request does, while the cache is full.

    `reach`: how many pages of its file it writes all over.
    """

    machine: FlushMachine
    reach: int
    seconds: float
    pages: int = 16
    content: bytearray = field(default_factory=bytearray)
    waited: int = 0
    written: int = 0
    ended: bool = False

    async def run(self) -> None:
        source = random.Random(5)
        machine = self.machine
        number = machine.create("chain")
        evictor = Evictor(machine.store)
        while not self.ended:
            first = source.randrange(max(1, self.reach // self.pages)) * self.pages
            while machine.store.expected_bytes() >= machine.limits.full_bytes:
                self.waited += 1
                evictor.step(1 << 20, 1 << 20, recent_too=True, written_will_do=True)
                machine.committer.commit_now()
                await trio.sleep(300)
                if self.ended:
                    return
            data = source.randbytes(self.pages * PAGE)
            machine.write(number, first, data)
            self.content.extend(bytes(max(0, (first + self.pages) * PAGE - len(self.content))))
            self.content[first * PAGE : (first + self.pages) * PAGE] = data
            self.written += 1
            machine.committer.commit_now()
            await trio.sleep(self.seconds)


@dataclass
class Watch:
    """What may not grow: the most that was seen of it."""

    tasks: int = 0
    held_bytes: int = 0
    disk_bytes: int = 0
    spool_bytes: int = 0
    waiting: int = 0

    async def run(self, machine: FlushMachine) -> None:
        while True:
            await trio.sleep(600)
            context = machine.context
            self.tasks = max(self.tasks, trio.lowlevel.current_statistics().tasks_living)
            held = sum(upload.held_bytes for upload in machine.uploader._stragglers.values())
            self.held_bytes = max(self.held_bytes, held)
            self.spool_bytes = max(self.spool_bytes, context.spool.used_bytes)
            self.waiting = max(self.waiting, len(machine.uploader.waiting))
            size = sum(path.stat().st_blocks * 512 for path in machine.directory.rglob("*") if path.is_file())
            self.disk_bytes = max(self.disk_bytes, size)

    def check(self, limits: Limits) -> None:
        assert self.tasks < 150
        assert self.waiting <= PACKS_IN_FLIGHT
        assert self.held_bytes <= upload.STRAGGLING_BYTES
        assert self.spool_bytes <= limits.spool_bytes
        assert self.disk_bytes <= limits.map_bytes + 2 * limits.journal_bytes + limits.spool_bytes + MIB


@contextlib.contextmanager
def lines_logged() -> Iterator[list[str]]:
    """Collects what is logged from INFO on."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("qsfs"), Collect(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def switch(machine: FlushMachine, *numbers: int) -> None:
    """Has exactly these backends answer, counted from 0."""
    for number, backend in enumerate(machine.backends):
        backend.down = number not in numbers
    machine.publisher.reach = len(numbers)


def calls(machine: FlushMachine) -> Callable[[], int]:
    """Counts tries of any call, those that are refused too."""
    count = 0

    def counted(call: str) -> float:
        nonlocal count
        count += 1
        return 0.0

    for backend in machine.backends:
        backend.delay = counted
    return lambda: count


@contextlib.asynccontextmanager
async def working(machine: FlushMachine, writer: Writer) -> AsyncIterator[tuple[Flusher, Watch]]:
    async with flushing(machine, cut_seconds=60.0, quiet_seconds=PATIENT) as flusher, trio.open_nursery() as nursery:
        watch = Watch()
        nursery.start_soon(probing.probe, machine.fleet_members, machine.world.keys)
        nursery.start_soon(writer.run)
        nursery.start_soon(watch.run, machine)
        yield flusher, watch
        nursery.cancel_scope.cancel()


async def caught_up(machine: FlushMachine, flusher: Flusher, writer: Writer, seconds: float) -> None:
    """All that was written is published within that time, and every mark says so."""
    writer.ended = True
    with trio.fail_after(seconds):
        await flusher.sync()
    assert restore(machine.world).files["chain"] == bytes(writer.content)
    with trio.fail_after(seconds):
        # Pages that were on their way ahead of that cut got their extents after it.
        await until(lambda: flusher.status()["exposure"]["written"]["bytes"] == 0)
        # Of such a pack nothing may be left to record: it was tried again for nothing, and that ends as well.
        await until(lambda: not flusher.status()["waiting"])
    assert restore(machine.world).files["chain"] == bytes(writer.content)
    assert machine.store.layers.view.count(Table.DIRTY) == 0
    status = flusher.status()
    assert status["waiting"] == [] and not status["last_error"]
    assert not machine.spool.heads and not list(machine.directory.glob("spool/*.pack"))


@pytest.mark.parametrize("left", [0, pytest.param(2, marks=pytest.mark.slow)])
async def test_three_days_without_backends_within_what_the_cache_holds(
    world: World, machine: FlushMachine, clock, left: int
):
    """Writers never wait; one cut and its packs are tried, ever more seldom; then all comes at once."""
    writer = Writer(machine, reach=512, seconds=900)
    async with working(machine, writer) as (flusher, watch):
        await trio.sleep(HOUR)
        before = restore(world)
        switch(machine, *range(left))
        count = calls(machine)
        with lines_logged() as lines:
            await trio.sleep(3 * DAY)
        assert writer.waited == 0 and writer.written > 3 * DAY / 900
        assert count() < 3 * DAY / 2, "each backend a few times a minute"
        assert len(lines) < 30
        assert flusher.status()["waiting"] and flusher.status()["exposure"]["written"]["age"] > 2.9 * DAY
        watch.check(SMALL)
        assert restore(world, before.head).files == before.files
        switch(machine, *range(6))
        await caught_up(machine, flusher, writer, HOUR)
        watch.check(SMALL)


@pytest.mark.parametrize("days", [1, pytest.param(3, marks=pytest.mark.slow)])
async def test_days_without_backends_beyond_what_the_cache_holds(
    world: World, machine: FlushMachine, clock, expect_log, days: int
):
    """Writers wait, are not refused, and go on where they were; the disk holds what it was given."""
    expect_log(r"the cache is short of room and \d+ packs are not full", optional=True)
    writer = Writer(machine, reach=8192, seconds=300, pages=32)
    async with working(machine, writer) as (flusher, watch):
        await trio.sleep(HOUR)
        switch(machine)
        with lines_logged() as lines:
            await trio.sleep(days * DAY)
        assert writer.waited, "more came than the cache holds"
        assert len(lines) < 30
        watch.check(SMALL)
        stood = writer.written
        switch(machine, *range(6))
        await trio.sleep(6 * HOUR)
        assert writer.written > stood + 50, "writers go on as the backlog drains"
        await caught_up(machine, flusher, writer, HOUR)
        watch.check(SMALL)


async def test_a_crash_after_days_without_backends_loses_nothing(world: World, machine: FlushMachine, clock):
    writer = Writer(machine, reach=512, seconds=600)
    async with working(machine, writer) as (flusher, _):
        await trio.sleep(HOUR)
        switch(machine)
        await trio.sleep(DAY)
        assert flusher.status()["spool_bytes"] > 0, "a cut was under way"
    switch(machine, *range(6))
    async with flushing(machine) as flusher:
        await caught_up(machine, flusher, writer, HOUR)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
async def test_a_day_of_backends_that_come_and_go(world: World, machine: FlushMachine, clock, expect_log, seed: int):
    """Each is up or down for minutes, often too few at a time: generations come all the same, and nothing piles up."""
    expect_log(r"the cache is short of room and \d+ packs are not full", optional=True)
    writer = Writer(machine, reach=1024, seconds=300)
    source = random.Random(seed)
    async with working(machine, writer) as (flusher, watch):
        published = flusher.status()["generation"]
        count = calls(machine)
        with lines_logged() as lines:
            end = trio.current_time() + DAY
            while trio.current_time() < end:
                switch(machine, *(number for number in range(6) if source.random() < 0.55))
                await trio.sleep(source.uniform(30, 1200))
        others = [line for line in lines if "is down" not in line and "is up again" not in line]
        assert len(others) < 100, others[:20]
        assert flusher.status()["generation"] > published + 20
        assert count() < 6 * DAY
        watch.check(SMALL)
        switch(machine, *range(6))
        await caught_up(machine, flusher, writer, HOUR)
        await trio.sleep(HOUR)
        assert not machine.context.ledger.incomplete, "what is missing was stored"
