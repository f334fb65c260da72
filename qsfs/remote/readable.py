"""Which generations may be read without owning, and which one is meant: those that the newest head keeps, and itself.

Everything here reads.  Nothing is written to a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from qsfs.clock import Clock
from qsfs.errors import BackendError, Corrupt, NotFound, QsfsError, QuorumUnavailable
from qsfs.format.erasure import CodeParams
from qsfs.format.head import Head, HeadRef, KeptGeneration, SealedHead, head_key, open_head
from qsfs.format.keys import KeyRing
from qsfs.format.owner import Owner, open_owner_record, owner_key
from qsfs.remote.control import Reading, Records
from qsfs.remote.members import Members
from qsfs.remote.newest import describe_head, judge
from qsfs.remote.quorum import FleetQuorum, fleet_quorums, reached
from qsfs.remote.reasons import summary
from qsfs.remote.snapshots import find_generation, find_snapshot
from qsfs.remote.source import Source
from qsfs.remote.survey import Timing, fetch_head, survey
from qsfs.values import counted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a read-only mount shows: a generation by its number, a snapshot by its name, else the newest.

    `head`: how the digest of the head begins that counts as the newest, where two copies of a machine have sent heads.
    """

    generation: int | None = None
    snapshot: str | None = None
    head: str | None = None

    def __str__(self) -> str:
        line = "" if self.head is None else f" by head {self.head}"
        if self.snapshot is not None:
            return f'snapshot "{self.snapshot}"{line}'
        return f"{'the newest generation' if self.generation is None else f'generation {self.generation}'}{line}"


def readable(head: Head, ref: HeadRef) -> tuple[KeptGeneration, ...]:
    """The generations that may be read while `head`, named by `ref`, is the newest; itself is the last."""
    kept = [entry for entry in head.kept if entry.head != ref]
    return (*sorted(kept, key=lambda entry: entry.head), KeptGeneration(ref, head.time_ns, ()))


def choose(head: Head, ref: HeadRef, wanted: Wanted) -> HeadRef:
    """The head that is meant by `wanted` while `head`, named by `ref`, is the newest.  Raises `NotFound`."""
    there = readable(head, ref)
    if wanted.snapshot is not None:
        return find_snapshot(there, wanted.snapshot).head
    return ref if wanted.generation is None else find_generation(there, wanted.generation).head


async def source_of(source: Source, wanted: Wanted, timing: Timing | None = None) -> Source:
    """The source of the generation that is wanted, given that of the newest one.

    Raises `NotFound` as `choose`, and `QuorumUnavailable` where its head cannot be read now.
    """
    ref = choose(source.found.head, source.found.ref, wanted)
    if ref == source.found.ref:
        return source
    sealed, head = await read_head(source.members, ref, source.keys, timing or Timing())
    judgement = replace(source.found.judgement, newest=ref)
    return replace(source, found=replace(source.found, head=head, judgement=judgement), sealed=sealed)


async def read_head(members: Members, ref: HeadRef, keys: KeyRing, timing: Timing) -> tuple[SealedHead, Head]:
    """A head, sealed and opened, from any backend that has it.

    Raises `NotFound` if every backend answered and none has it, `Corrupt` if what they have is not it, and
    `QuorumUnavailable` if some did not answer.
    """
    key = head_key(keys.fsid, ref)

    def opened(value: bytes) -> tuple[SealedHead, Head]:
        return SealedHead(key, value, ref), open_head(key, value, keys)

    return await _read_record(members, key, opened, timing, describe_head(ref))


async def owner_host(members: Members, owner: Owner, keys: KeyRing, timing: Timing) -> str:
    """The host that an owner's record names; "" where no backend gives the record: it is for people only."""
    key = owner_key(keys.fsid, owner)
    try:
        return await _read_record(
            members, key, lambda value: open_owner_record(key, value, keys).host, timing, "the owner's record"
        )
    except QsfsError:
        return ""


async def _read_record(members: Members, key: bytes, opened: Callable[[bytes], T], timing: Timing, what: str) -> T:
    """What `opened` makes of the value of a control key, from the first backend whose value it accepts."""
    reasons: list[str] = []
    silent, corrupt = not len(members), False
    for member in sorted(members, key=lambda member: (not member.ready, member.number)):
        control = member.control
        try:
            with trio.fail_after(timing.attempt):
                value = await control.get(key)
            if value is not None:
                return opened(value)
        except trio.TooSlowError:
            silent = True
            reasons.append(f"backend {control.name}: no answer in {timing.attempt:g} s")
        except BackendError as error:
            silent = True
            reasons.append(str(error))
        except Corrupt as error:
            corrupt = True
            reasons.append(f"backend {control.name}: {error}")
    if silent:
        raise QuorumUnavailable(f"{what} cannot be read now: {summary(reasons) or 'no backend is known'}")
    if corrupt:
        raise Corrupt(f"{what} is damaged wherever it lies: {summary(reasons)}")
    raise NotFound(f"{what} is on none of the {len(members)} backends any more")


@dataclass(frozen=True, slots=True)
class Published:
    """The newest head that is known to be published, and which generations may be read by it.

    `hidden`: why backends may hold a newer one that this process cannot authenticate; "" if none does.
    """

    ref: HeadRef
    head: Head
    hidden: str = ""

    def keeps(self, ref: HeadRef) -> bool:
        """Whether the generation of head `ref` may still be read."""
        return ref == self.ref or any(entry.head == ref for entry in self.head.kept)


async def look(
    members: Members,
    records: Records,
    code: CodeParams,
    clock: Clock,
    timing: Timing,
    *,
    rejected: Set[HeadRef] = frozenset(),
    deadline_seconds: float = 60.0,
) -> Published:
    """Reads all heads once and returns the newest one that is published, as far as can be told.

    The heads `rejected`, which a person chose against, count as not there.

    One counts as published if a fence quorum lists it, or a newer head keeps it: it may be too few that
    answer, and a head that was sent and reached nobody else is never followed.
    Raises `QuorumUnavailable` if too few answered to tell, and `SplitHeads`.
    """
    deadline = trio.current_time() + deadline_seconds
    read = await survey(members, records, clock, timing, deadline=deadline, tries=1)
    read = read.without(rejected, records.facts)
    readings = list(read.readings.values())
    newest = read.newest
    if newest is None:
        raise QuorumUnavailable(f"no head was read: {read.reasons() or 'no backend is known'}")
    head = await fetch_head(members, readings, newest, records, timing)
    members.adopt(head.fleets)
    quorums = fleet_quorums(head.fleets, code)
    judgement = judge(readings, newest, quorums, records.facts, records.host(newest.owner))
    judgement.require_one_line()
    ref = published_of(readings, newest, head, quorums)
    if ref is None:
        raise QuorumUnavailable(
            f"too few backends answered to tell which head is published: {read.reasons() or 'none more is known'}"
        )
    if ref != newest:
        held = records.held(ref)
        head = held if held is not None else (await read_head(members, ref, records.keys, timing))[1]
    # Of those that are listed no more nothing need be remembered.
    records.prune({ref for reading in readings for ref in reading.heads})
    return Published(ref, head, _hidden(judgement.uncounted))


def _hidden(uncounted: Mapping[int, str]) -> str:
    if not uncounted:
        return ""
    return (
        f"{counted(len(uncounted), 'backend')} may hold newer heads that this mount cannot open, "
        f"{summary(uncounted.values())}; if the master key was rotated, remount"
    )


def published_of(
    readings: Collection[Reading], newest: HeadRef, head: Head, quorums: Collection[FleetQuorum]
) -> HeadRef | None:
    """The newest head among those read that was published for certain; None if there is none.

    `head`, named by `newest`, is the newest of all; `quorums` are those of its fleets.
    """
    kept = {entry.head for entry in head.kept}
    for ref in sorted({newest, *kept, *(ref for reading in readings for ref in reading.heads)}, reverse=True):
        holders = {reading.number for reading in readings if ref in reading.heads}
        if ref in kept or reached(quorums, holders):
            return ref
    return None
