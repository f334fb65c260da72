"""Time and randomness, injected: logic never asks the operating system itself.

`Clock` is the only source of wall time, running time and random bytes.  The daemon uses
`SystemClock`; tests and simulations pass `FixedClock`, or one bound to trio's virtual clock.
"""

from __future__ import annotations

import os
import random
import time
from typing import Protocol

_REALTIME_COARSE = 5  # CLOCK_REALTIME_COARSE of linux/time.h, which `time` does not name


class Clock(Protocol):
    """Wall time, running time and random bytes."""

    def time_ns(self) -> int:
        """Nanoseconds since the epoch (wall time; may step)."""
        ...

    def monotonic(self) -> float:
        """Seconds of running time; never steps backwards."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """`count` unpredictable bytes."""
        ...


class SystemClock:
    """The operating system's clocks and random source."""

    def time_ns(self) -> int:
        """Wall time in nanoseconds, by the clock that the kernel stamps files with.

        A finer one would be ahead of it by a tick, and the kernel's next stamp of a file behind ours.
        """
        return time.clock_gettime_ns(_REALTIME_COARSE)

    def monotonic(self) -> float:
        """Running time in seconds."""
        return time.monotonic()

    def random_bytes(self, count: int) -> bytes:
        """Bytes from the kernel's generator."""
        return os.urandom(count)


class FixedClock:
    """A clock that moves only when told to, with a seeded generator: for tests and vectors."""

    def __init__(self, seed: int = 0, time_ns: int = 1_700_000_000_000_000_000) -> None:
        self._random = random.Random(seed)
        self._time_ns = time_ns
        self._monotonic = 0.0

    def advance(self, seconds: float) -> None:
        """Moves both clocks forward by `seconds`."""
        self._time_ns += int(seconds * 1e9)
        self._monotonic += seconds

    def time_ns(self) -> int:
        """The set wall time."""
        return self._time_ns

    def monotonic(self) -> float:
        """Seconds advanced so far."""
        return self._monotonic

    def random_bytes(self, count: int) -> bytes:
        """The next bytes of the seeded generator."""
        return self._random.randbytes(count)
