"""Byte rates hold in both directions: within 5 % over a long time, in bounded bursts, and nothing is late for them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest
import trio

from qsfs.backend.limits import RateLimit, with_limits
from qsfs.errors import BackendError, BackendUnavailable, Unavailable
from qsfs.remote import reader as reading
from qsfs.remote.members import Member
from qsfs.remote.reader import PackReader
from qsfs.remote.stored import StoredPack
from qsfs.store.schema import PAGE
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.flushing import flushing, pack_rows, until
from tests.remote.harness import FaultyBackend, World
from tests.remote.small_fs import SmallFs, noise

SHARD = 132 << 10
"""More than a shard of these packs takes."""


class Meter:
    """What passed to or from backends, byte by byte, with its time."""

    def __init__(self) -> None:
        self.passed: list[tuple[float, int]] = []

    def note(self, size: int) -> None:
        self.passed.append((trio.current_time(), size))

    def rate(self, start: float, stop: float) -> float:
        return sum(size for at, size in self.passed if start <= at < stop) / (stop - start)

    def most_within(self, seconds: float) -> int:
        """The most bytes of any stretch of so many seconds."""
        most = size = first = 0
        for at, count in self.passed:
            size += count
            while self.passed[first][0] < at - seconds:
                size -= self.passed[first][1]
                first += 1
            most = max(most, size)
        return most


class Counted(FaultyBackend):
    """A backend that counts what comes to it and what leaves it, of calls that fail too."""

    def __init__(self, inner: FaultyBackend, up: Meter, down: Meter) -> None:
        super().__init__(inner.store)
        self._up, self._down = up, down
        self.fails: Callable[[], bool] = lambda: False

    async def set(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        self._up.note(len(key) + len(value))
        if self.fails():
            raise BackendUnavailable("the answer was lost")
        await super().set(key, value)

    async def get(self, key: bytes) -> bytes | None:
        value = await super().get(key)
        if value is not None:
            self._down.note(len(value))
        return value


def limited(machine: FlushMachine, *, upload: float = 0, download: float = 0) -> tuple[Meter, Meter, list[Counted]]:
    """Holds the backends of a machine that is not mounted yet to rates; meters for both directions below them."""
    up, down = Meter(), Meter()
    rates = {"upload": RateLimit(upload), "download": RateLimit(download)}
    counted = [Counted(backend, up, down) for backend in machine.backends]
    machine.backends = [with_limits(backend, **rates) for backend in counted]  # type: ignore[misc]
    return up, down, counted


async def test_uploads_keep_their_rate(world: World, machine: FlushMachine, clock):
    """With more to send than the rate lets through, for a quarter of an hour: what must be sent again counts too.

    The rate is so low that a pack waits for minutes, and no backend is blamed for that.
    """
    rate = 10_000
    up, _, backends = limited(machine, upload=rate)
    source = random.Random(1)
    content = bytearray()
    async with flushing(machine, cut_seconds=30.0) as flusher:
        number = machine.create("a")
        machine.nursery.start_soon(_failing, backends, source)
        begun = trio.current_time()
        while trio.current_time() < begun + 900:
            data = source.randbytes(64 * PAGE)
            machine.write(number, len(content) // PAGE, data)
            content += data
            await machine.committer.commit()
            await trio.sleep(16)
        measured = up.rate(begun + 60, begun + 900)
        print(measured, up.most_within(1), up.most_within(60))
        assert 0.95 * rate <= measured <= 1.05 * rate
        assert up.most_within(1) <= 1.25 * rate + SHARD
        assert up.most_within(60) <= 60.25 * rate + SHARD
        assert all(member.writable for member in machine.fleet_members)
        with trio.fail_after(86400):
            await flusher.sync()
    assert restore(world).files["a"] == bytes(content)


async def _failing(backends: list[Counted], source: random.Random) -> None:
    """One in twenty answers is lost."""
    for backend in backends:
        backend.fails = lambda: source.random() < 0.05
    await trio.sleep_forever()


async def test_fetches_keep_their_rate(world: World, machine: FlushMachine, clock, monkeypatch):
    """Sixteen readers who want more than it lets through: nothing counts twice, and nobody asks others meanwhile."""
    monkeypatch.setattr(reading, "RECENT_BYTES", 0)
    rate = 20_000
    _, down, backends = limited(machine, download=rate)
    async with flushing(machine) as flusher:
        number = machine.create("a")
        machine.write(number, 0, random.Random(1).randbytes(640 * PAGE))
        await flusher.sync()
        code = machine.world.code
        packs = [StoredPack.of_row(row, code) for row in pack_rows(machine).values() if row.kind == 1]
        reader = PackReader(machine.fleet_members, machine.world.keys, machine.code)
        source = random.Random(2)
        down.passed.clear()
        for backend in backends:
            backend.delay = lambda call: 0.02

        async def read() -> None:
            while True:
                pack = source.choice(packs)
                await reader.shards(pack, range(code.k))

        async with reader.running(), trio.open_nursery() as nursery:
            begun = trio.current_time()
            for _ in range(16):
                nursery.start_soon(read)
            await trio.sleep(900)
            nursery.cancel_scope.cancel()
        measured = down.rate(begun + 60, begun + 900)
        print(measured, down.most_within(1), down.most_within(60), reader.counts)
        assert 0.95 * rate <= measured <= 1.05 * rate
        assert down.most_within(1) <= 1.25 * rate + 2 * SHARD
        assert down.most_within(60) <= 60.25 * rate + 2 * SHARD
        assert reader.counts.decoded == 0, "a wait for the rate is no reason to ask others"


async def test_no_backend_is_blamed_for_what_the_rate_holds_up(world: World, machine: FlushMachine, clock, monkeypatch):
    """At a rate at which one shard takes minutes, longer than any answer may take."""
    blamed: list[BackendError] = []
    monkeypatch.setattr(Member, "failed", lambda member, error: blamed.append(error))
    limited(machine, upload=400)
    async with flushing(machine) as flusher:
        machine.write(machine.create("a"), 0, random.Random(1).randbytes(32 * PAGE))
        await flusher.sync()
        assert blamed == []
        await until(lambda: not machine.context.ledger.incomplete)


async def test_no_read_fails_for_what_the_rate_holds_up(scratch, clock, expect_log):
    """The deadline of a read is for backends that do not answer; a rate is what the operator asked for."""
    expect_log("page .*: has been waiting for .*the download rate holds up", logging.WARNING)
    fs = await SmallFs.make(scratch / "cache")
    data = noise(64 * PAGE)
    number = fs.remote_file("a", data, extent_pages=16)
    limit = RateLimit(1000)
    for member in fs.members:
        member.data = with_limits(member.data, download=limit)
    begun = trio.current_time()
    async with fs.fetching(deadline_seconds=10) as fetcher:
        await fetcher.fetch(number, 0, 64)
    assert trio.current_time() - begun > 100
    assert b"".join(fs.read(number, 0, 64)) == data
    fs.close()


async def test_a_read_that_a_rate_held_up_still_fails_when_no_backend_answers(scratch, clock, expect_log):
    expect_log("page .*: has been waiting for .*the download rate holds up", logging.WARNING)
    expect_log("not here after .*connection refused", logging.ERROR)
    fs = await SmallFs.make(scratch / "cache")
    number = fs.remote_file("a", noise(64 * PAGE), extent_pages=16)
    limit = RateLimit(1000)
    for member in fs.members:
        member.data = with_limits(member.data, download=limit)
    async with fs.fetching(deadline_seconds=10) as fetcher, trio.open_nursery() as nursery:
        limit.charge(100_000)
        nursery.start_soon(_down_after, fs, 50)
        begun = trio.current_time()
        with pytest.raises(Unavailable):
            await fetcher.fetch(number, 0, 64)
        assert 50 < trio.current_time() - begun < 200
    fs.close()


async def _down_after(fs: SmallFs, seconds: float) -> None:
    await trio.sleep(seconds)
    for backend in fs.backends.values():
        backend.down = True
