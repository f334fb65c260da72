"""The one border between request handlers and pyfuse3, which ends the mount on any foreign exception.

A handler may raise `PosixError`, a `Need`, or by mistake anything else.  Outside only `FUSEError`
arrives, and `trio.Cancelled` when the mount ends.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from qsfs.errors import DataLost, QsfsError, Unavailable
from qsfs.filesystem.needs import Need
from qsfs.filesystem.posix import PosixError
from qsfs.fuse.interfaces import Waiter

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")


class RequestCounts:
    """How often each kind of request came, waited, and failed for a reason of our own."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        self.waits: dict[str, int] = {}
        self.waiting = 0
        self.unexpected = 0

    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())


class Guarded(Protocol):
    """What an object needs whose methods are request handlers."""

    counts: RequestCounts
    waiter: Waiter


_G = TypeVar("_G", bound=Guarded)


def request(
    handler: Callable[Concatenate[_G, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[_G, _P], Coroutine[Any, Any, _R]]:
    """Makes a method a request handler: counts it, satisfies its needs, translates its errors.

    After a `Need` was satisfied the whole handler runs again, so it must raise one only before it
    has changed anything that must not be changed twice.  Nothing here suspends unless it waits.
    """
    name = handler.__name__.lstrip("_")

    async def guarded(self: _G, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        requests = self.counts.requests
        requests[name] = requests.get(name, 0) + 1
        need: Need | None = None
        while True:
            try:
                if need is not None:
                    await _wait(self, name, need)
                return await handler(self, *args, **kwargs)
            except Need as raised:
                need = raised
            except PosixError as error:
                raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
            except pyfuse3.FUSEError:
                raise
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 (whatever it is, the mount lives)
                raise pyfuse3.FUSEError(translate(self.counts, name, error)) from None

    functools.update_wrapper(guarded, handler)
    return guarded


async def _wait(handlers: Guarded, name: str, need: Need) -> None:
    counts = handlers.counts
    counts.waits[name] = counts.waits.get(name, 0) + 1
    counts.waiting += 1
    try:
        await handlers.waiter.satisfy(need)
    finally:
        counts.waiting -= 1


def translate(counts: RequestCounts, name: str, error: BaseException) -> int:
    """The error code for an exception that left handler `name`, logged and counted.

    A group counts as the first of its exceptions that says more than EIO.  What is no `Exception`
    at all (a cancellation) is raised again.
    """
    leaves = list(_leaves(error))
    if not all(isinstance(leaf, Exception) for leaf in leaves):
        raise error
    for leaf in leaves:
        if isinstance(leaf, PosixError | pyfuse3.FUSEError):
            return leaf.errno or errno.EIO
    if all(isinstance(leaf, Unavailable | DataLost) for leaf in leaves):
        # Whoever waited for the backends has said so, once for all the requests of one read.
        log.debug("%s failed: %s", name, leaves[0])
        return errno.EIO
    counts.unexpected += 1
    if all(isinstance(leaf, QsfsError) for leaf in leaves):
        for leaf in leaves:
            log.error("%s failed: %s: %s", name, type(leaf).__name__, leaf)
        return errno.EIO
    log.error("%s failed unexpectedly", name, exc_info=error)
    for leaf in leaves:
        if isinstance(leaf, OSError) and leaf.errno:
            return leaf.errno
    return errno.EIO


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
