"""A long write and a commit let each other work, and neither waits for more than a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsfs.store import turns as turns_module
from qsfs.store.schema import BLOCK_PAGES, PAGE
from qsfs.store.turns import Turns
from tests.core.machine import Machine

PATIENCE = 60.0


@contextmanager
def doing(what: Callable[[], object]) -> Iterator[threading.Thread]:
    """A thread that does `what`, which has ended by the end of the block."""
    thread = threading.Thread(target=what, daemon=True)
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def commit_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of the commit is long: what returns sooner was told to."""
    monkeypatch.setattr(turns_module, "COMMIT_SECONDS", PATIENCE)


@pytest.fixture
def write_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of a write is long."""
    monkeypatch.setattr(turns_module, "WRITE_SECONDS", PATIENCE)


@pytest.mark.usefixtures("commit_patient")
def test_a_write_goes_on_when_all_is_applied_or_the_commit_failed() -> None:
    turns = Turns()
    with doing(turns.give_way) as thread, pytest.raises(OSError, match="full"), turns:
        thread.start()
        raise OSError("full")
    turns.give_way()


def test_a_commit_that_makes_no_step_holds_up_no_write() -> None:
    """It may wait for the disk, or apply a hundred thousand names."""
    turns = Turns()
    with turns, doing(turns.give_way) as thread:
        thread.start()


@pytest.mark.usefixtures("write_patient")
def test_after_its_turn_a_commit_waits_for_the_next_long_write() -> None:
    turns = Turns()
    with turns:
        turns.step_done()
        turns.give_way()
        with doing(turns.step_done) as thread:
            thread.start()
            thread.join(0.05)
            assert thread.is_alive()
            turns.give_way()


def test_a_commit_goes_on_by_itself_when_no_long_write_comes() -> None:
    turns = Turns()
    with turns:
        turns.give_way()
        turns.step_done()


@pytest.mark.usefixtures("write_patient")
def test_a_commit_that_begins_does_not_wait_for_what_the_last_one_left() -> None:
    turns = Turns()
    with turns:
        turns.give_way()
    with turns:
        turns.step_done()


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
