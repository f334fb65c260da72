"""What the store knows of one file: pages by state, extents, packs and where their shards lie.

Counted in short steps, since a file may have a million extents; between two of them requests change
the file, so a survey of a file in use is about right, never a snapshot.  Memory holds a bit for each
pack number and what is listed by name, whatever the file's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from qsfs.store.schema import (
    BLOCK_PAGES,
    PAGE,
    ExtentRow,
    Inode,
    PackRow,
    PackState,
    Table,
    split_u64_pair,
    u64,
    u64_pair,
)
from qsfs.store.store import Store

_ROWS = 32
"""Rows of one step: well below a millisecond where nothing is local, two where all is."""


@dataclass(frozen=True, slots=True)
class Answering:
    """Which backends answer now, by number, the group of each, and the k of the code."""

    numbers: Collection[int]
    groups: Mapping[int, str]
    k: int


@dataclass(slots=True)
class Pages:
    """Pages by state.  `unpublished` are in a pack that no published head names yet for them."""

    clean: int = 0
    dirty: int = 0
    remote: int = 0
    uncovered: int = 0
    unpublished: int = 0


@dataclass(frozen=True, slots=True)
class ListedExtent:
    """One extent row, with the id of its pack."""

    row: ExtentRow
    pack_id: bytes


@dataclass(slots=True)
class PacksFound:
    """All packs that hold something of the file.

    `spares` counts them by how many of their stored shards may be lost, `spares_now` the same of the shards
    on backends that answer; `group_deaths` those that the loss of one whole group would end; `shards` counts
    shards by backend; `oldest_look_ns` is when the one that was looked at longest ago was.
    """

    count: int = 0
    full: int = 0
    looked: int = 0
    missing: int = 0
    spares: Counter[int] = field(default_factory=Counter)
    spares_now: Counter[int] = field(default_factory=Counter)
    group_deaths: int = 0
    shards: Counter[int] = field(default_factory=Counter)
    oldest_look_ns: int = 0


class FileSurvey:
    """Surveys files one after the other; the sums are over all of them."""

    def __init__(self, store: Store, answering: Answering, *, most_extents: int = 0, most_packs: int = 0) -> None:
        """Lists up to so many extents, from the page given to `steps` on, and so many packs."""
        self.pages = Pages()
        self.extents = 0
        self.packs = PacksFound()
        self.listed: list[ListedExtent] = []
        self.listed_packs: list[PackRow] = []
        self.next_page: int | None = None
        self._store = store
        self._answering = answering
        self._most_extents = most_extents
        self._most_packs = most_packs
        self._seen = bytearray()

    def steps(self, inode: Inode, list_from: int = 0) -> Iterator[None]:
        """Surveys one file; may be left alone for as long as one likes between two steps."""
        start = 0
        while (found := self._blocks(inode.number, start)) is not None:
            start = found
            yield
        start = 0
        while (found := self._extents(inode, start, list_from)) is not None:
            start = found
            yield

    def _blocks(self, inode: int, start: int) -> int | None:
        """Counts the resident pages of some blocks; returns where to go on."""
        numbers, behind = next_blocks(self._store, inode, start, _ROWS)
        for number in numbers:
            state = self._store.blocks.state(inode, number)
            if state is not None:
                self.pages.clean += (state.resident & ~state.dirty).bit_count()
                self.pages.dirty += (state.resident & state.dirty).bit_count()
        return behind

    def _extents(self, inode: Inode, start: int, list_from: int) -> int | None:
        store = self._store
        rows = list(islice(store.extents.overlapping(inode.number, start, 1 << 62), _ROWS))
        cold = bool(rows) and self._is_cold(inode.number, rows)
        for row in rows:
            self.extents += 1
            if cold:
                self.pages.remote += row.pages
            else:
                for _, bits in store.blocks.remote_blocks(inode.number, row, row.first, row.first + row.pages):
                    self.pages.remote += bits.bit_count()
            if _is_marked(store, u64_pair(inode.number, row.first)):
                self.pages.unpublished += row.pages
            if self._is_new(row.pack):
                self._count_pack(self._pack(row.pack))
            if self._most_extents and row.first + row.pages > list_from:
                if len(self.listed) < self._most_extents:
                    pack = self._pack(row.pack)
                    self.listed.append(ListedExtent(row, b"" if pack is None else pack.pack_id))
                elif self.next_page is None:
                    self.next_page = row.first
        return rows[-1].first + rows[-1].pages if len(rows) == _ROWS else None

    def _is_cold(self, inode: int, rows: list[ExtentRow]) -> bool:
        """Whether nothing between the first and the last of these extents is local, or cut off."""
        if self._store.pending_truncations(inode):
            return False
        numbers, _ = next_blocks(self._store, inode, rows[0].first // BLOCK_PAGES, 1)
        return not numbers or numbers[0] * BLOCK_PAGES >= rows[-1].first + rows[-1].pages

    def _pack(self, number: int) -> PackRow | None:
        row = self._store.get(Table.PACKS, u64(number))
        return None if row is None else PackRow.decode(row)

    def _is_new(self, number: int) -> bool:
        """Whether a pack is met for the first time; from then on it is not."""
        index, bit = divmod(number, 8)
        if index >= len(self._seen):
            self._seen.extend(bytes(index + 1 - len(self._seen)))
        if self._seen[index] & 1 << bit:
            return False
        self._seen[index] |= 1 << bit
        return True

    def _count_pack(self, pack: PackRow | None) -> None:
        found = self.packs
        found.count += 1
        if pack is None:
            found.missing += 1
            return
        if len(self.listed_packs) < self._most_packs:
            self.listed_packs.append(pack)
        found.full += bool(pack.state & PackState.FULL)
        if pack.state & PackState.LOOKED:
            found.looked += 1
            if pack.verified_at_ns:
                oldest = found.oldest_look_ns or pack.verified_at_ns
                found.oldest_look_ns = min(oldest, pack.verified_at_ns)
        k = self._answering.k
        places = [place for place in pack.placement if place >= 0]
        found.shards.update(places)
        found.spares[len(places) - k] += 1
        found.spares_now[spare_now(pack, self._answering)] += 1
        groups = Counter(group for place in places if (group := self._answering.groups.get(place, "")))
        found.group_deaths += bool(groups) and len(places) - max(groups.values()) < k


def spare_now(pack: PackRow, answering: Answering) -> int:
    """How many of the shards that lie on answering backends may be lost, below 0 if too few do."""
    return sum(place in answering.numbers for place in pack.placement) - answering.k


def next_blocks(store: Store, inode: int, start: int, most: int) -> tuple[list[int], int | None]:
    """The next blocks of a file that have a row in any layer, and where to go on (None: that was all)."""
    view = store.layers.view
    rows = view.scan(Table.BLOCKS, u64_pair(inode, start), u64(inode + 1))
    stored = [split_u64_pair(key)[1] for key, _ in islice(rows, most)]
    behind = stored[-1] + 1 if len(stored) == most else None
    found = set(stored)
    for group in (store.layers.open, store.layers.committing):
        if group is not None:
            found.update(n for n in group.blocks_of.get(inode, ()) if n >= start and (behind is None or n < behind))
    return sorted(found), behind


def holes(size: int, pages: Pages) -> int:
    """Pages of a file of `size` bytes that are in no state: they read as zeros."""
    return max(0, -(-size // PAGE) - pages.clean - pages.dirty - pages.remote)


def _is_marked(store: Store, key: bytes) -> bool:
    """Whether an extent row changed since the last published generation."""
    for group in (store.layers.open, store.layers.committing):
        if group is not None and key in group.rows[Table.EXTENTS]:
            return True
    return store.layers.view.get(Table.CHANGED, bytes((Table.EXTENTS,)) + key) is not None
