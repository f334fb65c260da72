"""A long write lets a commit do a step first, and is never held up for more than a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsfs.store import turns as turns_module
from qsfs.store.schema import BLOCK_PAGES, PAGE
from qsfs.store.turns import Turns
from tests.core.machine import Machine

PATIENCE = 60.0


@contextmanager
def giving_way(turns: Turns) -> Iterator[threading.Thread]:
    """A thread that waits for a step, started within the block."""
    thread = threading.Thread(target=turns.give_way, daemon=True)
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "LONGEST_WAIT_SECONDS", PATIENCE)


@pytest.mark.usefixtures("patient")
def test_a_write_goes_on_after_a_step() -> None:
    """Not only when all is applied: a group of 64 MiB takes long."""
    turns = Turns()
    with turns, giving_way(turns) as thread:
        thread.start()
        while thread.is_alive():
            turns.step_done()


@pytest.mark.usefixtures("patient")
def test_a_write_goes_on_when_all_is_applied_or_the_commit_failed() -> None:
    turns = Turns()
    with giving_way(turns) as thread, pytest.raises(OSError, match="full"), turns:
        thread.start()
        while not turns.waited_for:
            pass
        raise OSError("full")
    turns.give_way()


@pytest.mark.usefixtures("patient")
def test_a_step_that_nobody_waited_for_serves_no_later_write() -> None:
    """Else each long write would pass by what the last one left."""
    turns = Turns()
    with turns:
        for _ in range(2):
            turns.step_done()
            with giving_way(turns) as thread:
                thread.start()
                while not turns.waited_for:
                    assert thread.is_alive()
                turns.step_done()


def test_a_commit_that_makes_no_step_holds_up_no_write() -> None:
    """It may wait for the disk, or apply a hundred thousand names."""
    turns = Turns()
    with turns, giving_way(turns) as thread:
        thread.start()


def test_a_commit_makes_steps_and_its_flush_is_no_part_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its steps is small; whoever writes while the disk works does not wait for it."""
    machine = Machine(tmp_path)
    number = machine.create("file")
    machine.write(number, 0, bytes(PAGE * BLOCK_PAGES) * 100)
    turns = machine.store.turns
    seen: list[str] = []
    step_done, leave = Turns.step_done, Turns.__exit__

    def step(self: Turns) -> None:
        seen.append("step")
        step_done(self)

    def end(self: Turns, *what: object) -> None:
        assert machine.store.environment.env.info()["last_txnid"] == before
        leave(self, *what)
        seen.append("end")

    monkeypatch.setattr(Turns, "step_done", step)
    monkeypatch.setattr(Turns, "__exit__", end)
    before = machine.store.environment.env.info()["last_txnid"]
    machine.commit()
    assert seen.count("step") >= 2
    assert seen[-1] == "end"
    assert machine.store.environment.env.info()["last_txnid"] == before + 1
    turns.give_way()
    machine.close()
