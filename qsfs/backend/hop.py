"""One blocking call on a worker thread, at as little cost to the event loop as trio allows.

`trio.to_thread.run_sync` gives each call's thread a name, a copied context and a limiter's turn: of the
CPU that a small call to a backend takes, a sixth (docs/performance.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar, cast

import outcome
import trio

T = TypeVar("T")


async def in_thread(action: Callable[[], T]) -> T:
    """What `action` returns or raises, run on one of trio's cached worker threads.

    Nothing bounds the number of threads: the caller does.  Who is cancelled goes on at once, and what
    `action` comes to is forgotten; the caller sees to it that it ends soon.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()
    token = trio.lowlevel.current_trio_token()
    waiting = True

    def report(result: outcome.Outcome[T]) -> None:
        if waiting:
            trio.lowlevel.reschedule(task, result)

    def deliver(result: outcome.Outcome[T]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(report, result)

    def abort(_: object) -> trio.lowlevel.Abort:
        nonlocal waiting
        waiting = False
        return trio.lowlevel.Abort.SUCCEEDED

    trio.lowlevel.start_thread_soon(action, deliver)
    return cast("T", await trio.lowlevel.wait_task_rescheduled(abort))
