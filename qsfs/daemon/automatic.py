"""Automatic snapshots: made at intervals while the file system is mounted, and pruned by the rules."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from qsfs.clock import Clock
from qsfs.config import SnapshotsConfig
from qsfs.errors import DeadlineExceeded, Fenced, QsfsError
from qsfs.remote.pinning import Pinning
from qsfs.remote.retention import Rules, automatic_name, seconds_until_due, surplus

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 60.0


class AutomaticSnapshots:
    """Makes them for one mount that owns the file system.  `problem` is why the last one could not be made."""

    def __init__(
        self, config: SnapshotsConfig, pinning: Pinning, clock: Clock, hand_over: Callable[[], Awaitable[None]]
    ) -> None:
        """`hand_over` has the kernel hand over what it holds."""
        self.problem = ""
        self._hand_over = hand_over
        self._every = config.every_seconds
        self._rules = Rules(config.keep_last, config.hourly, config.daily, config.weekly)
        self._pinning = pinning
        self._clock = clock

    async def run(self) -> None:
        """Makes one whenever it is due, until flushing ends; returns at once where none are wanted.

        What is due is seen by the wall clock, or by running time where the wall clock was set back.
        """
        if not self._every:
            return
        tried = self._clock.monotonic()
        while True:
            ran = self._clock.monotonic() - tried
            wait = seconds_until_due(self._pinning.snapshots, self._every, self._clock.time_ns())
            wait = min(wait, max(0.0, self._every - ran))
            if wait > 0:
                await trio.sleep(min(wait, _LOOK_SECONDS))
                continue
            tried = self._clock.monotonic()
            try:
                await self.make()
                self.problem = ""
            except (Fenced, DeadlineExceeded):
                return
            except QsfsError as error:
                if str(error) != self.problem:
                    _log.error("no automatic snapshot was made: %s", error)
                self.problem = str(error)
                await trio.sleep(_LOOK_SECONDS)

    async def make(self) -> None:
        """Makes one, and deletes those that no rule keeps any more.  Waits for backends as long as it takes.

        Raises what making a snapshot raises.
        """
        await self._hand_over()
        name = automatic_name(self._clock.time_ns())
        await self._pinning.pinned(await self._pinning.cut(name))
        gone = surplus(self._pinning.snapshots, self._rules)
        if gone:
            await self._pinning.unpin(gone)
        _log.info("snapshot %s was made%s", name, f", and {', '.join(gone)} deleted" if gone else "")
