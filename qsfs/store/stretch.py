"""Reading the rows of a generation that stand in one stretch of positions.

A stretch is complete: it holds every row that a generation of the committed state has between two
positions, and none from elsewhere.  So it may take the place of whatever is known of that stretch.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from qsfs.clock import Clock
from qsfs.store.positions import INODE_SPACE, INODE_TABLES, SPACES
from qsfs.store.schema import Table
from qsfs.store.snapshot import CommittedState, Row, RowsPart

_ROW_COST = 48
_INODE = 8
"""Length of the part of a key that names an inode: its rows are never divided."""
_ROWS_A_LOOK = 64
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
    reading = _Reading(state, clock, most_bytes, until)
    first = start[0] if start else 0
    for space in _ORDER:
        if space < first or (stop is not None and bytes((space,)) >= stop):
            continue
        begin = start[1:] if space == first else b""
        end = stop[1:] if stop is not None and stop[0] == space else None
        resume = reading.inodes(begin, end) if space == INODE_SPACE else reading.plain(_TABLE_OF[space], begin, end)
        if resume is not None:
            return RowsPart(tuple(reading.rows), bytes((space,)) + resume)
    return RowsPart(tuple(reading.rows), None)


class _Reading:
    """Rows that were found so far.  Its methods return the key at which they stopped, None at the end."""

    def __init__(self, state: CommittedState, clock: Clock, most_bytes: int, until: float) -> None:
        self.rows: list[Row] = []
        self._state = state
        self._clock = clock
        self._most = most_bytes
        self._until = until
        self._size = 0
        self._count = 0

    def _enough(self) -> bool:
        """Whether to stop, asked once for each key or inode; the clock is looked at now and then."""
        self._count += 1
        late = self._count % _ROWS_A_LOOK == 0 and self._clock.monotonic() >= self._until
        return late or self._size >= self._most

    def plain(self, table: Table, start: bytes, stop: bytes | None) -> bytes | None:
        """Rows of a table that are in a generation as they are in the table.

        An extent may bring a truncation row of its inode along, which stands elsewhere and is read there.
        """
        for key, value in self._state.view.scan(table, start, stop):
            if self._enough():
                return key
            self.rows.append((table, key, bytes(value)))
            self._size += len(key) + len(value) + _ROW_COST
        return None

    def inodes(self, start: bytes, stop: bytes | None) -> bytes | None:
        """What there is of each inode, but for its extents."""
        view = self._state.view
        before = b""
        for key, table in merge(*(_keys(self._state, table, start, stop) for table in INODE_TABLES), key=_by_inode):
            if key[:_INODE] != before and self._enough():
                return key[:_INODE]
            before = key[:_INODE]
            stored = view.get(table, key)
            for row in self._state.rows_of(table, key, None if stored is None else bytes(stored)):
                self.rows.append(row)
                self._size += len(row[1]) + len(row[2] or b"") + _ROW_COST
        return None


def _keys(state: CommittedState, table: Table, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, Table]]:
    return ((key, table) for key, _ in state.view.scan(table, start, stop))


def _by_inode(name: tuple[bytes, Table]) -> tuple[bytes, int]:
    return name[0][:_INODE], name[1]
