"""`[mount] fsync = "written"`: an fsync returns once a published head has what it covers.

The local disk comes first, as without this.  Then the fsync waits for a generation that is cut after
it; all that came before the cut share it, and the next cut follows at once for those that came later.
No wait is silent: it shows in `status`, in the log when it gets long, and `qsfs unblock` ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.errors import QsfsError, Unavailable
from qsfs.fuse.interfaces import Durability

_log = logging.getLogger(__name__)

LATE_SECONDS = 10.0
"""An fsync that waits for longer is told in the log, and ended by an unmount."""
_LOOK_SECONDS = 2.0


@dataclass(eq=False)
class _Wait:
    inode: int
    since: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class WrittenDurability:
    """Durability at class written, over that of this machine's disk.

    `published` returns when a published head has everything accepted before it was called; `stays_here`
    tells of which inodes no generation holds the data; `why` says what a wait is for.
    """

    def __init__(
        self,
        local: Durability,
        published: Callable[[], Awaitable[None]],
        stays_here: Callable[[int], bool],
        why: Callable[[], str],
        clock: Clock,
    ) -> None:
        self.ended = 0
        self._local = local
        self._published = published
        self._stays_here = stays_here
        self._why = why
        self._clock = clock
        self._waits: set[_Wait] = set()
        self._told = False

    async def sync(self, number: int, data_only: bool) -> None:
        """Returns when the inode's writes received so far are durable here and in a published head.

        Of a file that stays local: here.  Raises `Unavailable` if the wait for backends was ended or
        this mount does not publish any more; the local disk has them even then.
        """
        await self._local.sync(number, data_only)
        if not self._stays_here(number):
            await self._wait(number)

    async def sync_namespace(self) -> None:
        """Returns when all namespace operations received so far are; raises as `sync`."""
        await self._local.sync_namespace()
        await self._wait(0)

    async def _wait(self, number: int) -> None:
        wait = _Wait(number, self._clock.monotonic())
        self._waits.add(wait)
        try:
            with wait.scope:
                try:
                    await self._published()
                except QsfsError as error:
                    self.ended += 1
                    raise Unavailable(f"fsync: no head has it, this machine's disk has: {error}") from error
                return
            self.ended += 1
            raise Unavailable("fsync: the wait for backends was ended; this machine's disk has it")
        finally:
            self._waits.discard(wait)

    @property
    def waiting(self) -> bool:
        """Whether any fsync waits now."""
        return bool(self._waits)

    def unblock(self, inode: int | None = None, *, older_than: float = 0.0) -> int:
        """Ends waits with an error to whoever waits: all, or of one inode, or old ones; returns how many."""
        now = self._clock.monotonic()
        found = [
            wait
            for wait in self._waits
            if inode in (None, wait.inode) and now - wait.since >= older_than and not wait.scope.cancel_called
        ]
        for wait in found:
            wait.scope.cancel()
        if found:
            _log.warning("%d fsyncs that waited for backends were ended with EIO; they are durable locally", len(found))
        return len(found)

    async def run(self) -> None:
        """Tells in the log when backends keep fsyncs waiting, and when they do not any more."""
        while True:
            self.look()
            await trio.sleep(_LOOK_SECONDS)

    def look(self) -> None:
        """Logs once that fsyncs are late, and once that none is any more."""
        report = self.report()
        late = report["oldest_seconds"] >= LATE_SECONDS
        if late and not self._told:
            _log.warning(
                "%d fsyncs wait for a published head, the longest for %.0f s: %s; bring backends back, or "
                "'qsfs unblock' ends them with EIO",
                report["waiting"],
                report["oldest_seconds"],
                report["why"],
            )
        elif self._told and not late:
            _log.info("no fsync waits for long any more")
        self._told = late

    def report(self) -> dict[str, Any]:
        """How many wait, the longest for how many seconds, what for, and how many ended with an error."""
        now = self._clock.monotonic()
        oldest = max((now - wait.since for wait in self._waits), default=0.0)
        return {
            "waiting": len(self._waits),
            "oldest_seconds": round(oldest, 1),
            "why": self._why() if self._waits else "",
            "ended": self.ended,
        }
