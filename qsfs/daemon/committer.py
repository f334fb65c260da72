"""Local durability: seals and commits groups, serves fsyncs by the journal, wakes who waits.

Two things leave the event loop here: the commit of a group and the flush of journal appends, one
thread hop each.  A flush stays where the disk is quick and nobody else asks for anything: the hop
would take about as long as the flush.  Everything between hops is synchronous, so no lock is needed: "one commits at a
time" and "one flushes at a time" are plain flags.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

import trio

from qsfs.errors import CacheError, QsfsError
from qsfs.filesystem.contents import Contents
from qsfs.store.environment import StoreFull
from qsfs.store.group import Group
from qsfs.store.store import CommitNeeded, Frame, Store

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 4.0
_FULL_TRIES = 20
_FULL_PAUSE_SECONDS = 0.1
_LONG_READ_SECONDS = 5.0
_SHORT_FLUSH_SECONDS = 1e-3
_FORGETTING = 0.1


class Committer:
    """Drives the store's groups and journal.  `failed` is set once the local disk failed: no way back.

    `alone` tells whether no request waits but the one that is being served; by default nobody knows.
    """

    def __init__(
        self,
        store: Store,
        contents: Contents,
        group_seconds: float,
        *,
        alone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._contents = contents
        self._group_seconds = group_seconds
        self._wanted = 0
        self._wake = trio.Event()
        self._progress = trio.Event()
        self._begun = trio.Event()
        store.on_stream = self._on_stream
        self._queue: list[Frame] = []
        self._placed = 0
        self._flushed = 0
        self._flushing = False
        self._flush_progress = trio.Event()
        self._flush_seconds = math.inf
        self._alone = alone
        self.failed: CacheError | None = None
        self._failure = trio.Event()
        self.after_commit: list[Callable[[], None]] = []
        self.commits = 0
        self.flushes = 0

    # groups

    async def run(self) -> None:
        """Commits groups as they get old, full or wanted, until cancelled."""
        while self.failed is None:
            with trio.move_on_after(min(self._group_seconds, _IDLE_SECONDS)):
                await self._wake.wait()
            self._wake = trio.Event()
            if self._store.dirty or self._wanted > self._store.layers.committed_number:
                await self._commit_group()
            else:
                self._store.idle()

    async def _commit_group(self) -> None:
        try:
            group = self._store.seal()
            self._begun.set()
            self._begun = trio.Event()
            with trio.CancelScope(shield=True):
                await self._apply(group)
            self._store.committed(group)
        except Exception as error:  # noqa: BLE001 - a group that cannot be committed is never given up silently
            self._fail(error)
            return
        self.commits += 1
        self._progress.set()
        self._progress = trio.Event()
        for callback in self.after_commit:
            callback()
        if self._store.group_is_full() or self._store.streams() or self._wanted > group.number:
            self._wake.set()

    def _on_stream(self) -> None:
        self._wake.set()

    async def _apply(self, group: Group) -> None:
        """Commits a sealed group.  Room that was freed but cannot be reused yet is waited for.

        While others read an older state, what was freed since cannot be reused: then that is no reason to
        give up, however slow the disk.
        """
        clock = self._store.clock
        begin = clock.monotonic()
        tries = 0
        again = told = False
        while True:
            try:
                await trio.to_thread.run_sync(self._store.commit, group)
                return
            except StoreFull as error:
                tries += self._store.environment.readers <= 1
                if tries >= _FULL_TRIES:
                    raise
                if again:
                    # Not what the last commits freed, which is had by two empty ones.
                    await trio.sleep(_FULL_PAUSE_SECONDS)
                again = True
                if not told and clock.monotonic() - begin >= _LONG_READ_SECONDS:
                    told = True
                    _log.warning("%s; waiting for pages that are being read to become free", error)
                self._store.layers.renew_view()
                with contextlib.suppress(StoreFull):
                    await trio.to_thread.run_sync(self._store.environment.release_freed)
                self._store.layers.renew_view()

    def _fail(self, error: Exception) -> None:
        """Takes note that nothing can be made durable any more; whoever waits for that gets the error."""
        if self.failed is not None:
            return
        unexpected = None if isinstance(error, QsfsError) else error
        _log.critical(
            "%s; the mount is read-only from here on, its open group stays in memory",
            error if unexpected is None else f"the local store failed unexpectedly: {error!r}",
            exc_info=unexpected,
        )
        self.failed = error if isinstance(error, CacheError) else CacheError(str(error))
        self._failure.set()
        self._begun.set()
        self._progress.set()
        self._flush_progress.set()

    async def commit(self) -> int:
        """Commits everything accepted so far; returns the number of the commit that has it.

        Raises `CacheError` if the local disk failed.
        """
        layers = self._store.layers
        target = layers.open.number
        if not self._store.dirty:
            target = layers.committed_number if layers.committing is None else layers.committing.number
        self._wanted = max(self._wanted, target)
        while layers.committed_number < target:
            self._wake.set()
            self._raise_if_failed()
            await self._progress.wait()
        self._raise_if_failed()
        return target

    async def room(self) -> None:
        """Waits while the open group is full: until it can be sealed, not until it is durable.

        Raises `CacheError` if the local disk failed.
        """
        while self._store.group_is_full():
            self._raise_if_failed()
            self.kick()
            await self._begun.wait()

    def kick(self) -> None:
        """Has the open group sealed soon."""
        self._wanted = max(self._wanted, self._store.layers.open.number)
        self._wake.set()

    async def progress(self) -> None:
        """Waits for the end of the next commit."""
        self._raise_if_failed()
        await self._progress.wait()

    async def failure(self) -> CacheError:
        """Waits until the local disk fails; returns why."""
        await self._failure.wait()
        assert self.failed is not None
        return self.failed

    def _raise_if_failed(self) -> None:
        if self.failed is not None:
            raise self.failed

    # fsync

    async def sync(self, number: int, data_only: bool = False) -> None:
        """Makes an inode's data and all namespace changes durable, and covers an atomic-sync file.

        `data_only` saves nothing here: a file's size and times go with its data.
        """
        inode = self._store.inode(number)
        if inode is not None:
            self._contents.cover(inode)
        await self._journal((number,))

    async def sync_namespace(self) -> None:
        """Makes all namespace changes durable."""
        await self._journal(())

    async def _journal(self, inodes: tuple[int, ...]) -> None:
        self._raise_if_failed()
        try:
            frame = self._store.journal_frame(inodes)
        except CommitNeeded:
            await self.commit()
            return
        if frame is not None:
            self._queue.append(frame)
            self._placed += 1
        await self._flush(self._placed)

    async def _flush(self, ticket: int) -> None:
        """Returns when every append placed up to `ticket` is durable; one flush serves all waiters."""
        while self._flushed < ticket:
            self._raise_if_failed()
            if self._flushing:
                await self._flush_progress.wait()
                continue
            self._flushing = True
            frames, self._queue, upto = self._queue, [], self._placed
            try:
                if self._flushes_at_once():
                    self._write(frames)
                else:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._write, frames)
                self._flushed = upto
                self.flushes += 1
            except Exception as error:  # noqa: BLE001 - what was to be flushed must not pass for durable
                self._fail(error)
            finally:
                self._flushing = False
                self._flush_progress.set()
                self._flush_progress = trio.Event()

    def _flushes_at_once(self) -> bool:
        """Whether a flush may keep the event loop: it was short lately, the disk is free, nobody waits."""
        return (
            self._flush_seconds < _SHORT_FLUSH_SECONDS
            and self._store.layers.committing is None
            and self._alone()
        )

    def _write(self, frames: list[Frame]) -> None:
        """Writes and flushes appends.  A slow flush counts at once, and is forgotten over the next ones."""
        clock = self._store.clock
        begin = clock.monotonic()
        self._store.journal.write(frames)
        seconds = clock.monotonic() - begin
        before = seconds if math.isinf(self._flush_seconds) else self._flush_seconds
        self._flush_seconds = max(seconds, before + _FORGETTING * (seconds - before))
