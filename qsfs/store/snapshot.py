"""One committed state of the store, as a worker thread reads it for the backends.

A `CommittedState` is one LMDB read transaction: while it is open LMDB reuses nothing that was freed
since, so it is closed within seconds.  Long readings go on from a key in the next one.  Rows come
out as a generation holds them, which differs from the tables in this:

- an orphan (unlinked, still open) has neither inode row, xattrs nor symlink;
- a `local_only` file is empty;
- where one of these has extents, a truncation row says that they are no data, as it does for a
  file that is gone while its extents are worked off.
"""

from __future__ import annotations

import contextlib
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from sortedcontainers import SortedDict
from xxhash import xxh3_64_intdigest

from qsfs.clock import Clock
from qsfs.store.block import ALL_PAGES, block_key
from qsfs.store.environment import Environment
from qsfs.store.group import COMMIT_KEY, WRITE_NUMBER_KEY
from qsfs.store.layers import merge_rows, overlay_rows
from qsfs.store.reading import LocalDamage
from qsfs.store.schema import (
    BLOCK_PAGES,
    PAGE,
    REMOTE_TABLES,
    VALUE_SIZE,
    BlockRow,
    Inode,
    InodeFlag,
    Table,
    Truncation,
    decode_truncations,
    encode_truncations,
    is_cut,
    read_plain_u64,
    split_u64,
    split_u64_pair,
    u64,
    u64_pair,
)

Row = tuple[int, bytes, bytes | None]
"""A remote row: table number, key, value (None: deleted)."""

EXTENT_PAGES = 64
"""Pages in the largest extent; runs are cut where page numbers are multiples of it."""

_Piece = tuple[int, tuple[int, ...], tuple[bytes | memoryview, ...]]
"""Pages of one block: the first one, the write number of each, and their bytes in parts."""

_REMOTE = sorted(REMOTE_TABLES)
_KNOWN_OWNERS = 4096
_ROW_COST = 48


@dataclass(frozen=True, slots=True)
class DirtyRun:
    """Dirty pages of a file without a gap: their write numbers and bytes, from page `first` on."""

    inode: int
    first: int
    writes: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class DirtyPart:
    """Some dirty runs in order; `resume` is where the next part begins, None at the end."""

    runs: tuple[DirtyRun, ...]
    resume: bytes | None


@dataclass(frozen=True, slots=True)
class RowsPart:
    """Some remote rows; `resume` is where the next part begins, None at the end."""

    rows: tuple[Row, ...]
    resume: bytes | None


@dataclass(frozen=True, slots=True)
class _Owner:
    """What decides over an inode's pages and rows."""

    exists: bool
    orphan: bool
    local_only: bool
    pending: tuple[Truncation, ...]

    @property
    def uploads(self) -> bool:
        return self.exists and not self.orphan and not self.local_only


@dataclass(frozen=True, slots=True)
class Want:
    """Which dirty pages are wanted, and how much at a time.

    `quiet` says of a block (its `block_key`) whether it may be read now, `taken` of a block and its
    write numbers which pages (bits) somebody else has; both are called on the reading thread.
    `orphans` takes the pages of unlinked open files too.  A part ends after about `most_bytes`, or
    once the clock says `until`; it always gets on by a block.
    """

    most_bytes: int
    until: float = float("inf")
    quiet: Callable[[int], bool] | None = None
    taken: Callable[[int, Sequence[int]], int] | None = None
    orphans: bool = False


class CommittedState:
    """The store as of one commit.  For one thread, which also closes it."""

    def __init__(self, environment: Environment, clock: Clock) -> None:
        self.view = environment.read()
        self._clock = clock
        self._owners: OrderedDict[int, _Owner] = OrderedDict()
        self.commit_number = self._number(COMMIT_KEY)
        self.write_number = self._number(WRITE_NUMBER_KEY)

    def __enter__(self) -> CommittedState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.close()

    def _number(self, name: bytes) -> int:
        row = self.view.get(Table.LOCAL, name)
        return 0 if row is None else read_plain_u64(bytes(row))

    @property
    def moving(self) -> bool:
        """Whether covered pages are still on their way to their files: such a state is no cut."""
        return self.view.count(Table.SPILL_COVERED) > 0

    def counters(self) -> dict[str, int]:
        """All counters by name."""
        rows = self.view.scan(Table.COUNTERS, b"", None)
        return {key.decode("ascii"): read_plain_u64(bytes(row)) for key, row in rows}

    # dirty pages

    def dirty(self, start: bytes, want: Want) -> DirtyPart:
        """Dirty pages from the block with key `start` on.

        Left out are pages under a pending truncation and those of inodes that are gone, orphans or
        `local_only`.  Raises `LocalDamage` if the bytes that come first fail their checksum; a part
        ends before a block that does.
        """
        runs: list[DirtyRun] = []
        run = _Run()
        size = 0
        resume: bytes | None = None
        seen = 0
        for key, row, bits in self._dirty_blocks(start, want):
            enough = size >= want.most_bytes or (seen > 0 and self._clock.monotonic() >= want.until)
            if enough and not run.goes_on(key):
                resume = key
                break
            seen += 1
            if row is None:
                continue
            try:
                pieces = self._read_block(key, row, bits)
            except LocalDamage:
                if not size:
                    raise
                resume = key
                break
            inode = split_u64(key)
            for piece in pieces:
                run.add(inode, *piece, runs)
            size += bits.bit_count() * PAGE
        run.end(runs)
        return DirtyPart(tuple(runs), resume)

    def dirty_bytes(self, most: int, want: Want) -> int:
        """Bytes of dirty pages that `dirty` would give; the count ends once it is above `most`."""
        total = 0
        for _, _, bits in self._dirty_blocks(b"", want):
            total += bits.bit_count() * PAGE
            if total > most:
                break
        return total

    def clean(self, blocks: Iterable[tuple[int, int, int]]) -> tuple[DirtyRun, ...]:
        """The resident clean pages among those wanted, as runs: of each block inode, number and wanted bits, in order.

        Left out are pages under a pending truncation, those of inodes that `dirty` leaves out, and damaged ones.
        """
        runs: list[DirtyRun] = []
        run = _Run()
        for inode, number, wanted in blocks:
            key = u64_pair(inode, number)
            encoded = self.view.get(Table.BLOCKS, key)
            owner = self._owner(inode)
            if encoded is None or not owner.uploads:
                continue
            row = BlockRow.decode(encoded)
            bits = wanted & row.resident & ~row.dirty & ~_cut_bits(owner.pending, number, row.writes)
            with contextlib.suppress(LocalDamage):
                for piece in self._read_block(key, row, bits):
                    run.add(inode, *piece, runs)
        run.end(runs)
        return tuple(runs)

    def _dirty_blocks(self, start: bytes, want: Want) -> Iterator[tuple[bytes, BlockRow | None, int]]:
        """Dirty blocks: key, row, bits of the wanted pages; without a row where none is wanted."""
        position: bytes | None = start
        while position is not None:
            begin, position = position, None
            for key, _ in self.view.scan(Table.DIRTY, begin, None):
                inode, number = split_u64_pair(key)
                owner = self._owner(inode)
                if not (owner.uploads or (want.orphans and owner.exists and owner.orphan)):
                    position = u64_pair(inode + 1, 0)
                    break
                encoded = None
                if want.quiet is None or want.quiet(block_key(inode, number)):
                    encoded = self.view.get(Table.BLOCKS, key)
                if encoded is None:
                    yield key, None, 0
                    continue
                row = BlockRow.decode(encoded)
                bits = row.dirty & row.resident
                if owner.pending:
                    bits &= ~_cut_bits(owner.pending, number, row.writes)
                if want.taken is not None:
                    bits &= ~want.taken(block_key(inode, number), row.writes)
                yield key, row if bits else None, bits

    def _read_block(self, key: bytes, row: BlockRow, bits: int) -> list[_Piece]:
        """The wanted pages of a block, verified: in one piece if it is wanted whole."""
        inode, number = split_u64_pair(key)
        value = self.view.get(Table.VALUES, key)
        if bits == ALL_PAGES and value is not None and _is_whole(value, row):
            return [(number * BLOCK_PAGES, row.writes, (value, row.tail))]
        found: list[_Piece] = []
        for index in range(BLOCK_PAGES):
            if not bits & 1 << index:
                continue
            page_number = number * BLOCK_PAGES + index
            if value is None or len(value) != VALUE_SIZE:
                raise LocalDamage(inode, page_number, "its local bytes are gone")
            page: bytes | memoryview = value[index * PAGE : (index + 1) * PAGE]
            if index == BLOCK_PAGES - 1:
                page = bytes(page) + row.tail
            if xxh3_64_intdigest(page) != row.sums[index]:
                raise LocalDamage(inode, page_number, "its local bytes fail their checksum")
            found.append((page_number, (row.writes[index],), (page,)))
        return found

    def _owner(self, inode: int) -> _Owner:
        owner = self._owners.get(inode)
        if owner is None:
            key = u64(inode)
            row = self.view.get(Table.INODES, key)
            flags = Inode.decode(inode, bytes(row)).flags if row is not None else 0
            pending = self.view.get(Table.TRUNCATIONS, key)
            owner = self._owners[inode] = _Owner(
                row is not None,
                self.view.get(Table.ORPHANS, key) is not None,
                bool(flags & InodeFlag.LOCAL_ONLY),
                decode_truncations(bytes(pending)) if pending is not None else (),
            )
            if len(self._owners) > _KNOWN_OWNERS:
                self._owners.popitem(last=False)
        return owner

    # metadata

    def something_changed(self) -> bool:
        """Whether a generation of this state would show anything new to a restore.

        Bookkeeping of packs and counters alone does not count: it goes with the next generation.
        """
        for first, last in ((Table.INODES, Table.EXTENTS), (Table.TRUNCATIONS, Table.TRUNCATIONS)):
            marks = self.view.scan(Table.CHANGED, bytes((first,)), bytes((last + 1,)))
            if next(marks, None) is not None:
                return True
        return self.dirty_bytes(0, Want(1)) > 0

    def changed_count(self) -> int:
        """The number of change marks."""
        return self.view.count(Table.CHANGED)

    def changed(self, start: bytes, floor: int, most_bytes: int, until: float = float("inf")) -> RowsPart:
        """Rows marked as changed by a commit above `floor`, from mark `start` on, as they are now."""
        lowest = u64(floor)
        marks = ((name, bytes(mark) > lowest) for name, mark in self.view.scan(Table.CHANGED, start, None))
        return self._rows(marks, most_bytes, until, self._changed_rows)

    def everything(self, start: bytes, most_bytes: int, until: float = float("inf")) -> RowsPart:
        """All rows from `start` on (table number u8, then the key)."""
        return self._rows(self._names(start), most_bytes, until, self.rows_of)

    def _rows(
        self,
        names: Iterator[tuple[bytes, bool]],
        most_bytes: int,
        until: float,
        expand: Callable[[Table, bytes, bytes | None], Iterator[Row]],
    ) -> RowsPart:
        rows: list[Row] = []
        size = 0
        for seen, (name, wanted) in enumerate(names):
            if size >= most_bytes or (seen and self._clock.monotonic() >= until):
                return RowsPart(tuple(rows), name)
            if not wanted:
                continue
            table, key = Table(name[0]), name[1:]
            stored = self.view.get(table, key)
            for row in expand(table, key, None if stored is None else bytes(stored)):
                rows.append(row)
                size += len(row[1]) + len(row[2] or b"") + _ROW_COST
        return RowsPart(tuple(rows), None)

    def _names(self, start: bytes) -> Iterator[tuple[bytes, bool]]:
        first = start[0] if start else 0
        for table in _REMOTE:
            if table < first:
                continue
            prefix = bytes((table,))
            for key, _ in self.view.scan(table, start[1:] if table == first else b"", None):
                yield prefix + key, True

    def _changed_rows(self, table: Table, key: bytes, value: bytes | None) -> Iterator[Row]:
        """What a changed row is in a generation, with the rows that depend on it."""
        inode = split_u64(key) if table in _OF_INODES else 0
        if table == Table.INODES and value is not None:
            if self._owner(inode).orphan:
                for other in (Table.XATTRS, Table.SYMLINKS):
                    for name, _ in self.view.scan(other, key, u64(inode + 1)):
                        yield other, name, None
                yield table, key, None
            else:
                yield table, key, self._inode_row(inode, value)
            # What the last generation has there may be its own: for when the file was local only.
            if self._owner(inode).pending or self._has_extents(inode):
                yield self._truncation_row(inode)
        elif table == Table.TRUNCATIONS:
            yield self._truncation_row(inode)
        elif table in (Table.XATTRS, Table.SYMLINKS) and self._owner(inode).orphan:
            yield table, key, None
        else:
            yield table, key, value
            if table == Table.EXTENTS and value is not None and not self._owner(inode).uploads:
                yield self._truncation_row(inode)

    def rows_of(self, table: Table, key: bytes, value: bytes | None) -> Iterator[Row]:
        """What a row is in a full image; nothing that is deleted."""
        return (row for row in self._changed_rows(table, key, value) if row[2] is not None)

    def _inode_row(self, inode: int, value: bytes) -> bytes:
        if not self._owner(inode).local_only:
            return value
        row = Inode.decode(inode, value)
        if stat.S_ISREG(row.mode):
            row.size = row.allocated = 0
        return row.encode()

    def _has_extents(self, inode: int) -> bool:
        return next(self.view.scan(Table.EXTENTS, u64(inode), u64(inode + 1)), None) is not None

    def _truncation_row(self, inode: int) -> Row:
        owner = self._owner(inode)
        if owner.exists and not owner.uploads:
            all_of_it = (Truncation(0, self.write_number + 1),) if self._has_extents(inode) else ()
            return Table.TRUNCATIONS, u64(inode), encode_truncations(all_of_it) or None
        return Table.TRUNCATIONS, u64(inode), encode_truncations(owner.pending) or None


def _cut_bits(pending: tuple[Truncation, ...], number: int, writes: Sequence[int]) -> int:
    """The pages of a block that a pending truncation cuts."""
    pages = enumerate(writes, number * BLOCK_PAGES)
    return sum(1 << i for i, (page, write) in enumerate(pages) if is_cut(pending, page, write))


def _is_whole(value: memoryview, row: BlockRow) -> bool:
    """Whether every page of a block matches its checksum."""
    return len(value) == VALUE_SIZE and row.sums == (
        xxh3_64_intdigest(value[:PAGE]),
        xxh3_64_intdigest(value[PAGE : 2 * PAGE]),
        xxh3_64_intdigest(value[2 * PAGE : 3 * PAGE]),
        xxh3_64_intdigest(b"".join((value[3 * PAGE :], row.tail))),
    )


_OF_INODES = frozenset((Table.INODES, Table.XATTRS, Table.SYMLINKS, Table.EXTENTS, Table.TRUNCATIONS))


class _Run:
    """Pages being joined to runs: their write numbers, and their bytes in parts of any length."""

    def __init__(self) -> None:
        self.inode = 0
        self.first = 0
        self.writes: list[int] = []
        self.parts: list[bytes | memoryview] = []

    def goes_on(self, key: bytes) -> bool:
        """Whether a block may belong to the same extent as the last page."""
        inode, number = split_u64_pair(key)
        page = number * BLOCK_PAGES
        return (
            bool(self.writes)
            and inode == self.inode
            and page == self.first + len(self.writes)
            and page % EXTENT_PAGES != 0
        )

    def add(
        self,
        inode: int,
        page: int,
        writes: tuple[int, ...],
        parts: tuple[bytes | memoryview, ...],
        runs: list[DirtyRun],
    ) -> None:
        """Takes the next pages, all of one block; what does not go on with them becomes a run of its own."""
        if self.writes and (inode != self.inode or page != self.first + len(self.writes) or page % EXTENT_PAGES == 0):
            self.end(runs)
        if not self.writes:
            self.inode, self.first = inode, page
        self.writes += writes
        self.parts += parts

    def end(self, runs: list[DirtyRun]) -> None:
        """Ends the run."""
        if self.writes:
            runs.append(DirtyRun(self.inode, self.first, tuple(self.writes), b"".join(self.parts)))
            self.writes, self.parts = [], []


class ImageRows:
    """A committed state with rows of its own on top: what a generation makes of it."""

    def __init__(self, state: CommittedState) -> None:
        self._view = state.view
        self.rows: dict[Table, SortedDict] = {Table.EXTENTS: SortedDict(), Table.PACKS: SortedDict()}

    def get(self, table: Table, key: bytes) -> bytes | None:
        """See `layers.Rows`."""
        overlay = self.rows[table]
        if key in overlay:
            mine: bytes | None = overlay[key]
            return mine
        row = self._view.get(table, key)
        return None if row is None else bytes(row)

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """See `layers.Rows`."""
        self.rows[table][key] = value

    def delete(self, table: Table, key: bytes) -> None:
        """See `layers.Rows`."""
        self.rows[table][key] = None

    def scan(
        self, table: Table, start: bytes, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """See `layers.Rows`."""
        stored: Iterator[tuple[bytes, bytes | None]] = (
            (key, bytes(value)) for key, value in self._view.scan(table, start, stop, reverse)
        )
        merged = merge_rows(overlay_rows(self.rows[table], start, stop, reverse), stored, reverse)
        return ((key, value) for key, value in merged if value is not None)
