"""Deleting what this mount itself knows that no head ever named: the packs of abandoned cuts.

Safe because a pack's id is random, and only the owner that sealed it could have named it: its
spool says that no head of that cut was stored, let alone sent.  A copy of this machine would have
the same spool, so nothing is deleted before a head was published after the cut was abandoned: that
publication would have shown the copy.
"""

from __future__ import annotations

import logging
import math

import trio

from qsfs.errors import BackendError
from qsfs.format.shard import shard_key
from qsfs.remote.context import FlushContext
from qsfs.remote.members import Member
from qsfs.remote.spool import AbandonedPack
from qsfs.store.schema import PackRow, Table
from qsfs.store.snapshot import CommittedState

_log = logging.getLogger(__name__)

PACKS_AT_ONCE = 8
_DELETE_SECONDS = 30.0
_AGAIN_SECONDS = 60.0
"""When packs are tried again that some backend did not answer for."""


class AbandonedCollector:
    """Deletes shards of abandoned packs.  `deleted` counts them."""

    def __init__(self, context: FlushContext) -> None:
        self.deleted = 0
        self._context = context
        self._not_before = -math.inf

    async def collect(self, known: frozenset[bytes], named: frozenset[bytes], owner_epoch: int) -> bool:
        """Deletes the shards of some packs among those with ids in `known`; True if none is left.

        `known` were abandoned before this mount published its newest head; `named` are the ids that
        its heads list.  A pack stays on the list while a backend does not answer.
        """
        context = self._context
        spool = context.spool
        wanted = [p for p in spool.abandoned if p.pack_id in known and p.owner_epoch <= owner_epoch]
        batch = wanted[:PACKS_AT_ONCE]
        if not batch:
            return True
        if context.clock.monotonic() < self._not_before:
            return False
        ids = {pack.pack_id for pack in batch}
        in_use = named | await context.in_thread(lambda: self._in_tables(ids))
        done = set(ids & in_use)
        for pack in batch:
            if pack.pack_id not in in_use and await self._delete(pack):
                done.add(pack.pack_id)
        await context.in_thread(
            lambda: spool.set_abandoned(pack for pack in spool.abandoned if pack.pack_id not in done)
        )
        if len(done) < len(batch):
            self._not_before = context.clock.monotonic() + _AGAIN_SECONDS
        return len(done) == len(wanted)

    def _in_tables(self, ids: set[bytes]) -> set[bytes]:
        """Those of `ids` that the local store names, whatever the spool says."""
        context = self._context
        with CommittedState(context.store.environment, context.clock) as state:
            rows = state.view.scan(Table.PACKS, b"", None)
            return {found for _, row in rows if (found := PackRow.decode(bytes(row)).pack_id) in ids}

    async def _delete(self, pack: AbandonedPack) -> bool:
        """Deletes every shard everywhere; False if a backend did not answer."""
        answered = True

        async def clear(member: Member) -> None:
            nonlocal answered
            if not member.identified:
                answered = False
                return
            with trio.move_on_after(_DELETE_SECONDS) as scope:
                for shard in range(self._context.sealer.code.params.n):
                    key = shard_key(
                        self._context.sealer.keys.fsid, pack.owner_epoch, pack.pack_id, shard
                    )
                    try:
                        gone = await member.data.delete(key)
                    except BackendError as error:
                        member.failed(error)
                        answered = False
                        return
                    self.deleted += gone
            answered = answered and not scope.cancelled_caught

        async with trio.open_nursery() as nursery:
            for member in self._context.uploader.members:
                nursery.start_soon(clear, member)
        if answered:
            _log.info("pack %s of an abandoned cut: its shards were deleted", pack.pack_id.hex())
        return answered
