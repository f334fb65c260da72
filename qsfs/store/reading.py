"""Reading pages from the layers: the open group, the committing group, then LMDB."""

from __future__ import annotations

from collections.abc import Mapping

from xxhash import xxh3_64_intdigest

from qsfs.errors import Corrupt
from qsfs.store.block import Block, DamagedPage, block_key
from qsfs.store.layers import Layers
from qsfs.store.prefetch import read_ahead
from qsfs.store.recency import RecentSet
from qsfs.store.schema import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    PAGE,
    VALUE_SIZE,
    BlockRow,
    Page,
    Table,
    Truncation,
    is_cut,
    u64_pair,
    u64_pairs,
    unpack_block,
)
from qsfs.store.values import whole_blocks

_RUN_PAGES = 2 * BLOCK_PAGES
_MOST_STREAMS = 64


class LocalDamage(Corrupt):
    """The bytes of one local page are gone or fail their checksum."""

    def __init__(self, inode: int, page: int, what: str) -> None:
        super().__init__(f"inode {inode}, page {page}: {what}; run 'qsfs fsck --repair'")
        self.inode = inode
        self.page = page


class PageReader:
    """Reads resident pages; `used` remembers which blocks were read lately."""

    def __init__(self, layers: Layers, pending: Mapping[int, tuple[Truncation, ...]]) -> None:
        self._layers = layers
        self._pending = pending
        self.used = RecentSet()
        self._streams: dict[tuple[int, int], bool] = {}

    def pages(self, inode: int, first: int, count: int) -> list[Page | None]:
        """The resident pages from `first` on; None where a page is a hole or remote only.

        Memoryviews among them die with the next commit: join or copy at once.  Raises
        `LocalDamage` if stored bytes fail their checksum.
        """
        found: list[Page | None] = []
        page, stop = first, first + count
        while page < stop:
            index = page % BLOCK_PAGES
            here = min(BLOCK_PAGES - index, stop - page)
            self._read_block(found, inode, page // BLOCK_PAGES, index, here)
            page += here
        return found

    def run(self, inode: int, first: int, count: int) -> bytes | None:
        """All bytes of the pages from `first` on, if LMDB alone has their blocks, wholly resident and intact.

        None calls for `pages`.  Reads that follow each other are read ahead from the disk.
        """
        if count < _RUN_PAGES or inode in self._pending:
            return None
        start, stop = first // BLOCK_PAGES, (first + count - 1) // BLOCK_PAGES + 1
        blocks = range(start, stop)
        for group in (self._layers.open, self._layers.committing):
            if group is not None and inode in group.blocks_of and not group.blocks_of[inode].isdisjoint(blocks):
                return None
        view = self._layers.view
        keys = u64_pairs(inode, blocks)
        value = view.get(Table.VALUES, keys[0])
        if value is None:
            return None
        self._read_ahead(value, inode, start, stop)
        whole = whole_blocks(view.get_all(Table.BLOCKS, keys), view.get_all(Table.VALUES, keys))
        if whole is None or len(whole) != len(blocks) * BLOCK_SIZE:
            return None
        self.used.add_all(range(block_key(inode, start), block_key(inode, stop)))
        if len(whole) == count * PAGE:
            return whole
        skipped = (first - start * BLOCK_PAGES) * PAGE
        return whole[skipped : skipped + count * PAGE]

    def _read_ahead(self, value: memoryview, inode: int, start: int, stop: int) -> None:
        """Has the kernel read what a run and the one behind it take; `value` is the first of the run."""
        size = (stop - start) * BLOCK_SIZE
        if self._streams.pop((inode, start), False):
            read_ahead(value, size, size)
        else:
            read_ahead(value, 0, 2 * size)
        if len(self._streams) >= _MOST_STREAMS:
            self._streams.clear()
        self._streams[inode, stop] = True

    def _read_block(self, found: list[Page | None], inode: int, number: int, index: int, count: int) -> None:
        key = block_key(inode, number)
        self.used.add(key)
        committing = self._layers.committing
        lower = committing.blocks.get(key) if committing is not None else None
        top = self._layers.open.blocks.get(key) or lower
        if top is None:
            found += self._stored_pages(key, index, count)[index : index + count]
            return
        for i in range(index, index + count):
            if not top.resident & 1 << i or self.is_cut(inode, number, i, top):
                found.append(None)
                continue
            page: Page | None = top.page(i)
            if page is None and lower is not None:
                page = lower.page(i)
            if page is None:
                page = self._stored_pages(key, i, 1, raw=True)[i]
            elif type(page) is DamagedPage:
                raise LocalDamage(inode, number * BLOCK_PAGES + i, "its local bytes fail their checksum")
            found.append(page)

    def is_cut(self, inode: int, number: int, index: int, block: Block) -> bool:
        """Whether a pending truncation makes a page of `block` a hole."""
        pending = self._pending.get(inode)
        page = number * BLOCK_PAGES + index
        return pending is not None and is_cut(pending, page, block.writes[index])

    def _stored_pages(self, key: int, index: int, count: int, raw: bool = False) -> list[Page | None]:
        """The pages of a block in LMDB; `raw`: those under a pending truncation too."""
        name = key.to_bytes(16, "big")
        pages: list[Page | None] = [None] * BLOCK_PAGES
        view = self._layers.view
        encoded = view.get(Table.BLOCKS, name)
        if encoded is None:
            return pages
        row = BlockRow.decode(encoded)
        inode, number = key >> 64, key & (1 << 64) - 1
        pending = None if raw else self._pending.get(inode)
        value = view.get(Table.VALUES, name)
        for i in range(index, index + count):
            if not row.resident & 1 << i:
                continue
            page_number = number * BLOCK_PAGES + i
            if pending is not None and is_cut(pending, page_number, row.writes[i]):
                continue
            page: Page
            if value is None or len(value) != VALUE_SIZE:
                raise LocalDamage(inode, page_number, "its local bytes are gone")
            if i < BLOCK_PAGES - 1:
                page = value[i * PAGE : (i + 1) * PAGE]
            else:
                page = bytes(value[i * PAGE :]) + row.tail
            if xxh3_64_intdigest(page) != row.sums[i]:
                raise LocalDamage(inode, page_number, "its local bytes fail their checksum")
            pages[i] = page
        return pages

    def is_resident(self, inode: int, page: int) -> bool:
        """Whether a page lies in this store as of now."""
        number, index = divmod(page, BLOCK_PAGES)
        key = block_key(inode, number)
        block = self._layers.open.blocks.get(key)
        if block is None and self._layers.committing is not None:
            block = self._layers.committing.blocks.get(key)
        if block is not None:
            return bool(block.resident & 1 << index) and not self.is_cut(inode, number, index, block)
        encoded = self._layers.view.get(Table.BLOCKS, u64_pair(inode, number))
        if encoded is None:
            return False
        fields = unpack_block(encoded)
        pending = self._pending.get(inode)
        return bool(fields[0] & 1 << index) and not (
            pending is not None and is_cut(pending, page, fields[6 + index])
        )
