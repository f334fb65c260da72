"""How long each backend takes to answer, and when an answer is late."""

from __future__ import annotations

from collections import deque

LEAST_SECONDS = 0.05
"""No answer is late before this."""
MOST_SECONDS = 3.0
"""Every answer is late after this: a backend that is always slow must not use up a reader's deadline."""
UNKNOWN_SECONDS = 0.25
"""When an answer of a backend that has not answered often enough is late."""

_SAMPLES = 64
_ENOUGH = 8


class Latencies:
    """The last answers' times of each backend, by number, in seconds."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._late: dict[int, float] = {}

    def note(self, member: int, seconds: float) -> None:
        """Records how long one answer took."""
        self._samples.setdefault(member, deque(maxlen=_SAMPLES)).append(seconds)
        self._late.pop(member, None)

    def late_after(self, member: int) -> float:
        """The 95th percentile of its answers within `LEAST_SECONDS` and `MOST_SECONDS`: then others are asked too."""
        known = self._late.get(member)
        if known is None:
            samples = sorted(self._samples.get(member, ()))
            if len(samples) < _ENOUGH:
                known = UNKNOWN_SECONDS
            else:
                known = min(MOST_SECONDS, max(LEAST_SECONDS, samples[(len(samples) * 95) // 100]))
            self._late[member] = known
        return known

    def typical(self, member: int) -> float:
        """Its median answer, for choosing the fastest; 0 where nothing is known, so that it is tried."""
        samples = sorted(self._samples.get(member, ()))
        return samples[len(samples) // 2] if samples else 0.0
