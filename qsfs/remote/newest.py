"""Which head is the newest among what was read, and how sure that is: pure logic.

The newest head is the largest (owner, generation) that authenticates.  Two heads of its owner of
which neither descends from the other were sent by two copies of one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from qsfs.errors import SplitHeads
from qsfs.format.head import HeadRef, Owner
from qsfs.remote.control import HeadFacts, Reading
from qsfs.remote.quorum import FleetQuorum, withstands

Facts = Callable[[HeadRef], HeadFacts | None]
"""What is known of a head, or None if it has not been read."""


class Descent(Enum):
    """Whether a head descends from an older one."""

    YES = "yes"
    NO = "no"
    UNDECIDED = "undecided"


def newest_head(readings: Iterable[Reading]) -> HeadRef | None:
    """The newest head in any of the readings; None if none was found."""
    return max((ref for reading in readings for ref in reading.heads), default=None)


def largest_owner(readings: Iterable[Reading]) -> Owner | None:
    """The largest owner that any reading proves, by its record or by a head."""
    found = [owner for reading in readings for owner in reading.owners]
    found += [ref.owner for reading in readings for ref in reading.heads]
    return max(found, default=None)


def uncounted(reading: Reading, newest: HeadRef | None) -> str | None:
    """Why a reading does not count towards a quorum: it may hide something above `newest`.  None if it "
    "counts."""
    for claim, reason in reading.unproven:
        if isinstance(claim, HeadRef) and (newest is None or _position(claim) >= _position(newest)):
            return reason
    return None


class Line:
    """The heads that `young` descends from, as far as they can be followed.

    A head names its predecessor and the kept generations, and descends from all of them.
    """

    def __init__(self, young: HeadRef, facts: Facts) -> None:
        self._ancestors = _ancestors(young, facts)
        self._positions = {_position(ref) for ref in self._ancestors}
        self._lowest = _follow(young, facts)

    def descends_from(self, old: HeadRef) -> Descent:
        """Whether it descends from `old`, an older or equally old head of the same owner.

        NO needs proof: another head in the place of `old`, or a line of predecessors that passes it.
        What lies between may be lost or collected: then it is UNDECIDED.
        """
        if old in self._ancestors:
            return Descent.YES
        # A generation's number is never used twice by one owner.
        if _position(old) in self._positions or self._lowest is None or self._lowest <= _position(old):
            return Descent.NO
        return Descent.UNDECIDED


@dataclass(frozen=True, slots=True)
class Judgement:
    """The newest head among what was read, and how far that can be trusted.

    `withstands`: how many of the backends that count may be lost, stale or lying without hiding a
    newer published head; below 0 one may exist already.  `others`: the other heads of its owner;
    `splits`: those that the newest does not descend from, or cannot be shown to although they may
    have been published; `undecided`: those where that cannot be told and does not matter.
    `uncounted`: why backends that answered do not count, by number.
    """

    newest: HeadRef
    withstands: int
    counted: frozenset[int]
    others: frozenset[HeadRef]
    splits: tuple[HeadRef, ...]
    undecided: tuple[HeadRef, ...]
    uncounted: dict[int, str]

    def require_one_line(self) -> None:
        """`SplitHeads`, listing the heads, if two copies of one machine have sent heads."""
        if self.splits:
            heads = ", ".join(describe_head(ref) for ref in (self.newest, *self.splits))
            raise SplitHeads(
                f"heads of one mount that do not descend from each other: {heads}; two copies of one "
                "machine ran. "
                "Stop both, decide which generation is right, and name it to the restore or takeover"
            )


def judge(
    readings: Collection[Reading], newest: HeadRef, quorums: Collection[FleetQuorum], facts: Facts
) -> Judgement:
    """Judges what was read; `quorums` are those of the fleets that the newest head names."""
    reasons = {reading.number: uncounted(reading, newest) for reading in readings}
    counted = frozenset(number for number, reason in reasons.items() if reason is None)
    others = frozenset(
        ref for reading in readings for ref in reading.heads if ref.owner == newest.owner and ref != newest
    )
    line = Line(newest, facts)
    last = _last_published(newest, facts)
    splits: list[HeadRef] = []
    undecided: list[HeadRef] = []
    for ref in sorted(others):
        answer = line.descends_from(ref)
        # Of two lines only one gets a head published.  What is older than a head that this line has
        # published was therefore not published by another one; what is newer may have been.
        if answer is Descent.NO or (answer is Descent.UNDECIDED and ref.generation > last):
            splits.append(ref)
        elif answer is Descent.UNDECIDED:
            undecided.append(ref)
    return Judgement(
        newest=newest,
        withstands=withstands(quorums, counted),
        counted=counted,
        others=others,
        splits=tuple(splits),
        undecided=tuple(undecided),
        uncounted={number: reason for number, reason in reasons.items() if reason is not None},
    )


def describe_head(ref: HeadRef) -> str:
    """A head for people: "generation 12 of epoch 3 (digest 0a1b2c3d)"."""
    return f"generation {ref.generation} of epoch {ref.owner.epoch} (digest {ref.digest.hex()[:8]})"


def _position(ref: HeadRef) -> tuple[Owner, int]:
    return ref.owner, ref.generation


def _last_published(newest: HeadRef, facts: Facts) -> int:
    """The generation of the last head that this owner knew to be published when it sent `newest`."""
    known = facts(newest)
    kept = () if known is None else known.kept
    return max((ref.generation for ref in kept if ref.owner == newest.owner), default=-1)


def _follow(young: HeadRef, facts: Facts) -> tuple[Owner, int] | None:
    """The place of the last head that predecessors lead to without a gap; None where the line began."""
    step = young
    while (known := facts(step)) is not None:
        if known.predecessor is None:
            return None
        if _position(known.predecessor) >= _position(step):
            break
        step = known.predecessor
    return _position(step)


def _ancestors(young: HeadRef, facts: Facts) -> set[HeadRef]:
    found: set[HeadRef] = set()
    pending = [young]
    while pending:
        known = facts(pending.pop())
        if known is None:
            continue
        named = set(known.kept) if known.predecessor is None else {*known.kept, known.predecessor}
        # Only earlier heads: a forged or foreign loop must not hold us.
        fresh = {ref for ref in named if ref not in found and _position(ref) < _position(known.ref)}
        found |= fresh
        pending += fresh
    return found
