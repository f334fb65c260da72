"""The one border between request handlers and pyfuse3, which ends the mount on any foreign exception.

A handler may raise `PosixError`, a `Need`, or by mistake anything else.  Outside only `FUSEError`
arrives, and `trio.Cancelled` when the mount ends.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio

from qsfs.errors import DataLost, GenerationExpired, MayHaveExpired, QsfsError, Unavailable
from qsfs.filesystem.needs import Need
from qsfs.filesystem.posix import MAX_NAME, PosixError
from qsfs.fuse.interfaces import Waiter

log = logging.getLogger(__name__)

_ENDS = (trio.Cancelled, GeneratorExit, KeyboardInterrupt, SystemExit)
_TOLD_AGAIN = frozenset(10**power for power in range(1, 12))

_P = ParamSpec("_P")
_R = TypeVar("_R")


class RequestCounts:
    """How often each kind of request came, waited, and failed for a reason of our own."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        self.waits: dict[str, int] = {}
        self.waiting = 0
        self.unexpected = 0
        self.failures: dict[str, int] = {}
        self._causes: dict[tuple[str, type, object, int], int] = {}

    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())

    def failed(self, name: str, error: BaseException) -> int:
        """Counts an unexpected error in requests of kind `name`; returns how often its like came by now."""
        self.unexpected += 1
        self.failures[name] = self.failures.get(name, 0) + 1
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        cause = (name, type(error), place and place.tb_frame.f_code, place.tb_lineno if place else 0)
        self._causes[cause] = times = self._causes.get(cause, 0) + 1
        return times


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
                    await wait_for(self, name, need)
                return await handler(self, *args, **kwargs)
            except Need as raised:
                need = raised
            except PosixError as error:
                raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
            except (pyfuse3.FUSEError, *_ENDS):
                raise
            except BaseException as error:  # noqa: BLE001 (whatever it is, the mount lives)
                raise pyfuse3.FUSEError(translate(self.counts, name, error, args)) from None

    functools.update_wrapper(guarded, handler)
    return guarded


async def wait_for(handlers: Guarded, name: str, need: Need) -> None:
    """Satisfies a need of a request of kind `name`, and counts that it waits."""
    counts = handlers.counts
    counts.waits[name] = counts.waits.get(name, 0) + 1
    counts.waiting += 1
    try:
        await handlers.waiter.satisfy(need)
    finally:
        counts.waiting -= 1


def translate(counts: RequestCounts, name: str, error: BaseException, arguments: Sequence[object] = ()) -> int:
    """The error code for an exception that left handler `name`, logged and counted.

    A group counts as the first of its exceptions that says more than EIO.  What ends the program
    (a cancellation) is raised again.
    """
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, _ENDS):
            raise leaf
    for leaf in leaves:
        if isinstance(leaf, PosixError | pyfuse3.FUSEError):
            return leaf.errno or errno.EIO
    if all(isinstance(leaf, Unavailable | DataLost | GenerationExpired | MayHaveExpired) for leaf in leaves):
        # Whoever waited for the backends has said so, once for all the requests of one read.
        log.debug("%s failed: %s", name, leaves[0])
        return errno.EIO
    times = counts.failed(name, leaves[0])
    if all(isinstance(leaf, QsfsError) for leaf in leaves):
        for leaf in leaves:
            log.error("%s failed: %s: %s", name, type(leaf).__name__, leaf)
        return errno.EIO
    if times == 1:
        log.error("%s failed unexpectedly (%s)", name, ", ".join(_shown(arguments)), exc_info=error)
    elif times in _TOLD_AGAIN:
        log.error("%s failed unexpectedly, the same way for the %dth time: %r", name, times, leaves[0])
    for leaf in leaves:
        if isinstance(leaf, OSError) and leaf.errno:
            return leaf.errno
    return errno.EIO


def _shown(arguments: Sequence[object]) -> Iterator[str]:
    """What of a request's arguments helps to find it in a log: numbers and names, no contents."""
    for argument in arguments:
        if isinstance(argument, bytes):
            yield repr(argument) if len(argument) <= MAX_NAME else f"{len(argument)} bytes"
        elif isinstance(argument, int) or (isinstance(argument, list) and len(argument) == 1):
            yield repr(argument)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
