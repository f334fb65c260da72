"""Byte-rate limits per direction, shared by all backends, and a bound on calls at a time."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import trio

from qsfs.backend.contract import Backend
from qsfs.backend.wrapper import Call, WrappedBackend, download_bytes

T = TypeVar("T")

_BURST_S = 0.25
_SHORTEST_S = 0.001


@dataclass(slots=True)
class _Paid:
    """What a task has paid to a limit in advance."""

    limit: RateLimit
    left: int


_paid: ContextVar[_Paid | None] = ContextVar("paid", default=None)


class RateLimit:
    """A token bucket of bytes, by trio's clock: first come, first served.

    Saves up a quarter of a second's worth.  `rate` is in bytes a second, 0 for no limit, and may be
    changed at any time.  A transfer starts as soon as the bucket is not empty and may overdraw it:
    values larger than the bucket pass, and the average holds.

    Whoever gives a call a deadline waits for its `turn` first: what a limit holds up is not late.
    """

    def __init__(self, rate: float = 0) -> None:
        self._rate = float(rate)
        self._level = self._rate * _BURST_S
        self._at = -math.inf
        self._turn = trio.StrictFIFOLock()
        self._changed = trio.Event()

    @property
    def rate(self) -> float:
        """Bytes a second; 0: no limit."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._refill()
        self._rate = float(rate)
        self._level = min(self._level, self._rate * _BURST_S)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @asynccontextmanager
    async def turn(self, expected: int) -> AsyncIterator[None]:
        """Waits for the bucket and pays `expected` bytes; what calls of this task are charged in the block counts
        against them, without another wait.  At its end what was not needed goes back.
        """
        await self.take(expected)
        paid = _Paid(self, expected if self._rate > 0 else 0)
        token = _paid.set(paid)
        try:
            yield
        finally:
            _paid.reset(token)
            if paid.left:
                self._level += paid.left
                self._tell()

    @property
    def waits(self) -> bool:
        """Whether a transfer that comes now would have to wait."""
        self._refill()
        return self._rate > 0 and (self._level < 0 or self._turn.locked())

    async def take(self, count: int) -> None:
        """Waits for the bucket, then takes `count` bytes from it."""
        await self.wait()
        self.charge(count)

    async def wait(self) -> None:
        """Waits until the bucket is not overdrawn."""
        paid = _paid.get()
        if self._rate <= 0 or (paid is not None and paid.limit is self):
            return
        async with self._turn:
            self._refill()
            while self._rate > 0 and self._level < 0:
                changed = self._changed
                # A pause that rounds to nothing would never end.
                with trio.move_on_after(max(_SHORTEST_S, -self._level / self._rate)):
                    await changed.wait()
                self._refill()

    def charge(self, count: int) -> None:
        """Takes `count` bytes from the bucket at once, overdrawing it if need be."""
        paid = _paid.get()
        if paid is not None and paid.limit is self:
            covered = min(paid.left, count)
            paid.left -= covered
            count -= covered
        if self._rate > 0:
            self._refill()
            self._level -= count

    def _refill(self) -> None:
        now = trio.current_time()
        if self._rate > 0 and now > self._at:
            filled = self._level + (now - self._at) * self._rate
            self._level = min(self._rate * _BURST_S, filled)
        self._at = now


class _Limits:
    def __init__(
        self,
        upload: RateLimit | None,
        download: RateLimit | None,
        concurrency: trio.Semaphore | None,
        waits: bool,
    ) -> None:
        self._upload = upload
        self._download = download
        self._concurrency = concurrency
        self._waits = waits

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        if self._upload is not None and call.upload_bytes:
            if self._waits:
                await self._upload.wait()
            self._upload.charge(call.upload_bytes)
        if self._download is not None and call.kind == "get" and self._waits:
            await self._download.wait()
        if call.kind == "session" or self._concurrency is None:
            result = await run()
        else:
            async with self._concurrency:
                result = await run()
        if self._download is not None:
            self._download.charge(download_bytes(result))
        return result


def with_limits(
    backend: Backend,
    *,
    upload: RateLimit | None = None,
    download: RateLimit | None = None,
    concurrency: trio.Semaphore | None = None,
    waits: bool = True,
) -> Backend:
    """`backend`, held to the given rates and to `concurrency` calls at a time.

    All three may be shared between backends.  Only `get` waits for the download rate; what was
    received, by any call, is charged when it has come.  Without `waits` no call is held up by a rate, and
    all are charged, which others then wait for.
    """
    return _Limited(backend, upload, download, concurrency, waits)


@dataclass(frozen=True, slots=True)
class Rates:
    """The limits that a backend is held to."""

    upload: RateLimit
    download: RateLimit


class _Limited(WrappedBackend):
    def __init__(
        self,
        inner: Backend,
        upload: RateLimit | None,
        download: RateLimit | None,
        concurrency: trio.Semaphore | None,
        waits: bool,
    ) -> None:
        super().__init__(inner, _Limits(upload, download, concurrency, waits))
        self.rates = Rates(upload or _NO_LIMIT, download or _NO_LIMIT)


_NO_LIMIT = RateLimit()
_NO_LIMITS = Rates(_NO_LIMIT, _NO_LIMIT)


def rates_of(backend: Backend) -> Rates:
    """The limits that `backend` is held to itself; none if it is not, or what wraps it hides them."""
    return backend.rates if isinstance(backend, _Limited) else _NO_LIMITS
