"""Reading pages from the layers: the open group, the committing group, then LMDB."""

from __future__ import annotations

from collections.abc import Mapping

from xxhash import xxh3_64_intdigest

from qsfs.errors import Corrupt
from qsfs.store.block import ALL_PAGES, Block, DamagedPage, block_key
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
        """All bytes of the pages from `first` on, if every block is wholly resident, intact, and in one piece.

        None calls for `pages`.  Reads of LMDB that follow each other are read ahead from the disk.
        """
        if count < _RUN_PAGES or inode in self._pending:
            return None
        start, stop = first // BLOCK_PAGES, (first + count - 1) // BLOCK_PAGES + 1
        parts: list[Page] = []
        behind = start
        for number in self._in_groups(inode, start, stop):
            block = self._newest(block_key(inode, number))
            if block is None or block.whole is None or block.resident != ALL_PAGES:
                return None
            if behind < number and not self._add_stored(parts, inode, behind, number):
                return None
            parts.append(block.whole)
            behind = number + 1
        if behind < stop and not self._add_stored(parts, inode, behind, stop):
            return None
        self.used.add_all(range(block_key(inode, start), block_key(inode, stop)))
        skipped = (first - start * BLOCK_PAGES) * PAGE
        surplus = (stop - start) * BLOCK_SIZE - skipped - count * PAGE
        if surplus:
            parts[-1] = memoryview(parts[-1])[:-surplus]
        if skipped:
            parts[0] = memoryview(parts[0])[skipped:]
        whole = parts[0]
        return whole if len(parts) == 1 and isinstance(whole, bytes) else b"".join(parts)

    def _in_groups(self, inode: int, start: int, stop: int) -> list[int]:
        """The blocks of [start, stop) that a group has something of, in order."""
        found: set[int] = set()
        for group in (self._layers.open, self._layers.committing):
            if group is not None and inode in group.blocks_of:
                found |= group.blocks_of[inode].intersection(range(start, stop))
        return sorted(found)

    def _newest(self, key: int) -> Block | None:
        """A block of the open group, else of the committing one."""
        block = self._layers.open.blocks.get(key)
        committing = self._layers.committing
        return block if block is not None or committing is None else committing.blocks.get(key)

    def _add_stored(self, parts: list[Page], inode: int, start: int, stop: int) -> bool:
        """Adds the bytes of blocks that LMDB alone has; False if they are not all whole and intact."""
        view = self._layers.view
        keys = u64_pairs(inode, range(start, stop))
        value = view.get(Table.VALUES, keys[0])
        if value is None:
            return False
        self._read_ahead(value, inode, start, stop)
        whole = whole_blocks(view.get_all(Table.BLOCKS, keys), view.get_all(Table.VALUES, keys))
        if whole is None or len(whole) != (stop - start) * BLOCK_SIZE:
            return False
        parts.append(whole)
        return True

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
        top = self._newest(key)
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
        block = self._newest(key)
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
