"""Deleting what this mount itself knows that no head ever named: the packs of abandoned cuts.

Safe because a pack's id is random, and only the owner that sealed it could have named it: its
spool says that no head of that cut was stored, let alone sent.  A copy of this machine would have
the same spool, so nothing is deleted before a head was published after the cut was abandoned: that
publication would have shown the copy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import trio

from qsfs.errors import BackendError
from qsfs.format.shard import shard_key
from qsfs.remote.context import FlushContext
from qsfs.remote.members import Member, State
from qsfs.remote.spool import AbandonedPack
from qsfs.store.schema import PackRow, Table
from qsfs.store.snapshot import CommittedState

_log = logging.getLogger(__name__)

PACKS_AT_ONCE = 8
_DELETE_SECONDS = 30.0
_STEP_SECONDS = 0.1
_AGAIN_SECONDS = 60.0
"""When packs are tried again that some backend did not answer for."""


class AbandonedCollector:
    """Deletes shards of abandoned packs.  `deleted` counts them.

    Each backend is asked once for each pack: which have answered is remembered, those that are down are
    left alone, and until they are back nothing but them is asked again.
    """

    def __init__(self, context: FlushContext) -> None:
        self.deleted = 0
        self._context = context
        self._not_before = -math.inf
        self._cleared: dict[bytes, set[int]] = {}

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
        in_use = named | await self._in_tables(ids)
        done = set(ids & in_use)
        for pack in batch:
            if pack.pack_id not in in_use and await self._delete(pack):
                done.add(pack.pack_id)
                self._cleared.pop(pack.pack_id, None)
        if done:
            await context.in_thread(
                lambda: spool.set_abandoned(pack for pack in spool.abandoned if pack.pack_id not in done)
            )
        if len(done) < len(batch):
            self._not_before = context.clock.monotonic() + _AGAIN_SECONDS
        return len(done) == len(wanted)

    async def _in_tables(self, ids: set[bytes]) -> set[bytes]:
        """Those of `ids` that the local store names, whatever the spool says; read in short transactions.

        An id that is there stays there, and one that is not can no longer come: the packs are given up.
        """
        found: set[bytes] = set()
        position: bytes | None = b""
        while position is not None:
            start = position
            some, position = await self._context.in_thread(lambda: self._some_in_tables(ids, start))  # noqa: B023
            found |= some
        return found

    def _some_in_tables(self, ids: set[bytes], start: bytes) -> tuple[set[bytes], bytes | None]:
        context = self._context
        found: set[bytes] = set()
        until = context.clock.monotonic() + _STEP_SECONDS
        with CommittedState(context.store.environment, context.clock) as state:
            for key, row in state.view.scan(Table.PACKS, start, None):
                pack_id = PackRow.decode(bytes(row)).pack_id
                if pack_id in ids:
                    found.add(pack_id)
                if context.clock.monotonic() >= until:
                    return found, key + b"\0"
        return found, None

    async def _delete(self, pack: AbandonedPack) -> bool:
        """Deletes every shard on all backends that answer; False if one did not."""
        cleared = self._cleared.setdefault(pack.pack_id, set())
        sealer = self._context.sealer
        keys = [
            shard_key(sealer.keys.fsid, pack.owner_epoch, pack.pack_id, shard)
            for shard in range(sealer.code.params.n)
        ]

        async def clear(member: Member) -> None:
            gone = await delete_on(member, keys)
            if gone is not None:
                self.deleted += gone
                cleared.add(member.number)

        members = list(self._context.uploader.members)
        async with trio.open_nursery() as nursery:
            for member in members:
                if member.number not in cleared and member.identified and member.state is State.UP:
                    nursery.start_soon(clear, member)
        if not cleared >= {member.number for member in members}:
            return False
        _log.info("pack %s of an abandoned cut: its shards were deleted", pack.pack_id.hex())
        return True


async def delete_on(member: Member, keys: Iterable[bytes]) -> int | None:
    """Deletes values on one backend; how many there were, or None if it did not answer for all in time."""
    deleted = 0
    with trio.move_on_after(_DELETE_SECONDS) as scope:
        try:
            for key in keys:
                deleted += await member.data.delete(key)
        except BackendError as error:
            member.failed(error)
            return None
    return None if scope.cancelled_caught else deleted
