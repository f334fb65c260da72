"""What `status` says of exposure: an upper bound by class, which no clock bends and no idle mount raises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio

from qsfs.remote.flush import Flusher
from qsfs.store.schema import PAGE
from tests.remote.flush_machine import FlushMachine
from tests.remote.flushing import VirtualClock, flushing, page, until

DAY = 86400.0


def told(flusher: Flusher) -> dict[str, dict[str, Any]]:
    """Exposure, of which no class may have less, or younger, than the one before it."""
    found: dict[str, dict[str, Any]] = flusher.status()["exposure"]
    entries = list(found.values())
    for entry, stricter in itertools.pairwise(entries):
        assert 0 <= entry["bytes"] <= stricter["bytes"]
        assert 0 <= entry["age"] <= stricter["age"]
    return found


class SteppedClock(VirtualClock):
    """A virtual clock whose wall time may be set."""

    stepped = 0.0

    def time_ns(self) -> int:
        return super().time_ns() + int(self.stepped * 1e9)


@pytest.fixture
def stepped(machine: FlushMachine, clock) -> SteppedClock:
    machine.clock = SteppedClock(clock)
    return machine.clock


async def test_a_database_without_a_sync_is_as_old_as_its_oldest_write_at_every_class(machine: FlushMachine, clock):
    """No published head has what it wrote minutes ago, however often others are published meanwhile."""
    async with flushing(machine) as flusher:
        number = machine.create("busy")
        await flusher.sync()
        begun = machine.clock.monotonic()
        machine.store.promised_bytes = lambda: 4 * PAGE
        machine.store.promised_since = lambda: begun
        generation = flusher.status()["generation"]
        for _ in range(20):
            machine.write(number, 0, page("x"))
            await trio.sleep(30)
            told(flusher)
        assert flusher.status()["generation"] > generation + 10
        assert all(600 <= entry["age"] < 601 for entry in told(flusher).values())


@pytest.mark.parametrize("step", [-DAY, DAY])
async def test_a_wall_clock_that_is_set_right_after_the_mount_changes_no_age(
    machine: FlushMachine, stepped: SteppedClock, step: float, clock
):
    """It was a day ahead, or behind, when the mount began; what is written then is seconds old, at every class."""
    async with flushing(machine) as flusher:
        await flusher.sync()
    stepped.stepped = -step
    async with flushing(machine, cut_seconds=DAY) as flusher:
        await flusher.sync()
        for backend in machine.backends[:3]:
            backend.down = True
        await trio.sleep(60)
        assert told(flusher)["written"]["age"] == 0
        machine.write(machine.create("a"), 0, page("x") * 16)
        await flusher.sync()
        machine.write(machine.create("b"), 0, page("x"))
        await machine.committer.commit()
        stepped.stepped = 0.0
        await trio.sleep(20)
        found = told(flusher)
        assert 20 <= found["written"]["age"] < 30 and 20 <= found["full"]["age"] < 40


async def test_an_open_file_without_a_name_exposes_nothing_on_an_idle_mount(machine: FlushMachine, clock):
    """No generation will ever hold its data: its age would grow for as long as it is open, an alarm for nothing."""
    async with flushing(machine) as flusher:
        number = machine.create("a")
        await flusher.sync()
        machine.unlink("a", number, still_open=True)
        machine.write(number, 0, page("x") * 16)
        assert told(flusher)["local"]["bytes"] >= 16 * PAGE, "the power loses it"
        await flusher.sync()
        await trio.sleep(600)
        found = told(flusher)
        assert found["written"]["bytes"] == 0 and found["written"]["age"] == 0
        machine.store.idle()
        machine.write(machine.create("b"), 0, page("x"))
        await trio.sleep(10)
        found = told(flusher)
        assert found["written"]["bytes"] >= PAGE and 10 <= found["written"]["age"] < 13, "what is new counts"


async def test_nothing_is_said_of_full_packs_before_all_are_known(machine: FlushMachine, clock):
    """A zero would say that all are full."""
    async with flushing(machine) as flusher:
        assert not flusher.knows_packs
        found = flusher.status()
        assert list(found["exposure"]) == ["local", "written"]
        assert found["packs_not_full"] is None and found["packs_not_looked_at"] is None
        await until(lambda: flusher.knows_packs)
        found = flusher.status()
        assert found["exposure"]["full"]["bytes"] >= found["exposure"]["written"]["bytes"]
        assert found["packs_not_full"] is not None and found["packs_not_looked_at"] is not None
