"""The second look: a while after a pack is full, whether its backends still list every shard.

An acknowledgement of a 0-db without `--sync` is a page cache: a backend that was restarted since
may have lost it.  Pages are evicted only once their pack was found whole.  A shard that is missing
is rebuilt from the others and stored again, and the pack is looked at again later.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from qsfs import failpoints
from qsfs.errors import BackendError
from qsfs.remote.context import FlushContext
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import pack_row, set_looked, set_placement
from qsfs.store.schema import PackState

_log = logging.getLogger(__name__)

LOOKS_AT_ONCE = 4
EXISTS_SECONDS = 30.0
_UNKNOWN_SECONDS = 30.0
"""When a pack is looked at again of which a backend did not answer."""


class SecondLook:
    """Looks at packs whose time has come.  `found_missing` counts shards that had gone."""

    def __init__(self, context: FlushContext) -> None:
        self.found_missing = 0
        self._context = context

    async def look(self, most: int, *, written_too: bool) -> int:
        """Looks at no more than `most` packs; returns how many were found whole.

        With `written_too` packs that are not full count as whole when the shards that they have are
        there, as many as a written pack has: for a cache that is short of room while packs cannot become full.
        """
        found = 0
        limit = trio.CapacityLimiter(LOOKS_AT_ONCE)

        async def one(number: int) -> None:
            nonlocal found
            async with limit:
                whole = await self._look(number, written_too)
            found += whole

        async with trio.open_nursery() as nursery:
            for number in self._context.ledger.due(most, written_too=written_too):
                nursery.start_soon(one, number)
        return found

    async def _look(self, number: int, written_too: bool) -> bool:
        context = self._context
        ledger = context.ledger
        row = pack_row(context.store, number)
        if row is None or row.unnamed_since_ns:
            ledger.forget(number)
            return False
        if row.looked_at:
            ledger.note(number, row)
            return False
        answers = await self._ask(StoredPack.of_row(row, context.sealer.code.params))
        failpoints.hit("flush.look.asked")
        gone = [shard for shard, there in answers.items() if there is False]
        if gone:
            self._report(row.pack_id, row.placement, gone)
            placement = tuple(-1 if shard in gone else m for shard, m in enumerate(row.placement))
            now = pack_row(context.store, number)
            if now is not None and now.placement == row.placement:
                changed = set_placement(context.store, number, placement, context.clock.time_ns())
                if changed is not None:
                    ledger.note(number, changed)
            return False
        proven = tuple(m if answers.get(shard) else -1 for shard, m in enumerate(row.placement))
        if proven != row.placement:
            # Who is short of room takes it as one that is only written; the others are asked for again.
            known = row.state & PackState.LOOKED
            if written_too and not known and replace(row, placement=proven).written:
                set_looked(context.store, number, row.placement, 0)
            ledger.later(number, _UNKNOWN_SECONDS)
            return False
        if not row.written or not set_looked(context.store, number, row.placement, context.clock.time_ns()):
            ledger.later(number, _UNKNOWN_SECONDS)
            return False
        looked = pack_row(context.store, number)
        if looked is not None:
            ledger.note(number, looked)
        return True

    async def _ask(self, pack: StoredPack) -> dict[int, bool | None]:
        """For each shard that has a place whether it is there; None: its backend did not answer."""
        answers: dict[int, bool | None] = {}

        async def ask(shard: int, number: int) -> None:
            answers[shard] = None
            member = self._context.uploader.members.by_number(number)
            if member is None or not member.identified or not member.ready:
                return
            with trio.move_on_after(EXISTS_SECONDS):
                try:
                    answers[shard] = await member.data.exists(pack.key(self._context.sealer.keys.fsid, shard))
                except BackendError as error:
                    member.failed(error)
                else:
                    member.succeeded()

        async with trio.open_nursery() as nursery:
            for shard, number in enumerate(pack.placement):
                if number >= 0:
                    nursery.start_soon(ask, shard, number)
        return answers

    def _report(self, pack_id: bytes, placement: tuple[int, ...], gone: list[int]) -> None:
        self.found_missing += len(gone)
        members = self._context.uploader.members
        for shard in gone:
            member = members.by_number(placement[shard])
            _log.warning(
                "pack %s, shard %d: backend %s acknowledged it and has lost it; it is made again",
                pack_id.hex(),
                shard,
                member.name if member is not None else placement[shard],
            )
