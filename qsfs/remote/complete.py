"""Completing packs that are written and not full, and moving shards off backends that are being emptied."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

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
    """Rebuilds and stores missing shards, one pack at a time.

    A shard on a backend that is `leaving` counts as missing, until another one has it.
    """

    def __init__(
        self, context: FlushContext, reader: ShardReader, leaving: Callable[[], Set[int]] = frozenset
    ) -> None:
        self.completed = 0
        self.problem = ""
        self._context = context
        self._reader = reader
        self._leaving = leaving
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
            if not self.room_for(row.placement):
                continue
            tried += 1
            self._not_before[number] = now + _RETRY_SECONDS
            done += await self.complete(number)
        return done

    async def complete(self, number: int) -> bool:
        """Stores what a pack lacks, whatever was tried before; whether it has got any more.

        Raises nothing of the backends'.
        """
        row = pack_row(self._context.store, number)
        if row is None or row.unnamed_since_ns:
            return False
        try:
            pack = StoredPack.of_row(row, self._context.sealer.code.params)
            with trio.move_on_after(PACK_SECONDS):
                return await self._complete(number, pack)
        except CacheError:
            raise
        except QsfsError as error:
            self.problem = str(error)
            _log.warning("pack %s lacks shards and could not be completed: %s", row.pack_id.hex(), error)
        return False

    def room_for(self, placement: tuple[int, ...]) -> bool:
        """Whether some backend could take a shard of a pack that lies there."""
        return any(m.writable and m.number not in placement for m in self._context.uploader.members)

    async def _complete(self, number: int, pack: StoredPack) -> bool:
        context = self._context
        params = context.sealer.code.params
        leaving = self._leaving()
        there = tuple(-1 if place in leaving else place for place in pack.placement)
        missing = [n for n, place in enumerate(there) if place < 0]
        # The one pack that is read here is held besides: who waits for backends must not hold up uploads.
        # Data shards are themselves; parity follows from all of them.
        needed = missing if max(missing, default=0) < params.k else range(params.k)
        payloads = await self._reader.shards(pack, needed)
        async with context.packs:
            shards = await context.in_thread(lambda: rebuild(context.sealer, pack, payloads, missing))
            upload = await context.uploader.upload(pack.ref, shards, there)
        await upload.finished.wait()
        failpoints.hit("flush.complete.stored")
        placement = tuple(
            old if new < 0 else new for old, new in zip(pack.placement, upload.placement, strict=True)
        )
        if placement == pack.placement:
            return False
        await context.committer.room()
        row = pack_row(context.store, number)
        if row is None or row.placement != pack.placement:
            return False
        changed = set_placement(context.store, number, placement, context.clock.time_ns())
        if changed is not None:
            context.ledger.note(number, changed)
            self._not_before.pop(number, None)
            self.completed += upload.full
        return True
