"""One machine that flushes to six backends at 2+2, on a virtual clock; tests that want others have their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from trio.testing import MockClock

from tests.remote.flush_machine import FlushMachine
from tests.remote.flushing import VirtualClock
from tests.remote.harness import World, make_world
from tests.support.virtual_time import virtual_time


@pytest.fixture
def clock() -> Iterator[MockClock]:
    """Runs ahead once nothing is at work."""
    with virtual_time() as clock:
        yield clock


@pytest.fixture
async def world(clock: MockClock) -> World:
    return await make_world(6, k=2, m=2)


@pytest.fixture
def machine(world: World, clock: MockClock, tmp_path: Path) -> FlushMachine:
    machine = FlushMachine(world, tmp_path / "cache")
    machine.clock = VirtualClock(clock)
    return machine
