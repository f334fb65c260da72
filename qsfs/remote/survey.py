"""Conversations with many backends at once, each over one connection, repeated until they succeed."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Set
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from qsfs.backend.contract import Session
from qsfs.clock import Clock
from qsfs.errors import (
    BackendError,
    BackendUnavailable,
    Corrupt,
    NotFound,
    QsfsError,
    QuorumUnavailable,
    WrongBackend,
)
from qsfs.format.erasure import CodeParams
from qsfs.format.head import FleetEntry, Head, HeadRef
from qsfs.format.identity import identity_key
from qsfs.remote.control import Reading, Records, read_control
from qsfs.remote.identity import Stranger, require_identity
from qsfs.remote.members import Member, Members
from qsfs.remote.newest import Facts, Judgement, dead_heads, describe_head, judge, newest_head, uncounted
from qsfs.remote.quorum import fleet_quorums
from qsfs.remote.reasons import summary

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """How long to wait for backends, in seconds.

    `attempt`: one conversation with one backend.  `retry` to `retry_most`: the pause after a failed
    one, doubling, with jitter.  `grace`: how much longer slow backends are waited for once a
    quorum has been reached.
    """

    attempt: float = 10.0
    retry: float = 0.5
    retry_most: float = 15.0
    grace: float = 2.0

    def pause(self, failures: int, clock: Clock) -> float:
        """The pause after the given number of failures in a row: between half and all of the full one."""
        full = min(self.retry_most, self.retry * 2.0 ** min(failures - 1, 16))
        return full * (0.5 + int.from_bytes(clock.random_bytes(2), "big") / 0x20000)


@dataclass(slots=True)
class Survey:
    """What has been read so far: the last whole reading of each backend, and why others gave none."""

    readings: dict[int, Reading] = field(default_factory=dict)
    errors: dict[int, BackendError] = field(default_factory=dict)

    @property
    def newest(self) -> HeadRef | None:
        """The newest head read."""
        return newest_head(self.readings.values())

    def without(self, rejected: Set[HeadRef], facts: Facts) -> Survey:
        """What was read, as if the heads `rejected`, and those that are dead then, were not there."""
        left = {number: reading.without(rejected) for number, reading in self.readings.items()}
        dead = dead_heads(left.values(), facts)
        return Survey({number: reading.without(dead) for number, reading in left.items()}, self.errors)

    def reasons(self) -> str:
        """Why backends gave no reading, for messages; empty if all gave one."""
        return summary(self.errors.values())


async def converse(
    member: Member, records: Records, timing: Timing, talk: Callable[[Session], Awaitable[T]]
) -> T:
    """One conversation over one connection to the heads of a member, once it has shown its identity there.

    Raises what the calls of a session raise, `WrongBackend`, and what `talk` raises; the result is
    recorded in the member.
    """
    try:
        with trio.fail_after(timing.attempt):
            async with member.control.session() as session:
                sealed = await require_identity(session, member.entry, records.keys)
                member.control.expect(identity_key(records.fsid), sealed)
                result = await talk(session)
    except trio.TooSlowError:
        late = BackendUnavailable(f"backend {member.control.name}: no answer in {timing.attempt:g} s")
        member.failed(late)
        raise late from None
    except WrongBackend as error:
        member.not_ours(error)
        raise
    except BackendError as error:
        member.failed(error)
        raise
    member.succeeded()
    return result


async def survey(
    members: Iterable[Member],
    records: Records,
    clock: Clock,
    timing: Timing,
    *,
    deadline: float,
    tries: float = math.inf,
    newest_first: bool = False,
    enough: Callable[[Survey], bool] = lambda _: False,
) -> Survey:
    """Reads the owner records and heads of all `members`, at once.

    Ends when all have answered or failed `tries` times, `timing.grace` after `enough` is satisfied, or
    at `deadline` (trio's clock).  Raises `FormatMismatch` if a newer version of qsfs is at work there.
    """
    result = Survey()
    failures: list[QsfsError] = []
    with trio.CancelScope(deadline=deadline) as scope:

        async def read(member: Member) -> None:
            failed = 0
            while True:
                try:
                    reading = await converse(
                        member,
                        records,
                        timing,
                        lambda session: read_control(
                            session, member.number, records, member.index, newest_first=newest_first
                        ),
                    )
                except BackendError as error:
                    result.errors[member.number] = error
                    failed += 1
                    if failed >= tries:
                        return
                    await trio.sleep(timing.pause(failed, clock))
                except QsfsError as error:
                    failures.append(error)
                    scope.cancel()
                    return
                else:
                    result.errors.pop(member.number, None)
                    result.readings[member.number] = reading
                    if enough(result):
                        scope.deadline = min(scope.deadline, trio.current_time() + timing.grace)
                    return

        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(read, member)
    if failures:
        raise failures[0]
    return result


async def fetch_head(
    members: Members, readings: Collection[Reading], ref: HeadRef, records: Records, timing: Timing
) -> Head:
    """Head `ref` from memory or from any backend that lists it.

    Raises `QuorumUnavailable` if none of them gives it now.
    """
    held = records.held(ref)
    reasons: list[str] = []
    for member in members.of([reading.number for reading in readings if ref in reading.heads]):
        if held is not None:
            break
        try:
            held = await converse(member, records, timing, lambda session: records.head(session, ref))
        except (BackendError, NotFound, Corrupt) as error:
            reasons.append(str(error))
    if held is None:
        raise QuorumUnavailable(
            f"{describe_head(ref)} cannot be read any more: {summary(reasons) or 'no backend has it'}"
        )
    return held


@dataclass(frozen=True, slots=True)
class Found:
    """The newest head that the reachable backends hold, and what it is worth.

    `missing`: entries of its fleets that no configured backend is.  `rejected`: the heads that a person chose
    against with this one; `judgement` is as if they were not there.  `lines`: where nobody chose, the last heads
    of the other lines.
    """

    head: Head
    judgement: Judgement
    survey: Survey
    missing: tuple[FleetEntry, ...]
    rejected: frozenset[HeadRef] = frozenset()
    lines: tuple[Head, ...] = ()

    @property
    def ref(self) -> HeadRef:
        """Names the head."""
        return self.judgement.newest

    def not_configured(self, strangers: Collection[Stranger]) -> list[str]:
        """Sentences about entries at whose place there is no configured backend, not even a stranger."""
        places = {(stranger.candidate.address, stranger.candidate.namespace) for stranger in strangers}
        return [
            f"Not configured: {entry.address}/{entry.namespace} (entry {entry.number})."
            for entry in self.missing
            if (entry.address, entry.namespace) not in places
        ]

    def sentences(self, strangers: Collection[Stranger] = ()) -> tuple[str, ...]:
        """What a restore prints: which head, how many losses the reading withstands, what did not answer.

        `strangers` are the configured backends that are no members, about which the caller says more.
        """
        verdict = self.judgement
        fleet = {entry.number for fleet in self.head.fleets for entry in fleet.entries}
        answered = len(verdict.counted & fleet)
        found = [
            f"The newest head is {describe_head(self.ref)}; {answered} of {len(fleet)} backends answered."
        ]
        if verdict.withstands >= 0:
            found.append(f"This holds even if {verdict.withstands} of those have lost it, are stale or lie.")
        else:
            found.append(
                f"Too few answered: {-verdict.withstands} more must answer before a newer generation, "
                "published where "
                "nobody answered, can be ruled out."
            )
        if verdict.uncounted:
            found.append(f"Not counted: {summary(verdict.uncounted.values())}.")
        if self.survey.errors:
            found.append(f"Not answered: {self.survey.reasons()}.")
        found += self.not_configured(strangers)
        found += [
            f"Also found: {describe_head(ref)}, which may or may not be an ancestor."
            for ref in verdict.undecided
        ]
        found += [
            f"Also found: {describe_head(ref)}, which a copy of the machine sent and never published."
            for ref in verdict.dead
        ]
        found += [f"Not chosen: {describe_head(ref)}, which is left behind." for ref in sorted(self.rejected)]
        if verdict.splits:
            found.append(f"Of several lines: {verdict.describe_split()}.")
        return tuple(found)


async def find_newest(
    members: Members,
    records: Records,
    code: CodeParams,
    clock: Clock,
    timing: Timing,
    *,
    deadline_seconds: float = 60.0,
    tries: float = 3,
    chosen: str | None = None,
    any_line: bool = False,
) -> Found:
    """Reads every reachable backend, as a restore does, and adopts the fleets that the newest head names.

    Where two copies of a machine have sent heads, `chosen` is how the digest of the one begins that counts as the
    newest, as a person chose it; without it that is `SplitHeads`, unless `any_line`, for what no single head is
    needed for.  Raises what `Judgement.choose` raises, `NotFound` if all backends answered and none has a head,
    `Corrupt` if all answered and no head that they list authenticates, `QuorumUnavailable` if none was found, or not
    the chosen one, and some did not answer.
    Whether `judgement.withstands` is enough is for the caller to say.
    """
    deadline = trio.current_time() + deadline_seconds
    read = await survey(members, records, clock, timing, deadline=deadline, tries=tries, newest_first=True)
    newest = read.without(frozenset(), records.facts).newest
    readings = list(read.readings.values())
    if newest is None:
        if len(read.readings) < len(members) or not members:
            raise QuorumUnavailable(
                f"no head found, but not every backend answered: {read.reasons() or 'none is known'}"
            )
        hidden = [reason for reading in readings if (reason := uncounted(reading, None)) is not None]
        if hidden:
            raise Corrupt(f"{len(hidden)} backends list heads, and none authenticates: {hidden[0]}")
        raise NotFound(
            f"none of the {len(members)} backends holds a head of file system {records.fsid.hex()}"
        )
    rejected: frozenset[HeadRef] = frozenset()
    head, missing, judgement = await _judged(members, readings, newest, records, code, timing)
    if chosen is not None:
        ref = _chosen(judgement, chosen, read)
        if ref != newest:
            _, _, judgement = await _judged(members, readings, ref, records, code, timing)
        rejected = frozenset(judgement.splits)
        left = [reading.without(rejected) for reading in readings]
        head, missing, judgement = await _judged(members, left, ref, records, code, timing)
    elif not any_line:
        judgement.require_one_line()
    lines = [await fetch_head(members, readings, end.ref, records, timing) for end in judgement.ends[1:]]
    return Found(head, judgement, read, tuple(missing), rejected, tuple(lines))


async def _judged(
    members: Members,
    readings: Collection[Reading],
    newest: HeadRef,
    records: Records,
    code: CodeParams,
    timing: Timing,
) -> tuple[Head, list[FleetEntry], Judgement]:
    """Head `newest`, the entries of its fleets that no member is, and what it is worth."""
    head = await fetch_head(members, readings, newest, records, timing)
    missing = members.adopt(head.fleets)
    quorums = fleet_quorums(head.fleets, code)
    return head, missing, judge(readings, newest, quorums, records.facts, records.host(newest.owner))


def _chosen(judgement: Judgement, digest: str, read: Survey) -> HeadRef:
    try:
        return judgement.choose(digest)
    except NotFound as error:
        if read.errors:
            raise QuorumUnavailable(f"{error}; but not every backend answered: {read.reasons()}") from error
        raise
