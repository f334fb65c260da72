"""Reading the rows of a generation that stand in one stretch of positions.

A stretch is complete: it holds every row that a generation of the committed state has between two
positions, and none from elsewhere.  So it may take the place of whatever is known of that stretch.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from qsfs.clock import Clock
from qsfs.store.positions import INODE_SPACE, INODE_TABLES, SPACES, position_of
from qsfs.store.schema import Table
from qsfs.store.snapshot import CommittedState, Row, RowsPart

_ROW_COST = 48
_INODE_END = 9
"""Length of the part of a position that names an inode: its rows are never divided."""
_ORDER = sorted(set(SPACES.values()))
_TABLE_OF = {space: Table(table) for table, space in SPACES.items() if space != INODE_SPACE}


def read_stretch(
    state: CommittedState,
    clock: Clock,
    start: bytes,
    stop: bytes | None,
    most_bytes: int,
    until: float = float("inf"),
) -> RowsPart:
    """The rows from position `start` to `stop` (None: to the end), about `most_bytes` of them, until the clock says so.

    `resume` of what is returned is a position that may divide the rows: not inside those of one inode.
    """
    rows: list[Row] = []
    size = 0
    before = b""
    for seen, (position, table, key) in enumerate(_names(state, start, stop)):
        apart = position[0] != INODE_SPACE or position[:_INODE_END] != before
        if apart and (size >= most_bytes or (seen and clock.monotonic() >= until)):
            return RowsPart(tuple(rows), position[:_INODE_END] if position[0] == INODE_SPACE else position)
        before = position[:_INODE_END]
        stored = state.view.get(table, key)
        for row in state.rows_of(table, key, None if stored is None else bytes(stored)):
            # An extent brings the truncation row of its inode along, which stands elsewhere and is read there.
            if SPACES[row[0]] == position[0]:
                rows.append(row)
                size += len(row[1]) + len(row[2] or b"") + _ROW_COST
    return RowsPart(tuple(rows), None)


def _names(state: CommittedState, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, Table, bytes]]:
    """Position, table and key of the stored rows in a stretch, in the order of positions, by inode."""
    first = start[0] if start else 0
    for space in _ORDER:
        if space < first or (stop is not None and bytes((space,)) >= stop):
            continue
        begin = start[1:] if space == first else b""
        end = stop[1:] if stop is not None and stop[0] == space else None
        if space == INODE_SPACE:
            yield from merge(*(_inode_rows(state, table, begin, end) for table in INODE_TABLES), key=_inode_order)
        else:
            table = _TABLE_OF[space]
            for key, _ in state.view.scan(table, begin, end):
                yield position_of(table, key), table, key


def _inode_rows(
    state: CommittedState, table: Table, begin: bytes, end: bytes | None
) -> Iterator[tuple[bytes, Table, bytes]]:
    for key, _ in state.view.scan(table, begin, end):
        yield position_of(table, key), table, key


def _inode_order(name: tuple[bytes, Table, bytes]) -> tuple[bytes, int]:
    return name[0][:_INODE_END], name[1]
