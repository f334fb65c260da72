"""One generation on a read-only mount: its store, and the parts that read from it and fetch into it.

Nothing in it is a writer's: no ownership, no flush, no journal.  All that it holds can be fetched again, so
everything may be evicted, and what a crash loses is no loss.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.committer import Committer
from qsfs.daemon.keeper import Keeper
from qsfs.daemon.paths import path_of
from qsfs.daemon.space import DaemonSpace
from qsfs.daemon.supervision import supervised
from qsfs.errors import CacheError, Corrupt, DataLost, QsfsError
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.needs import Need, NeedPages
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.posix import PosixError
from qsfs.format.head import Head, HeadRef
from qsfs.fuse import loop
from qsfs.fuse.generations import Generation
from qsfs.fuse.operations import Operations
from qsfs.fuse.state import ReadOnlyState
from qsfs.remote.advance import NotAdvanced
from qsfs.remote.fetch import Fetcher
from qsfs.remote.inherit import Inheritance
from qsfs.remote.reader import PackReader
from qsfs.remote.restore import restore_into
from qsfs.remote.source import Source
from qsfs.remote.template import Template
from qsfs.store.limits import Limits
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

_JOURNAL_BYTES = 1 << 20


def image_limits(config: Config, shares: int) -> Limits:
    """The bounds of each of so many images that share the configured size.  `CacheError` if that is too little."""
    size = config.cache.size_bytes // shares
    try:
        # Nothing is ever journaled or sent: both take what is the least.
        return Limits.of(dataclasses.replace(config.cache, size_bytes=size, journal_bytes=_JOURNAL_BYTES), 0)
    except CacheError as error:
        if shares == 1:
            raise
        raise CacheError(
            f"[cache] size is too small for a mount that follows, which divides it by {shares}: {error}"
        ) from error


async def build(
    directory: Path,
    source: Source,
    limits: Limits,
    clock: Clock,
    *,
    deadline_seconds: float,
    template: Template | None = None,
) -> None:
    """Builds the store of a generation in `directory`, unless an earlier mount has left it there whole.

    With a `template` what it holds of the generation already is not read again, and it holds that one afterwards.
    Raises as `restore_into`, with nothing left behind that would be taken for an image.
    """
    if (directory / "data.mdb").exists():
        return
    await trio.to_thread.run_sync(partial(directory.mkdir, mode=0o700, parents=True, exist_ok=True))
    if template is not None and await _moved(template, source, deadline_seconds):
        await trio.to_thread.run_sync(template.copy_to, directory)
        return
    await restore_into(directory, source, limits, clock, exact=True, deadline_seconds=deadline_seconds)
    if template is not None:
        try:
            await trio.to_thread.run_sync(template.take, directory, source.found.head)
        except CacheError as error:
            _log.warning("the next move reads all metadata again: %s", error)
            await trio.to_thread.run_sync(template.drop)


async def _moved(template: Template, source: Source, deadline_seconds: float) -> bool:
    """Whether the template holds the generation of `source` now; if not, a restore may still have it."""
    try:
        await template.move(source, deadline_seconds=deadline_seconds)
    except (NotAdvanced, DataLost, Corrupt, CacheError) as error:
        _log.debug("generation %d is restored whole: %s", source.found.ref.generation, error)
        return False
    return True


class Image:
    """A generation that is being read.  `run` must be running; `close` comes after its end."""

    def __init__(
        self,
        directory: Path,
        source: Source,
        limits: Limits,
        config: Config,
        clock: Clock,
        reader: PackReader,
        sent_bytes: Callable[[str], int],
        expired: Callable[[HeadRef], Awaitable[QsfsError | None]],
        tag: int = 0,
    ) -> None:
        """Opens the store that `build` made.  `expired` judges what a head names and is gone.

        `tag` makes it one generation of a mount that follows; see `qsfs.fuse.generations`.
        """
        self.directory = directory
        self.ref: HeadRef = source.found.ref
        self.head: Head = source.found.head
        self.host = ""
        self.store = Store(directory, limits, clock)
        self.contents = Contents(self.store)
        self.namespace = Namespace(self.store, self.contents, Policies(()))
        self.committer = Committer(self.store, self.contents, config.cache.group_seconds, alone=loop.nothing_waits)
        self.keeper = Keeper(self.store, self.contents, self.committer, clock, all_remote=True)
        self.inheritance = Inheritance(self.store)
        self.fetcher = Fetcher(
            self.store,
            reader,
            self.committer,
            self.contents.transient,
            deadline_seconds=config.fetch.deadline_seconds,
            path_of=partial(path_of, self.namespace.tree),
            expired=lambda: expired(self.ref),
            take=self.inheritance.take,
        )
        self.space = DaemonSpace(self.store, source.members, source.superblock.code, sent_bytes, lambda: False)
        self.state = ReadOnlyState()
        self.generation = Generation(tag, self.namespace)
        self.operations = self.generation.operations = Operations(
            self.namespace,
            _Waiter(self.fetcher, self.inheritance),
            self.committer,
            self.space,
            self.state,
            xattr=config.mount.xattr,
            relatime=False,
            attributes=self.generation.attributes if tag else None,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.committer.run)
            await nursery.start(self.fetcher.run)
            nursery.start_soon(supervised, self.keeper.run)
            nursery.start_soon(supervised, self.space.run)
            task_status.started()

    async def commit(self) -> None:
        """Keeps what was fetched for the next mount."""
        if self.committer.failed is None and self.store.dirty:
            await self.committer.commit()

    def close(self) -> None:
        """Closes the store."""
        self.store.close()


class _Waiter:
    """What handlers wait with: only for pages, since nothing here changes anything."""

    def __init__(self, fetcher: Fetcher, inheritance: Inheritance) -> None:
        self._fetcher = fetcher
        self._inheritance = inheritance

    async def satisfy(self, need: Need) -> None:
        """Returns when the operation should be tried again; raises what the application shall get."""
        if not isinstance(need, NeedPages):
            raise PosixError(5)
        if not self._inheritance.take(need.inode, need.first, need.count):
            await self._fetcher.fetch(need.inode, need.first, need.count)
