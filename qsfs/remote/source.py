"""Where a restore, a drill and a read-only mount begin: from candidates and a secret to the newest generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from qsfs.clock import Clock
from qsfs.errors import NotFound, QsfsError, QuorumUnavailable, WrongBackend
from qsfs.format.head import Head, SealedHead, head_key, open_head
from qsfs.format.keys import KeyRing
from qsfs.format.slots import Secret
from qsfs.format.superblock import Superblock
from qsfs.remote.control import Records
from qsfs.remote.identity import Stranger, find_members
from qsfs.remote.members import Candidate, Member, Members
from qsfs.remote.newest import describe_head
from qsfs.remote.reasons import summary
from qsfs.remote.superblocks import find_superblock
from qsfs.remote.survey import Found, Timing, find_newest


@dataclass(frozen=True, slots=True)
class Source:
    """A generation on the backends, and the means to read it."""

    superblock: Superblock
    keys: KeyRing
    members: Members
    strangers: tuple[Stranger, ...]
    problems: tuple[str, ...]
    found: Found
    sealed: SealedHead

    def sentences(self) -> tuple[str, ...]:
        """What was found where, for people."""
        left_out = (f"Left out: {stranger.error}." for stranger in self.strangers)
        return (*self.found.sentences(self.strangers), *self.problems, *left_out)


async def find_source(
    candidates: Sequence[Candidate],
    *,
    secret: Secret,
    clock: Clock,
    timing: Timing | None = None,
    chosen: str | None = None,
    any_line: bool = False,
    deadline_seconds: float = 60.0,
) -> Source:
    """Reads superblock, identities and heads, and the newest head itself.

    `chosen` and `any_line` are for where two copies of a machine have sent heads: see `find_newest`.
    Raises what `find_superblock` and `find_newest` raise, among them `KeyFileError`, `SplitHeads` (listing the heads)
    and `QuorumUnavailable`.
    """
    timing = timing or Timing()
    opened = await find_superblock(candidates, secret, attempt_seconds=timing.attempt)
    members, strangers = await find_members(candidates, opened.keys, clock, attempt_seconds=timing.attempt)
    records = Records(opened.keys)
    found = await find_newest(
        members,
        records,
        opened.superblock.code,
        clock,
        timing,
        deadline_seconds=deadline_seconds,
        chosen=chosen,
        any_line=any_line,
    )
    _add_silent(members, strangers, found.head, clock)
    sealed = await _sealed(members, found, opened.keys, timing)
    removed = (f"{opened.removed}.",) if opened.removed else ()
    problems = (*removed, *(f"Superblock: {error}." for _, error in opened.problems))
    return Source(opened.superblock, opened.keys, members, tuple(strangers), problems, found, sealed)


def _add_silent(members: Members, strangers: Sequence[Stranger], head: Head, clock: Clock) -> None:
    """Backends of the fleet that did not say who they are may still do so while packs are read."""
    entries = {(e.address, e.namespace): e for fleet in head.fleets for e in fleet.entries}
    for stranger in strangers:
        candidate = stranger.candidate
        entry = entries.get((candidate.address, candidate.namespace))
        if entry is None or isinstance(stranger.error, WrongBackend) or members.by_number(entry.number):
            continue
        member = Member(entry, candidate.data, candidate.control(entry.control_namespace), clock)
        member.failed(stranger.error)
        members.add(member)


async def _sealed(members: Members, found: Found, keys: KeyRing, timing: Timing) -> SealedHead:
    """The head's sealed bytes, from any backend that has them."""
    ref = found.ref
    key = head_key(keys.fsid, ref)
    reasons: list[str] = []
    named = {reading.number for reading in found.survey.readings.values() if ref in reading.heads}
    for member in sorted(members, key=lambda member: (member.number not in named, member.number)):
        control = member.control
        try:
            with trio.fail_after(timing.attempt):
                value = await control.get(key)
            if value is None:
                raise NotFound(f"backend {control.name}: does not have it any more")
            open_head(key, value, keys)
        except trio.TooSlowError:
            reasons.append(f"backend {control.name}: no answer in {timing.attempt:g} s")
        except QsfsError as error:
            reasons.append(str(error))
        else:
            return SealedHead(key, value, ref)
    raise QuorumUnavailable(f"{describe_head(ref)} cannot be read any more: {summary(reasons)}")
