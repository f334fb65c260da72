"""Snapshots in the daemon: what the control socket's snapshot commands do, and the automatic ones."""

from __future__ import annotations

import contextlib
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import links, read_secret
from qsfs.errors import DeadlineExceeded, NotFound
from qsfs.filesystem.contents import Contents
from qsfs.format.slots import Secret
from qsfs.remote.pinning import Pinning
from qsfs.remote.snapshots import Snapshot, check_name, snapshots_of
from qsfs.remote.source import find_source
from qsfs.store.store import Store


class Snapshots:
    """Makes and deletes the snapshots of one mount that owns the file system."""

    def __init__(self, store: Store, contents: Contents, committer: Committer, pinning: Pinning) -> None:
        self._store = store
        self._contents = contents
        self._committer = committer
        self._pinning = pinning

    async def create(self, name: str) -> dict[str, Any]:
        """Makes a snapshot of everything accepted so far; returns once it holds.

        Raises `ConfigError` for a name that cannot be or is in use, and what ended flushing.
        """
        return described(await self._pinning.pinned(await self._pinning.cut(check_name(name))))

    async def cut(self, name: str, held_seconds: float, ticket: str) -> None:
        """The first half of `create` for applications that are held still, `held_seconds` at most.

        Covers everything, also what atomic-sync files have written since their last sync, as if the
        applications had been killed.  Returns once a cut is sealed, when they may go on.  It becomes a
        snapshot only if `hold` with the same `ticket`, which only this caller knows, follows soon: whoever
        died or let them go early does not call it.  Raises `DeadlineExceeded` if no cut is sealed in time:
        then there is no snapshot either.
        """
        check_name(name)
        end = trio.current_time() + held_seconds
        with trio.move_on_at(end) as scope:
            await self._cover()
        if scope.cancelled_caught:
            raise DeadlineExceeded(
                f'snapshot "{name}" was given up: the cache is full, and what is not synced yet could not be '
                f"covered within {held_seconds:g} s; see 'qsfs status'"
            )
        left = max(0.0, end - trio.current_time())
        await self._pinning.cut(name, held_seconds=left, ticket=ticket)

    async def _cover(self) -> None:
        for number in self._contents.uncovered():
            await self._committer.room()
            inode = self._store.inode(number)
            if inode is not None:
                self._contents.cover(inode)

    async def hold(self, ticket: str) -> dict[str, Any]:
        """Takes it that the applications were held until `cut` had sealed its cut; returns once that is a snapshot.

        Raises `NotFound` if it was abandoned, as it is when this comes too late.
        """
        request = self._pinning.held(ticket)
        self._pinning.confirm(request)
        return described(await self._pinning.pinned(request))

    async def abandon(self, ticket: str) -> None:
        """Gives up what `cut` was called for, if it is still there: it never is a snapshot."""
        with contextlib.suppress(NotFound):
            self._pinning.abandon(self._pinning.held(ticket))

    async def delete(self, name: str) -> None:
        """Deletes a snapshot, and waits until a published head does without it.  Raises `NotFound`."""
        await self._pinning.unpin([name])


def described(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot for programs; the time in seconds since 1970."""
    return {
        "name": snapshot.name,
        "generation": snapshot.generation,
        "epoch": snapshot.head.owner.epoch,
        "time": snapshot.time_ns / 1e9,
    }


async def snapshots_on_backends(
    config: Config, clock: Clock, *, secret: Secret | None = None
) -> tuple[list[Snapshot], tuple[str, ...]]:
    """The snapshots that the newest head on the backends keeps, and what a person should read about that.

    For a machine where nothing is mounted.  `secret` opens it (default: the configured one).  Where two copies of
    a machine have sent heads it is those that any of their lines keeps.  Raises as `find_source` does, but for
    `SplitHeads`.
    """
    secret = read_secret(config, secret)
    found = links(config, clock)
    try:
        source = await find_source(found.candidates, secret=secret, clock=clock, any_line=True)
    finally:
        await found.aclose()
    heads = (source.found.head, *source.found.lines)
    return snapshots_of({entry for head in heads for entry in head.kept}), source.sentences()
