"""What of the uncovered writes of one file reaches the medium when the power goes.

The rules are those of a page cache over a disk with sectors of 512 bytes.  A dirty page is written back
as it was at some moment, or not at all; pages are independent, so a later one may be kept and an earlier
one lost; of the write that was in flight the first sectors arrived.  A page that only a truncation made
room for needs that truncation.  Every choice is drawn from a generator of its own, named by seed, file
and page, so that one page more or less elsewhere changes nothing here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PAGE = 4096
SECTOR = 512

KEEP = ("random", "none", "all", "oldest", "newest")


@dataclass(slots=True, eq=False)
class Write:
    """Bytes written at an offset; `sequence` orders all changes of the disk."""

    sequence: int
    offset: int
    data: bytes


@dataclass(slots=True, eq=False)
class Truncate:
    """A change of a file's size; `old_size` is what it was before."""

    sequence: int
    size: int
    old_size: int


Event = Write | Truncate


@dataclass
class CutReport:
    """What a power cut did: pages and operations kept and lost, and the write it tore.

    `files` maps the path of a file to its (kept, lost) pages; `torn` names the file of the write that was
    in flight and how many of its bytes arrived.
    """

    seed: str
    keep: str
    fsyncs: int = 0
    writes: int = 0
    kept_pages: int = 0
    lost_pages: int = 0
    kept_operations: int = 0
    lost_operations: int = 0
    torn: tuple[str, int, int] | None = None
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, name: str, kept: int, lost: int) -> None:
        """Counts the pages of one file."""
        self.files[name] = (kept, lost)
        self.kept_pages += kept
        self.lost_pages += lost


class Plan:
    """The choices of one power cut, all drawn from `seed`.

    `keep` is "random", or a directed cut: "none" or "all" of what is uncovered, "newest" (only the last
    write), "oldest" (all but the last write).
    """

    def __init__(self, seed: str, keep: str = "random") -> None:
        if keep not in KEEP:
            raise ValueError(f"keep '{keep}' is none of {', '.join(KEEP)}")
        self.seed = seed
        self.keep = keep
        # Extremes are as likely as the middle: the interesting losses are of one page, and of all but one.
        self._data_share = self.draw("data share").choice((0.0, 0.1, 0.5, 0.5, 0.5, 0.9, 1.0))
        self._torn_sequence = -1
        self._torn_end = 0

    def draw(self, *name: object) -> random.Random:
        """The generator of the choice called `name`."""
        return random.Random("/".join(map(str, (self.seed, *name))))

    def prefix(self, count: int, *name: object) -> int:
        """How many of `count` changes that reach the medium in order have done so."""
        if self.keep != "random":
            return 0 if self.keep == "none" else count
        generator = self.draw("prefix", *name)
        return generator.choice((0, count, generator.randint(0, count)))

    def flip(self, *name: object) -> bool:
        """Whether a change that reaches the medium in no order has done so."""
        if self.keep != "random":
            return self.keep != "none"
        return self.draw("flip", *name).random() < self._data_share

    def tear(self, last: Write) -> int | None:
        """Chooses how far the write in flight came; bytes that arrived, None if the cut does not tear it."""
        self._torn_sequence = last.sequence
        self._torn_end = last.offset
        generator = self.draw("tear")
        if self.keep == "newest":
            self._torn_end = last.offset + len(last.data)
        elif self.keep == "random":
            if generator.random() < 0.25:
                self._torn_sequence = -1
                return None
            end = last.offset + len(last.data)
            first = last.offset // SECTOR + 1
            stops = [last.offset, *range(first * SECTOR, end, SECTOR), end]
            self._torn_end = generator.choice(stops)
        elif self.keep != "oldest":
            self._torn_sequence = -1
            return None
        return self._torn_end - last.offset

    def version(self, count: int, file: int, page: int) -> int:
        """Which of the states 0 (as on the medium) to `count` (newest) of a page was written back."""
        if self.keep != "random":
            return count if self.keep in ("all", "oldest") else 0
        generator = self.draw("page", file, page)
        if generator.random() < self._data_share:
            return count
        return generator.randrange(count)

    def torn_end(self, unit: Write) -> int | None:
        """Up to which offset of the file `unit` arrived, if it belongs to the write in flight."""
        return self._torn_end if unit.sequence == self._torn_sequence else None

    def exposed(self, file: int, needed: int, possible: int) -> int:
        """The size of a file between what its kept pages need and what all its writes would have needed.

        Beyond the kept pages such a file reads as zeros, as it does on disks that keep sizes and data apart.
        """
        if self.keep != "random" or possible <= needed:
            return needed
        generator = self.draw("size", file)
        return generator.choice((needed, needed, needed, possible))


@dataclass
class Survivors:
    """The writes of one file to apply to the medium, in order, and the size that it then has at least."""

    writes: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0
    kept: int = 0
    lost: int = 0


def survivors(events: Sequence[Event], plan: Plan, file: int) -> Survivors:
    """Chooses what of `events`, the uncovered changes of one file, the medium holds after the cut.

    Truncations among `events` are not on the medium.
    """
    found = Survivors()
    possible = 0
    for page, units in sorted(_by_page(events).items()):
        possible = max(possible, *(unit.offset + len(unit.data) for unit in units))
        pieces = _choose(units, plan, file, page)
        if len(pieces) == len(units) and len(pieces[-1].data) == len(units[-1].data):
            found.kept += 1
        else:
            found.lost += 1
        for piece in pieces:
            found.writes.append((piece.offset, piece.data))
            found.size = max(found.size, piece.offset + len(piece.data))
    found.size = plan.exposed(file, found.size, possible)
    return found


def split(write: Write) -> Iterator[tuple[int, Write]]:
    """The parts of a write by page."""
    start, end = write.offset, write.offset + len(write.data)
    while start < end:
        page = start // PAGE
        stop = min(end, (page + 1) * PAGE)
        yield page, Write(write.sequence, start, write.data[start - write.offset : stop - write.offset])
        start = stop


def _by_page(events: Sequence[Event]) -> dict[int, list[Write]]:
    """The successive states of each page that can be on the medium while no truncation of `events` is."""
    pages: dict[int, list[Write]] = {}
    limit: int | None = None
    for event in events:
        if isinstance(event, Truncate):
            bound = min(event.size, event.old_size)
            limit = bound if limit is None else min(limit, bound)
            continue
        for page, unit in split(event):
            if limit is None or (page + 1) * PAGE <= limit:
                pages.setdefault(page, []).append(unit)
    return pages


def _choose(units: list[Write], plan: Plan, file: int, page: int) -> list[Write]:
    last = units[-1]
    end = plan.torn_end(last)
    if end is None:
        return units[: plan.version(len(units), file, page)]
    arrived = end - last.offset
    if arrived >= len(last.data):
        return units
    count = plan.version(len(units) - 1, file, page) if len(units) > 1 else 0
    # The sectors that arrived show the page's newest state, the others an older one.
    start = last.offset // SECTOR * SECTOR
    return units[:count] + [part for unit in units[count:] if (part := _clip(unit, start, end)) is not None]


def _clip(unit: Write, start: int, end: int) -> Write | None:
    first, stop = max(start, unit.offset), min(end, unit.offset + len(unit.data))
    if first >= stop:
        return None
    return Write(unit.sequence, first, unit.data[first - unit.offset : stop - unit.offset])
