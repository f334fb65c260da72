"""Dead packs, and when each may be deleted: what is known, without I/O.

A pack is dead once no table names it any more, and stays so: its extents were all replaced or cut off, or the
chain of the metadata left it behind.  Three things stand between its death and its end.

1. *A generation without it.*  Its death is seen before a cut; the generation of that cut, and every later one,
   does not name it.
2. *No kept generation names it.*  One that is older than that may, unless the pack is younger than it.
3. *The retention time*, by the running clock of this mount, during which a reader elsewhere may finish; and
   then a head that was published after all this, which shows that this mount still is the owner.

Nothing of it is remembered over a restart: a mount that begins anew counts the retention time anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
    """The dead packs of one mount, by number, from death to deletion.  Times in seconds of running time."""

    def __init__(self, retention_seconds: float) -> None:
        self.deleted_packs = 0
        self.deleted_bytes = 0
        self._retention = retention_seconds
        self._fresh: dict[int, DeadPack] = {}
        self._waiting: dict[int, tuple[DeadPack, int]] = {}
        self._free: dict[int, tuple[DeadPack, float]] = {}
        self._permitted: dict[int, DeadPack] = {}

    def died(self, dead: DeadPack) -> None:
        """Takes a pack in; one that is here already begins anew."""
        self.forget(dead.number)
        self._fresh[dead.number] = dead

    def forget(self, number: int) -> None:
        """Lets go of a pack that is not dead after all, or that is gone."""
        for packs in (self._fresh, self._waiting, self._free, self._permitted):
            packs.pop(number, None)

    def before_cut(self, now: float) -> CutView:
        """What the cut that begins now will show as dead, and what the head that follows may release."""
        ripe = []
        for number, (_, since) in self._free.items():
            if now - since < self._retention:
                break
            ripe.append(number)
        return CutView(tuple(self._fresh), tuple(ripe))

    def published(self, view: CutView, generation: int) -> None:
        """A head of `generation` was published, whose cut began at `view`."""
        for number in view.died:
            dead = self._fresh.pop(number, None)
            if dead is not None:
                self._waiting[number] = (dead, generation)
        for number in view.ripe:
            free = self._free.pop(number, None)
            if free is not None:
                self._permitted[number] = free[0]

    @property
    def waiting(self) -> list[int]:
        """The packs that a kept generation may still name."""
        return list(self._waiting)

    def without_of(self, number: int) -> int | None:
        """The first generation that is known not to name a waiting pack."""
        entry = self._waiting.get(number)
        return None if entry is None else entry[1]

    def release(self, numbers: Iterable[int], kept: Sequence[KeptFacts], now: float) -> None:
        """Starts the retention time of those waiting packs that no kept generation may name."""
        for number in numbers:
            entry = self._waiting.get(number)
            if entry is None:
                continue
            dead, without = entry
            if not any(facts.generation < without and facts.may_name(dead) for facts in kept):
                del self._waiting[number]
                self._free[number] = (dead, now)

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
            [dead for dead, _ in self._free.values()],
            list(self._permitted.values()),
        )
        oldest = next(iter(self._free.values()), None)
        return {
            "packs": sum(map(len, groups)),
            "bytes": sum(dead.stored_bytes for group in groups for dead in group),
            "until_next_generation": len(groups[0]),
            "maybe_in_kept_generations": len(groups[1]),
            "in_retention": len(groups[2]),
            "being_deleted": len(groups[3]),
            "next_retention_end_seconds": (
                None if oldest is None else max(0.0, oldest[1] + self._retention - now)
            ),
            "deleted_packs": self.deleted_packs,
            "deleted_bytes": self.deleted_bytes,
        }
