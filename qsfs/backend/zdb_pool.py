"""The connections to one 0-db: deadlines, cancellation, reconnecting.

A connection whose request is cancelled or late is closed and never used again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import trio

from qsfs.backend.link import Argument, Link, LinkBroken, Refusal, Reply, Target
from qsfs.clock import Clock
from qsfs.errors import BackendError, BackendFull, BackendRefused, BackendUnavailable, WrongBackend

T = TypeVar("T")

_BACKOFF_FIRST_S = 0.1
_BACKOFF_LONGEST_S = 5.0
_TRANSIENT = ("Cannot write", "Cannot delete key (", "Internal", "temporarily", "not available anymore")
_FULL = ("No space left",)
_NAMESPACE_GONE = "not available anymore"


def backend_error(name: str, refusal: str) -> BackendError:
    """What an error reply of a 0-db means: passing, final, or no room."""
    message = f"backend {name}: it answered: {refusal}"
    if any(part in refusal for part in _FULL):
        return BackendFull(f"{message}; raise the namespace's maxsize or add backends")
    if any(part in refusal for part in _TRANSIENT):
        return BackendUnavailable(message)
    return BackendRefused(f"{message}; check its namespace, passwords and rights")


class LinkPool:
    """Up to `connections` links to one target; `call` picks one, or waits for one to be free.

    After a failed connection further ones are refused at once for a while that doubles up to
    five seconds, so that a dead backend costs nothing.  Times in seconds.
    """

    def __init__(
        self,
        name: str,
        target: Target,
        *,
        clock: Clock,
        connections: int,
        call_timeout: float,
        connect_timeout: float,
    ) -> None:
        self.name = name
        self._target = target
        self._clock = clock
        self._call_timeout = call_timeout
        self._connect_timeout = min(connect_timeout, call_timeout)
        self._slots = trio.Semaphore(connections)
        self._threads = trio.CapacityLimiter(connections)
        self._expected: tuple[bytes, bytes] | None = None
        self._idle: list[Link] = []
        self._busy: set[Link] = set()
        self._closed = False
        self._failures = 0
        self._retry_at = -math.inf
        self._last_failure: BackendError | None = None

    async def call(self, *arguments: Argument) -> Reply:
        """One request on any link; raises `Refusal`, or what connecting raises."""
        with trio.move_on_after(self._call_timeout):
            try:
                self._slots.acquire_nowait()
            except trio.WouldBlock:
                await self._slots.acquire()
            try:
                link = await self._take()
                try:
                    reply = await self._ask(link, *arguments)
                except Refusal as refusal:
                    if _NAMESPACE_GONE in str(refusal):
                        link.close()
                    else:
                        self._give_back(link)
                    raise
                self._give_back(link)
                return reply
            finally:
                self._slots.release()
        raise self._late()

    @contextlib.asynccontextmanager
    async def dedicated(self) -> AsyncIterator[DedicatedLink]:
        """A link of one's own for the time of the block; raises what connecting raises."""
        threads = trio.CapacityLimiter(1)
        link = None
        with trio.move_on_after(self._call_timeout):
            link = await self._connect(threads)
        if link is None:
            raise self._late()
        dedicated = DedicatedLink(self, link)
        try:
            yield dedicated
        finally:
            dedicated.end()

    def expect(self, key: bytes, value: bytes | None) -> None:
        """See `Backend`.  Links that were made before are not used again."""
        expected = None if value is None else (key, value)
        if expected != self._expected:
            self._expected = expected
            self._failures = 0
            self._retry_at = -math.inf
            self._last_failure = None
            for link in self._idle:
                link.close()
            self._idle = []
            for link in self._busy:
                link.outdated = True

    async def aclose(self) -> None:
        """Closes every link; calls under way fail."""
        self._closed = True
        for link in self._idle:
            link.close()
        self._idle = []
        for link in self._busy:
            link.close()
        await trio.lowlevel.checkpoint()

    async def _take(self) -> Link:
        while self._idle:
            link = self._idle.pop()
            if not link.is_stale():
                return link
            link.close()
        return await self._connect(self._threads)

    def _give_back(self, link: Link) -> None:
        if self._closed or link.outdated:
            link.close()
        else:
            self._idle.append(link)

    async def _connect(self, threads: trio.CapacityLimiter) -> Link:
        if self._closed:
            raise BackendUnavailable(f"backend {self.name}: it was closed here")
        now = trio.current_time()
        if self._last_failure is not None and now < self._retry_at:
            raise type(self._last_failure)(
                f"{self._last_failure} (not tried again for {self._retry_at - now:.1f} s)"
            )
        link = Link(self._target)
        try:
            await self._guarded(link, link.connect(threads, self._connect_timeout))
            await self._recognise(link)
        except Refusal as refusal:
            error = backend_error(self.name, str(refusal))
            self._note_failure(error)
            raise error from None
        except (BackendUnavailable, WrongBackend) as error:
            self._note_failure(error)
            raise
        self._failures = 0
        self._last_failure = None
        return link

    async def _recognise(self, link: Link) -> None:
        """Raises `WrongBackend` unless the link leads to what is expected."""
        if self._expected is None:
            return
        key, value = self._expected
        try:
            found = await self._ask(link, "GET", key)
        except Refusal:
            link.close()
            raise
        if found != value:
            link.close()
            what = "has lost the record by which it is known" if found is None else "is known by another record"
            raise WrongBackend(
                f"backend {self.name}: {what}: it was re-created, emptied or swapped since it was asked last"
            )

    async def _ask(self, link: Link, *arguments: Argument) -> Reply:
        return await self._guarded(link, link.call(*arguments))

    async def _guarded(self, link: Link, call: Awaitable[T]) -> T:
        self._busy.add(link)
        try:
            return await call
        except LinkBroken as failure:
            raise BackendUnavailable(f"backend {self.name}: {failure}") from failure
        finally:
            self._busy.discard(link)

    def _note_failure(self, error: BackendError) -> None:
        now = trio.current_time()
        if now >= self._retry_at:
            longest = min(_BACKOFF_LONGEST_S, _BACKOFF_FIRST_S * 2.0 ** min(self._failures, 16))
            self._retry_at = now + longest * (0.5 + self._clock.random_bytes(1)[0] / 512)
            self._failures += 1
        self._last_failure = error

    def _late(self) -> BackendUnavailable:
        return BackendUnavailable(f"backend {self.name}: no answer within {self._call_timeout:g} s")


class DedicatedLink:
    """One link that is not replaced: after a break, or a call that was cut short, every call fails."""

    def __init__(self, pool: LinkPool, link: Link) -> None:
        self._pool = pool
        self._link = link
        self._turn = trio.Lock()
        self._broken = False

    async def call(self, *arguments: Argument) -> Reply:
        """One request; calls wait for one another.  Raises `Refusal` or `BackendUnavailable`."""
        pool, link = self._pool, self._link
        with trio.move_on_after(pool._call_timeout):
            async with self._turn:
                if self._broken:
                    raise BackendUnavailable(f"backend {pool.name}: this session's connection is lost")
                self._broken = True
                try:
                    reply = await pool._ask(link, *arguments)
                except Refusal:
                    self._broken = False
                    raise
                self._broken = False
                return reply
        raise pool._late()

    def end(self) -> None:
        """Closes the link."""
        self._broken = True
        self._link.close()
