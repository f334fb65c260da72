"""One block as a group holds it: bitmaps, write numbers, the pages that are new, and how they are stored."""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from qsfs.store.schema import BLOCK_PAGES, BLOCK_SIZE, PAGE, TAIL, VALUE_SIZE, BlockRow, Page, pack_block

ALL_PAGES = (1 << BLOCK_PAGES) - 1
ZERO_PAGE = bytes(PAGE)


class DamagedPage(bytes):
    """Bytes that failed their checksum on the way to another place: kept as damage, never returned."""


def block_key(inode: int, block: int) -> int:
    """The key of a block as one number; its 16 big-endian bytes are the LMDB key."""
    return inode << 64 | block


class Block:
    """What a group knows of one block.

    It need not hold the bytes of every resident page: the others lie in an older layer (the committing
    group, then LMDB).  A block that came whole keeps its bytes in one piece.  `stored` is False only
    where LMDB has no row of it when the group is committed; `filled` is whether it counts for the bound.
    """

    __slots__ = ("_pages", "_sums", "_whole", "dirty", "filled", "resident", "stored", "writes")

    def __init__(
        self, resident: int = 0, dirty: int = 0, writes: list[int] | None = None, *, stored: bool = True
    ) -> None:
        self.resident = resident
        self.dirty = dirty
        self.writes = [0] * BLOCK_PAGES if writes is None else writes
        self.stored = stored
        self.filled = False
        self._pages: list[Page | None] | None = None
        self._whole: Page | None = None
        self._sums: list[int] | None = None

    @property
    def whole(self) -> Page | None:
        """The bytes of all pages where the block holds them in one piece, else None."""
        return self._whole

    def page(self, index: int) -> Page | None:
        """The bytes of a page, None where the block does not hold them."""
        if self._whole is not None:
            return memoryview(self._whole)[index * PAGE : (index + 1) * PAGE]
        return None if self._pages is None else self._pages[index]

    def set_page(self, index: int, data: bytes) -> None:
        """Gives one page new bytes."""
        self._own_pages()[index] = data

    def set_whole(self, data: Page, sums: list[int] | None = None) -> None:
        """Gives all pages new bytes, `BLOCK_SIZE` of them, which must not change later.

        `sums` are the pages' checksums, for who has the bytes at hand before `encode` needs them.
        """
        self._whole, self._sums, self._pages = data, sums, None

    def drop_page(self, index: int) -> None:
        """Lets go of the bytes of one page."""
        if self._whole is not None or self._pages is not None:
            self._own_pages()[index] = None

    def drop_all(self) -> None:
        """Lets go of all bytes."""
        self._whole = self._pages = None

    def _own_pages(self) -> list[Page | None]:
        pages = self._pages
        if pages is None:
            pages = [None] * BLOCK_PAGES
            if self._whole is not None:
                pages = [self.page(index) for index in range(BLOCK_PAGES)]
                self._whole = None
            self._pages = pages
        return pages

    def needs_stored_value(self) -> bool:
        """Whether `encode` needs the stored value: the block holds some of its pages."""
        return self._pages is not None and None in self._pages and any(self._pages)

    def encode(self, old: BlockRow | None, old_value: Page | None) -> tuple[bytes, Page | None]:
        """The row to store, and the value, or None where the stored one can stay.

        `old` is the stored row, `old_value` the stored value where `needs_stored_value`.
        """
        if self._whole is not None:
            view = memoryview(self._whole)
            sums = checksums(view) if self._sums is None else self._sums
            return self._row(sums, bytes(view[VALUE_SIZE:])), view[:VALUE_SIZE]
        if self._pages is None or not any(self._pages):
            assert old is not None, "a resident block without pages must be in LMDB already"
            return self._row(old.sums, old.tail), None
        sums = [0] * BLOCK_PAGES if old is None else list(old.sums)
        parts: list[Page] = [ZERO_PAGE] * BLOCK_PAGES
        if old is not None and old_value:
            stored = memoryview(old_value)
            parts = [stored[at : at + PAGE] for at in range(0, BLOCK_SIZE, PAGE)]
            parts[-1] = b"".join((parts[-1], old.tail))
        for index, page in enumerate(self._pages):
            if page is not None:
                sums[index] = _checksum(page)
                parts[index] = page
        last = parts[-1]
        return self._row(sums, bytes(last[-TAIL:])), b"".join((*parts[:-1], memoryview(last)[:-TAIL]))

    def _row(self, sums: Sequence[int], tail: bytes) -> bytes:
        return pack_block(self.resident, self.dirty, sums, self.writes, tail)


def checksums(block: memoryview) -> list[int]:
    """The checksum of each page of a block."""
    return [
        xxh3_64_intdigest(block[:PAGE]),
        xxh3_64_intdigest(block[PAGE : 2 * PAGE]),
        xxh3_64_intdigest(block[2 * PAGE : 3 * PAGE]),
        xxh3_64_intdigest(block[3 * PAGE :]),
    ]


def _checksum(page: Page) -> int:
    return xxh3_64_intdigest(page) ^ (type(page) is DamagedPage)
