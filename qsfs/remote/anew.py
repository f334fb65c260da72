"""Having the pages of a sealed extent uploaded anew: what is only remote is fetched, then all are marked dirty.

Nothing else is special about it.  The pages keep their write numbers, so whatever happens to them meanwhile wins as
ever, and a crash leaves them clean or dirty, both of which are true.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from qsfs.errors import Corrupt
from qsfs.format.extent import ExtentEntry
from qsfs.format.pack import open_extent
from qsfs.remote.context import FlushContext
from qsfs.remote.shards import ShardReader
from qsfs.remote.stored import StoredPack
from qsfs.store.reading import LocalDamage
from qsfs.store.redirty import redirty
from qsfs.store.schema import ExtentRow, Inode

_log = logging.getLogger(__name__)


class Anew:
    """Extents of one store, by the numbers of the packs that they lie in."""

    def __init__(self, context: FlushContext, reader: ShardReader) -> None:
        self._context = context
        self._reader = reader

    def rows(self, number: int, entry: ExtentEntry) -> list[ExtentRow]:
        """What is left of a sealed extent of pack `number`."""
        stop = entry.first_page + entry.pages
        rows = self._context.store.extents.overlapping(entry.inode, entry.first_page, stop)
        return [row for row in rows if (row.pack, row.ordinal) == (number, entry.ordinal)]

    def absent(self, number: int, entry: ExtentEntry) -> int:
        """How many pages of what is left of it are not here, or damaged here; none of a file that was removed."""
        blocks, found = self._context.store.blocks, 0
        inode = self._context.store.inode(entry.inode)
        if inode is None or not inode.nlink:
            return 0
        for row in self.rows(number, entry):
            remote = blocks.remote_blocks(entry.inode, row, row.first, row.first + row.pages)
            found += sum(bits.bit_count() for _, bits in remote)
            found += sum(1 for _ in self._damaged(entry.inode, row))
        return found

    def mark_local(self, number: int, entry: ExtentEntry) -> int:
        """Marks what is left of it, here, and not damaged dirty; returns how many pages were clean."""
        store = self._context.store
        inode = store.inode(entry.inode)
        if inode is None:
            return 0
        return sum(
            redirty(store.blocks, inode, part)
            for row in self.rows(number, entry)
            for part in self._undamaged(entry.inode, row)
        )

    async def mark(
        self, number: int, pack: StoredPack, entry: ExtentEntry, stop: Callable[[], bool] = lambda: False
    ) -> int:
        """Marks all pages of what is left of it dirty; returns how many were clean or remote.

        None once `stop` says so.  Raises what `ShardReader.shards` raises, and `Corrupt`.
        """
        context, store = self._context, self._context.store
        data = b""
        while True:
            inode = store.inode(entry.inode)
            rows = self.rows(number, entry)
            if inode is None or not inode.nlink or not rows or stop():
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
        for damage in self._damaged(inode.number, row):
            if self._context.store.blocks.drop_damaged(inode, damage.page):
                _log.warning("%s; it is clean and will be fetched from the backends", damage)

    def _damaged(self, inode: int, row: ExtentRow) -> Iterator[LocalDamage]:
        blocks = self._context.store.blocks
        with contextlib.suppress(LocalDamage):
            blocks.pages(inode, row.first, row.pages)
            return
        for page in range(row.first, row.first + row.pages):
            try:
                blocks.pages(inode, page, 1)
            except LocalDamage as damage:
                yield damage

    def _undamaged(self, inode: int, row: ExtentRow) -> list[ExtentRow]:
        damaged = {damage.page for damage in self._damaged(inode, row)}
        if not damaged:
            return [row]
        return [row.part(page, 1) for page in range(row.first, row.first + row.pages) if page not in damaged]

    async def _read(self, pack: StoredPack, entry: ExtentEntry) -> bytes:
        ref, keys = pack.ref, self._context.sealer.keys
        if entry.offset + entry.sealed_length > ref.body_length:
            raise Corrupt(f"pack {pack.name}: extent {entry.ordinal} ends behind the pack; run 'qsfs fsck'")
        numbers = entry.shards(ref)
        shards = await self._reader.shards(pack, numbers)
        start = entry.offset - numbers[0] * ref.shard_size
        sealed = b"".join(shards[number] for number in numbers)[start : start + entry.sealed_length]
        return await self._context.in_thread(lambda: open_extent(keys, ref, entry, sealed))
