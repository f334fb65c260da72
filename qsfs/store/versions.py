"""A set of page versions, looked up by block: which pages somebody has already, with which write numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qsfs.store.block import ALL_PAGES, block_key
from qsfs.store.schema import BLOCK_PAGES

_Writes = tuple[int, ...]
_NONE: _Writes = (0,) * BLOCK_PAGES


class PageVersions:
    """Pages of files, each with one write number; write numbers start at 1.

    `held` may be called on another thread than the rest: it sees each block before or after a change.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, _Writes] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add(self, inode: int, first: int, writes: Sequence[int]) -> None:
        """Adds the pages from `first` on; they replace other versions of them."""
        blocks = self._blocks
        for key, part in _parts(inode, first, writes):
            old = blocks.get(key)
            if old is not None and 0 in part:
                part = tuple(new or before for new, before in zip(part, old, strict=True))
            blocks[key] = part

    def discard(self, inode: int, first: int, writes: Sequence[int]) -> None:
        """Removes the pages from `first` on, where the set has these versions of them."""
        blocks = self._blocks
        for key, part in _parts(inode, first, writes):
            old = blocks.get(key)
            if old is None:
                continue
            if old == part:
                del blocks[key]
                continue
            left = tuple(0 if gone == before else before for gone, before in zip(part, old, strict=True))
            if any(left):
                blocks[key] = left
            else:
                del blocks[key]

    def held(self, block: int, writes: Sequence[int]) -> int:
        """The bits of the pages of a block (its `block_key`) that the set has with the numbers `writes`."""
        mine = self._blocks.get(block)
        if mine is None:
            return 0
        if mine == writes:
            return ALL_PAGES
        return sum(1 << i for i in range(BLOCK_PAGES) if mine[i] and mine[i] == writes[i])


def _parts(inode: int, first: int, writes: Sequence[int]) -> Iterator[tuple[int, _Writes]]:
    """The blocks of some pages with the write number of each page, 0 where it is none of them."""
    number, before = divmod(first, BLOCK_PAGES)
    behind = -(before + len(writes)) % BLOCK_PAGES
    padded = (*_NONE[:before], *writes, *_NONE[:behind])
    parts = zip(*(iter(padded),) * BLOCK_PAGES, strict=True)
    return enumerate(parts, block_key(inode, number))
