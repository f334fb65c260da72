"""`takeover`: this machine becomes the owner of a file system that another machine published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import links, members_of, open_file_system
from qsfs.daemon.formatting import local_store_exists
from qsfs.daemon.key_upkeep import KeyUpkeep
from qsfs.daemon.lock import CacheLock
from qsfs.daemon.owning import local_fleets, own_when_possible
from qsfs.daemon.restoring import restore_file_system
from qsfs.daemon.rollback import return_to_base
from qsfs.daemon.secret import read_secret
from qsfs.errors import Fenced
from qsfs.filesystem.contents import Contents
from qsfs.format.head import HeadRef
from qsfs.format.slots import Secret
from qsfs.remote.base import RETURNS_KEY
from qsfs.remote.ownership import Ownership
from qsfs.remote.rollback import RollbackReport
from qsfs.remote.spool import Spool
from qsfs.store.limits import Limits
from qsfs.store.store import Store


@dataclass(frozen=True, slots=True)
class Taken:
    """What a takeover came to: the head that this machine published last, and how an older generation became it."""

    ref: HeadRef
    returned: RollbackReport | None


async def take_over(
    config: Config, clock: Clock, progress: Callable[[str], None], *, secret: Secret | None = None
) -> Taken:
    """Restores where there is no local state, then owns and publishes the newest head as its own first.

    Where an older generation was restored, that one becomes the newest, as after a rollback.
    Waits for a quorum of backends as long as it takes; `progress` is told what it does and waits for.
    `secret` opens it (default: the configured one).
    """
    there = local_store_exists(config.cache.directory)
    secret = read_secret(config, secret)
    if not there:
        progress("no local state: restoring the newest generation")
        await restore_file_system(config, clock, progress, secret=secret)
    lock = CacheLock(config.cache.directory)
    try:
        limits = Limits.of(config.cache, config.flush.spool_bytes)
        spool = Spool(config.cache.directory / "spool", limits.spool_bytes)
        store = Store(config.cache.directory, limits, clock)
        try:
            if store.local(RETURNS_KEY) is None:
                owned = await _own(config, store, spool, secret, clock, progress)
                return Taken(owned.first_ref, None)
        finally:
            store.close()
        returned = await return_to_base(config, clock, progress, secret)
        return Taken(returned.base, returned)
    finally:
        lock.release()


async def _own(
    config: Config, store: Store, spool: Spool, secret: Secret, clock: Clock, progress: Callable[[str], None]
) -> Ownership:
    found = links(config, clock)
    try:
        opened = await open_file_system(store, found, secret, clock)
        members, strangers = await members_of(found, opened, clock, local_fleets(store, opened))
        for stranger in strangers:
            progress(f"left out: {stranger.error}")
        committer = Committer(store, Contents(store), config.cache.group_seconds)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            await KeyUpkeep(store, committer, members, opened, secret, clock).look()
            owned = await own_when_possible(
                store,
                spool,
                opened,
                members,
                clock,
                nursery,
                takeover=True,
                on_fenced=_raise,
                waiting=lambda what: progress(f"waiting for {what}") if what else None,
            )
            await committer.commit()
            nursery.cancel_scope.cancel()
        return owned
    finally:
        await found.aclose()


def _raise(error: Fenced) -> None:
    raise error
