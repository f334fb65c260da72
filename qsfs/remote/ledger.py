"""Which packs need attention: not full yet, or not looked at a second time.

Kept in memory from what is recorded, and read once from the pack rows after a mount, in the
background.  For the event loop's thread, but for `read_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsfs.clock import Clock
from qsfs.format.extent import PackKind
from qsfs.store.environment import Environment
from qsfs.store.schema import PackRow, PackState, Table, split_u64
from qsfs.store.snapshot import CommittedState

SMALL_SHARD = 64 << 10
"""Bytes of a shard below which a pack may be worth merging with others."""
_STEP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class RowsRead:
    """Pack rows that need attention, metadata packs by id, data packs without live bytes, with few, and small ones."""

    unsettled: tuple[tuple[int, PackRow], ...]
    metadata: tuple[tuple[bytes, int], ...]
    emptied: tuple[int, ...]
    thin: tuple[int, ...]
    small: tuple[int, ...]
    resume: bytes | None


def read_rows(environment: Environment, clock: Clock, start: bytes) -> RowsRead:
    """Reads pack rows from `start` on for about a tenth of a second, on a worker thread."""
    unsettled = []
    metadata = []
    emptied: list[int] = []
    thin: list[int] = []
    small: list[int] = []
    resume: bytes | None = None
    until = clock.monotonic() + _STEP_SECONDS
    with CommittedState(environment, clock) as state:
        for key, value in state.view.scan(Table.PACKS, start, None):
            row = PackRow.decode(bytes(value))
            if row.kind == PackKind.METADATA:
                metadata.append((row.pack_id, split_u64(key)))
            elif 2 * row.live < row.body_length:
                (thin if row.live else emptied).append(split_u64(key))
            elif row.shard_size < SMALL_SHARD:
                small.append(split_u64(key))
            if not (row.state & PackState.FULL and row.looked_at) and not row.unnamed_since_ns:
                unsettled.append((split_u64(key), row))
            if clock.monotonic() >= until:
                resume = key + b"\0"
                break
    return RowsRead(tuple(unsettled), tuple(metadata), tuple(emptied), tuple(thin), tuple(small), resume)


class Ledger:
    """Packs that are not settled, by number.

    `incomplete` maps those that are not full to (live bytes, when they were written, running time);
    `looks` those that were not looked at again to when that is due (running time).  `emptied` are data
    packs that had no live bytes when the rows were read, `thin` those that had fewer than half of their size, `small`
    those whose shards are small: who acts on these takes them out.  `lost` are those of which too few shards have a
    place, and those that who reads them adds; `lost_metadata` the metadata packs among them.
    """

    def __init__(self, clock: Clock, second_look_seconds: float) -> None:
        self.incomplete: dict[int, tuple[int, float]] = {}
        self.looks: dict[int, float] = {}
        self.metadata: dict[bytes, int] = {}
        self.lost: set[int] = set()
        self.lost_metadata: set[int] = set()
        self.emptied: set[int] = set()
        self.thin: set[int] = set()
        self.small: set[int] = set()
        self._clock = clock
        self._delay = second_look_seconds

    def note(self, number: int, row: PackRow) -> None:
        """Takes note of a row as it is now."""
        if row.kind == PackKind.METADATA:
            self.metadata[row.pack_id] = number
        elif row.shard_size < SMALL_SHARD:
            self.small.add(number)
        # Over a restart only the wall clock knows; what it says once stays, if it steps later.
        now = self._clock.monotonic()
        age = max(0.0, (self._clock.time_ns() - row.written_at_ns) / 1e9)
        if row.state & PackState.FULL:
            self.incomplete.pop(number, None)
        else:
            _, written_at = self.incomplete.get(number, (0, now - age))
            self.incomplete[number] = (row.live or row.body_length, written_at)
        if row.readable:
            self.lost.discard(number)
            self.lost_metadata.discard(number)
        else:
            self.lose(number, row)
        if row.looked_at:
            self.looks.pop(number, None)
        else:
            # The wait goes on over a restart, by the wall clock: a cache that is full of what is due would stand
            # still meanwhile.
            self.looks[number] = now + self._delay - min(age, self._delay)

    def take(self, read: RowsRead) -> None:
        """Takes over what was read of rows that nothing has been noted of since."""
        for pack_id, number in read.metadata:
            self.metadata.setdefault(pack_id, number)
        self.emptied.update(read.emptied)
        self.thin.update(read.thin)
        self.small.update(read.small)
        for number, row in read.unsettled:
            if number not in self.incomplete and number not in self.looks:
                self.note(number, row)

    def forget(self, number: int) -> None:
        """Drops a pack that is gone or that nothing lives in."""
        self.incomplete.pop(number, None)
        self.looks.pop(number, None)
        self.lost.discard(number)
        self.lost_metadata.discard(number)

    def lose(self, number: int, row: PackRow) -> None:
        """Takes note that fewer shards of a pack are left than it takes to read it."""
        self.lost.add(number)
        if row.kind == PackKind.METADATA:
            self.lost_metadata.add(number)

    def due(self, most: int, *, written_too: bool) -> list[int]:
        """Packs to look at now: full ones, and with `written_too` those that are only written."""
        now = self._clock.monotonic()
        found = []
        for number, when in self.looks.items():
            if when <= now and number not in self.lost and (written_too or number not in self.incomplete):
                found.append(number)
                if len(found) >= most:
                    break
        return found

    @property
    def next_look_seconds(self) -> float | None:
        """In how long the next pack is due for its second look; None if all were looked at."""
        due = min((when for number, when in self.looks.items() if number not in self.lost), default=None)
        return None if due is None else max(0.0, due - self._clock.monotonic())

    @property
    def looks_help(self) -> bool:
        """Whether any pack may still be looked at: no look finds enough of one that is lost."""
        return len(self.looks) > len(self.lost) or not self.looks.keys() <= self.lost

    def later(self, number: int, seconds: float) -> None:
        """Puts a look off, behind all others: those that cannot be looked at hold up none that can."""
        if self.looks.pop(number, None) is not None:
            self.looks[number] = self._clock.monotonic() + seconds

    @property
    def incomplete_bytes(self) -> int:
        """Live bytes in packs that are not full."""
        return sum(live for live, _ in self.incomplete.values())

    @property
    def incomplete_seconds(self) -> float:
        """How long ago the oldest pack that is not full was written; 0.0 without any."""
        now = self._clock.monotonic()
        return max((now - written_at for _, written_at in self.incomplete.values()), default=0.0)
