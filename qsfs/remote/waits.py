"""Reads that wait for backends, as `status` shows them and `qsfs unblock` ends them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

_FORGET_FROM = 1000


@dataclass(eq=False, slots=True)
class Wait:
    """One reader of pages that are only remote.

    `keeps_waiting` is its policy: True for `wait`, False for `error` after the deadline.  `again` is
    whether it asks for what has just failed, and was logged then.  `why` says what is in the way, as of now;
    `path` is the file's, once the log has named it.
    """

    inode: int
    first: int
    count: int
    since_ns: int
    keeps_waiting: bool
    began: float
    again: bool = False
    explain: Callable[[], str] = field(default=lambda: "")
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    unblocked: bool = False
    path: str = ""

    @property
    def seconds(self) -> float:
        """How long it has waited."""
        return trio.current_time() - self.began

    @property
    def why(self) -> str:
        """What is in the way."""
        return self.explain()


class Waits:
    """All reads that wait now."""

    def __init__(self) -> None:
        self._waits: dict[Wait, None] = {}

    def __iter__(self) -> Iterator[Wait]:
        return iter(list(self._waits))

    def __len__(self) -> int:
        return len(self._waits)

    @contextmanager
    def during(self, wait: Wait) -> Iterator[Wait]:
        """Lists `wait` for the time of a `with` block."""
        self._waits[wait] = None
        try:
            yield wait
        finally:
            del self._waits[wait]

    def unblock(self, inode: int | None) -> int:
        """Ends the waits of one file (None: all); returns how many."""
        ended = [wait for wait in self._waits if inode in (None, wait.inode)]
        for wait in ended:
            wait.unblocked = True
            wait.scope.cancel()
        return len(ended)


class SaidLately:
    """What people were told lately, so that it is not said for each page."""

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}
        self._most = _FORGET_FROM

    def again(self, what: Hashable, seconds: float) -> bool:
        """Whether it was said already; if not it is now, for so many seconds."""
        now = trio.current_time()
        if now < self._until.get(what, 0.0):
            return True
        self._until[what] = now + seconds
        if len(self._until) >= self._most:
            self._until = {known: until for known, until in self._until.items() if until > now}
            self._most = max(_FORGET_FROM, 2 * len(self._until))
        return False
