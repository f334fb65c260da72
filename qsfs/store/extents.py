"""Extent rows: which pages of a file lie in which pack.  Rows of one file never overlap.

A newer extent trims or splits the older ones it covers.  Every change of a row moves the live
bytes of its pack along; those are written to the pack rows when the group is sealed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

from qsfs.store.layers import Rows
from qsfs.store.schema import PAGE, ExtentRow, PackRow, Table, u64, u64_pair

_KNOWN_FILES = 100_000


class Extents:
    """The extents of all files.

    `emptied` are packs that turned out to have no live bytes when a group was sealed, `thinned` those that lost
    some and have fewer than half of their size, with the sealed bytes for each plain one of what they lost; who acts on
    that takes them out.  `recorded_bytes` counts the pages of all extents that were added.
    """

    def __init__(self, layers: Rows) -> None:
        self._layers = layers
        self._live_change: defaultdict[int, int] = defaultdict(int)
        self._has: dict[int, bool] = {}
        self._lost: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._recording: set[int] = set()
        self.emptied: set[int] = set()
        self.thinned: dict[int, float] = {}
        self.recorded_bytes = 0

    def any(self, inode: int) -> bool:
        """Whether the file has extents.  True may be stale, False never is."""
        known = self._has.get(inode)
        if known is None:
            if len(self._has) > _KNOWN_FILES:
                self._has.clear()
            rows = self._layers.scan(Table.EXTENTS, u64(inode), u64(inode + 1))
            known = self._has[inode] = next(rows, None) is not None
        return known

    def expect_none(self, inode: int) -> None:
        """Takes note that a new file has no extents, which saves the first look."""
        self._has[inode] = False

    def at(self, inode: int, page: int) -> ExtentRow | None:
        """The extent that holds `page`, pending truncations not considered."""
        if not self.any(inode):
            return None
        rows = self._layers.scan(Table.EXTENTS, u64(inode) + bytes(8), u64_pair(inode, page + 1), True)
        for key, value in rows:
            row = ExtentRow.decode(int.from_bytes(key[8:], "big"), value)
            return row if page < row.first + row.pages else None
        return None

    def overlapping(self, inode: int, first: int, stop: int) -> Iterator[ExtentRow]:
        """The extents that hold pages in [first, stop), in order."""
        if not self.any(inode) or first >= stop:
            return
        before = self.at(inode, first)
        if before is not None:
            yield before
            first = before.first + before.pages
            if first >= stop:
                return
        for key, value in self._layers.scan(Table.EXTENTS, u64_pair(inode, first), u64_pair(inode, stop)):
            yield ExtentRow.decode(int.from_bytes(key[8:], "big"), value)

    def parts(self, inode: int, first: int, stop: int, most: int) -> Iterator[list[ExtentRow]]:
        """The same, at most `most` at a time; what changes between two parts shows in the later one."""
        while rows := list(islice(self.overlapping(inode, first, stop), most)):
            yield rows
            first = rows[-1].first + rows[-1].pages

    def insert(self, inode: int, row: ExtentRow) -> None:
        """Adds an extent; what older ones hold of its pages is taken from them."""
        self.take(inode, row.first, row.first + row.pages)
        self._has[inode] = True
        self._put(inode, row)
        self._live_change[row.pack] += row.pages * PAGE
        self.recorded_bytes += row.pages * PAGE

    def take(self, inode: int, first: int, stop: int) -> None:
        """Removes the pages [first, stop) from all extents."""
        for row in list(self.overlapping(inode, first, stop)):
            end = row.first + row.pages
            left, right = max(0, first - row.first), max(0, end - stop)
            if left:
                self._put(inode, row.part(row.first, left))
            else:
                self._layers.delete(Table.EXTENTS, u64_pair(inode, row.first))
            if right:
                self._put(inode, row.part(stop, right))
            taken = (row.pages - left - right) * PAGE
            self._live_change[row.pack] -= taken
            lost = self._lost[row.pack]
            lost[0] += taken
            lost[1] += taken * row.sealed_length / max(1, row.plain_length)

    def added(self, pack: int) -> None:
        """Takes note of a new pack, so that one that nothing lives in is noticed too."""
        self._live_change[pack] += 0

    @contextmanager
    def recording(self, pack: int) -> Iterator[None]:
        """While extents of `pack` are added in steps it passes neither for emptied nor for thin, whatever goes."""
        self._recording.add(pack)
        try:
            yield
        finally:
            self._recording.discard(pack)
            self.added(pack)

    def in_work(self, pack: int) -> bool:
        """Whether extents of a pack are just being added in steps."""
        return pack in self._recording

    def live_change(self, pack: int) -> int:
        """What is still to be added to the live bytes in the row of `pack`."""
        return self._live_change.get(pack, 0)

    def write_back(self) -> None:
        """Brings the live bytes of the pack rows up to date; called when a group is sealed."""
        for number, change in self._live_change.items():
            row = self._layers.get(Table.PACKS, u64(number))
            if row is None:
                continue
            pack = PackRow.decode(row)
            if change:
                pack = replace(pack, live=max(0, pack.live + change))
                self._layers.put(Table.PACKS, u64(number), pack.encode())
            if number in self._recording:
                continue
            if not pack.live:
                self.emptied.add(number)
            elif change < 0:
                plain, sealed = self._lost[number]
                density = min(1.0, sealed / max(1.0, plain))
                if 2 * pack.live * density < pack.body_length:
                    self.thinned[number] = density
        self._live_change.clear()
        self._lost.clear()

    def _put(self, inode: int, row: ExtentRow) -> None:
        self._layers.put(Table.EXTENTS, u64_pair(inode, row.first), row.encode())
