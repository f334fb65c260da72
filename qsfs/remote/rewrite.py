"""Rewriting packs of which little lives: their last pages are marked dirty, and flushing packs them anew.

Nothing else is special about it.  The pages keep their write numbers, so whatever happens to them meanwhile wins as
ever, and a crash leaves them clean or dirty, both of which are true.  The old pack is dead once the new one is
recorded, and is deleted as every dead one.  Fewer bytes are uploaded than become free.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable

import trio

from qsfs.errors import BackendError, Corrupt, DataLost, FormatMismatch
from qsfs.format.extent import ExtentEntry, PackKind
from qsfs.format.pack import open_extent
from qsfs.remote.context import FlushContext
from qsfs.remote.dead_packs import read_index
from qsfs.remote.shards import ShardReader
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import pack_row
from qsfs.store.reading import LocalDamage
from qsfs.store.redirty import redirty
from qsfs.store.schema import PAGE, ExtentRow, Inode, PackRow

_log = logging.getLogger(__name__)

SETTLED_SECONDS = 600.0
"""Age from which on a pack is rewritten: a younger one that shrinks is likely to die by itself."""
AGAIN_SECONDS = 3600.0
"""When a pack is tried again that could not be rewritten."""
_LONGEST_SECONDS = 600.0
_READ_SECONDS = 60.0
_LOOKED_AT = 256


class Rewriter:
    """Rewrites one pack at a time, while the cache has room and enough backends answer.

    `share` is the part of a pack's size below which its live bytes make it worth that, at most a half; 0: never.
    """

    def __init__(
        self,
        context: FlushContext,
        reader: ShardReader,
        *,
        share: float,
        short_of_room: Callable[[], bool],
    ) -> None:
        self.rewritten_packs = 0
        self.rewritten_bytes = 0
        self._context = context
        self._reader = reader
        self._share = share
        self._short_of_room = short_of_room
        self._thin: dict[int, float] = {}
        self._current: tuple[int, float] | None = None

    def take_over(self, thin: Iterable[int]) -> None:
        """Takes in the packs of which little lived when the mount began."""
        for number in thin:
            self._thin.setdefault(number, 0.0)

    def report(self) -> dict[str, int]:
        """How many packs are thin, how many were rewritten, and the bytes of their pages."""
        return {
            "thin_packs": len(self._thin),
            "rewritten_packs": self.rewritten_packs,
            "rewritten_bytes": self.rewritten_bytes,
        }

    async def work(self) -> None:
        """Begins with the next pack, unless the last one is still on its way."""
        thinned = self._context.store.extents.thinned
        self.take_over(thinned)
        thinned.clear()
        if self._busy() or not self._share or self._short_of_room():
            return
        if not self._context.uploader.enough_backends():
            return
        chosen = self._choose()
        if chosen is not None:
            await self._rewrite(*chosen)

    def _busy(self) -> bool:
        """Whether pages of the last pack have still to be uploaded."""
        if self._current is None:
            return False
        number, until = self._current
        row = pack_row(self._context.store, number)
        if row is not None and row.live and self._context.clock.monotonic() < until:
            return True
        if row is None or not row.live:
            self.rewritten_packs += 1
            self._thin.pop(number, None)
        self._current = None
        return False

    def _choose(self) -> tuple[int, PackRow] | None:
        """The thinnest of the packs that were not looked at for longest."""
        now, wall_ns = self._context.clock.monotonic(), self._context.clock.time_ns()
        best: tuple[float, int, PackRow] | None = None
        for number in [n for _, (n, later) in zip(range(_LOOKED_AT), self._thin.items(), strict=False) if later <= now]:
            row = pack_row(self._context.store, number)
            later = self._thin.pop(number)
            if row is None or not row.live or row.kind != PackKind.DATA:
                continue
            self._thin[number] = later
            part = row.live / row.body_length
            if part >= self._share or wall_ns - row.written_at_ns < SETTLED_SECONDS * 1e9:
                continue
            if best is None or part < best[0]:
                best = (part, number, row)
        return None if best is None else best[1:]

    async def _rewrite(self, number: int, row: PackRow) -> None:
        """Brings what lives of a pack into the cache, and marks it dirty."""
        context = self._context
        marked = 0
        try:
            with trio.fail_after(_READ_SECONDS):
                pack = StoredPack.of_row(row, context.sealer.code.params)
                for entry in await read_index(self._reader, pack, context.sealer.keys):
                    marked += await self._rewrite_extent(number, pack, entry)
                    await trio.lowlevel.checkpoint()
        except (trio.TooSlowError, BackendError, DataLost, Corrupt, FormatMismatch) as error:
            why = "it was not read in time" if isinstance(error, trio.TooSlowError) else error
            _log.info("pack %s: is not rewritten, which is tried again: %s", row.pack_id.hex(), why)
        self.rewritten_bytes += marked * PAGE
        del self._thin[number]
        self._thin[number] = context.clock.monotonic() + AGAIN_SECONDS
        if marked:
            self._current = (number, context.clock.monotonic() + _LONGEST_SECONDS)

    async def _rewrite_extent(self, number: int, pack: StoredPack, entry: ExtentEntry) -> int:
        context, store = self._context, self._context.store
        data = b""
        while True:
            inode = store.inode(entry.inode)
            rows = self._rows(number, entry)
            if inode is None or not inode.nlink or not rows or self._short_of_room():
                return 0
            for row in rows:
                self._drop_damage(inode, row)
            remote = any(store.blocks.remote_blocks(entry.inode, row, row.first, row.first + row.pages) for row in rows)
            if not remote or data:
                break
            data = await self._read(pack, entry)
            await context.committer.room()
        if remote:
            store.blocks.install(inode, entry.first_page, data, rows[0])
        return sum(redirty(store.blocks, inode, row) for row in rows)

    def _drop_damage(self, inode: Inode, row: ExtentRow) -> None:
        """Evicts clean pages whose local bytes are damaged: marked dirty, they could not be fetched again."""
        blocks = self._context.store.blocks
        with contextlib.suppress(LocalDamage):
            blocks.pages(inode.number, row.first, row.pages)
            return
        for page in range(row.first, row.first + row.pages):
            try:
                blocks.pages(inode.number, page, 1)
            except LocalDamage as damage:
                if blocks.drop_damaged(inode, page):
                    _log.warning("%s; it is clean and will be fetched from the backends", damage)

    def _rows(self, number: int, entry: ExtentEntry) -> list[ExtentRow]:
        """What is left of a sealed extent of pack `number`."""
        stop = entry.first_page + entry.pages
        rows = self._context.store.extents.overlapping(entry.inode, entry.first_page, stop)
        return [row for row in rows if (row.pack, row.ordinal) == (number, entry.ordinal)]

    async def _read(self, pack: StoredPack, entry: ExtentEntry) -> bytes:
        ref, keys = pack.ref, self._context.sealer.keys
        numbers = entry.shards(ref)
        shards = await self._reader.shards(pack, numbers)
        start = entry.offset - numbers[0] * ref.shard_size
        sealed = b"".join(shards[number] for number in numbers)[start : start + entry.sealed_length]
        return await self._context.in_thread(lambda: open_extent(keys, ref, entry, sealed))
