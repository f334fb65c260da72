"""Becoming the one mount that may publish heads.

Read a quorum; choose an epoch above all seen; write the owner record and read, on a quorum; publish
the newest head found as our own first head.  Only then is the mount the owner: until the first
head is published, a paused older owner's head could still become the newest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import trio

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.errors import Fenced, NotFound, QuorumUnavailable
from qsfs.format.erasure import CodeParams
from qsfs.format.head import Fleet, Head, HeadRef, Owner, OwnerRecord, seal_owner_record
from qsfs.format.units import ID_SIZE
from qsfs.remote.base import LocalHead
from qsfs.remote.control import Reading, Records
from qsfs.remote.fencing import fenced, unclear
from qsfs.remote.kept import kept_of_first
from qsfs.remote.members import Members
from qsfs.remote.newest import Descent, Judgement, Line, dead_heads, judge, largest_owner, uncounted
from qsfs.remote.publish import NotYet, Publisher, StoreBeforeSend
from qsfs.remote.quorum import FleetQuorum, describe_shortage, fleet_quorums, reached
from qsfs.remote.quorum_write import QuorumWrite
from qsfs.remote.reasons import summary
from qsfs.remote.survey import Survey, Timing, fetch_head, survey

Accept = Callable[[Head, Judgement], None]
"""Raises (`StaleCache`, `SplitHeads`) unless the newest head found is one that this mount may go on from."""

_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Ownership:
    """What a mount that owns has: its publisher, the head that it found, and its own first head."""

    publisher: Publisher
    found: Head
    found_ref: HeadRef
    first: Head
    first_ref: HeadRef

    @property
    def owner(self) -> Owner:
        """The owner that this mount is."""
        return self.publisher.owner


class OwnUnfinished(QuorumUnavailable):
    """The first head was sent, and too few backends count so far.

    `again`, given seconds, goes on with the same owner and head: to begin anew would leave another head
    that may be found, each time.
    """

    def __init__(self, message: str, again: Callable[[float], Awaitable[Ownership]]) -> None:
        super().__init__(message)
        self.again = again


def choose_owner(highest: Owner | None, clock: Clock) -> Owner:
    """An owner above all seen, with a mount id that nobody else has: each mount owns anew."""
    return Owner(1 if highest is None else highest.epoch + 1, clock.random_bytes(ID_SIZE))


def first_head(found: Head, ref: HeadRef, owner: Owner) -> Head:
    """The newest head found, as the first of `owner`: the same image and generation number."""
    return replace(found, owner=owner, predecessor=ref, kept=kept_of_first(found, ref))


async def own(
    members: Members,
    *,
    records: Records,
    code: CodeParams,
    clock: Clock,
    nursery: trio.Nursery,
    host: str,
    accept: Accept,
    store_before_send: StoreBeforeSend,
    fleets: tuple[Fleet, ...] = (),
    restored: LocalHead | None = None,
    rejected: frozenset[HeadRef] = frozenset(),
    timing: Timing | None = None,
    deadline_seconds: float = 60.0,
    on_fenced: Callable[[Fenced], None] = lambda _: None,
) -> Ownership:
    """Makes this mount the owner, or raises and leaves it not being one.

    `accept` is asked before anything is written, and again about what was found once the owner record
    was; `fleets` are those of the local base, by which is counted until a head is found.  `restored` is the
    head that a restore has read here: it is found too, whoever has it answers now or not, unless the backends
    show one that it does not descend from.  The heads `rejected`, which a person chose against, count as not
    there.  `host` is shown to others.  `nursery` is where late backends, and
    later heads, go on.

    Raises `QuorumUnavailable` (too few backends answered before the deadline: nobody is worse off, try
    again, by its own `again` if it is `OwnUnfinished`), `NotFound` (a quorum answered and none has a head),
    `Fenced` (another mount, or a copy of this one, is taking over at this moment) and what `accept` and
    `store_before_send` raise.  Where another mount has only announced itself, it is given a moment to
    publish, and then outbid.
    """
    attempt = _Attempt(
        members,
        records,
        code,
        clock,
        nursery,
        host,
        accept,
        restored,
        rejected,
        timing or Timing(),
        trio.current_time() + deadline_seconds,
    )
    for left in reversed(range(_ROUNDS)):
        found = await attempt.read(fleets)
        owner = choose_owner(largest_owner(found.readings), clock)
        try:
            announced = await attempt.announce(owner, found)
        except _LargerRecord:
            if not left:
                raise
            # It may be left from an attempt that died, also of this machine.  If its mount lives it
            # publishes meanwhile, and `accept` judges its head.
            await trio.sleep(attempt.timing.grace + attempt.timing.pause(1, clock))
            continue
        if announced.head.fleets == found.head.fleets:
            break
        # The fleet changed meanwhile: what was announced to the old one counts for nothing.
        fleets = announced.head.fleets
    else:
        raise QuorumUnavailable("the fleet changed again and again while this mount tried to own; try again")
    publisher = Publisher(
        owner,
        announced.ref,
        members=members,
        records=records,
        code=code,
        clock=clock,
        nursery=nursery,
        store_before_send=store_before_send,
        timing=attempt.timing,
        on_fenced=on_fenced,
    )
    seconds = max(0.0, attempt.deadline - trio.current_time())
    return await _publish_first(publisher, announced, seconds)


async def _publish_first(publisher: Publisher, found: _Newest, seconds: float) -> Ownership:
    first = first_head(found.head, found.ref, publisher.owner)
    result = await publisher.publish(first, deadline_seconds=seconds)
    if isinstance(result, NotYet):
        raise OwnUnfinished(
            f"this mount's first head was sent, but: {summary(result.reasons)}",
            lambda more: _publish_first(publisher, found, more),
        )
    return Ownership(publisher, found.head, found.ref, first, result.ref)


class _LargerRecord(Fenced):
    """Another mount has announced itself above us, and has not published yet."""


@dataclass(frozen=True, slots=True)
class _Newest:
    head: Head
    ref: HeadRef
    readings: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class _Attempt:
    members: Members
    records: Records
    code: CodeParams
    clock: Clock
    nursery: trio.Nursery
    host: str
    accept: Accept
    restored: LocalHead | None
    rejected: frozenset[HeadRef]
    timing: Timing
    deadline: float

    async def read(self, fleets: tuple[Fleet, ...]) -> _Newest:
        """Reads a quorum of the fleets that the newest head names, and asks `accept` about that head."""
        read = await survey(
            self.members,
            self.records,
            self.clock,
            self.timing,
            deadline=self.deadline,
            enough=lambda so_far: self._enough(self._living(so_far), fleets),
        )
        living = self._living(read)
        readings, newest = tuple(living.readings.values()), living.newest
        quorums = self._quorums(newest, fleets)
        reasons = {reading.number: uncounted(reading, newest) for reading in readings}
        counted = {number for number, reason in reasons.items() if reason is None}
        enough = reached(quorums, counted)
        if read.newest is None and (enough or (not quorums and len(counted) == len(self.members) > 0)):
            raise NotFound(
                f"no head of file system {self.records.fsid.hex()} on the backends that answered: there is "
                "nothing to own; check the addresses, and that the key is the right one"
            )
        # Below a quorum the newest head found may be an old one: nothing is concluded from it.
        if newest is None or not enough:
            none = "no head was found" if read.newest is None else "only heads were found that were chosen against"
            why = [describe_shortage(quorums, counted) or none, living.reasons()]
            why.append(summary(reason for reason in reasons.values() if reason is not None))
            raise QuorumUnavailable(f"cannot own now: {'; '.join(filter(None, why))}")
        return await self._judged(readings)

    async def announce(self, owner: Owner, found: _Newest) -> _Newest:
        """Writes the owner record to a quorum, reading after it; the newest head found, accepted again."""
        record = OwnerRecord(self.records.fsid, owner, self.clock.time_ns(), self.host)
        key, value = seal_owner_record(record, self.records.keys, self.clock)
        write = QuorumWrite(
            self.members,
            fleet_quorums(found.head.fleets, self.code),
            key,
            value,
            records=self.records,
            judge=lambda reading: self._allows(reading, owner),
            timing=self.timing,
            clock=self.clock,
        )
        failpoints.hit("own.announce")
        write.start(self.nursery)
        try:
            done = await write.settle(self.deadline)
        except BaseException:
            write.stop()
            raise
        if not done:
            write.stop()
            raise QuorumUnavailable(f"cannot own now: {summary(write.reasons())}")
        failpoints.hit("own.announced")
        later = write.survey.readings.values()
        return await self._judged((*found.readings, *(reading.without(self.rejected) for reading in later)))

    async def _judged(self, readings: tuple[Reading, ...]) -> _Newest:
        dead = dead_heads(readings, self.records.facts)
        ref = self._or_restored(max(ref for reading in readings for ref in reading.heads - dead))
        head = await fetch_head(self.members, readings, ref, self.records, self.timing)
        self.members.adopt(head.fleets)
        quorums = fleet_quorums(head.fleets, self.code)
        self.accept(head, judge(readings, ref, quorums, self.records.facts, self.records.host(ref.owner)))
        return _Newest(head, ref, readings)

    def _living(self, read: Survey) -> Survey:
        return read.without(self.rejected, self.records.facts)

    def _or_restored(self, ref: HeadRef) -> HeadRef:
        """The restored head in the place of one that it descends from.

        It may have been sent and never published: then perhaps one backend has it, and may be slow now.
        """
        restored = self.restored
        if restored is None:
            return ref
        self.records.learn(restored.sealed, restored.head)
        descent = Line(restored.sealed.ref, self.records.facts).descends_from(ref)
        return restored.sealed.ref if restored.sealed.ref > ref and descent is Descent.YES else ref

    def _allows(self, reading: Reading, owner: Owner) -> str | None:
        error = fenced(reading, owner=owner, written=(), published=None, records=self.records)
        if error is not None:
            if all(ref.owner < owner for ref in reading.heads):
                raise _LargerRecord(str(error))
            raise error
        return unclear(reading, owner=owner, written=(), published=None)

    def _quorums(self, newest: HeadRef | None, fleets: tuple[Fleet, ...]) -> tuple[FleetQuorum, ...]:
        held = None if newest is None else self.records.held(newest)
        return fleet_quorums(fleets if held is None else held.fleets, self.code)

    def _enough(self, read: Survey, fleets: tuple[Fleet, ...]) -> bool:
        newest = read.newest
        counted = {r.number for r in read.readings.values() if uncounted(r, newest) is None}
        return reached(self._quorums(newest, fleets), counted)
