"""Which packs are worth rewriting: what is known of them, without I/O.

*Thin packs.*  Less than a share of what a pack takes still lives.  More becomes free than is uploaded anew, so
that costs at most as much as what made them thin, and nothing else bounds it.

*Small packs.*  Each cut leaves what it had.  Full of life they cost little space, and each costs every backend a
record, its keys in memory, and looks.  They are merged once they are old, oldest first, from an allowance: with what
was rewritten of thin packs it is at most `_ALLOWED` times what applications changed.

Packs wait for each other until they fill a good part of a new one together, thin ones not for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qsfs.format.extent import PackKind
from qsfs.store.schema import PackRow, PackState

SETTLED_SECONDS = 600.0
"""Age from which on a thin pack is rewritten: a younger one that shrinks is likely to die by itself."""
SMALL_SECONDS = 3600.0
"""Age from which on a small pack is merged with others."""
PATIENCE_SECONDS = 3600.0
"""How long a thin pack waits for others."""
AGAIN_SECONDS = 3600.0
"""When a pack is tried again that could not be rewritten."""
_LOOKED_AT = 256
_MOST_SMALL = 100_000
_SMALL = 8
"""A pack is small if it is less than a full one divided by this, in plain bytes too: by those packs are closed."""
_ALLOWED = 1.1
_SAVED_PACKS = 16
"""Packs' worth of allowance that is saved up at most: what a long load leaves does not pay for years of merging."""


@dataclass(slots=True)
class _Thin:
    """A thin pack: when it was first seen, when to look next, stored bytes for each plain byte that lives."""

    since: float
    later: float
    density: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A pack to rewrite.  `small`: for its size, whatever lives in it."""

    number: int
    row: PackRow
    small: bool


class Candidates:
    """The packs of one mount that may be worth rewriting.  Times are those of the running clock.

    `row` gives the row of a pack as of now, `pack_bytes` is what a full one takes, `share` the part of a pack's size
    below which it is thin, at most a half.
    """

    def __init__(self, row: Callable[[int], PackRow | None], *, pack_bytes: int, share: float) -> None:
        self._row = row
        self._pack_bytes = pack_bytes
        self._share = share
        self._thin: dict[int, _Thin] = {}
        self._small: dict[int, None] = {}
        self._small_later = 0.0
        self._allowance = 0.0
        self._recorded = 0

    @property
    def thin(self) -> int:
        """How many packs are known of which little lives."""
        return len(self._thin)

    @property
    def small(self) -> int:
        """How many small packs are known."""
        return len(self._small)

    def thinned(self, packs: Mapping[int, float], now: float) -> None:
        """Takes in packs of which little lives, with the stored bytes for each plain one, as far as known."""
        for number, density in packs.items():
            self._thin.setdefault(number, _Thin(now, 0.0, min(1.0, density)))

    def grew(self, packs: Iterable[int]) -> None:
        """Takes in small packs, oldest first; no more than are remembered, the next mount finds them."""
        for number in packs:
            if len(self._small) < _MOST_SMALL:
                self._small[number] = None

    def recorded(self, total: int) -> None:
        """Takes note of how many bytes of pages were recorded in packs since the mount began."""
        self._earn(_ALLOWED * (total - self._recorded))
        self._recorded = total

    def marked(self, size: int) -> None:
        """Takes note of bytes of pages that are uploaded anew: they will be recorded, and earn nothing by that."""
        self._earn(-(1 + _ALLOWED) * size)

    def _earn(self, size: float) -> None:
        most = _SAVED_PACKS * self._pack_bytes
        self._allowance = max(-most, min(most, self._allowance + size))

    def density(self, number: int, stored_per_byte: float) -> None:
        """Takes note of what a pack's own index says."""
        known = self._thin.get(number)
        if known is not None:
            known.density = min(1.0, stored_per_byte)

    def share_of(self, row: PackRow, density: float) -> float:
        """The part of a pack's size that lives."""
        return row.live * min(1.0, density) / max(1, row.body_length)

    def is_thin(self, row: PackRow, density: float) -> bool:
        """Whether less of it lives than the share."""
        return self.share_of(row, density) < self._share

    def tried(self, choice: Choice, now: float) -> None:
        """Takes note that a pack was looked into; if it is still there it is looked at again, not soon."""
        if choice.small:
            self._small_later = now + AGAIN_SECONDS
            self._small[choice.number] = None
            return
        known = self._thin.pop(choice.number, None) or _Thin(now, 0.0, 1.0)
        known.later = now + AGAIN_SECONDS
        self._thin[choice.number] = known

    def gone(self, number: int) -> None:
        """Lets go of a pack in which nothing lives any more."""
        self._thin.pop(number, None)

    def choose(self, most_bytes: int, now: float, wall_ns: int, *, one_at_least: bool = True) -> list[Choice]:
        """What to rewrite together now, thinnest first, of `most_bytes` that live; nothing if too little is.

        `one_at_least`: the first thin one goes whatever it takes.
        """
        found: list[tuple[float, float, Choice]] = []
        for number in [number for number, _ in zip(self._thin, range(_LOOKED_AT), strict=False)]:
            known = self._thin.pop(number)
            row = self._row(number)
            if row is None or not row.live or row.kind != PackKind.DATA:
                continue
            self._thin[number] = known
            settled = wall_ns - row.written_at_ns >= SETTLED_SECONDS * 1e9
            if known.later <= now and settled and self.is_thin(row, known.density):
                found.append((self.share_of(row, known.density), known.since, Choice(number, row, False)))
        found.sort(key=lambda each: each[0])
        chosen: list[Choice] = []
        size, waited = 0, False
        for _, since, choice in found:
            if (chosen or not one_at_least) and size + choice.row.live > most_bytes:
                break
            chosen.append(choice)
            size += choice.row.live
            waited = waited or now - since >= PATIENCE_SECONDS + SETTLED_SECONDS
        if size < self._pack_bytes:
            more = self._choose_small(min(most_bytes, self._pack_bytes) - size, now, wall_ns)
            if waited or 2 * (size + sum(choice.row.live for choice in more)) >= self._pack_bytes:
                self._take_small(more)
                return chosen + more
            return []
        return chosen

    def _choose_small(self, most_bytes: int, now: float, wall_ns: int) -> list[Choice]:
        """The oldest small packs, within the allowance."""
        most = min(float(most_bytes), self._allowance / (1 + _ALLOWED))
        chosen: list[Choice] = []
        if now < self._small_later:
            return chosen
        for number in [number for number, _ in zip(self._small, range(_LOOKED_AT), strict=False)]:
            row = self._row(number)
            if row is None or not self._is_small(row) or number in self._thin:
                del self._small[number]
                continue
            most -= row.live
            if most < 0 or wall_ns - row.written_at_ns < SMALL_SECONDS * 1e9:
                break
            chosen.append(Choice(number, row, True))
        return chosen

    def _is_small(self, row: PackRow) -> bool:
        """Whether a pack takes little and may be merged with others.  Start packs hold what belongs together."""
        small = _SMALL * max(row.live, row.body_length) < self._pack_bytes
        return row.live > 0 and small and not row.state & PackState.START

    def _take_small(self, chosen: list[Choice]) -> None:
        for choice in chosen:
            del self._small[choice.number]
