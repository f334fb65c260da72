"""A blocking call on a worker thread: its result, its error, and a caller who no longer waits."""

from __future__ import annotations

import threading

import pytest
import trio

from qsfs.backend.hop import in_thread


async def test_it_comes_back_with_what_the_action_returns_or_raises() -> None:
    assert await in_thread(lambda: threading.current_thread() is threading.main_thread()) is False

    def fail() -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        await in_thread(fail)


async def test_who_is_cancelled_goes_on_at_once_and_gets_nothing_later() -> None:
    """The action goes on; what it comes to must wake nobody, least of all in a later wait."""
    begun, end, ended = trio.Event(), threading.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def action() -> str:
        token.run_sync_soon(begun.set)
        end.wait()
        return "late"

    async with trio.open_nursery() as nursery:

        async def call() -> None:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_begun, scope)
                await in_thread(action)
            assert scope.cancelled_caught
            end.set()
            assert await in_thread(lambda: "next") == "next"
            token.run_sync_soon(ended.set)
            await ended.wait()

        async def cancel_when_begun(scope: trio.CancelScope) -> None:
            await begun.wait()
            scope.cancel()

        nursery.start_soon(call)


async def test_who_is_cancelled_before_begins_nothing() -> None:
    done: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_thread(lambda: done.append(1))
    assert scope.cancelled_caught
    assert not done
