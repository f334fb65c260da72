"""How a mount stops: told by a signal or a command, it unmounts, or ends a start that waits."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from qsfs.daemon import mountpoint
from qsfs.daemon.notify import notify
from qsfs.errors import MountError

_log = logging.getLogger(__name__)

_BUSY_TRIES_SECONDS = 0.1


class Stopping:
    """The stop of one mount."""

    def __init__(self, path: Path, end_waits: Callable[[], None]) -> None:
        """It is mounted on `path`; `end_waits` ends what an application may wait for, before each try to unmount."""
        self._path = path
        self._end_waits = end_waits
        self._told = trio.Event()
        self._start: trio.CancelScope | None = None

    def stop(self) -> None:
        """Begins to stop; a start that waits ends at once."""
        self._told.set()
        if self._start is not None:
            self._start.cancel()

    @contextlib.contextmanager
    def start_scope(self) -> Iterator[trio.CancelScope]:
        """Cancels what runs in the block when the daemon is told to stop before it is mounted."""
        with trio.CancelScope() as scope:
            self._start = scope
            if self._told.is_set():
                scope.cancel()
            yield scope
        self._start = None

    async def watch_signals(self) -> None:
        """Stops at SIGTERM and SIGINT; serves until cancelled."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                _log.info("%s: stopping", signal.Signals(number).name)
                self.stop()

    async def unmount_when_told(self) -> None:
        """Unmounts when told to stop; while applications use the mount it is tried again."""
        await self._told.wait()
        warned = False
        while True:
            self._end_waits()
            try:
                await trio.to_thread.run_sync(mountpoint.unmount, self._path, abandon_on_cancel=True)
            except MountError as error:
                if not warned:
                    _log.warning("%s; waiting for them to end", error)
                    notify(f"STATUS=waiting: {error}")
                    warned = True
                await trio.sleep(_BUSY_TRIES_SECONDS)
            else:
                return
