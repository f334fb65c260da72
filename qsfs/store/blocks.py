"""Pages of files: resident, dirty, clean, evicted; always judged by the newest layer.

A page of a block is in one of four states (docs/architecture.md, "Pages"): a hole, remote only,
resident clean, resident dirty.  Everything that changes a state goes through the open group,
also the daemon's own work (clean marks, installs, evictions, truncations worked off).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

from qsfs.store.block import ALL_PAGES, Block, block_key, checksums
from qsfs.store.extents import Extents
from qsfs.store.group import InodeLog
from qsfs.store.inodes import Inodes
from qsfs.store.layers import Layers
from qsfs.store.reading import PageReader
from qsfs.store.recency import RecentSet
from qsfs.store.schema import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    PAGE,
    ExtentRow,
    Inode,
    InodeFlag,
    Page,
    Table,
    Truncation,
    add_truncation,
    decode_truncations,
    encode_truncations,
    is_cut,
    split_u64,
    split_u64_pair,
    u64,
    u64_pair,
    unpack_block,
)

_LOCAL_ONLY = int(InodeFlag.LOCAL_ONLY)
_FEW_BLOCKS = 64
_A_RUN = 4


class Blocks:
    """The local pages of all files."""

    def __init__(self, layers: Layers, inodes: Inodes, extents: Extents) -> None:
        self._layers = layers
        self._inodes = inodes
        self._extents = extents
        self.written = RecentSet()
        self._under_work: dict[int, _Work] = {}
        self.pending: dict[int, tuple[Truncation, ...]] = {
            split_u64(key): decode_truncations(row) for key, row in layers.scan(Table.TRUNCATIONS, b"", None)
        }
        self.reader = PageReader(layers, self.pending)

    def pages(self, inode: int, first: int, count: int) -> list[Page | None]:
        """See `PageReader.pages`."""
        return self.reader.pages(inode, first, count)

    def state(self, inode: int, number: int) -> Block | None:
        """Bitmaps and write numbers of a block as of now, or None; read only."""
        key = block_key(inode, number)
        block = self._layers.open.blocks.get(key) or self._inherit(inode, number, key)
        if block is None:
            return None
        if inode in self.pending and block is self._layers.open.blocks.get(key):
            owner = self._inodes.get(inode)
            block = block if owner is None else self.writable(owner, number)
        self._cut(inode, number, block)
        return block if block.resident else None

    def _inherit(self, inode: int, number: int, key: int) -> Block | None:
        committing = self._layers.committing
        lower = committing.blocks.get(key) if committing is not None else None
        if lower is not None:
            return Block(lower.resident, lower.dirty, list(lower.writes))
        encoded = self._layers.view.get(Table.BLOCKS, u64_pair(inode, number))
        if encoded is None:
            return None
        return _block_of(encoded)

    def _cut(self, inode: int, number: int, block: Block) -> int:
        """Clears the pages of `block` that a pending truncation cuts; returns their bits."""
        pending = self.pending.get(inode)
        if pending is None:
            return 0
        bits = 0
        for i in range(BLOCK_PAGES):
            if block.resident & 1 << i and is_cut(pending, number * BLOCK_PAGES + i, block.writes[i]):
                bits |= 1 << i
                block.writes[i] = 0
                block.drop_page(i)
        block.resident &= ~bits
        block.dirty &= ~bits
        return bits

    def writable(self, inode: Inode, number: int) -> Block:
        """The block in the open group, with pending truncations worked off in it."""
        key = block_key(inode.number, number)
        block = self._layers.open.blocks.get(key)
        if block is None:
            block = self._inherit(inode.number, number, key) or Block(stored=False)
            self._layers.open.blocks[key] = block
            self._layers.open.blocks_of[inode.number].add(number)
        if inode.number in self.pending:
            bits = self._cut(inode.number, number, block)
            if bits:
                self._count_holes(inode, number, bits)
        return block

    def _count_holes(self, inode: Inode, number: int, bits: int) -> None:
        """Pages that ceased to be resident are holes now, unless an extent row holds them."""
        has_extents = self._extents.any(inode.number)
        inode.allocated -= self._holes(inode.number, number, bits) if has_extents else bits.bit_count()
        self._inodes.touch(inode)

    def put(self, inode: Inode, first: int, data: Page, write_number: int) -> None:
        """Writes whole pages from page `first` on; they become resident and, unless local only, dirty."""
        group = self._layers.open
        log = group.data_log.get(inode.number)
        if log is None:
            log = group.data_log[inode.number] = InodeLog()
        count = len(data) // PAGE
        if count == 1:
            log.pages[first] = write_number
            self.move_in(inode, first, bytes(data), write_number)
            self.written.add(block_key(inode.number, first // BLOCK_PAGES))
            return
        log.pages.update(dict.fromkeys(range(first, first + count), write_number))
        local = bool(inode.flags & _LOCAL_ONLY)
        has_extents = self._extents.any(inode.number)
        start, stop = first // BLOCK_PAGES, (first + count - 1) // BLOCK_PAGES + 1
        view = memoryview(data)
        new = stop - start >= _A_RUN and group.blocks_of[inode.number].isdisjoint(range(start, stop))
        bare = new and self._is_bare(inode.number, start, stop)
        page, offset = first, 0
        for number in range(start, stop):
            index = page % BLOCK_PAGES
            here = min(BLOCK_PAGES - index, count)
            block = self._bare_block(inode.number, number) if bare else self.writable(inode, number)
            if here == BLOCK_PAGES:
                if not block.filled:
                    group.streamed_blocks += 1
                bits = ALL_PAGES
                block.writes = [write_number] * BLOCK_PAGES
                whole = view[offset : offset + BLOCK_SIZE]
                if new and whole.readonly:
                    # Such blocks are rarely rewritten, so their checksums need not wait for the commit.  And
                    # uncopied they hold on to all of `data`, so a group may hold twice what it counts for.
                    block.set_whole(whole, checksums(whole))
                else:
                    block.set_whole(bytes(whole))
            else:
                bits = ((1 << here) - 1) << index
                for i in range(here):
                    block.writes[index + i] = write_number
                    block.set_page(index + i, bytes(view[offset + i * PAGE : offset + (i + 1) * PAGE]))
            group.fill(block)
            added = bits & ~block.resident
            if added:
                inode.allocated += self._holes(inode.number, number, added) if has_extents else added.bit_count()
                block.resident |= bits
            if not local:
                block.dirty |= bits
            offset += here * PAGE
            page += here
            count -= here
        self.written.add_all(range(block_key(inode.number, start), block_key(inode.number, stop)))
        self._inodes.touch(inode)

    def _is_bare(self, inode: int, start: int, stop: int) -> bool:
        """Whether the layers below the open group know nothing of some blocks: then none need be looked up."""
        numbers = range(start, stop)
        committing = self._layers.committing
        if committing is not None and not committing.blocks_of.get(inode, set()).isdisjoint(numbers):
            return False
        rows = self._layers.view.scan(Table.BLOCKS, u64_pair(inode, start), u64_pair(inode, stop))
        return next(rows, None) is None

    def _bare_block(self, inode: int, number: int) -> Block:
        """A block of which nothing is known, in the open group."""
        group = self._layers.open
        block = group.blocks[block_key(inode, number)] = Block(stored=False)
        group.blocks_of[inode].add(number)
        return block

    def _holes(self, inode: int, number: int, bits: int) -> int:
        """How many of the pages `bits` of a block no extent row holds."""
        first = number * BLOCK_PAGES
        return sum(bool(bits & 1 << i) and self._extents.at(inode, first + i) is None for i in range(BLOCK_PAGES))

    def move_in(self, inode: Inode, page: int, data: bytes, write_number: int) -> None:
        """Makes a page of the file's own that was kept elsewhere in the store; nothing for the journal."""
        number, index = divmod(page, BLOCK_PAGES)
        bit = 1 << index
        block = self.writable(inode, number)
        if not block.resident & bit and self._extents.at(inode.number, page) is None:
            inode.allocated += 1
        block.resident |= bit
        if not inode.flags & _LOCAL_ONLY:
            block.dirty |= bit
        block.writes[index] = write_number
        block.set_page(index, data)
        self._layers.open.fill(block)
        self._inodes.touch(inode)

    def install(self, inode: Inode, first: int, data: bytes | memoryview, source: ExtentRow) -> int:
        """Makes fetched pages from page `first` on resident clean; returns how many that were.

        Only those become so that are still remote only by the extent that they came from.  `data` must not
        change later: where half of it or more is installed, the blocks refer to it.
        """
        stop = first + len(data) // PAGE
        absent = self._absent(inode.number, first, stop)
        wanted = [
            found
            for row in self._extents.overlapping(inode.number, first, stop)
            if (row.pack, row.ordinal) == (source.pack, source.ordinal)
            for found in self._remote_blocks(inode.number, row, first, stop, absent)
        ]
        view = memoryview(data)
        keep = 2 * len(wanted) * BLOCK_SIZE >= len(cast("bytes", view.obj))
        installed = 0
        for number, bits in wanted:
            block = self._bare_block(inode.number, number) if number in absent else self.writable(inode, number)
            absent.discard(number)
            block.resident |= bits
            start = (number * BLOCK_PAGES - first) * PAGE
            if bits == ALL_PAGES:
                block.writes = [source.write_number] * BLOCK_PAGES
                whole = view[start : start + BLOCK_SIZE]
                block.set_whole(whole if keep else bytes(whole))
            else:
                for i in range(BLOCK_PAGES):
                    if bits & 1 << i:
                        block.writes[i] = source.write_number
                        block.set_page(i, bytes(view[start + i * PAGE : start + (i + 1) * PAGE]))
            self._layers.open.fill(block)
            self.reader.used.add(block_key(inode.number, number))
            installed += bits.bit_count()
        return installed

    def remote_blocks(self, inode: int, row: ExtentRow, first: int, stop: int) -> list[tuple[int, int]]:
        """Blocks, with the bits of their pages, that `row` holds of [first, stop) and that are remote only.

        `row` is the extent row that lies there now.
        """
        first, stop = max(first, row.first), min(stop, row.first + row.pages)
        return self._remote_blocks(inode, row, first, stop, self._absent(inode, first, stop))

    def _remote_blocks(
        self, inode: int, row: ExtentRow, first: int, stop: int, absent: Container[int]
    ) -> list[tuple[int, int]]:
        first, stop = max(first, row.first), min(stop, row.first + row.pages)
        pending = self.pending.get(inode)
        found = []
        page = first
        while page < stop:
            number, index = divmod(page, BLOCK_PAGES)
            here = min(BLOCK_PAGES - index, stop - page)
            bits = ((1 << here) - 1) << index
            state = None if number in absent else self.state(inode, number)
            if state is not None:
                bits &= ~state.resident
            if pending is not None:
                for i in range(index, index + here):
                    if is_cut(pending, number * BLOCK_PAGES + i, row.write_number):
                        bits &= ~(1 << i)
            if bits:
                found.append((number, bits))
            page += here
        return found

    def _absent(self, inode: int, first: int, stop: int) -> set[int]:
        """The blocks of the pages [first, stop) that no layer has anything of."""
        absent = set(range(first // BLOCK_PAGES, (stop - 1) // BLOCK_PAGES + 1))
        for group in (self._layers.open, self._layers.committing):
            if group is not None and inode in group.blocks_of:
                absent -= group.blocks_of[inode]
        stored = self._layers.view.get_all(Table.BLOCKS, [u64_pair(inode, number) for number in sorted(absent)])
        return absent.difference(split_u64_pair(bytes(key))[1] for key, _ in stored)

    def remote_extent(self, inode: int, page: int) -> ExtentRow | None:
        """The extent that holds `page`, unless a pending truncation makes it a hole."""
        row = self._extents.at(inode, page)
        if row is None:
            return None
        pending = self.pending.get(inode)
        if pending is not None and is_cut(pending, page, row.write_number):
            return None
        return row

    def clean(self, inode: Inode, first: int, writes: Sequence[int]) -> list[int]:
        """Marks those pages from `first` on clean that are resident dirty with these write numbers; returns them."""
        stop = first + len(writes)
        numbers = range(first // BLOCK_PAGES, (stop - 1) // BLOCK_PAGES + 1)
        group = self._layers.open
        stored = self._stored_blocks(inode.number, numbers)
        cleaned: list[int] = []
        for number in numbers:
            key = block_key(inode.number, number)
            block = group.blocks.get(key)
            known = block is not None
            if block is None:
                block = stored.get(number) or self._inherit(inode.number, number, key)
                if block is None:
                    continue
            if inode.number in self.pending:
                block, known = self.writable(inode, number), True
            base = number * BLOCK_PAGES
            bits = 0
            for page in range(max(first, base), min(stop, base + BLOCK_PAGES)):
                index = page - base
                if block.dirty & 1 << index and block.writes[index] == writes[page - first]:
                    bits |= 1 << index
                    cleaned.append(page)
            if bits:
                block.dirty &= ~bits
                if not known:
                    group.blocks[key] = block
                    group.blocks_of[inode.number].add(number)
        return cleaned

    def _stored_blocks(self, inode: int, numbers: range) -> dict[int, Block]:
        """Those of some blocks that LMDB has and no group, as `_inherit` gives them."""
        wanted = set(numbers)
        for group in (self._layers.open, self._layers.committing):
            if group is not None and inode in group.blocks_of:
                wanted -= group.blocks_of[inode]
        rows = self._layers.view.get_all(Table.BLOCKS, [u64_pair(inode, number) for number in sorted(wanted)])
        return {int.from_bytes(key[8:], "big"): _block_of(row) for key, row in rows}

    def mark_all(self, inode: Inode, *, dirty: bool) -> None:
        """Marks every resident page dirty, or not: for a file that leaves or enters `local_only`."""
        for number in self.numbers(inode.number, 0):
            block = self.writable(inode, number)
            block.dirty = block.resident if dirty else 0

    def evict(self, inode: Inode, number: int, bits: int) -> int:
        """Drops the clean pages `bits` of a block; returns how many went."""
        state = self.state(inode.number, number)
        if state is None:
            return 0
        bits &= state.resident & ~state.dirty
        if not bits:
            return 0
        block = self.writable(inode, number)
        block.resident &= ~bits
        for i in range(BLOCK_PAGES):
            if bits & 1 << i:
                block.drop_page(i)
                block.writes[i] = 0
        return bits.bit_count()

    def drop_damaged(self, inode: Inode, page: int) -> bool:
        """Evicts a page whose local bytes are damaged, if it is clean and a pack has it."""
        if self.remote_extent(inode.number, page) is None:
            return False
        number, index = divmod(page, BLOCK_PAGES)
        return self.evict(inode, number, 1 << index) == 1

    def numbers(self, inode: int, first: int) -> list[int]:
        """Numbers of the blocks from `first` on that have a row in any layer, in order."""
        found = set(self._unstored_numbers(inode, first))
        found.update(self._stored_numbers(inode, first))
        return sorted(found)

    def _stored_numbers(self, inode: int, first: int) -> Iterator[int]:
        rows = self._layers.view.scan(Table.BLOCKS, u64_pair(inode, first), u64(inode + 1))
        return (int.from_bytes(key[8:], "big") for key, _ in rows)

    def _unstored_numbers(self, inode: int, first: int) -> Iterator[int]:
        for group in (self._layers.open, self._layers.committing):
            if group is not None:
                yield from (number for number in group.blocks_of.get(inode, ()) if number >= first)

    def truncate(self, inode: Inode, first: int, write_number: int) -> None:
        """Makes every page from `first` on a hole: recorded at once, worked off by `work_off`."""
        new = Truncation(first, write_number)
        self._set_pending(inode.number, add_truncation(self.pending.get(inode.number, ()), new))

    def drop(self, inode: Inode) -> bool:
        """Makes all of a file that goes away holes at once if that is little; whether it did."""
        number = inode.number
        if number in self.pending or self._extents.any(number):
            return False
        if inode.allocated:
            found = set(islice(self._stored_numbers(number, 0), _FEW_BLOCKS))
            found.update(self._unstored_numbers(number, 0))
            if len(found) >= _FEW_BLOCKS:
                return False
            for block_number in found:
                block = self.writable(inode, block_number)
                block.resident = block.dirty = 0
                block.writes = [0] * BLOCK_PAGES
                block.drop_all()
            inode.allocated = 0
        return True

    def _set_pending(self, inode: int, pending: tuple[Truncation, ...]) -> None:
        self._under_work.pop(inode, None)
        if pending:
            self.pending[inode] = pending
            self._layers.put(Table.TRUNCATIONS, u64(inode), encode_truncations(pending))
        else:
            self.pending.pop(inode, None)
            self._layers.delete(Table.TRUNCATIONS, u64(inode))

    def work_off(self, inode: Inode, steps: int) -> bool:
        """Works off pending truncations of a file, about `steps` blocks; True when done.

        Goes on where the last call ended.  That is enough, since nothing that a truncation cuts can
        appear behind it: what is written, uploaded or fetched later is judged by the truncation.
        `inode` may be a stand-in for one that is gone: only its number counts then.
        """
        pending = self.pending.get(inode.number)
        if not pending:
            return True
        work = self._under_work.get(inode.number)
        if work is None:
            first = min(t.first for t in pending)
            unstored = sorted(set(self._unstored_numbers(inode.number, first // BLOCK_PAGES)), reverse=True)
            work = self._under_work[inode.number] = _Work(unstored, first // BLOCK_PAGES, first)
        while work.unstored and steps > 0:
            self._work_off_block(inode, work.unstored.pop())
            steps -= 1
        if steps > 0 and work.block is not None:
            numbers = list(islice(self._stored_numbers(inode.number, work.block), steps))
            for number in numbers:
                self._work_off_block(inode, number)
            work.block = None if len(numbers) < steps else numbers[-1] + 1
            steps -= len(numbers)
        if steps <= 0:
            return False
        rows = list(islice(self._extents.overlapping(inode.number, work.page, 1 << 63), steps))
        for row in rows:
            stop = work.page = row.first + row.pages
            cuts = [t.first for t in pending if row.write_number < t.write_number and t.first < stop]
            if cuts:
                first = max(row.first, min(cuts))
                self._drop_extent(inode, row, first)
                steps -= (stop - first) // BLOCK_PAGES
            steps -= 1
            if steps <= 0:
                return False
        self._set_pending(inode.number, ())
        return True

    def _work_off_block(self, inode: Inode, number: int) -> None:
        key = block_key(inode.number, number)
        group = self._layers.open
        block = group.blocks.get(key) or self._inherit(inode.number, number, key)
        bits = 0 if block is None else self._cut(inode.number, number, block)
        if block is not None and bits:
            if key not in group.blocks:
                group.blocks[key] = block
                group.blocks_of[inode.number].add(number)
            self._count_holes(inode, number, bits)

    def _drop_extent(self, inode: Inode, row: ExtentRow, first: int) -> None:
        stop = row.first + row.pages
        for number in range(first // BLOCK_PAGES, (stop - 1) // BLOCK_PAGES + 1):
            state = self.state(inode.number, number)
            resident = state.resident if state is not None else 0
            for page in range(max(first, number * BLOCK_PAGES), min(stop, (number + 1) * BLOCK_PAGES)):
                if not resident & 1 << page % BLOCK_PAGES:
                    inode.allocated -= 1
        self._extents.take(inode.number, first, stop)
        self._inodes.touch(inode)


def _block_of(row: Page) -> Block:
    """What a stored row says of a block."""
    fields = unpack_block(row)
    return Block(fields[0], fields[1], list(fields[6:10]))


@dataclass(slots=True)
class _Work:
    """How far the truncations of a file are worked off.

    `unstored` are the blocks still to be looked at that lay in a group when the work began, the next
    one last; `block` is the next one to look at in LMDB (None: none is left), `page` the page from
    which on extents are left.
    """

    unstored: list[int]
    block: int | None
    page: int
