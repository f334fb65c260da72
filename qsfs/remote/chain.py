"""What a head lists: the snapshot of the metadata, divided into ranges, and the deltas since.

The rows of a generation stand in one order (`store.positions`).  A *range* is a stretch of it; its
packs hold all rows that stood there as of some commit, and nothing of elsewhere.  A *delta* holds
the rows that one generation changed, anywhere.  A restore takes the packs of every range, then the
deltas in order, and of each the rows in those ranges to which it still applies.

**Refreshing.**  A range is replaced by reading its rows from the local tables again.  So the work
at a time is bounded by the range, whatever all metadata weigh, and what nothing has changed is not
written again.  Why that gives the state of the cut:

- The reading begins after the record of generation g is committed, and takes many transactions.
  What it reads of a row is the row as some commit b or a later one left it, b being the first.
- A row that nothing changes from then on is right: the tables after g's record hold what g says of
  it, or the record marked it as changed, and then it is in the delta of the next generation.
- A row that changes later is marked, so it is in the delta of a generation that is recorded after
  the reading began.  All of these apply to the new range: its `since` is the number that
  the next delta was to have when the reading began.
- Such a delta may hold a row that is older than what was read, if its cut was taken before that.
  Then the row changed after that cut and is in the next delta.  The first head that lists the range
  has a cut which was taken after the reading ended; so its own delta, which applies, has every such row.

A crash before that head is recorded leaves the ranges as they were; the packs that were written are
listed nowhere.  Any number of heads may be published while a range is read.

**Merging.**  Deltas that follow each other are merged into one (`merge`), which changes no row of the image:
the later row of a key counts, and rows that a range does not need any more are left out.

**Dropping deltas.**  `since` of a range is the first delta that touches it, not the first that is
newer.  A delta that no range needs any more, and all before it, is dropped; so the range
that has waited longest is refreshed first, and what was never touched holds nothing up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice

from qsfs.format.extent import PackRef
from qsfs.format.head import Head, MetadataPack, SnapshotRange

LEAST_DELTAS = 32
MOST_DELTAS = 512
"""Deltas after which ranges are refreshed whatever they weigh: between these, by what the snapshot weighs."""
_SNAPSHOT_A_DELTA = 2048
"""A head names each delta on every backend.  To keep twice as many costs that; half as many costs more refreshing.
With d listed, and s bytes of snapshot, both cost about the same where d x d = s / this."""
_LEAST_SNAPSHOT = 4 << 20
"""Bytes that a smaller snapshot counts as when deltas are weighed against it."""
MERGED = 8
"""Deltas that become one."""
_MOST_MERGED_BYTES = 2 << 20
"""What merged deltas weigh at most, packed: their rows are in memory together."""
_NONE_OUTWEIGHS = 4
_LEAST_AT_ONCE = 4
_MOST_AT_ONCE = 64
"""Packs that are written anew between two generations."""
_PACKED = 8
"""Bytes of rows to read anew for each that a delta weighs: rows pack to a fourth, and twice as much is wanted."""


@dataclass(frozen=True, slots=True)
class ListedPack:
    """A written metadata pack: its number in the local table, and what a head says of it."""

    number: int
    ref: PackRef
    chunks: int


Packs = tuple[ListedPack, ...]


class Touched:
    """Which stretches of positions a delta has rows in; `starts` are the ranges as known while it is made."""

    __slots__ = ("_found", "_last", "_starts")

    def __init__(self, starts: Sequence[bytes] = (b"",)) -> None:
        self._starts = starts
        self._found: set[int] = set()
        self._last: tuple[bytes, bytes | None] = (b"\xff" * 600, None)

    @classmethod
    def everything(cls) -> Touched:
        """What is not known more closely."""
        touched = cls()
        touched.note(b"")
        return touched

    def note(self, position: bytes) -> None:
        """Takes note of a row."""
        start, stop = self._last
        if start <= position and (stop is None or position < stop):
            return
        index = bisect_right(self._starts, position) - 1
        self._found.add(index)
        self._last = self._stretch(index)

    def _stretch(self, index: int) -> tuple[bytes, bytes | None]:
        return self._starts[index], self._starts[index + 1] if index + 1 < len(self._starts) else None

    def overlaps(self, start: bytes, stop: bytes | None) -> bool:
        """Whether a row may stand from `start` to `stop` (None: to the end)."""
        index = bisect_right(self._starts, start) - 1
        if self._stretch(index) == (start, stop):
            return index in self._found
        return any(
            (stop is None or low < stop) and (high is None or start < high)
            for low, high in map(self._stretch, self._found)
        )


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of the snapshot, from `start` to the next range; deltas numbered from `since` on apply to it."""

    start: bytes
    packs: Packs
    since: int

    @property
    def bytes(self) -> int:
        """What its packs weigh."""
        return sum(pack.ref.body_length for pack in self.packs)


@dataclass(frozen=True, slots=True)
class Delta:
    """The rows that one generation changed.  Numbers ascend; `touched` is not known of what a head listed."""

    number: int
    packs: Packs
    touched: Touched | None = None

    @property
    def bytes(self) -> int:
        """What its packs weigh."""
        return sum(pack.ref.body_length for pack in self.packs)


@dataclass(slots=True)
class Stretch:
    """A run of ranges that is read anew, from where the first starts to `stop` (None: the end).

    `pieces` are the new packs, and where the rows of each start; they hold everything up to `reached`.
    """

    start: bytes
    stop: bytes | None
    pieces: list[tuple[bytes, Packs]] = field(default_factory=list)
    reached: bytes | None = None


@dataclass(slots=True)
class Refresh:
    """Stretches that are read anew, in at most `most_packs` packs, while generations go on.

    Deltas numbered from `since` on apply to what is read.  Once it is `done`, the head of a cut that
    is taken after that may list it: the stretches that were reached.
    """

    stretches: list[Stretch]
    most_packs: int
    since: int
    done: bool = False

    @property
    def packs(self) -> list[ListedPack]:
        """The packs that were written so far; no head lists them yet."""
        return [pack for stretch in self.stretches for _, packs in stretch.pieces for pack in packs]


@dataclass(slots=True)
class Merge:
    """Deltas that follow each other and become one; `since` and `starts` are those of the ranges when it began.

    Once it is `done`, any head may list `packs` in their place.
    """

    deltas: tuple[Delta, ...]
    starts: tuple[bytes, ...]
    since: tuple[int, ...]
    packs: Packs = ()
    done: bool = False


Renewal = Refresh | Merge
"""What is written while generations go on, to be listed in the place of what it was made of; one at a time."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The ranges of the snapshot in order, the deltas of a generation from the oldest on, the next one's number."""

    ranges: tuple[Range, ...]
    deltas: tuple[Delta, ...]
    next_number: int

    @classmethod
    def of_head(cls, head: Head, number_of: Callable[[MetadataPack], int]) -> Chain:
        """What `head` lists."""

        def listed(packs: Iterable[MetadataPack]) -> Packs:
            return tuple(ListedPack(number_of(pack), pack.ref, pack.chunks) for pack in packs)

        snapshot = iter(listed(head.snapshot))
        parts = ranges_of(head)
        ranges = tuple(Range(part.start, tuple(islice(snapshot, part.packs)), part.since) for part in parts)
        deltas = tuple(Delta(number, listed(packs)) for number, packs in enumerate(head.deltas))
        return cls(ranges, deltas, len(deltas))

    def heads_ranges(self) -> tuple[SnapshotRange, ...]:
        """What a head says of the ranges: nothing if it lists one, to which every delta applies."""
        first = self.deltas[0].number if self.deltas else self.next_number
        if len(self.ranges) == 1 and self.ranges[0].since <= first:
            return ()
        # Only deltas without packs are left out, and those touch nothing.
        numbers = [delta.number for delta in self.deltas]
        return tuple(
            SnapshotRange(part.start, len(part.packs), bisect_right(numbers, part.since - 1)) for part in self.ranges
        )

    @property
    def starts(self) -> tuple[bytes, ...]:
        """Where the ranges start."""
        return tuple(part.start for part in self.ranges)

    def stop_of(self, index: int) -> bytes | None:
        """Where a range ends; None: at the end."""
        return self.ranges[index + 1].start if index + 1 < len(self.ranges) else None

    def followed_by(self, packs: Packs, touched: Touched) -> Chain:
        """The chain with the delta of another generation behind it, and without what nothing needs any more."""
        if not packs:
            return self
        number = self.next_number
        ranges = tuple(
            replace(part, since=number + 1)
            if part.since >= number and not touched.overlaps(part.start, self.stop_of(index))
            else part
            for index, part in enumerate(self.ranges)
        )
        return Chain(ranges, (*self.deltas, Delta(number, packs, touched)), number + 1)._shortened()

    def refreshed(self, refresh: Refresh) -> Chain:
        """The chain with what was read anew in the place of what it had there.

        A range that was not reached whole keeps its packs, for the rest.
        """
        chain = self
        for stretch in refresh.stretches:
            if stretch.pieces:
                chain = replace(chain, ranges=tuple(chain._with(stretch, refresh.since)))
        return chain._shortened()

    def _with(self, stretch: Stretch, since: int) -> Iterator[Range]:
        reached = stretch.reached
        for index, part in enumerate(self.ranges):
            stop = self.stop_of(index)
            if part.start == stretch.start:
                yield from self._pieces(stretch, since)
            if part.start < stretch.start or (reached is not None and part.start >= reached):
                yield part
            elif reached is not None and (stop is None or reached < stop):
                yield replace(part, start=reached)

    def _pieces(self, stretch: Stretch, since: int) -> Iterator[Range]:
        stops = [*(start for start, _ in stretch.pieces[1:]), stretch.reached]
        for (start, packs), stop in zip(stretch.pieces, stops, strict=True):
            yield Range(start, packs, self._since(since, start, stop))

    def merged(self, merge: Merge) -> Chain:
        """The chain with a merged delta in the place of its parts; as it is if they are not all listed any more.

        Of a part, rows that a range does not need are left out.  So the merged delta, whose number is the
        first's, applies to each range that any part applied to.
        """
        first, last = merge.deltas[0].number, merge.deltas[-1].number
        numbers = [delta.number for delta in self.deltas if first <= delta.number <= last]
        if numbers != [delta.number for delta in merge.deltas]:
            return self
        ranges = tuple(replace(part, since=first) if first < part.since <= last else part for part in self.ranges)
        deltas = [delta for delta in self.deltas if delta.number < first]
        deltas += [Delta(first, merge.packs)] if merge.packs else []
        deltas += [delta for delta in self.deltas if delta.number > last]
        return Chain(ranges, tuple(deltas), self.next_number)._shortened()

    def renewed(self, renewal: Renewal) -> Chain:
        """The chain with what was written in the place of what it was made of."""
        return self.merged(renewal) if isinstance(renewal, Merge) else self.refreshed(renewal)

    def _since(self, least: int, start: bytes, stop: bytes | None) -> int:
        """The first delta numbered from `least` on that touches a stretch."""
        for delta in self.deltas:
            if delta.number >= least and (delta.touched is None or delta.touched.overlaps(start, stop)):
                return delta.number
        return self.next_number

    def _shortened(self) -> Chain:
        needed = min(part.since for part in self.ranges)
        return Chain(self.ranges, tuple(d for d in self.deltas if d.number >= needed), self.next_number)

    # what to renew

    def next_merge(self) -> Merge | None:
        """Deltas to merge now, the newest that fit: several, none of which outweighs the others, of bounded weight."""
        for begin in range(len(self.deltas) - MERGED, -1, -1):
            some = self.deltas[begin : begin + MERGED]
            weights = [delta.bytes for delta in some]
            if sum(weights) <= _MOST_MERGED_BYTES and max(weights) <= sum(weights) // _NONE_OUTWEIGHS:
                return Merge(some, self.starts, tuple(part.since for part in self.ranges))
        return None

    def needing(self, lost: Set[bytes]) -> list[int]:
        """The ranges that a restore cannot read while packs with these ids are `lost`: their own, or a delta's."""
        if not lost:
            return []
        deltas = [delta.number for delta in self.deltas if any(pack.ref.pack_id in lost for pack in delta.packs)]
        last = max(deltas, default=-1)
        return [
            index
            for index, part in enumerate(self.ranges)
            if part.since <= last or any(pack.ref.pack_id in lost for pack in part.packs)
        ]

    def next_refresh(self, ratio: float, pack_bytes: int, lost: Set[bytes] = frozenset()) -> Refresh | None:
        """What to read anew now; None while the deltas neither outweigh the snapshot by `ratio` nor are too many.

        A range has about `pack_bytes` of rows.  The ranges that have waited longest come first; how much it
        is depends on how the deltas grow, so that their list stays short, and not on how much there is.
        What needs packs that are `lost` comes before all else.
        """
        needing = self.needing(lost)
        weight = sum(delta.bytes for delta in self.deltas)
        snapshot = sum(part.bytes for part in self.ranges)
        most = most_deltas(snapshot)
        if weight <= ratio * max(snapshot, _LEAST_SNAPSHOT) and len(self.deltas) < most and not needing:
            return None
        listed = sum(len(part.packs) for part in self.ranges)
        growth = self.deltas[-1].bytes if self.deltas else 0
        wanted = max(_LEAST_AT_ONCE, int(_PACKED * growth / ratio) // pack_bytes + 1, 2 * listed // most + 1)
        most_packs = _MOST_AT_ONCE if needing else min(wanted, _MOST_AT_ONCE)
        waiting = needing or [index for index, part in enumerate(self.ranges) if part.since < self.next_number]
        chosen: list[int] = []
        packs = 0
        for index in sorted(waiting, key=lambda index: self.ranges[index].since):
            packs += max(1, len(self.ranges[index].packs))
            if chosen and packs > most_packs:
                break
            chosen.append(index)
        return Refresh(self._stretches(sorted(chosen)), most_packs, self.next_number)

    def _stretches(self, indexes: Sequence[int]) -> list[Stretch]:
        """Ranges as stretches; neighbours are one, so that small ones become one."""
        stretches: list[Stretch] = []
        for index in indexes:
            start, stop = self.ranges[index].start, self.stop_of(index)
            if stretches and stretches[-1].stop == start:
                stretches[-1].stop = stop
            else:
                stretches.append(Stretch(start, stop))
        return stretches

    def all_packs(self) -> list[ListedPack]:
        """Every pack that is listed."""
        listed: list[Range | Delta] = [*self.ranges, *self.deltas]
        return [pack for part in listed for pack in part.packs]


def most_deltas(snapshot_bytes: int) -> int:
    """How many deltas a head lists before ranges are refreshed for that alone."""
    best = int((snapshot_bytes / _SNAPSHOT_A_DELTA) ** 0.5)
    return max(LEAST_DELTAS, min(MOST_DELTAS, best))


def ranges_of(head: Head) -> tuple[SnapshotRange, ...]:
    """The ranges of a head: one with everything if it names none."""
    return head.ranges or (SnapshotRange(b"", len(head.snapshot), 0),)


def listed_ids(head: Head) -> frozenset[bytes]:
    """The ids of the metadata packs that a head lists."""
    return frozenset(pack.ref.pack_id for packs in (head.snapshot, *head.deltas) for pack in packs)
