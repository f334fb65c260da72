"""A transaction group: every change between two local commits, in memory until it is committed.

The thread of the file system fills the open group; a sealed group is never changed again, so the
writer thread may read it while the next one fills.  `commit` applies a sealed group to LMDB in key
order within one transaction, which also stores what replay needs: the write number at which the
group was sealed, and the sequence number of the first journal append after that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sortedcontainers import SortedDict
from xxhash import xxh3_64_intdigest

from qsfs import failpoints
from qsfs.store.environment import Environment
from qsfs.store.schema import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    PAGE,
    REMOTE_TABLES,
    TAIL,
    BlockRow,
    Table,
    plain_u64,
    u64,
)

COMMIT_KEY = b"commit"
WRITE_NUMBER_KEY = b"write-number"
JOURNAL_START_KEY = b"journal-start"
Key = bytes
RowValue = bytes | None
ALL_PAGES = (1 << BLOCK_PAGES) - 1
ZERO_PAGE = bytes(PAGE)
_MARKS_AT_ONCE = 10_000


class DamagedPage(bytes):
    """Bytes that failed their checksum on the way to another place: kept as damage, never returned."""


class Block:
    """What a group knows of one block: bitmaps, write numbers, and the pages that the group holds.

    `pages[i]` is None where the page is not resident, or where its bytes lie in an older layer
    (the committing group, then LMDB).
    """

    __slots__ = ("dirty", "filled", "pages", "resident", "writes")

    def __init__(self, resident: int, dirty: int, writes: list[int]) -> None:
        self.resident = resident
        self.dirty = dirty
        self.writes = writes
        self.pages: list[bytes | None] = [None] * BLOCK_PAGES
        self.filled = False


class InodeLog:
    """What the journal has not got yet of one file: truncations in order, pages, and its times."""

    __slots__ = ("pages", "touched", "truncations")

    def __init__(self) -> None:
        self.truncations: list[tuple[int, int]] = []
        self.pages: dict[int, int] = {}
        self.touched = 0


@dataclass(frozen=True, slots=True)
class Publication:
    """A generation that counts as published with a group: which change marks go with it.

    `commit_number` is its cut's; `image` holds the rows (None: deleted) that the generation has of
    pages which were dirty at the cut, where the tables had others then.
    """

    commit_number: int
    image: Mapping[tuple[Table, bytes], bytes | None]


class Group:
    """All changes between two commits.  `since` is running time at which it was empty."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: dict[Table, SortedDict] = {table: SortedDict() for table in Table}
        self._changed_rows = 0
        self.blocks: dict[int, Block] = {}
        self.blocks_of: defaultdict[int, set[int]] = defaultdict(set)
        self.spill: dict[int, Block] = {}
        self.inodes: set[int] = set()
        self.namespace_log: list[tuple[int, bytes, tuple[int, ...]]] = []
        self.data_log: dict[int, InodeLog] = {}
        self.covers: set[int] = set()
        self.filled_blocks = 0
        self.streamed_blocks = 0
        self.published: Publication | None = None
        self.sealed_at = 0
        self.journal_start = 0
        self.since = 0.0

    @property
    def bytes(self) -> int:
        """Upper bound of the values that the group writes to LMDB: whole blocks count."""
        return self.filled_blocks * BLOCK_SIZE

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the blocks that came whole and new: to wait for more of them saves nothing."""
        return self.streamed_blocks * BLOCK_SIZE

    @property
    def row_count(self) -> int:
        """Rows and blocks that the group changes."""
        return len(self.blocks) + len(self.spill) + len(self.inodes) + self._changed_rows

    def change(self, table: Table, key: Key, value: RowValue) -> None:
        """Sets a row, or deletes it (None)."""
        rows = self.rows[table]
        if key not in rows:
            self._changed_rows += 1
        rows[key] = value

    def fill(self, block: Block) -> None:
        """Takes note that a block gets bytes of its own, for the bound."""
        if not block.filled:
            block.filled = True
            self.filled_blocks += 1

    @property
    def empty(self) -> bool:
        """Whether committing it would change nothing."""
        return not (
            self.blocks or self.spill or self.inodes or self.published or self._changed_rows
        )


def block_key(inode: int, block: int) -> int:
    """The key of a block as one number; its 16 big-endian bytes are the LMDB key."""
    return inode << 64 | block


def commit(environment: Environment, group: Group, local: Mapping[bytes, bytes]) -> None:
    """Applies a sealed group durably, in one transaction.

    `local` rows go into LOCAL with it.  Raises `CacheError` with nothing applied.
    """
    with environment.write() as txn:
        mark = u64(group.number)
        changed = environment.databases[Table.CHANGED]
        for table, overlay in group.rows.items():
            database = environment.databases[table]
            remote = table in REMOTE_TABLES
            prefix = bytes((table,))
            for key, value in overlay.items():
                if value is None:
                    txn.delete(key, db=database)
                else:
                    txn.put(key, value, db=database)
                if remote:
                    txn.put(prefix + key, mark, db=changed)
        databases = environment.databases
        _apply_blocks(
            txn, group.blocks, databases[Table.BLOCKS], databases[Table.VALUES], databases[Table.DIRTY]
        )
        _apply_blocks(txn, group.spill, databases[Table.SPILL_BLOCKS], databases[Table.SPILL_VALUES], None)
        if group.published is not None:
            _settle_marks(txn, environment, group.published, mark)
        failpoints.hit("commit.applied")
        database = databases[Table.LOCAL]
        txn.put(COMMIT_KEY, plain_u64(group.number), db=database)
        txn.put(WRITE_NUMBER_KEY, plain_u64(group.sealed_at), db=database)
        txn.put(JOURNAL_START_KEY, plain_u64(group.journal_start), db=database)
        for key, value in local.items():
            txn.put(key, value, db=database)
        failpoints.hit("commit.before")
    failpoints.hit("commit.done")


def _settle_marks(txn: Any, environment: Environment, published: Publication, mark: bytes) -> None:
    """Clears the change marks that a published generation contained, and those of rows that equal its own.

    A row of its image that differs from the table's is marked as changed: the next generation must
    replace it, also where the table itself did not change.
    """
    changed = environment.databases[Table.CHANGED]
    contained = u64(published.commit_number)
    position = b""
    while True:
        gone = []
        with txn.cursor(changed) as cursor:
            more = cursor.set_range(position)
            for key, value in cursor.iternext() if more else ():
                if value <= contained:
                    gone.append(key)
                    position = key
                    if len(gone) >= _MARKS_AT_ONCE:
                        break
            else:
                more = False
        for key in gone:
            txn.delete(key, db=changed)
        if not more:
            break
    for (table, key), row in published.image.items():
        name = bytes((table,)) + key
        if txn.get(key, db=environment.databases[table]) == row:
            txn.delete(name, db=changed)
        else:
            txn.put(name, mark, db=changed)


def _apply_blocks(txn: Any, blocks: Mapping[int, Block], rows: Any, values: Any, dirty: Any) -> None:
    """Stores `blocks` in the databases `rows` and `values`; `dirty`, if given, indexes the dirty ones."""
    for number in sorted(blocks):
        block = blocks[number]
        key = number.to_bytes(16, "big")
        old_row = txn.get(key, db=rows)
        if not block.resident:
            if old_row is not None:
                txn.delete(key, db=rows)
                txn.delete(key, db=values)
                if dirty is not None:
                    txn.delete(key, db=dirty)
            continue
        old = BlockRow.decode(old_row) if old_row is not None else None
        pages = block.pages
        row, value = _merge(block, old, None if old is None else _old_value(txn, values, key, old, pages))
        if value is not None:
            txn.put(key, value, db=values)
        txn.put(key, row.encode(), db=rows)
        if dirty is None:
            continue
        if block.dirty:
            if old is None or not old.dirty:
                txn.put(key, b"", db=dirty)
        elif old is not None and old.dirty:
            txn.delete(key, db=dirty)


def _old_value(
    txn: Any, values: Any, key: bytes, old: BlockRow, pages: list[bytes | None]
) -> bytes | None:
    """The block's old bytes, read only where the group does not hold every page itself."""
    if None not in pages or all(page is None for page in pages):
        return None
    stored = txn.get(key, db=values)
    return None if stored is None else bytes(stored) + old.tail


def _merge(block: Block, old: BlockRow | None, old_bytes: bytes | None) -> tuple[BlockRow, bytes | None]:
    """The row to store, and the value, or None where the stored value can stay."""
    pages = block.pages
    if None not in pages:
        parts = cast("list[bytes]", pages)
        sums = [_checksum(page) for page in parts]
    else:
        sums = list(old.sums) if old is not None else [0] * BLOCK_PAGES
        parts = [ZERO_PAGE] * BLOCK_PAGES
        if old_bytes:
            parts = [old_bytes[i * PAGE : (i + 1) * PAGE] for i in range(BLOCK_PAGES)]
        fresh = False
        for index, page in enumerate(pages):
            if page is not None:
                sums[index] = _checksum(page)
                parts[index] = page
                fresh = True
        if not fresh:
            assert old is not None, "a resident block without pages must be in LMDB already"
            return _row(block, sums, old.tail), None
    last = parts[-1]
    value = b"".join((*parts[:-1], memoryview(last)[:-TAIL]))
    return _row(block, sums, last[-TAIL:]), value


def _checksum(page: bytes) -> int:
    return xxh3_64_intdigest(page) ^ (type(page) is DamagedPage)


def _row(block: Block, sums: list[int], tail: bytes) -> BlockRow:
    s, w = sums, block.writes
    return BlockRow(block.resident, block.dirty, (s[0], s[1], s[2], s[3]), (w[0], w[1], w[2], w[3]), tail)
