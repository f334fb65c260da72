"""Virtual time for code that uses worker threads: it runs ahead only while nothing is at work.

Trio's own `MockClock` jumps once all tasks wait, also for a thread: then a deadline passes on a busy
machine that has not passed on a quiet one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock


@contextlib.contextmanager
def virtual_time() -> Iterator[MockClock]:
    """A clock that jumps to the next deadline when every task waits and no worker thread runs."""
    clock = MockClock(autojump_threshold=0)
    run_sync = trio.to_thread.run_sync
    running = 0

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal running
        running += 1
        clock.autojump_threshold = math.inf
        try:
            return await run_sync(*arguments, **options)
        finally:
            running -= 1
            if not running:
                clock.autojump_threshold = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", counted)
        yield clock
