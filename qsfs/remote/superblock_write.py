"""Replacing the superblock: the one value on backends that is ever replaced by a different one.

On each backend a superblock is written only over an older revision of the same file system, over
nothing, over rot, or over one that a quorum decided against, and only after this was read over the
same connection.  A change counts when a fence quorum of backends gives it back afterwards.  Whoever
changes it read such a quorum before, so of two changes one after the other the later one builds on
the earlier; of two at once at least one sees the other and says so, and every secret that opened
before still opens some copy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

import trio

from qsfs import failpoints
from qsfs.backend.contract import Session
from qsfs.errors import (
    BackendError,
    BackendUnavailable,
    Corrupt,
    FormatMismatch,
    KeyConflict,
    KeyFileError,
    QuorumUnavailable,
)
from qsfs.format.keys import KeyRing
from qsfs.format.superblock import SUPERBLOCK_KEY, Superblock, is_whole, read_superblock
from qsfs.remote.members import Member, Members
from qsfs.remote.quorum import FleetQuorum, describe_shortage, reached
from qsfs.remote.reasons import summary
from qsfs.remote.survey import Timing

TRIES = 3


class Standing(Enum):
    """What lies at a backend, next to a superblock that should lie there."""

    SAME = "same"
    OLDER = "older"
    """An older revision, nothing, or rot: it may be replaced."""
    NEWER = "newer"
    """A higher revision, or one under a master key that is not known here."""
    RIVAL = "rival"
    """Another one of the same revision, or one that is whole and sealed under another master key of the same number."""
    FOREIGN = "foreign"
    """Something else, or of a newer format: left alone."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Where a superblock lies now, by number, and why it does not elsewhere.

    `others` are values that must not be replaced by it, by number.
    """

    holders: frozenset[int]
    reasons: dict[int, str]
    others: dict[int, tuple[Standing, bytes]]


def standing(present: bytes | None, value: bytes, right: Superblock, keys: KeyRing) -> Standing:
    """How what a backend holds compares to `value`, which is `right`."""
    if present == value:
        return Standing.SAME
    if present is None:
        return Standing.OLDER
    try:
        other = read_superblock(present, keys)
    except Corrupt:
        return Standing.RIVAL if is_whole(present, keys.fsid) else Standing.OLDER
    except KeyFileError:
        return Standing.NEWER
    except FormatMismatch:
        return Standing.FOREIGN
    if other.revision == right.revision:
        return Standing.SAME if other == right else Standing.RIVAL
    return Standing.OLDER if other.revision < right.revision else Standing.NEWER


async def spread_superblock(
    members: Members,
    value: bytes,
    keys: KeyRing,
    *,
    timing: Timing | None = None,
    write: bool = True,
    beaten: Collection[bytes] = (),
) -> Spread:
    """Brings `value` to every identified member that holds an older one, and reads it back there.

    `beaten` are rivals that count as older: a quorum held another when they were read.  Without `write`
    it only looks.  Raises nothing of the backends'.
    """
    timing = timing or Timing()
    right = read_superblock(value, keys)
    holders: set[int] = set()
    reasons: dict[int, str] = {}
    others: dict[int, tuple[Standing, bytes]] = {}

    async def put(session: Session, member: Member) -> None:
        present = await session.get(SUPERBLOCK_KEY)
        found = Standing.OLDER if present in beaten else standing(present, value, right, keys)
        if found is Standing.OLDER and write:
            await session.set(SUPERBLOCK_KEY, value)
            failpoints.hit("superblock.stored")
            if await session.get(SUPERBLOCK_KEY) != value:
                raise BackendUnavailable(f"backend {session.name}: gives back something else than was stored")
            found = Standing.SAME
        if found is Standing.SAME:
            holders.add(member.number)
        elif found is Standing.OLDER:
            reasons[member.number] = f"backend {member.name}: holds an older superblock"
        else:
            others[member.number] = (found, present or b"")
            reasons[member.number] = f"backend {member.name}: {_SAID[found]}"

    async def work(member: Member) -> None:
        for left in reversed(range(TRIES)):
            try:
                with trio.fail_after(timing.attempt):
                    async with member.data.session() as session:
                        await put(session, member)
                return
            except trio.TooSlowError:
                reasons[member.number] = f"backend {member.name}: no answer in {timing.attempt:g} s"
                return
            except BackendError as error:
                reasons[member.number] = str(error)
                if not left or not isinstance(error, BackendUnavailable):
                    return
            await trio.sleep(timing.retry)

    async with trio.open_nursery() as nursery:
        for member in members:
            if member.identified:
                nursery.start_soon(work, member)
            else:
                reasons[member.number] = f"backend {member.name}: {member.error or 'has not shown its identity'}"
    return Spread(frozenset(holders), {n: why for n, why in reasons.items() if n not in holders}, others)


_SAID = {
    Standing.NEWER: "holds a newer superblock",
    Standing.RIVAL: "holds the superblock of another change of the key slots",
    Standing.FOREIGN: "holds something else than a superblock of this file system and format",
}


async def write_superblock(
    members: Members,
    quorums: Collection[FleetQuorum],
    value: bytes,
    keys: KeyRing,
    *,
    timing: Timing | None = None,
    beaten: Collection[bytes] = (),
) -> Spread:
    """Makes `value` the superblock: it is written everywhere, and a quorum of every fleet gives it back.

    The caller has read such a quorum, and made `value` the next revision of what it found.  Raises
    `KeyConflict` if another change was made at the same time, and `QuorumUnavailable` if too few hold
    it in the end: then it lies on some backends, and old and new secrets each open some.
    """
    written = await spread_superblock(members, value, keys, timing=timing, beaten=beaten)
    failpoints.hit("superblock.spread")
    again = await spread_superblock(members, value, keys, timing=timing, write=False, beaten=beaten)
    found = Spread(
        again.holders,
        {**{n: why for n, why in written.reasons.items() if n not in again.holders}, **again.reasons},
        {**written.others, **again.others},
    )
    rivals = [n for n, (kind, _) in found.others.items() if kind in (Standing.RIVAL, Standing.NEWER)]
    if reached(quorums, found.holders):
        return found
    if rivals:
        raise KeyConflict(
            "another key command changed the key slots at the same time: "
            f"{summary(found.reasons[n] for n in rivals)}. This change may not hold; keep the old and the new secret, "
            "look with 'qsfs key list', and run the command again"
        )
    raise QuorumUnavailable(
        f"the new key slots lie on too few backends ({describe_shortage(quorums, found.holders)}): the change is "
        "neither made nor undone. Keep the old and the new secret; bring backends back and run 'qsfs key refill', "
        f"which completes it (a mount does too). {summary(found.reasons.values())}"
    )
