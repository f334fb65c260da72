"""Retrying calls whose outcome is unknown: with jitter, a bound on tries, and a shared budget.

Only `BackendUnavailable` is retried.  Every call of the contract may be repeated: storing the same
bytes twice is one store.  A repeated `delete` may answer that the key was absent because an earlier
try, whose answer was lost, deleted it.  Calls in a session are not retried: a session that broke
stays broken.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from qsfs.backend.contract import Backend
from qsfs.backend.wrapper import Call, Unchanged, WrappedBackend
from qsfs.clock import Clock
from qsfs.errors import BackendUnavailable

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """At most `tries` tries; the n-th pause is random up to `first_pause` * 2^(n-1), at most `longest_pause`.

    Pauses are in seconds of trio's clock.
    """

    tries: int = 3
    first_pause: float = 0.1
    longest_pause: float = 5.0


class RetryBudget:
    """Bounds retries to a share of the calls, so that a general outage is not answered with a storm.

    Every first try earns `share` of a retry, up to `reserve` in store; every retry costs one.
    One budget may serve many backends.
    """

    def __init__(self, share: float = 0.2, reserve: float = 20.0) -> None:
        self._share = share
        self._reserve = reserve
        self._left = reserve

    def earn(self) -> None:
        """Notes a first try."""
        self._left = min(self._reserve, self._left + self._share)

    def spend(self) -> bool:
        """Takes one retry from the budget; `False` if there is none left."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class _Retry:
    def __init__(self, policy: RetryPolicy, budget: RetryBudget, clock: Clock) -> None:
        self._policy = policy
        self._budget = budget
        self._clock = clock

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        self._budget.earn()
        tried = 1
        while True:
            try:
                return await run()
            except BackendUnavailable:
                if tried >= self._policy.tries or not self._budget.spend():
                    raise
            await trio.sleep(self._pause(tried))
            tried += 1

    def _pause(self, tried: int) -> float:
        longest = min(self._policy.longest_pause, self._policy.first_pause * 2.0 ** (tried - 1))
        return longest * int.from_bytes(self._clock.random_bytes(4), "little") / 2**32


def with_retry(
    backend: Backend,
    clock: Clock,
    policy: RetryPolicy | None = None,
    budget: RetryBudget | None = None,
) -> Backend:
    """`backend`, whose calls are tried again as `policy` and `budget` allow."""
    retry = _Retry(policy or RetryPolicy(), budget or RetryBudget(), clock)
    return WrappedBackend(backend, retry, Unchanged)
