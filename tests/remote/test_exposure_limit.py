"""Limits to exposure: cuts begin so early that it stays below them, and where backends do not let it, that is said."""

from __future__ import annotations

import pytest
import trio

from qsfs.clock import FixedClock
from qsfs.remote.exposure_age import ExposureAge
from qsfs.remote.exposure_limit import ExposureLimit
from qsfs.remote.flush import Flusher
from qsfs.store.schema import PAGE
from tests.remote.flush_machine import FlushMachine
from tests.remote.flushing import flushing, page, until


async def worst(flusher: Flusher, machine: FlushMachine, key: str, steps: int, size: int) -> float:
    """The most exposure in a minute of writing `size` pages a second, after a minute to learn from."""
    number = machine.create("busy")
    most = 0.0
    for step in range(steps):
        machine.write(number, 0, page("abc"[step % 3]) * size)
        await trio.sleep(0.5)
        found = flusher.status()["exposure"]["written"][key]
        most = max(most, found if step > steps // 2 else 0.0)
        await trio.sleep(0.5)
    return most


async def test_nothing_gets_older_than_the_limit(machine: FlushMachine, clock):
    """Also with backends that take their time: the cut begins the earlier, the longer one takes."""
    for backend in machine.backends:
        backend.delay = lambda call: 3.0 if call == "set" else 0.0
    async with flushing(machine, cut_seconds=86400, quiet_seconds=3600, exposure_seconds=40) as flusher:
        assert 20 < await worst(flusher, machine, "age", 120, 1) <= 40
        assert flusher.status()["exposure_problem"] == ""


async def test_no_more_than_the_limit_is_exposed(machine: FlushMachine, clock):
    """Of a steady writer; without the limit all of it waits for the cut that is due."""
    limit = 400 * PAGE
    async with flushing(machine, cut_seconds=86400, quiet_seconds=3600, exposure_bytes=limit) as flusher:
        number = machine.create("busy")
        most = 0
        for step in range(60):
            machine.write(number, step * 16 * PAGE, page("x") * 16)
            await trio.sleep(1)
            most = max(most, flusher.status()["exposure"]["written"]["bytes"])
        assert 0 < most <= limit
        assert flusher.status()["generation"] > 3
        assert flusher.status()["exposure_problem"] == ""


async def test_a_limit_that_backends_do_not_let_hold_is_an_alarm_until_it_holds_again(
    machine: FlushMachine, expect_log, clock
):
    """Once in the log, with both limits and what is in the way; in status for as long as it lasts."""
    expect_log("no published head has .*exposure_bytes.* and .*exposure_seconds")
    limits = {"exposure_bytes": 8 * PAGE, "exposure_seconds": 20}
    async with flushing(machine, cut_seconds=86400, quiet_seconds=3600, **limits) as flusher:
        for backend in machine.backends[:4]:
            backend.down = True
        await trio.sleep(60)
        assert flusher.status()["exposure_problem"] == "", "nothing is exposed"
        flusher._limits.limit.size = 0
        machine.write(machine.create("a"), 0, page("x") * 16)
        await trio.sleep(15)
        flusher._limits.limit.size = 8 * PAGE
        flusher._limits.limit.seconds = 10
        await until(lambda: flusher.status()["exposure_problem"])
        await trio.sleep(100)
        problem = flusher.status()["exposure_problem"]
        assert "exposure_bytes" in problem and "exposure_seconds" in problem and "bring backends back" in problem
        assert machine.backends[0].name in problem
        for backend in machine.backends:
            backend.down = False
        await until(lambda: not flusher.status()["exposure_problem"])
        assert flusher.status()["exposure"]["written"]["bytes"] == 0


async def test_what_no_cut_can_hold_begins_none_and_is_no_alarm(machine: FlushMachine, clock):
    """Writes of a database before its sync: backends cannot help, and an idle mount stays idle."""
    async with flushing(machine, cut_seconds=86400, exposure_bytes=4096, exposure_seconds=5) as flusher:
        # With a head of this mount nothing else waits for one.
        machine.create("a")
        await flusher.sync()
        machine.store.promised_bytes = lambda: 1 << 20
        machine.store.promised_since = lambda: 0.0
        started = flusher._started
        await trio.sleep(600)
        assert flusher._started == started and flusher.status()["exposure_problem"] == ""


class HandClock(FixedClock):
    """A clock that is set by hand."""

    now = 0.0
    stepped = 0.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return 10**18 + int((self.now + self.stepped) * 1e9)


@pytest.mark.parametrize("limits", [(100.0, 0), (0.0, 8000)])
def test_after_a_cut_that_found_nothing_the_rest_counts_no_more(limits):
    """An open file without a name stays dirty: that must not have one cut follow the other.  New bytes count."""
    clock = HandClock(1)
    limit = ExposureLimit(*limits, ExposureAge(clock), clock)
    base = clock.time_ns() - int(80e9)
    assert limit.look(5000, base, "")
    limit.begin()
    limit.ended(new=False)
    assert not limit.look(5000, base, "") and limit.problem == ""
    clock.now += 600
    assert not limit.look(5000, base, "")
    clock.now += 70
    assert limit.look(10000, base, "")
    assert not limit.look(100, base, ""), "what went is not held against the next"


@pytest.mark.parametrize("step", [-1e6, 1e6])
def test_a_wall_clock_that_steps_makes_nothing_older_or_younger(expect_log, step):
    """Back, it would hide what gets old; ahead, it would be an alarm and cuts without end."""
    expect_log("no published head has what was written")
    clock = HandClock(1)
    limit = ExposureLimit(100.0, 0, ExposureAge(clock), clock)
    base = clock.time_ns()
    assert not limit.look(5000, base, "")
    clock.stepped = step
    clock.now += 20
    assert not limit.look(5000, base, "") and limit.problem == ""
    clock.now += 60
    assert limit.look(5000, base, "") and limit.problem == ""
    limit.begin()
    clock.now += 10
    limit.cut()
    base = clock.time_ns()
    clock.now += 10
    limit.ended(new=True)
    clock.stepped = 0.0
    assert not limit.look(5000, base, "") and limit.problem == "", "the cut was taken 10 s ago"
    clock.now += 80
    assert limit.look(5000, base, "") and limit.problem == ""
    clock.now += 11
    assert limit.look(5000, base, "") and "1 min 41 s" in limit.problem


@pytest.mark.parametrize("ahead", [0.0, 1e6])
def test_a_base_from_the_future_is_one_of_now(expect_log, ahead):
    """Another machine's clock, or this one's before it was set."""
    expect_log("no published head has what was written")
    clock = HandClock(1)
    limit = ExposureLimit(100.0, 0, ExposureAge(clock), clock)
    base = clock.time_ns() + int(ahead * 1e9)
    assert not limit.look(5000, base, "")
    clock.now += 80
    assert limit.look(5000, base, "") and limit.problem == ""
    clock.now += 30
    limit.look(5000, base, "")
    assert limit.problem


def test_no_rate_is_learnt_from_two_looks_that_follow_at_once():
    """A write between two looks a millisecond apart is no flood that goes on."""
    clock = HandClock(1)
    limit = ExposureLimit(0.0, 100_000, ExposureAge(clock), clock)
    for _ in range(10):
        clock.now += 0.25
        assert not limit.look(1000, 0, "")
    clock.now += 0.001
    assert not limit.look(30_000, 0, "")
