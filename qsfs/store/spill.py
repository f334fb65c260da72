"""Uncovered pages that left memory: a second pair of block tables, beside the files' own.

What an atomic-sync file wrote since its last sync is *uncovered*.  What of it does not fit in
memory is spilled here with the groups; a mount discards it.  Covering a file is one row
(SPILL_COVERED) in a group: from that commit on its spilled pages are the file's, and `move` brings
them over in bounded steps.  While that goes on, nothing more of the file is spilled, and what is
written to it drops the spilled page: a page may be uploaded and evicted before its turn to move.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from qsfs.store.block import Block, DamagedPage, block_key
from qsfs.store.blocks import Blocks
from qsfs.store.environment import Environment
from qsfs.store.layers import Layers
from qsfs.store.reading import LocalDamage
from qsfs.store.schema import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    PAGE,
    BlockRow,
    Inode,
    Table,
    plain_u64,
    read_plain_u64,
    split_u64,
    split_u64_pair,
    u64,
)


class Spill:
    """The spilled pages of all files: `covered` maps an inode to the write number that covered them."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._blocks: dict[int, set[int]] = {}
        self._to_move: dict[int, list[int]] = {}
        self.covered: dict[int, int] = {
            split_u64(key): read_plain_u64(row) for key, row in layers.scan(Table.SPILL_COVERED, b"", None)
        }

    def discard(self, environment: Environment) -> None:
        """Drops what no cover reached before the crash, and indexes the rest.  For a mount, before replay."""
        start = b""
        while True:
            keys = []
            for key, _ in self._layers.view.scan(Table.SPILL_BLOCKS, start, None):
                inode, block = split_u64_pair(key)
                if inode in self.covered:
                    self._blocks.setdefault(inode, set()).add(block)
                else:
                    keys.append(key)
                start = key + b"\0"
                if len(keys) >= 2048:
                    break
            else:
                start = b""
            if keys:
                with environment.write() as txn:
                    for key in keys:
                        txn.delete(key, db=environment.databases[Table.SPILL_BLOCKS])
                        txn.delete(key, db=environment.databases[Table.SPILL_VALUES])
                self._layers.renew_view()
            if not start:
                return

    def any(self, inode: int) -> bool:
        """Whether the file has spilled pages."""
        return inode in self._blocks

    def bytes_of(self, inode: int) -> int:
        """Room that the file's spilled blocks take."""
        return len(self._blocks.get(inode, ())) * BLOCK_SIZE

    def page(self, inode: int, page: int) -> bytes | None:
        """A spilled page, or None if this page is not spilled.  Raises `LocalDamage`."""
        data = self._page(inode, page)
        if type(data) is DamagedPage:
            raise LocalDamage(inode, page, "its local bytes, not covered yet, fail their checksum")
        return data

    def has(self, inode: int, page: int) -> bool:
        """Whether a page is spilled."""
        return self._page(inode, page) is not None

    def _page(self, inode: int, page: int) -> bytes | None:
        number, index = divmod(page, BLOCK_PAGES)
        if number not in self._blocks.get(inode, ()):
            return None
        key = block_key(inode, number)
        for group in (self._layers.open, self._layers.committing):
            block = group.spill.get(key) if group is not None else None
            if block is not None:
                if not block.resident & 1 << index:
                    return None
                data = block.page(index)
                if data is not None:
                    return data if isinstance(data, bytes) else bytes(data)
        return self._stored(key, index)

    def _stored(self, key: int, index: int) -> bytes | None:
        name = key.to_bytes(16, "big")
        encoded = self._layers.view.get(Table.SPILL_BLOCKS, name)
        value = self._layers.view.get(Table.SPILL_VALUES, name)
        if encoded is None:
            return None
        row = BlockRow.decode(encoded)
        if not row.resident & 1 << index:
            return None
        data = bytes(value[index * PAGE : (index + 1) * PAGE]) if value is not None else b""
        if index == BLOCK_PAGES - 1:
            data += row.tail
        if len(data) != PAGE:
            return DamagedPage(PAGE)
        return data if xxh3_64_intdigest(data) == row.sums[index] else DamagedPage(data)

    def put(self, inode: int, page: int, data: bytes) -> None:
        """Spills one page with the open group."""
        number, index = divmod(page, BLOCK_PAGES)
        block = self._writable(inode, number)
        block.resident |= 1 << index
        block.set_page(index, data)
        self._layers.open.fill(block)
        self._blocks.setdefault(inode, set()).add(number)

    def _writable(self, inode: int, number: int) -> Block:
        key = block_key(inode, number)
        block = self._layers.open.spill.get(key)
        if block is None:
            resident = 0
            committing = self._layers.committing
            lower = committing.spill.get(key) if committing is not None else None
            if lower is not None:
                resident = lower.resident
            else:
                encoded = self._layers.view.get(Table.SPILL_BLOCKS, key.to_bytes(16, "big"))
                if encoded is not None:
                    resident = BlockRow.decode(encoded).resident
            block = self._layers.open.spill[key] = Block(resident)
        return block

    def cut(self, inode: int, first: int) -> None:
        """Drops the spilled pages from `first` on."""
        for number in list(self._blocks.get(inode, ())):
            if (number + 1) * BLOCK_PAGES <= first:
                continue
            block = self._writable(inode, number)
            for index in range(BLOCK_PAGES):
                if number * BLOCK_PAGES + index >= first:
                    block.resident &= ~(1 << index)
                    block.drop_page(index)
            if not block.resident:
                self._forget_block(inode, number)

    def drop_pages(self, inode: int, first: int, count: int) -> None:
        """Drops single spilled pages: something newer was written over them."""
        numbers = self._blocks.get(inode, ())
        for page in range(first, first + count):
            number, index = divmod(page, BLOCK_PAGES)
            if number in numbers:
                block = self._writable(inode, number)
                block.resident &= ~(1 << index)
                block.drop_page(index)
                if not block.resident:
                    self._forget_block(inode, number)

    def drop(self, inode: int) -> None:
        """Drops all spilled pages of a file."""
        self.cut(inode, 0)

    def cover(self, inode: int, write_number: int) -> None:
        """Makes the spilled pages the file's own, under one write number, with the open group."""
        if inode in self._blocks:
            self.covered[inode] = write_number
            self._layers.put(Table.SPILL_COVERED, u64(inode), plain_u64(write_number))

    def move(self, inode: Inode, blocks: Blocks, steps: int) -> bool:
        """Brings at most `steps` covered blocks to their file; True when none is left.

        A page whose bytes are damaged arrives as damaged.
        """
        write_number = self.covered.get(inode.number)
        if write_number is None:
            return True
        blocks_of = self._blocks.get(inode.number, set())
        left = self._to_move.get(inode.number)
        if left is None:
            left = self._to_move[inode.number] = sorted(blocks_of, reverse=True)
        for number in _take(left, steps):
            if number not in blocks_of:
                continue
            for index in range(BLOCK_PAGES):
                page = number * BLOCK_PAGES + index
                data = self._page(inode.number, page)
                if data is not None:
                    blocks.move_in(inode, page, data, write_number)
            block = self._writable(inode.number, number)
            block.resident = 0
            block.drop_all()
            self._forget_block(inode.number, number)
        return inode.number not in self.covered

    def _forget_block(self, inode: int, number: int) -> None:
        numbers = self._blocks[inode]
        numbers.discard(number)
        if not numbers:
            del self._blocks[inode]
            self._to_move.pop(inode, None)
            if self.covered.pop(inode, None) is not None:
                self._layers.delete(Table.SPILL_COVERED, u64(inode))


def _take(numbers: list[int], most: int) -> list[int]:
    """Takes at most `most` numbers from the end of the list, the last one first."""
    taken = numbers[-most:][::-1]
    del numbers[-most:]
    return taken
