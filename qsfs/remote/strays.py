"""Strays: packs of which backends hold shards and that nothing names.  What is known of them, without I/O.

Flushes that crashed leave them, placements in which a backend was replaced, rollbacks whose left generation is not
kept any more.  Their retention time begins when the first scan that met them has found that nothing names
them, and goes on over restarts as that of dead packs (`running`).

How many are known at a time is bounded, and how many of those one backend has shown first: a backend that
lists keys without end fills its own share only.  What does not fit is met by a later scan.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from qsfs.errors import QsfsError
from qsfs.format import schema
from qsfs.format.units import ID_SIZE

STRAY_PREFIX = b"stray:"
"""LOCAL rows: the prefix and a pack id -> `Stray.encode`."""
MOST_STRAYS = 8192
MOST_PLACES = 1024
"""Shards of one stray that are known at a time: more than any code has, on as many backends twice."""

_SCHEMA = 1


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A shard that a backend lists: the number of its fleet entry, the shard's number, the value's bytes."""

    member: int
    shard: int
    size: int


@dataclass(frozen=True, slots=True)
class Stray:
    """A pack that nothing names: where shards of it were met, and since when it is known (running time, s)."""

    pack_id: bytes
    owner_epoch: int
    since: float
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Bytes that its shards take on backends."""
        return sum(place.size for place in self.places)

    def encode(self) -> bytes:
        """The row: msgpack array of schema 1, epoch, running time in nanoseconds, [member, shard, size] each."""
        places = [[place.member, place.shard, place.size] for place in self.places]
        return schema.pack([_SCHEMA, self.owner_epoch, int(self.since * 1e9), places])

    @classmethod
    def decode(cls, key: bytes, row: bytes) -> Stray | None:
        """What a row says; None for one of no known form: a later scan meets the pack again."""
        what = "stray in the local store"
        pack_id = key[len(STRAY_PREFIX) :]
        if len(pack_id) != ID_SIZE:
            return None
        try:
            fields = schema.record(row, _SCHEMA, 4, what)
            epoch, since = fields.integer(), fields.integer() / 1e9
            each = [schema.Fields(place, 3, what) for place in fields.array()]
            places = tuple(Place(place.integer(), place.integer(), place.integer()) for place in each)
        except QsfsError:
            return None
        return cls(pack_id, epoch, since, places)


def stray_key(pack_id: bytes) -> bytes:
    """The key in LOCAL."""
    return STRAY_PREFIX + pack_id


@dataclass(frozen=True, slots=True)
class StrayView:
    """What was known when a cut began: the strays whose retention time was over."""

    ripe: tuple[bytes, ...]


class Strays:
    """All strays that are known, from the first meeting to deletion.  Times in seconds of running time.

    `news` are the ids of those that were added, changed or dropped: for who records that.  `left_out` counts
    meetings for which there was no room since a scan last began.
    """

    def __init__(self, retention_seconds: float) -> None:
        self.deleted_packs = 0
        self.deleted_bytes = 0
        self.left_out = 0
        self.news: set[bytes] = set()
        self._retention = retention_seconds
        self._known: dict[bytes, Stray] = {}
        self._first_on: dict[int, int] = {}
        self._bytes = 0
        self._order: list[tuple[float, bytes]] = []
        self._ripe: dict[bytes, None] = {}
        self._permitted: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, pack_id: bytes) -> Stray | None:
        """What is known of a pack."""
        return self._known.get(pack_id)

    # meeting

    def remember(self, stray: Stray, now: float) -> None:
        """Takes in what an earlier mount has recorded."""
        self._add(replace(stray, since=min(stray.since, now)))

    def met(self, pack_id: bytes, owner_epoch: int, places: Iterable[Place], now: float, *, backends: int) -> None:
        """Takes note of shards of a pack that nothing names; its time begins now unless it was known."""
        found = tuple(places)
        known = self._known.get(pack_id)
        if known is None:
            first = found[0].member
            if len(self._known) >= MOST_STRAYS or self._first_on.get(first, 0) >= max(1, MOST_STRAYS // backends):
                self.left_out += 1
                return
            self._add(Stray(pack_id, owner_epoch, now, found[:MOST_PLACES]))
            self.news.add(pack_id)
            return
        there = {(place.member, place.shard) for place in known.places}
        more = [place for place in found if (place.member, place.shard) not in there]
        self._change(known, (*known.places, *more)[:MOST_PLACES])

    def _add(self, stray: Stray) -> None:
        self.drop(stray.pack_id)
        self._known[stray.pack_id] = stray
        self._count(stray, 1)
        heapq.heappush(self._order, (stray.since, stray.pack_id))

    def _change(self, stray: Stray, places: tuple[Place, ...]) -> None:
        if places != stray.places:
            self._count(stray, -1)
            changed = self._known[stray.pack_id] = replace(stray, places=places)
            self._count(changed, 1)
            self.news.add(stray.pack_id)

    def _count(self, stray: Stray, by: int) -> None:
        """Counts a stray in or out: its bytes, and as one of the backend of its first place."""
        first = stray.places[0].member if stray.places else -1
        self._first_on[first] = self._first_on.get(first, 0) + by
        self._bytes += by * stray.size

    def drop(self, pack_id: bytes) -> None:
        """Lets go of a pack that is named after all, or gone."""
        stray = self._known.pop(pack_id, None)
        if stray is not None:
            self._count(stray, -1)
            self._ripe.pop(pack_id, None)
            self._permitted.pop(pack_id, None)
            self.news.add(pack_id)

    # deleting

    def _ripen(self, now: float) -> None:
        while self._order and now - self._order[0][0] >= self._retention:
            since, pack_id = heapq.heappop(self._order)
            stray = self._known.get(pack_id)
            if stray is not None and stray.since == since and pack_id not in self._permitted:
                self._ripe[pack_id] = None

    def waits_for_a_head(self, now: float) -> bool:
        """Whether the time of any is over, and only a head is missing."""
        self._ripen(now)
        return bool(self._ripe)

    def before_cut(self, now: float) -> StrayView:
        """What the head of the cut that begins now may release."""
        self._ripen(now)
        return StrayView(tuple(self._ripe))

    def published(self, view: StrayView) -> None:
        """A head was published whose cut began at `view`."""
        for pack_id in view.ripe:
            if pack_id in self._ripe:
                del self._ripe[pack_id]
                self._permitted[pack_id] = None

    def permitted(self, most: int) -> list[Stray]:
        """Up to `most` strays that may be deleted now, if nothing names them still."""
        return [self._known[pack_id] for _, pack_id in zip(range(most), self._permitted, strict=False)]

    def cleared(self, pack_id: bytes, members: Iterable[int]) -> None:
        """These backends hold nothing of a pack any more; once none is left it is gone."""
        stray = self._known.get(pack_id)
        if stray is None:
            return
        gone = set(members)
        left = tuple(place for place in stray.places if place.member not in gone)
        self.deleted_bytes += stray.size - sum(place.size for place in left)
        self._change(stray, left)
        if not left:
            self.deleted_packs += 1
            self.drop(pack_id)

    # telling

    @property
    def counts_time(self) -> bool:
        """Whether any is known whose time is not over."""
        return len(self._known) > len(self._ripe) + len(self._permitted)

    def report(self, now: float) -> Mapping[str, float | int | None]:
        """How many there are, the bytes of their shards, and what they wait for."""
        oldest = min((stray.since for stray in self._known.values()), default=None)
        return {
            "packs": len(self._known),
            "bytes": self._bytes,
            "oldest_seconds": None if oldest is None else max(0.0, now - oldest),
            "in_retention": len(self._known) - len(self._ripe) - len(self._permitted),
            "until_next_generation": len(self._ripe),
            "being_deleted": len(self._permitted),
            "left_out": self.left_out,
            "deleted_packs": self.deleted_packs,
            "deleted_bytes": self.deleted_bytes,
        }
