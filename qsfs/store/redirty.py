"""Marking clean pages dirty again, so that they are uploaded anew."""

from __future__ import annotations

from qsfs.store.blocks import Blocks
from qsfs.store.schema import BLOCK_PAGES, ExtentRow, Inode, InodeFlag


def redirty(blocks: Blocks, inode: Inode, row: ExtentRow) -> int:
    """Marks the resident clean pages dirty that `row`, as it lies there now, holds; returns how many.

    They keep their write numbers, and their extent until the new one is recorded.
    """
    if inode.flags & InodeFlag.LOCAL_ONLY:
        return 0
    marked = 0
    stop = row.first + row.pages
    for number in range(row.first // BLOCK_PAGES, (stop - 1) // BLOCK_PAGES + 1):
        if blocks.state(inode.number, number) is None:
            continue
        base = number * BLOCK_PAGES
        first, last = max(row.first, base) - base, min(stop, base + BLOCK_PAGES) - base
        block = blocks.writable(inode, number)
        bits = ((1 << last) - (1 << first)) & block.resident & ~block.dirty
        block.dirty |= bits
        marked += bits.bit_count()
    return marked
