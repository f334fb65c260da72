"""The image of a generation: which metadata packs are read, in which order, and which of their rows count.

First the packs of the snapshot, range by range, so that rows come in the order of their keys, table
by table; then the deltas from the oldest on.  Of a pack of a range those rows count that stand in it:
the pack may be older than the range, which then is what is left of a larger one.  Of a delta those count that
stand in ranges to which it still applies: the others were read anew since.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from qsfs.format.head import Head, MetadataPack
from qsfs.format.rows import Row
from qsfs.remote.chain import ranges_of
from qsfs.store.positions import position_of


@dataclass(frozen=True, slots=True)
class Counting:
    """Which rows of a pack count: those from each of `starts` to the next where `wanted` says so."""

    starts: tuple[bytes, ...]
    wanted: tuple[bool, ...]

    @property
    def all(self) -> bool:
        """Whether every row counts."""
        return False not in self.wanted

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Those of `rows` that count."""
        if self.all:
            yield from rows
            return
        starts, wanted = self.starts, self.wanted
        for row in rows:
            if wanted[bisect_right(starts, position_of(row[0], row[1])) - 1]:
                yield row


Listed = tuple[MetadataPack, Counting]
"""A metadata pack, and which of its rows count."""


def packs_of(head: Head) -> Iterator[Listed]:
    """The metadata packs of a generation in the order in which their rows are applied: later ones replace earlier."""
    ranges = ranges_of(head)
    starts = tuple(part.start for part in ranges)
    snapshot = iter(head.snapshot)
    for index, part in enumerate(ranges):
        counting = _within(part.start, starts[index + 1] if index + 1 < len(starts) else None)
        for pack in islice(snapshot, part.packs):
            yield pack, counting
    for number, delta in enumerate(head.deltas):
        counting = Counting(starts, tuple(part.since <= number for part in ranges))
        for pack in delta:
            yield pack, counting


def _within(start: bytes, stop: bytes | None) -> Counting:
    starts, wanted = [start], [True]
    if start:
        starts, wanted = [b"", start], [False, True]
    if stop is not None:
        starts.append(stop)
        wanted.append(False)
    return Counting(tuple(starts), tuple(wanted))
