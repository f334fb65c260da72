"""Completing packs that are written and not full, once backends take shards again."""

from __future__ import annotations

import logging

import trio

from qsfs import failpoints
from qsfs.errors import CacheError, QsfsError
from qsfs.remote.context import FlushContext
from qsfs.remote.shards import ShardReader, rebuild
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import pack_row, set_placement

_log = logging.getLogger(__name__)

PACK_SECONDS = 300.0
"""How long one attempt at a pack may take."""
_RETRY_SECONDS = 60.0


class Completer:
    """Rebuilds and stores missing shards, one pack at a time."""

    def __init__(self, context: FlushContext, reader: ShardReader) -> None:
        self.completed = 0
        self.problem = ""
        self._context = context
        self._reader = reader
        self._not_before: dict[int, float] = {}

    async def complete_packs(self, most: int) -> int:
        """Tries at most `most` packs that can become more than they are; returns how many did.

        Raises nothing of the backends': a pack that cannot be completed now is tried again later.
        """
        context = self._context
        now = context.clock.monotonic()
        candidates = [n for n in context.ledger.incomplete if self._not_before.get(n, 0.0) <= now]
        done = tried = 0
        for number in candidates:
            if tried >= most:
                break
            row = pack_row(context.store, number)
            if row is None or row.unnamed_since_ns:
                context.ledger.forget(number)
                self._not_before.pop(number, None)
                continue
            if not self._room_for(row.placement):
                continue
            tried += 1
            self._not_before[number] = now + _RETRY_SECONDS
            try:
                pack = StoredPack.of_row(row, context.sealer.code.params)
                with trio.move_on_after(PACK_SECONDS):
                    if await self._complete(number, pack):
                        done += 1
            except CacheError:
                raise
            except QsfsError as error:
                self.problem = str(error)
                _log.warning("pack %s is not full and could not be completed: %s", row.pack_id.hex(), error)
        return done

    def _room_for(self, placement: tuple[int, ...]) -> bool:
        return any(m.writable and m.number not in placement for m in self._context.uploader.members)

    async def _complete(self, number: int, pack: StoredPack) -> bool:
        context = self._context
        params = context.sealer.code.params
        missing = [n for n, member in enumerate(pack.placement) if member < 0]
        # The one pack that is read here is held besides: who waits for backends must not hold up uploads.
        payloads = await self._reader.shards(pack, range(params.k))
        async with context.packs:
            shards = await context.in_thread(lambda: rebuild(context.sealer, pack, payloads, missing))
            upload = await context.uploader.upload(pack.ref, shards, pack.placement)
        await upload.finished.wait()
        failpoints.hit("flush.complete.stored")
        if tuple(upload.placement) == pack.placement:
            return False
        await context.committer.room()
        row = pack_row(context.store, number)
        if row is None or row.placement != pack.placement:
            return False
        changed = set_placement(context.store, number, tuple(upload.placement), context.clock.time_ns())
        if changed is not None:
            context.ledger.note(number, changed)
            self._not_before.pop(number, None)
            self.completed += upload.full
        return True
