"""Becoming the owner at a mount or a takeover: what is known locally, and waiting for a quorum."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from qsfs.clock import Clock
from qsfs.daemon.connect import Opened
from qsfs.daemon.host import host_name
from qsfs.errors import Fenced, QuorumUnavailable
from qsfs.format.fleet import Fleet
from qsfs.remote.base import (
    BASE_KEY,
    NEWEST_KEYS,
    PUBLISHED_KEY,
    RETURNS_KEY,
    LocalHead,
    local_head,
    record_published,
    record_rejected,
    rejected_heads,
)
from qsfs.remote.members import Members
from qsfs.remote.mount_check import LocalState, accept_for_mount
from qsfs.remote.ownership import Ownership, OwnUnfinished, own
from qsfs.remote.publish import StoreBeforeSend
from qsfs.remote.spool import Spool
from qsfs.store.store import Store

_OWN_SECONDS = 30.0
_AGAIN_SECONDS = 1.0


def local_state(store: Store, spool: Spool, opened: Opened) -> LocalState:
    """The heads that this machine knows of."""
    base = local_head(store, BASE_KEY, opened.keys)
    published = local_head(store, PUBLISHED_KEY, opened.keys)
    newest = local_head(store, RETURNS_KEY, opened.keys)
    returns = None if base is None or newest is None else base.sealed.ref
    if newest is not None:
        base = newest
    return LocalState(
        base=None if base is None else base.sealed.ref,
        published_here=base is not None and base.ours,
        published=None if published is None else published.sealed.ref,
        sent=frozenset(spool.heads),
        returns=returns,
    )


def restored_head(store: Store, opened: Opened) -> LocalHead | None:
    """The head that a restore found to be the newest; None where this machine has published since."""
    found = local_head(store, RETURNS_KEY, opened.keys) or local_head(store, BASE_KEY, opened.keys)
    return None if found is None or found.ours else found


def local_fleets(store: Store, opened: Opened) -> tuple[Fleet, ...]:
    """The fleets that the newest head known here names."""
    for name in NEWEST_KEYS:
        known = local_head(store, name, opened.keys)
        if known is not None:
            return known.head.fleets
    return ()


async def own_when_possible(
    store: Store,
    spool: Spool,
    opened: Opened,
    members: Members,
    clock: Clock,
    nursery: trio.Nursery,
    *,
    takeover: bool,
    on_fenced: Callable[[Fenced], None],
    waiting: Callable[[str], None],
    store_before_send: StoreBeforeSend | None = None,
) -> Ownership:
    """Owns, waiting for a quorum as long as it takes; `waiting` is told why ("": no longer).

    `store_before_send` stores heads in `spool`, and may do more; see `publish.Publisher`.  Raises
    what says that this mount must not own: `StaleCache`, `SplitHeads`, `Fenced`, `NotFound`.
    Heads that a person chose against count as not there.
    The caller commits: that this mount has published its first head is noted in the open group.
    """

    async def begin(seconds: float) -> Ownership:
        return await own(
            members,
            records=opened.records,
            code=opened.superblock.code,
            clock=clock,
            nursery=nursery,
            host=host_name(),
            accept=accept_for_mount(lambda: local_state(store, spool, opened), takeover=takeover),
            store_before_send=store_before_send or spool.store_head,
            fleets=local_fleets(store, opened),
            restored=restored_head(store, opened) if takeover else None,
            rejected=rejected_heads(store),
            deadline_seconds=seconds,
            on_fenced=on_fenced,
        )

    attempt: Callable[[float], Awaitable[Ownership]] = begin
    while True:
        try:
            owned = await attempt(_OWN_SECONDS)
        except QuorumUnavailable as error:
            attempt = error.again if isinstance(error, OwnUnfinished) else begin
            waiting(f"a quorum of backends: {error}")
            await trio.sleep(_AGAIN_SECONDS)
        else:
            waiting("")
            record_published(store, spool.heads[owned.first_ref])
            if rejected_heads(store):
                # From now on the heads of an owner of its own are the newest.
                record_rejected(store, opened.keys.fsid, ())
            return owned
