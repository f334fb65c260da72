"""One worker thread works at a time, and another one while that one does arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from qsfs.format.erasure import Code, CodeParams
from qsfs.remote.worker_turn import WorkerTurn
from tests.remote.flush_machine import FlushMachine

SECONDS = 30.0


def started(work: Callable[[], None]) -> Callable[[], None]:
    """Runs `work` in a thread; calling the result waits for its end and raises what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> None:
        thread.join(SECONDS)
        assert not thread.is_alive(), "it waits for a turn that never comes"
        if errors:
            raise errors[0]

    return join


def test_another_thread_works_while_the_turn_is_given_up_and_only_then() -> None:
    turn = WorkerTurn()
    working = threading.Lock()
    given_up, came = threading.Event(), threading.Event()

    def first() -> None:
        with turn:
            with working:
                pass
            with turn.given_up():
                given_up.set()
                assert came.wait(SECONDS), "nobody else could work meanwhile"
            assert working.acquire(blocking=False), "two work at a time"
            working.release()

    def second() -> None:
        assert given_up.wait(SECONDS)
        with turn, working:
            came.set()

    ends = [started(first), started(second)]
    for end in ends:
        end()


def test_nobody_gives_up_the_turn_of_another() -> None:
    turn = WorkerTurn()
    has, may_end, tried = threading.Event(), threading.Event(), threading.Event()

    def holder() -> None:
        with turn:
            has.set()
            assert may_end.wait(SECONDS)

    def other() -> None:
        assert has.wait(SECONDS)
        with turn.given_up():
            pass
        tried.set()

    end, second_end = started(holder), started(other)
    assert tried.wait(SECONDS)
    second_end()
    waits = started(turn.__enter__)
    may_end.set()
    end()
    waits()


def test_the_turn_is_free_after_an_error() -> None:
    turn = WorkerTurn()
    with pytest.raises(KeyError), turn, turn.given_up():
        raise KeyError
    started(turn.__enter__)()


async def test_who_reads_and_seals_has_the_turn_and_no_other(machine: FlushMachine, clock) -> None:
    def has_it() -> bool:
        return machine.context.turn.held

    async with machine.mounted():
        assert await machine.context.in_turn(has_it)
        assert not await machine.context.in_thread(has_it)
        assert not machine.context.turn.held


def test_a_code_does_its_arithmetic_within_what_it_is_given() -> None:
    """Encoding, rebuilding, and decoding where a data shard is missing; copying what is there is none."""
    seen: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    code = Code(CodeParams(2, 4), around=around)
    data = [b"a" * 64, b"b" * 64]
    parity = code.encode(data)
    assert seen == ["begin", "end"]
    assert code.decode({0: data[0], 1: data[1]}) == data
    assert seen == ["begin", "end"]
    assert code.decode({1: data[1], 3: parity[1]}) == data
    assert code.rebuild({0: data[0], 1: data[1]}, [2])[2] == parity[0]
    assert seen == ["begin", "end"] * 3
    assert parity == Code(CodeParams(2, 4)).encode(data)
