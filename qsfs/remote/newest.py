"""Which head is the newest among what was read, and how sure that is: pure logic.

The newest head is the largest (owner, generation) that authenticates.  Two heads of its owner of
which neither descends from the other were sent by two copies of one machine.  Of two such lines only
one ever gets a head published: whichever copy counts a quorum second has read the other's head on
some backend of it, and stopped.  So once any head names a published one of its owner, what was sent
on a line without that one is *dead*: it was never published, never will be, and counts as not there.
Where no head tells, either line may have been published: then a person chooses, and what the other
line sent is *rejected* and counts as not there, too.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from qsfs.errors import ConfigError, NotFound, SplitHeads
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


def dead_heads(readings: Iterable[Reading], facts: Facts) -> frozenset[HeadRef]:
    """The heads of the newest owner that another one proves to be of a line on which nothing is published.

    A kept generation of a head's own owner was published by that owner, whichever copy of it kept it.  Where heads
    prove that two lines published, which takes backends that lost what they acknowledged, none is dead: a person
    chooses.
    """
    heads = {ref for reading in readings for ref in reading.heads}
    owner = max((ref.owner for ref in heads), default=None)
    heads = {ref for ref in heads if ref.owner == owner}
    witness = max(heads, key=lambda ref: (_last_published(ref, facts), ref), default=None)
    published = None if witness is None else _published(witness, facts)
    if witness is None or published is None:
        return frozenset()
    line = Line(witness, facts)
    others = (_published(ref, facts) for ref in heads)
    if any(other is not None and line.descends_from(other) is Descent.NO for other in others):
        return frozenset()

    def dead(ref: HeadRef) -> bool:
        if ref in (witness, published):
            return False
        if ref.generation > published.generation:
            return Line(ref, facts).descends_from(published) is Descent.NO
        return line.descends_from(ref) is Descent.NO

    return frozenset(ref for ref in heads if dead(ref))


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
class LineEnd:
    """The last head of one of several lines, and what tells it apart for a person.

    `holders`: how many of the backends that answered list it.  `published`: the generation of the last
    head that its line knew to be published when it was sent; -1 if none.
    """

    ref: HeadRef
    time_ns: int
    holders: int
    published: int

    def __str__(self) -> str:
        cut = datetime.datetime.fromtimestamp(self.time_ns // 1_000_000_000, datetime.UTC)
        known = "nothing" if self.published < 0 else f"generation {self.published}"
        return (
            f"{describe_head(self.ref)}, cut at {cut:%Y-%m-%d %H:%M:%S} UTC, on {self.holders} of the backends that "
            f"answered, with {known} of its owner published before"
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """The newest head among what was read, and how far that can be trusted.

    `withstands`: how many of the backends that count may be lost, stale or lying without hiding a
    newer published head; below 0 one may exist already.  `others`: the other heads of its owner;
    `splits`: those that the newest does not descend from, or cannot be shown to although they may
    have been published; `ends`: the last heads of the lines, if there are several, the newest first.
    `dead`: see `dead_heads`; they are no `others`.  `undecided`: those where it cannot be told whether they
    are an ancestor and does not matter.
    `uncounted`: why backends that answered do not count, by number.  `host`: the newest head's owner ran
    there; "" if that is not known.
    """

    newest: HeadRef
    withstands: int
    counted: frozenset[int]
    others: frozenset[HeadRef]
    splits: tuple[HeadRef, ...]
    ends: tuple[LineEnd, ...]
    dead: tuple[HeadRef, ...]
    undecided: tuple[HeadRef, ...]
    uncounted: dict[int, str]
    host: str = ""

    def require_one_line(self) -> None:
        """`SplitHeads`, listing the heads, if two copies of one machine have sent heads."""
        if self.splits:
            raise SplitHeads(self.describe_split(), [end.ref.digest.hex() for end in self.ends])

    def describe_split(self) -> str:
        """The heads of the lines, how they differ, and the commands that choose one; "" if there is one line."""
        if not self.splits:
            return ""
        where = f" of '{self.host}'" if self.host else ""
        heads = "; ".join(f"({number}) {end}" for number, end in enumerate(self.ends, 1))
        digests = " or ".join(short_digest(end.ref) for end in self.ends)
        return (
            f"two copies of one machine{where} have sent heads that do not descend from each other: {heads}. Stop all "
            "copies for good, and decide which head is right (if there never was a copy, backends have lost heads: the "
            "first). `qsfs mount --read-only --head DIGEST` and `qsfs drill --head DIGEST` look at one. Then `qsfs "
            "takeover --head DIGEST` goes on from it, on the machine that sent it or on one without local state; "
            f"elsewhere `qsfs restore --set-aside --head DIGEST` comes first. DIGEST is {digests}. What only another "
            "one has is then in no generation any more"
        )

    def choose(self, digest: str) -> HeadRef:
        """The head of those listed whose digest begins with `digest`, in hexadecimal.

        Raises `NotFound` if there is none, and `ConfigError` if it is not clear which.
        """
        listed = [end.ref for end in self.ends] or [self.newest]
        found = [ref for ref in listed if ref.digest.hex().startswith(digest.lower())]
        if len(found) == 1:
            return found[0]
        if found or not digest:
            several = ", ".join(ref.digest.hex() for ref in listed)
            raise ConfigError(f'--head "{digest}" may mean several heads; their digests are {several}: give more of it')
        there = ", ".join(describe_head(ref) for ref in listed)
        raise NotFound(
            f'no head whose digest begins with "{digest}" is one to choose from: that is {there}. --head chooses '
            "between the heads of two copies of a machine; --generation names an older generation"
        )


def judge(
    readings: Collection[Reading],
    newest: HeadRef,
    quorums: Collection[FleetQuorum],
    facts: Facts,
    host: str = "",
) -> Judgement:
    """Judges what was read; `quorums` are those of the fleets that the newest head names, `host` is where
    its owner ran."""
    dead = dead_heads(readings, facts)
    readings = [reading.without(dead) for reading in readings]
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
        # What is older than a head that this line has published was not published by another one; what
        # is newer may have been.
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
        ends=tuple(_line_ends(readings, [newest, *reversed(splits)], facts)) if splits else (),
        dead=tuple(sorted(dead)),
        undecided=tuple(undecided),
        uncounted={number: reason for number, reason in reasons.items() if reason is not None},
        host=host,
    )


def short_digest(ref: HeadRef) -> str:
    """As much of a head's digest as messages show, and as a person needs to name it."""
    return ref.digest.hex()[:8]


def describe_head(ref: HeadRef) -> str:
    """A head for people: "generation 12 of epoch 3 (digest 0a1b2c3d)"."""
    return f"generation {ref.generation} of epoch {ref.owner.epoch} (digest {short_digest(ref)})"


def _position(ref: HeadRef) -> tuple[Owner, int]:
    return ref.owner, ref.generation


def _line_ends(readings: Collection[Reading], heads: Collection[HeadRef], facts: Facts) -> Iterator[LineEnd]:
    """Those of `heads`, the newest first, that no other one descends from."""
    passed: set[HeadRef] = set()
    for ref in heads:
        if ref in passed:
            continue
        passed |= _ancestors(ref, facts)
        known = facts(ref)
        holders = sum(ref in reading.heads for reading in readings)
        yield LineEnd(ref, 0 if known is None else known.time_ns, holders, _last_published(ref, facts))


def _last_published(newest: HeadRef, facts: Facts) -> int:
    """The generation of the last head that this owner knew to be published when it sent `newest`; -1 if none."""
    published = _published(newest, facts)
    return -1 if published is None else published.generation


def _published(newest: HeadRef, facts: Facts) -> HeadRef | None:
    """The last head that this owner knew to be published when it sent `newest`."""
    known = facts(newest)
    kept = () if known is None else known.kept
    return max((ref for ref in kept if ref.owner == newest.owner), default=None)


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
