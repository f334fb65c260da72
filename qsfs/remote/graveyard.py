"""Dead packs, and when each may be deleted: what is known, without I/O.

A pack is dead once no table names it any more, and stays so: its extents were all replaced or cut off, or the
chain of the metadata left it behind.  Three things stand between its death and its end.

1. *A generation without it.*  Its death is seen before a cut; the generation of that cut, and every later one,
   does not name it.
2. *No kept generation names it.*  One that is older than that may, unless the pack is younger than it.
3. *The retention time*, by the running time of this store, during which a reader elsewhere may finish; and
   then a head that was published after all this, which shows that this mount still is the owner.

Over a restart nothing but time is remembered (`deaths`): the new mount has to publish heads of its own, and asks
again which kept generations may name a pack.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qsfs.remote.deaths import Death
from qsfs.remote.kept import RECENT


@dataclass(frozen=True, slots=True)
class DeadPack:
    """A dead pack: its number and id, `data` or metadata, and the bytes that its shards take on backends."""

    number: int
    pack_id: bytes
    data: bool
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class KeptFacts:
    """What a kept generation may name: data packs numbered up to `last_pack`, the metadata packs `listed`.

    Both are None while its head could not be read: it may name anything.
    """

    generation: int
    last_pack: int | None = None
    listed: frozenset[bytes] | None = None

    def may_name(self, dead: DeadPack) -> bool:
        """Whether the generation may need this pack, which was alive when it was cut if it existed."""
        if dead.data:
            return self.last_pack is None or dead.number <= self.last_pack
        return self.listed is None or dead.pack_id in self.listed


@dataclass(frozen=True, slots=True)
class CutView:
    """What was known when a cut began: packs that had died by then, and those whose time was over."""

    died: tuple[int, ...]
    ripe: tuple[int, ...]


class Graveyard:
    """The dead packs of one mount, by number, from death to deletion.  Times in seconds of running time.

    `news` are the numbers of packs of which more is known than before, or which are gone: for who records that.
    """

    def __init__(self, retention_seconds: float) -> None:
        self.deleted_packs = 0
        self.deleted_bytes = 0
        self._retention = retention_seconds
        self.news: set[int] = set()
        self._fresh: dict[int, DeadPack] = {}
        self._waiting: dict[int, tuple[DeadPack, int]] = {}
        self._free: dict[int, tuple[DeadPack, int, float]] = {}
        self._order: list[tuple[float, int]] = []
        self._ripe: dict[int, None] = {}
        self._permitted: dict[int, DeadPack] = {}
        self._since: dict[int, float] = {}
        self._heads_needed = 0

    def died(self, dead: DeadPack) -> None:
        """Takes a pack in; one that is here already begins anew."""
        self.forget(dead.number)
        self._fresh[dead.number] = dead

    def remember(self, dead: DeadPack, death: Death) -> None:
        """Takes a pack in of which an earlier mount has recorded its death: its time goes on.

        It waits, as every pack, until a head of this mount is published and no kept generation may name it.
        """
        self.forget(dead.number)
        self.news.discard(dead.number)
        self._waiting[dead.number] = (dead, death.without)
        if dead.data:
            self._heads_needed = RECENT
        if death.since is not None:
            self._since[dead.number] = death.since

    def forget(self, number: int) -> None:
        """Lets go of a pack that is not dead after all, or that is gone."""
        for packs in (self._fresh, self._waiting, self._free, self._permitted, self._ripe, self._since):
            packs.pop(number, None)
        self.news.add(number)

    def death(self, number: int) -> Death | None:
        """What is to be remembered of a pack: of one that is waiting, or that no kept generation may name."""
        if number in self._free:
            dead, without, since = self._free[number]
            return Death(dead.pack_id, without, since)
        if number in self._waiting:
            dead, without = self._waiting[number]
            return Death(dead.pack_id, without, self._since.get(number))
        return None

    def before_cut(self, now: float) -> CutView:
        """What the cut that begins now will show as dead, and what the head that follows may release."""
        self._ripen(now)
        return CutView(tuple(self._fresh), tuple(self._ripe))

    def _ripen(self, now: float) -> None:
        while self._order and now - self._order[0][0] >= self._retention:
            since, number = heapq.heappop(self._order)
            if number in self._free and self._free[number][2] == since:
                self._ripe[number] = None

    def waits_for_a_head(self, now: float) -> bool:
        """Whether heads alone would bring any data pack further: one is fresh, or its time is over, or the last two
        kept generations may name it.  Metadata packs do not count: each head leaves some behind.
        """
        self._ripen(now)
        ripe = (self._free[number][0] for number in self._ripe)
        return any(dead.data for dead in (*self._fresh.values(), *ripe)) or bool(self._waiting and self._heads_needed)

    def published(self, view: CutView, generation: int) -> None:
        """A head of `generation` was published, whose cut began at `view`."""
        self._heads_needed = max(0, self._heads_needed - 1)
        for number in view.died:
            dead = self._fresh.pop(number, None)
            if dead is not None:
                self._waiting[number] = (dead, generation)
                self.news.add(number)
                if dead.data:
                    self._heads_needed = RECENT
        for number in view.ripe:
            self._ripe.pop(number, None)
            free = self._free.pop(number, None)
            if free is not None:
                self._permitted[number] = free[0]

    @property
    def counts_time(self) -> bool:
        """Whether the retention time of any pack has begun and is not over."""
        return bool(self._free)

    @property
    def waiting(self) -> list[int]:
        """The packs that a kept generation may still name."""
        return list(self._waiting)

    def without_of(self, number: int) -> int | None:
        """The first generation that is known not to name a waiting pack."""
        entry = self._waiting.get(number)
        return None if entry is None else entry[1]

    def release(self, numbers: Iterable[int], kept: Sequence[KeptFacts], now: float) -> None:
        """Starts the retention time of those waiting packs that no kept generation may name.

        One that an earlier mount has started goes on.
        """
        for number in numbers:
            entry = self._waiting.get(number)
            if entry is None:
                continue
            dead, without = entry
            if not any(facts.generation < without and facts.may_name(dead) for facts in kept):
                del self._waiting[number]
                since = min(now, self._since.pop(number, now))
                self._free[number] = (dead, without, since)
                heapq.heappush(self._order, (since, number))
                self.news.add(number)

    def permitted(self, most: int) -> list[DeadPack]:
        """Up to `most` packs that may be deleted now."""
        return [dead for _, dead in zip(range(most), self._permitted.values(), strict=False)]

    def gone(self, dead: DeadPack) -> None:
        """Takes note that a pack was deleted everywhere."""
        self.forget(dead.number)
        self.deleted_packs += 1
        self.deleted_bytes += dead.stored_bytes

    def report(self, now: float) -> dict[str, float | int | None]:
        """How many dead packs there are, their bytes on backends, and what they wait for."""
        groups: tuple[list[DeadPack], ...] = (
            list(self._fresh.values()),
            [dead for dead, _ in self._waiting.values()],
            [dead for dead, _, _ in self._free.values()],
            list(self._permitted.values()),
        )
        oldest = min((since for _, _, since in self._free.values()), default=None)
        return {
            "packs": sum(map(len, groups)),
            "bytes": sum(dead.stored_bytes for group in groups for dead in group),
            "until_next_generation": len(groups[0]),
            "maybe_in_kept_generations": len(groups[1]),
            "in_retention": len(groups[2]),
            "being_deleted": len(groups[3]),
            "next_retention_end_seconds": (
                None if oldest is None else max(0.0, oldest + self._retention - now)
            ),
            "deleted_packs": self.deleted_packs,
            "deleted_bytes": self.deleted_bytes,
        }
