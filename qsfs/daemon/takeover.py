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
from qsfs.daemon.owning import local_fleets, local_state, own_when_possible
from qsfs.daemon.restoring import restore_file_system
from qsfs.daemon.rollback import return_to_base
from qsfs.daemon.secret import read_secret
from qsfs.errors import Fenced, NotFound, StaleCache
from qsfs.filesystem.contents import Contents
from qsfs.format.head import HeadRef
from qsfs.format.slots import Secret
from qsfs.remote.base import RETURNS_KEY, record_rejected
from qsfs.remote.newest import describe_head
from qsfs.remote.ownership import Ownership
from qsfs.remote.readable import Wanted
from qsfs.remote.rollback import RollbackReport
from qsfs.remote.spool import Spool
from qsfs.remote.survey import Timing, find_newest
from qsfs.store.limits import Limits
from qsfs.store.store import Store


@dataclass(frozen=True, slots=True)
class Taken:
    """What a takeover came to: the head that this machine published last, and how an older generation became it."""

    ref: HeadRef
    returned: RollbackReport | None


async def take_over(
    config: Config,
    clock: Clock,
    progress: Callable[[str], None],
    *,
    secret: Secret | None = None,
    head: str | None = None,
) -> Taken:
    """Restores where there is no local state, then owns and publishes the newest head as its own first.

    Where an older generation was restored, that one becomes the newest, as after a rollback.
    Waits for a quorum of backends as long as it takes; `progress` is told what it does and waits for.
    `secret` opens it (default: the configured one).  `head` is how the digest of the head begins to go on from, where
    two copies of a machine have sent heads: local state that is there must be of that head (`StaleCache`).
    """
    there = local_store_exists(config.cache.directory)
    secret = read_secret(config, secret)
    if not there:
        progress("no local state: restoring the newest generation")
        await restore_file_system(config, clock, progress, wanted=Wanted(head=head), secret=secret)
    lock = CacheLock(config.cache.directory)
    try:
        limits = Limits.of(config.cache, config.flush.spool_bytes)
        spool = Spool(config.cache.directory / "spool", limits.spool_bytes)
        store = Store(config.cache.directory, limits, clock)
        try:
            if there and head is not None:
                await _choose(store, spool, secret, head, config, clock)
            if store.local(RETURNS_KEY) is None:
                owned = await _own(config, store, spool, secret, clock, progress)
                return Taken(owned.first_ref, None)
        finally:
            store.close()
        returned = await return_to_base(config, clock, progress, secret)
        return Taken(returned.base, returned)
    finally:
        lock.release()


async def _choose(
    store: Store, spool: Spool, secret: Secret, digest: str, config: Config, clock: Clock
) -> None:
    """Remembers that the head with this digest was chosen against the others that there are now.

    Raises as `find_newest`, and `StaleCache` if the local state is not of that head.
    """
    found = links(config, clock)
    try:
        opened = await open_file_system(store, found, secret, clock)
        members, _ = await members_of(found, opened, clock, local_fleets(store, opened))
        ours = local_state(store, spool, opened).heads
        params = opened.code.params
        try:
            newest = await find_newest(members, opened.records, params, clock, Timing(), chosen=digest)
        except NotFound:
            # An earlier takeover may have gone on from it, and sent its own first head.
            if any(ref.digest.hex().startswith(digest.lower()) for ref in ours):
                return
            raise
    finally:
        await found.aclose()
    if newest.ref not in ours:
        raise StaleCache(
            f"the local state here is not of {describe_head(newest.ref)}: `qsfs restore --set-aside --head {digest}` "
            "moves it beside the cache and takes that one; then `qsfs takeover` goes on from it"
        )
    record_rejected(store, opened.keys.fsid, newest.rejected)
    committer = Committer(store, Contents(store), config.cache.group_seconds)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        await committer.commit()
        nursery.cancel_scope.cancel()


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
