"""A journal flush keeps the event loop only where it is short and nobody waits; it is durable in either place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qsfs.clock import FixedClock
from qsfs.daemon.committer import Committer
from qsfs.errors import CacheError
from tests.core.machine import Machine, page


class Disk:
    """Notes on which thread the journal is flushed, and how long a flush seems to take."""

    def __init__(self, machine: Machine) -> None:
        self.seconds = 0.0
        self.at_once: list[bool] = []
        self.error: CacheError | None = None
        self._machine = machine
        self._write = machine.store.journal.write
        machine.store.journal.write = self.write  # type: ignore[method-assign]

    def write(self, frames: list[tuple[int, int, bytes]]) -> None:
        self.at_once.append(threading.current_thread() is threading.main_thread())
        if self.error is not None:
            raise self.error
        self._write(frames)
        clock = self._machine.clock
        assert isinstance(clock, FixedClock)
        clock.advance(self.seconds)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


async def sync(machine: Machine, committer: Committer, number: int, letter: str) -> None:
    machine.write(number, 0, page(letter))
    await committer.sync(number)
    assert page(letter) == machine.page(number, 0)


async def test_a_short_flush_for_a_lone_caller_needs_no_thread(machine: Machine) -> None:
    disk = Disk(machine)
    committer = Committer(machine.store, machine.contents, 5.0, alone=lambda: True)
    number = machine.create("file")
    for letter in "abc":
        await sync(machine, committer, number, letter)
    # How long it takes is not known before the first.
    assert disk.at_once == [False, True, True]
    machine.crash()
    assert machine.page(number, 0) == page("c")


async def test_others_are_served_while_a_flush_is_under_way(machine: Machine) -> None:
    disk = Disk(machine)
    committer = Committer(machine.store, machine.contents, 5.0)
    number = machine.create("file")
    for letter in "abc":
        await sync(machine, committer, number, letter)
    assert disk.at_once == [False] * 3


async def test_a_flush_that_was_slow_or_meets_a_commit_leaves_the_event_loop(machine: Machine) -> None:
    disk = Disk(machine)
    committer = Committer(machine.store, machine.contents, 5.0, alone=lambda: True)
    number = machine.create("file")
    await sync(machine, committer, number, "a")
    await sync(machine, committer, number, "b")
    disk.seconds = 0.02
    await sync(machine, committer, number, "c")
    disk.seconds = 0.0
    for _ in range(5):
        await sync(machine, committer, number, "d")
    assert disk.at_once == [False, True, True, False, False, False, False, False]
    while not disk.at_once[-1]:
        await sync(machine, committer, number, "e")
    group = machine.store.seal()
    await sync(machine, committer, number, "f")
    machine.store.commit(group)
    machine.store.committed(group)
    assert not disk.at_once[-1]


async def test_a_flush_that_fails_at_once_is_no_success(
    machine: Machine, expect_log: Callable[..., None]
) -> None:
    expect_log(r"the disk is gone")
    disk = Disk(machine)
    committer = Committer(machine.store, machine.contents, 5.0, alone=lambda: True)
    number = machine.create("file")
    await sync(machine, committer, number, "a")
    disk.error = CacheError("the disk is gone")
    for _ in range(2):
        with pytest.raises(CacheError, match="the disk is gone"):
            await sync(machine, committer, number, "b")
    assert disk.at_once == [False, True]
