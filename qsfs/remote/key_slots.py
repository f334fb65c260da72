"""Key slots on the backends: what lies where, changing them, and proving that a secret opens what it should.

A change reads a fence quorum of superblocks, makes the next revision and writes it everywhere (see
`superblock_write`).  It needs no local state and no ownership, and goes on while the file system is
mounted, here or elsewhere: a mount takes newer key slots up by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from qsfs.clock import Clock
from qsfs.errors import KeyFileError, NotFound, QuorumUnavailable
from qsfs.format.fleet import Fleet
from qsfs.format.key_changes import Change
from qsfs.format.keys import KeyRing
from qsfs.format.slots import Secret, Slot, list_slots, masters_of
from qsfs.format.superblock import Superblock, encode_superblock, slots_of
from qsfs.remote.control import Records
from qsfs.remote.identity import Stranger, find_members
from qsfs.remote.members import Candidate, Members
from qsfs.remote.newest import describe_head
from qsfs.remote.quorum import FleetQuorum, describe_shortage, fleet_quorums, reached
from qsfs.remote.reasons import listed, summary
from qsfs.remote.superblock_write import Spread, spread_superblock, write_superblock
from qsfs.remote.superblocks import FoundSuperblock, find_superblock
from qsfs.remote.survey import Found, Timing, find_newest

Make = Callable[[Superblock, KeyRing, int], Change]
"""Makes the next superblock of the present one, its key ring, and the number for a new master key."""

NOTHING_CHANGED = "nothing was changed"


@dataclass(frozen=True, slots=True)
class KeyState:
    """The superblock as the backends hold it, and the newest head, which its master keys opened.

    Where two copies of a machine have sent heads, the last of each line was opened, and `quorums` are those of
    the fleets of all: what holds, holds whichever line a person chooses.
    """

    found: FoundSuperblock
    members: Members
    strangers: tuple[Stranger, ...]
    newest: Found
    quorums: tuple[FleetQuorum, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The key slots by number."""
        return list_slots(self.found.superblock.slots)

    @property
    def fleet(self) -> int:
        """How many backends the fleet has."""
        return len({number for quorum in self.quorums for number in quorum.numbers})

    @property
    def holders(self) -> frozenset[int]:
        """The backends that hold the newest superblock."""
        return self._where(lambda value: value in self.found.same)

    @property
    def readable(self) -> frozenset[int]:
        """The backends of which is known what they hold, be it nothing.

        What is closed to our secret may be a later change, so it is not known.
        """
        empty = {c.name for c, error in self.found.problems if isinstance(error, NotFound)}
        return self._where(lambda value: value not in self.found.closed) | frozenset(
            member.number for member in self.members if member.identified and member.name in empty
        )

    @property
    def closed(self) -> frozenset[int]:
        """The backends whose copy is whole, and closed to our secret."""
        return self._where(lambda value: value in self.found.closed)

    @property
    def beaten(self) -> frozenset[bytes]:
        """Copies of a change that cannot have held: a quorum holds another, and they are of no newer master key."""
        if not reached(self.quorums, self.holders):
            return frozenset()
        return frozenset(v for v, error in self.found.closed.items() if not isinstance(error, KeyFileError))

    def opened_by(self, secret: Secret) -> frozenset[int]:
        """The backends whose copy a secret opens, be it an old one."""
        opens = {
            value: bool(masters_of(slots_of(value), secret, self.found.keys.fsid)[0])
            for value in {self.found.value, *self._authentic()}
        }
        return self._where(lambda value: opens.get(value, False))

    def sentences(self) -> tuple[str, ...]:
        """What is not as it should be, for people."""
        told = [f"{error}." for _, error in sorted(self.found.problems, key=lambda problem: problem[0].name)]
        known = {c.name for c, _ in self.found.problems}
        told += [f"{s.error}." for s in self.strangers if s.candidate.name not in known]
        told += self.newest.not_configured(self.strangers)
        told = told if len(told) <= 3 else [f"{summary(line.removesuffix('.') for line in told)}."]
        split = self.newest.judgement.describe_split()
        return tuple([*told, f"Heads: {split}."] if split else told)

    def _authentic(self) -> set[bytes]:
        wrong = {c.name for c, error in self.found.problems if isinstance(error, KeyFileError)}
        return {value for name, value in self.found.copies.items() if name not in wrong}

    def _where(self, matches: Callable[[bytes], bool]) -> frozenset[int]:
        return frozenset(
            member.number
            for member in self.members
            if member.identified and member.name in self.found.copies and matches(self.found.copies[member.name])
        )


@dataclass(frozen=True, slots=True)
class Changed:
    """A change that holds: a quorum of backends has it.  `late` says, for people, which do not yet."""

    change: Change
    holders: int
    fleet: int
    late: str

    def sentence(self) -> str:
        """Where the new key slots lie."""
        revision = self.change.superblock.revision
        where = f"revision {revision} of the key slots is on {self.holders} of {self.fleet} backends"
        return f"{where}." if not self.late else f"{where}; {self.late}"


async def read_key_state(
    candidates: Sequence[Candidate], secret: Secret, clock: Clock, timing: Timing | None = None
) -> KeyState:
    """Reads superblocks, identities and the newest head; raises as a restore does, `KeyFileError` among others."""
    timing = timing or Timing()
    found = await find_superblock(candidates, secret, attempt_seconds=timing.attempt)
    members, strangers = await find_members(candidates, found.keys, clock, attempt_seconds=timing.attempt)
    code = found.superblock.code
    newest = await find_newest(
        members,
        Records(found.keys),
        code,
        clock,
        timing,
        deadline_seconds=3 * timing.attempt,
        tries=1,
        any_line=True,
    )
    fleets = _all_fleets(newest)
    return KeyState(found, members, tuple(strangers), newest, fleet_quorums(fleets, code))


def _all_fleets(newest: Found) -> list[Fleet]:
    """The fleets that the newest head names, and those of other lines.

    Raises `SplitHeads` if two lines call different backends by one number: then counting means nothing.
    """
    fleets: list[Fleet] = []
    identities: dict[int, bytes] = {}
    for fleet in (fleet for head in (newest.head, *newest.lines) for fleet in head.fleets):
        if fleet in fleets:
            continue
        fleets.append(fleet)
        for entry in fleet.entries:
            if identities.setdefault(entry.number, entry.identity) != entry.identity:
                newest.judgement.require_one_line()
    return fleets


async def change_key_slots(
    candidates: Sequence[Candidate],
    secret: Secret,
    make: Make,
    clock: Clock,
    timing: Timing | None = None,
) -> Changed:
    """Makes one change of the key slots, and returns once it holds.

    Raises what `read_key_state` and `make` raise, and `QuorumUnavailable` where too few backends answered:
    then nothing was changed.  `write_superblock` says what it raises later, and what that means.
    """
    state = await read_key_state(candidates, secret, clock, timing)
    found = state.found
    _require_present(found)
    _require_quorum(state, NOTHING_CHANGED)

    def prepare() -> tuple[Change, bytes]:
        change = make(found.superblock, found.keys, found.newest_master + 1)
        return change, encode_superblock(change.superblock, change.keys, clock)

    change, value = await trio.to_thread.run_sync(prepare)
    spread = await write_superblock(
        state.members, state.quorums, value, change.keys, timing=timing, beaten=state.beaten
    )
    return _changed(state, change, spread)


async def refill_key_slots(
    candidates: Sequence[Candidate], secret: Secret, clock: Clock, timing: Timing | None = None
) -> Changed:
    """Brings the newest key slots to all backends that hold older ones or none; completes a change that
    was interrupted.  Raises as `change_key_slots`."""
    state = await read_key_state(candidates, secret, clock, timing)
    _require_quorum(state, NOTHING_CHANGED)
    if reached(state.quorums, state.holders):
        spread = await spread_superblock(
            state.members, state.found.value, state.found.keys, timing=timing, beaten=state.beaten
        )
    else:
        spread = await write_superblock(
            state.members, state.quorums, state.found.value, state.found.keys, timing=timing
        )
    return _changed(state, Change(state.found.superblock, state.found.keys), spread)


@dataclass(frozen=True, slots=True)
class Proof:
    """What a secret was shown to open.  `sentences` is what a person should read."""

    state: KeyState
    opens: int
    newest: bool
    sentences: tuple[str, ...]


async def prove_secret(
    candidates: Sequence[Candidate], secret: Secret, clock: Clock, timing: Timing | None = None
) -> Proof:
    """Proves against the backends that a secret opens the key slots there, and its master keys the newest head.

    Raises `KeyFileError` if it opens nothing, or only copies that may be from before it was removed, and
    `QuorumUnavailable` if too few backends answered to know the newest key slots and the newest head.
    """
    state = await read_key_state(candidates, secret, clock, timing)
    found, fleet = state.found, state.fleet
    opens = state.opened_by(secret)
    if found.removed:
        raise KeyFileError(
            f"{found.removed} (on {len(opens)} of {fleet} backends). Do not rely on it: it opens nothing once they "
            "are refilled"
        )
    _require_quorum(state, "nothing is proven")
    if state.newest.judgement.withstands < 0:
        newest = " ".join(state.newest.sentences(state.strangers))
        raise QuorumUnavailable(f"the secret opens the key slots, but {newest}")
    slot = ", ".join(map(str, sorted(found.used)))
    kinds = ", ".join(s.kind for s in state.slots if s.number in found.used)
    keys = found.keys
    told = [
        f"It opens key slot {slot} ({kinds}) of file system {keys.fsid.hex()} on {len(opens)} of {fleet} backends "
        f"(revision {found.superblock.revision} on {len(state.holders)}).",
        f"Master keys {', '.join(map(str, keys.numbers))}; {describe_head(state.newest.ref)}, the newest, "
        f"was decrypted ({len(state.newest.judgement.counted)} of {fleet} backends answered).",
        *state.sentences(),
    ]
    return Proof(state, len(opens), opens == state.holders, tuple(told))


def _require_present(found: FoundSuperblock) -> None:
    if found.removed:
        raise KeyFileError(f"{found.removed}; {NOTHING_CHANGED}: use a secret that opens the present key slots")


def _require_quorum(state: KeyState, so: str) -> None:
    """Raises unless it is known what the newest key slots are; `so` says what follows."""
    readable = state.readable
    if reached(state.quorums, readable):
        return
    told = " ".join(state.sentences())
    if state.closed:
        raise KeyFileError(
            f"{len(state.closed)} of {state.fleet} backends hold key slots that this secret does not open, so it may "
            f"have been removed; {so}: use a secret that opens the present key slots. {told}"
        )
    raise QuorumUnavailable(
        f"too few backends answered to know the newest key slots ({describe_shortage(state.quorums, readable)}); "
        f"{so}. {told}"
    )


def _changed(state: KeyState, change: Change, spread: Spread) -> Changed:
    fleet = {number for quorum in state.quorums for number in quorum.numbers}
    names = [m.name for m in state.members if m.number in fleet - spread.holders]
    names += [f"{entry.address}/{entry.namespace}" for entry in state.newest.missing]
    late = (
        ""
        if not names
        else f"{listed(names)} keep an older revision, which a secret that was removed still opens, until a mount or "
        "'qsfs key refill' finds them."
    )
    return Changed(change, len(spread.holders & fleet), len(fleet), late)
