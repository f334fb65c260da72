"""A shorter request loop for pyfuse3: it asks the event loop only when there is nothing to read.

As installed, pyfuse3 goes through trio's event loop twice for each request: for its lock, and to
wait for the descriptor.  It takes `trio` from its own module, so what is put there instead decides
how it waits.  `ShortLoop` first polls the descriptor, and spins for some microseconds if requests
came in quick succession lately, since a synchronous caller's next request follows the last answer
closely.  A spin that found nothing is paid for by several short waits before the next, so where the
processors are busy with other things it soon ends.

What it keeps: nothing runs between the poll that found a request and the read of it, which would
block the thread otherwise; after a wake-up it polls again; one task at a time waits for the
descriptor; after `TURN_SECONDS` without a pause all other tasks get a turn, always before pyfuse3
looks whether the session has ended.
"""

from __future__ import annotations

import logging
import select
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import pyfuse3
import trio

log = logging.getLogger(__name__)

SPIN_SECONDS = 30e-6
"""How long to wait for a next request without giving up the processor."""

TURN_SECONDS = 500e-6
"""How long requests may be answered without other tasks getting a turn."""

_SHORT_SECONDS = 100e-6
"""A wait that would have been short enough to spin through, had the event loop not been asked."""

_MOST_CREDIT = 8
_FAILURE_COSTS = 4
_VERSION = "3.5."
_in_use: list[ShortLoop] = []


@contextmanager
def installed(enabled: bool = True) -> Iterator[bool]:
    """Within the block pyfuse3 uses the shorter loop; yields whether it does.

    A pyfuse3 of another version than the one that this was written for keeps its own.
    """
    usable = enabled and pyfuse3.__version__.startswith(_VERSION) and getattr(pyfuse3, "trio", None) is trio
    if enabled and not usable:
        log.info("pyfuse3 %s keeps its own request loop", pyfuse3.__version__)
    if not usable:
        yield False
        return
    module: Any = pyfuse3
    module.trio = short_loop = ShortLoop()
    _in_use.append(short_loop)
    try:
        yield True
    finally:
        module.trio = trio
        _in_use.remove(short_loop)


def nothing_waits() -> bool:
    """Whether the kernel has no further request for us just now; without the shorter loop nobody knows."""
    return bool(_in_use) and not any(short_loop.lowlevel.is_readable() for short_loop in _in_use)


class ShortLoop:
    """What pyfuse3 finds under the name `trio`: its own lock and wait, everything else trio's."""

    def __init__(self, spin_seconds: float = SPIN_SECONDS, turn_seconds: float = TURN_SECONDS) -> None:
        self._turn_seconds = turn_seconds
        self.lowlevel = _LowLevel(spin_seconds)

    def Lock(self) -> ReadLock:
        """The lock that a worker holds while it waits for a request."""
        return ReadLock(self._turn_seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class ReadLock:
    """An unfair lock: a worker that comes back at once goes on; another is called in any case.

    The one that is called runs when the holder pauses, which it does when its request has to wait.
    So as long as no request waits, one worker answers all of them.
    """

    def __init__(self, turn_seconds: float) -> None:
        self._turn_seconds = turn_seconds
        self._turn_ends = 0.0
        self._held = False
        self._called = False
        self._waiting: OrderedDict[trio.lowlevel.Task, None] = OrderedDict()

    async def __aenter__(self) -> None:
        # With nobody waiting, a worker may have been started that must get to run and wait here.
        if not (self._waiting or self._called) or perf_counter() >= self._turn_ends:
            await trio.lowlevel.checkpoint()
            self._turn_ends = perf_counter() + self._turn_seconds
        while self._held:
            await self._wait()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        if self._waiting and not self._called:
            task = self._waiting.popitem(last=False)[0]
            self._called = True
            trio.lowlevel.reschedule(task)

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()
        self._waiting[task] = None

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiting[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._called = False


class _LowLevel:
    """`trio.lowlevel` with another `wait_readable`."""

    def __init__(self, spin_seconds: float) -> None:
        self._spin_seconds = spin_seconds
        self._credit = 0
        self._polls: dict[int, select.poll] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    def is_readable(self) -> bool:
        """Whether one of the descriptors that were waited for can be read."""
        return any(poll.poll(0) for poll in self._polls.values())

    async def wait_readable(self, descriptor: int) -> None:
        """Returns when `descriptor` can be read, without a pause if that is soon."""
        poll = self._polls.get(descriptor)
        if poll is None:
            poll = self._polls[descriptor] = select.poll()
            poll.register(descriptor, select.POLLIN)
        if poll.poll(0):
            return
        began = perf_counter()
        spins = self._credit > 0
        if spins:
            while perf_counter() - began < self._spin_seconds:
                if poll.poll(0):
                    self._credit = min(self._credit + 1, _MOST_CREDIT)
                    return
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            if poll.poll(0):
                break
        if spins:
            self._credit -= _FAILURE_COSTS
        elif perf_counter() - began < _SHORT_SECONDS:
            self._credit += 1
