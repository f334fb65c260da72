"""What the loss of backends would take: from where the packs' shards are recorded to lie.

Pure and in bounded memory: packs are added one by one, and for each loss that is asked about only counts and the worst
packs are kept.  A shard whose backend is not in the fleet counts as not stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsfs.errors import ConfigError
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import FleetEntry

WORST = 5
"""Packs that are named for each loss."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Backends, by their numbers, that are imagined to be gone together."""

    name: str
    numbers: frozenset[int]


@dataclass(slots=True)
class Outcome:
    """What a loss would take.  `spare` is how many more shards the worst pack could lose; below 0 it is lost."""

    loss: Loss
    spare: int | None = None
    lost_full: int = 0
    lost_written: int = 0
    lost_bytes: int = 0
    worst: list[tuple[int, bytes, bool]] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        """Whether every pack can still be read."""
        return not self.lost_full and not self.lost_written

    def add(self, spare: int, pack_id: bytes, full: bool, size: int) -> None:
        """Counts a pack that is left with `spare` shards above k."""
        if self.spare is None or spare < self.spare:
            self.spare = spare
        if spare < 0:
            self.lost_full += full
            self.lost_written += not full
            self.lost_bytes += size
        if len(self.worst) < WORST or spare < self.worst[-1][0]:
            self.worst.append((spare, pack_id, full))
            self.worst.sort(key=lambda pack: pack[0])
            del self.worst[WORST:]


class LossTable:
    """Takes packs, and tells for each of `losses`, and for any so many backends, nodes and groups, what they take."""

    def __init__(self, entries: Sequence[FleetEntry], code: CodeParams, losses: Iterable[Loss]) -> None:
        self.full = self.written = self.bytes = self.outside = 0
        self.backends = len(entries)
        self.nodes, self.groups = len(domains(entries, "node")), len(domains(entries, "group"))
        self._code = code
        self._bits = {entry.number: 1 << index for index, entry in enumerate(entries)}
        self.outcomes = [Outcome(loss) for loss in losses]
        self._masks = [self._mask(outcome.loss.numbers) for outcome in self.outcomes]
        self._kinds = {
            kind: [self._mask(numbers) for numbers in domains(entries, kind).values()] for kind in ("node", "group")
        }
        self._survives: dict[str, int] = {}
        self._survives_full: dict[str, int] = {}

    def add(self, pack_id: bytes, size: int, placement: Sequence[int]) -> None:
        """Adds a pack of `size` bytes whose shards lie as `placement` says (-1: not stored)."""
        held: list[int] = []
        mask = 0
        for number in placement:
            bit = self._bits.get(number)
            if bit is None:
                self.outside += number >= 0
                continue
            held.append(bit)
            mask |= bit
        full = -1 not in placement
        self.full += full
        self.written += not full
        self.bytes += size
        spare = len(held) - self._code.k
        # Where a backend holds two shards its bit counts twice.
        doubled = [bit for bit, count in Counter(held).items() for _ in range(count - 1)] if (
            len(held) != mask.bit_count()
        ) else []  # fmt: skip

        def within(of: int) -> int:
            count = (mask & of).bit_count()
            return count + sum(1 for bit in doubled if bit & of) if doubled else count

        for outcome, of in zip(self.outcomes, self._masks, strict=True):
            outcome.add(spare - within(of), pack_id, full, size)
        self._note("backend", spare if not doubled else survives(Counter(held).values(), spare), full)
        for kind, masks in self._kinds.items():
            self._note(kind, survives(map(within, masks), spare), full)

    def any_may_be_lost(self, kind: str, *, full_only: bool = False) -> int | None:
        """How many backends, nodes or groups, whichever, every pack survives the loss of; below 0: some are lost now.

        None where there are no packs.
        """
        return (self._survives_full if full_only else self._survives).get(kind)

    def _note(self, kind: str, count: int, full: bool) -> None:
        for found in (self._survives, self._survives_full) if full else (self._survives,):
            found[kind] = min(count, found.get(kind, count))

    def _mask(self, numbers: Iterable[int]) -> int:
        return sum(self._bits.get(number, 0) for number in set(numbers))

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            "packs": {"full": self.full, "written": self.written, "bytes": self.bytes},
            "shards_outside_the_fleet": self.outside,
            "any_may_be_lost": {kind: self.any_may_be_lost(kind) for kind in ("backend", "node", "group")},
            "any_may_be_lost_of_full": {
                kind: self.any_may_be_lost(kind, full_only=True) for kind in ("backend", "node", "group")
            },
            "losses": [self._outcome(outcome) for outcome in self.outcomes],
        }

    def _outcome(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "what": outcome.loss.name,
            "backends": sorted(outcome.loss.numbers),
            "survived": outcome.survived,
            "spare": outcome.spare,
            "lost": {"full": outcome.lost_full, "written": outcome.lost_written, "bytes": outcome.lost_bytes},
            "worst": [
                {"pack": pack_id.hex(), "shards": spare + self._code.k, "class": "full" if full else "written"}
                for spare, pack_id, full in outcome.worst
            ],
        }


def survives(counts: Iterable[int], spare: int) -> int:
    """How many places, whichever, a pack survives the loss of, given how many shards each has; -1: not even none."""
    if spare < 0:
        return -1
    places = survived = 0
    for count in sorted(counts, reverse=True):
        places += count
        if places > spare:
            break
        survived += 1
    return survived


def domains(entries: Iterable[FleetEntry], kind: str) -> dict[str, list[int]]:
    """The numbers of the backends by "group" or "node"; one without a name is one of its own."""
    found: dict[str, list[int]] = {}
    for entry in entries:
        name = getattr(entry, kind)
        found.setdefault(f"{kind}:{name}" if name else f"backend {entry.number}", []).append(entry.number)
    return found


def single_losses(entries: Sequence[FleetEntry]) -> list[Loss]:
    """The loss of each named group, of each named node, and of each backend."""
    losses = [
        Loss(name, frozenset(numbers))
        for kind in ("group", "node")
        for name, numbers in sorted(domains(entries, kind).items())
        if name.startswith(f"{kind}:")
    ]
    return losses + [Loss(backend_name(entry), frozenset((entry.number,))) for entry in entries]


def loss_of(entries: Sequence[FleetEntry], words: Sequence[str]) -> Loss:
    """The loss of all that `words` name together: a backend (its number, address or name), group:NAME, node:NAME.

    `ConfigError` for a word that names nothing.
    """
    numbers: set[int] = set()
    for word in words:
        kind, colon, name = word.partition(":")
        if colon and kind in ("group", "node"):
            found = {entry.number for entry in entries if getattr(entry, kind) == name and name}
            known = sorted({getattr(entry, kind) for entry in entries if getattr(entry, kind)})
        else:
            found = {
                entry.number
                for entry in entries
                if word in (str(entry.number), entry.address, f"{entry.address}/{entry.namespace}")
            }
            known = [backend_name(entry) for entry in entries]
        if not found:
            raise ConfigError(f"--lose {word}: the fleet has no such {kind if colon else 'backend'}; it has: "
                              f"{', '.join(known) or 'none with a name'}")  # fmt: skip
        numbers |= found
    return Loss(" + ".join(words), frozenset(numbers))


def backend_name(entry: FleetEntry) -> str:
    """The backend for people: its number and name."""
    return f"{entry.number} {entry.address}/{entry.namespace}"
