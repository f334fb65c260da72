"""A transaction group: every change between two local commits, in memory until it is committed.

The thread of the file system fills the open group; a sealed group is never changed again, so the
writer thread may read it while the next one fills.  `commit` applies a sealed group to LMDB in key
order within one transaction, which also stores what replay needs: the write number at which the
group was sealed, and the sequence number of the first journal append after that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sortedcontainers import SortedDict

from qsfs import failpoints
from qsfs.store.block import Block
from qsfs.store.environment import Environment, Usage
from qsfs.store.schema import (
    BLOCK_SIZE,
    REMOTE_TABLES,
    BlockRow,
    Page,
    Table,
    plain_u64,
    u64,
)
from qsfs.store.turns import Turns

COMMIT_KEY = b"commit"
WRITE_NUMBER_KEY = b"write-number"
JOURNAL_START_KEY = b"journal-start"
Key = bytes
RowValue = bytes | None
_ROWS_AT_ONCE = 256
_BLOCKS_AT_ONCE = 64


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


def commit(
    environment: Environment,
    group: Group,
    local: Mapping[bytes, bytes],
    turns: Turns,
) -> Usage:
    """Applies a sealed group durably, in one transaction, in the steps of `turns`; what is used then.

    `local` rows go into LOCAL with it.  Raises `CacheError` with nothing applied.
    """
    with environment.write(buffers=True) as txn:
        mark = u64(group.number)
        databases = environment.databases
        with turns:
            for table, overlay in group.rows.items():
                _apply_rows(txn, overlay, databases[table], turns)
                if table in REMOTE_TABLES:
                    marks = ((bytes((table,)) + key, mark) for key in overlay)
                    _put_all(txn, marks, databases[Table.CHANGED], turns)
            rows, values, dirty = databases[Table.BLOCKS], databases[Table.VALUES], databases[Table.DIRTY]
            _apply_blocks(txn, group.blocks, rows, values, dirty, turns)
            rows, values = databases[Table.SPILL_BLOCKS], databases[Table.SPILL_VALUES]
            _apply_blocks(txn, group.spill, rows, values, None, turns)
            if group.published is not None:
                _settle_marks(txn, environment, group.published, mark, turns)
            failpoints.hit("commit.applied")
            last = [
                (COMMIT_KEY, plain_u64(group.number)),
                (WRITE_NUMBER_KEY, plain_u64(group.sealed_at)),
                (JOURNAL_START_KEY, plain_u64(group.journal_start)),
                *local.items(),
            ]
            _put_all(txn, last, databases[Table.LOCAL], turns)
            usage = environment.usage_in(txn)
        failpoints.hit("commit.before")
    failpoints.hit("commit.done")
    return usage


def _apply_rows(txn: Any, overlay: SortedDict, database: Any, turns: Turns) -> None:
    """Sets and deletes rows of one table."""
    _put_all(txn, ((key, value) for key, value in overlay.items() if value is not None), database, turns)
    for count, key in enumerate((key for key, value in overlay.items() if value is None), 1):
        txn.delete(key, db=database)
        if not count % _ROWS_AT_ONCE:
            turns.step_done()


def _put_all(txn: Any, rows: Iterable[tuple[bytes, bytes]], database: Any, turns: Turns) -> None:
    """Stores rows, best in the order of their keys."""
    left = iter(rows)
    while some := list(islice(left, _ROWS_AT_ONCE)):
        with txn.cursor(database) as cursor:
            cursor.putmulti(some)
        turns.step_done()


def _settle_marks(
    txn: Any, environment: Environment, published: Publication, mark: bytes, turns: Turns
) -> None:
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
            for name, value in cursor.iternext() if more else ():
                if bytes(value) <= contained:
                    position = bytes(name)
                    gone.append(position)
                    if len(gone) >= _ROWS_AT_ONCE:
                        break
            else:
                more = False
        for key in gone:
            txn.delete(key, db=changed)
        turns.step_done()
        if not more:
            break
    for (table, key), row in published.image.items():
        name = bytes((table,)) + key
        if txn.get(key, db=environment.databases[table]) == row:
            txn.delete(name, db=changed)
        else:
            txn.put(name, mark, db=changed)


def _apply_blocks(
    txn: Any,
    blocks: Mapping[int, Block],
    rows: Any,
    values: Any,
    dirty: Any,
    turns: Turns,
) -> None:
    """Stores `blocks` in the databases `rows` and `values`; `dirty`, if given, indexes the dirty ones."""
    numbers = sorted(blocks)
    for begin in range(0, len(numbers), _BLOCKS_AT_ONCE):
        new_rows: list[tuple[bytes, bytes]] = []
        new_values: list[tuple[bytes, Page]] = []
        new_dirty: list[tuple[bytes, bytes]] = []
        for number in numbers[begin : begin + _BLOCKS_AT_ONCE]:
            block = blocks[number]
            key = number.to_bytes(16, "big")
            old_row = txn.get(key, db=rows) if block.stored else None
            if not block.resident:
                if old_row is not None:
                    txn.delete(key, db=rows)
                    txn.delete(key, db=values)
                    if dirty is not None:
                        txn.delete(key, db=dirty)
                continue
            old = old_value = None
            if old_row is not None:
                old = BlockRow.decode(old_row)
                old_value = txn.get(key, db=values) if block.needs_stored_value() else None
            row, value = block.encode(old, old_value)
            new_rows.append((key, row))
            if value is not None:
                new_values.append((key, value))
            if dirty is None:
                continue
            if not block.dirty:
                if old is not None and old.dirty:
                    txn.delete(key, db=dirty)
            elif old is None or not old.dirty:
                new_dirty.append((key, b""))
        for database, items in ((values, new_values), (rows, new_rows), (dirty, new_dirty)):
            if items:
                with txn.cursor(database) as cursor:
                    cursor.putmulti(items)
        turns.step_done()
