"""What a backend did lately: calls, bytes, latencies, errors; what health and fetch decide by."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from qsfs.backend.contract import Backend
from qsfs.backend.wrapper import Call, WrappedBackend, download_bytes
from qsfs.errors import BackendError

T = TypeVar("T")

_WINDOW = 256


@dataclass
class Metrics:
    """Counters of one backend since the process started; latencies of the last 256 calls of each kind.

    Times are trio's, in seconds; bytes are those of keys and values.  `calls` counts by kind of
    call, `errors` by class of error.
    """

    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    received_bytes: int = 0
    in_flight: int = 0
    last_error: str = ""
    last_error_at: float | None = None
    last_success_at: float | None = None
    _latencies: dict[str, deque[float]] = field(default_factory=dict)

    def percentile(self, kind: str, share: float) -> float | None:
        """The latency that `share` (0 to 1) of the recent calls of `kind` did not exceed.

        Only calls that were answered count.  `None` if there were none.
        """
        window = sorted(self._latencies.get(kind, ()))
        return window[min(len(window) - 1, int(len(window) * share))] if window else None

    def p50(self, kind: str) -> float | None:
        """The median latency of `kind`."""
        return self.percentile(kind, 0.5)

    def p95(self, kind: str) -> float | None:
        """The latency that one call of `kind` in twenty exceeds."""
        return self.percentile(kind, 0.95)

    def note_latency(self, kind: str, seconds: float) -> None:
        """Adds one answered call of `kind`."""
        self._latencies.setdefault(kind, deque(maxlen=_WINDOW)).append(seconds)


class _Meter:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        metrics = self._metrics
        begun = trio.current_time()
        metrics.calls[call.kind] += 1
        metrics.in_flight += 1
        try:
            result = await run()
        except BackendError as error:
            metrics.errors[type(error).__name__] += 1
            metrics.last_error = str(error)
            metrics.last_error_at = trio.current_time()
            raise
        finally:
            metrics.in_flight -= 1
        now = trio.current_time()
        metrics.note_latency(call.kind, now - begun)
        metrics.last_success_at = now
        metrics.sent_bytes += call.upload_bytes
        metrics.received_bytes += download_bytes(result)
        return result


def with_metrics(backend: Backend, metrics: Metrics) -> Backend:
    """`backend`, whose calls are counted and timed in `metrics`."""
    return WrappedBackend(backend, _Meter(metrics))
