"""Walking what backends list, page by page, for shards of packs that may be named by nothing.

One page of one backend at a time, the backends in turn, each from a stored cursor; a walk of a backend that has
ended begins anew a day of running time later.  Pages go through a `Sieve` of what is known to be named; what is left
of a *round* is bounded, and the cursors count as reached only once somebody has dealt with it.

Backends may lie in a scan, which costs time only: a key that is listed is a question, and a key that is not
is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import trio
import xxhash

from qsfs.backend.contract import ScanEntry, ScanPage
from qsfs.clock import Clock
from qsfs.errors import BackendError, BackendRefused, BackendUnavailable, QsfsError
from qsfs.format import schema
from qsfs.format.shard import OVERHEAD, parse_shard_key
from qsfs.format.units import MAX_SHARD
from qsfs.remote.members import Member, Members, State
from qsfs.remote.strays import MOST_PLACES, Place

SCAN_PREFIX = b"scan:"
"""LOCAL rows: the prefix and the number of a fleet entry, u32 big-endian -> `Walk.encode`."""
AGAIN_SECONDS = 86400.0
"""Running time from the end of a walk to the next one of the same backend."""
FAILED_SECONDS = 60.0
MOST_CANDIDATES = 4096
ROUND_SECONDS = 300.0
_PAGE_SECONDS = 30.0
_SCHEMA = 1
_NEVER = 2**64 - 1


class Sieve:
    """A bounded memory of packs that are named: what it does not let through is named, or is taken for it by mistake.

    A mistake is another one with another salt, so it costs a stray some days.  A megabyte; at a million packs it
    is wrong about one of twenty.
    """

    _BITS = 1 << 23

    def __init__(self, salt: int) -> None:
        self._salt = salt
        self._bits = bytearray(self._BITS // 8)

    def add(self, pack_id: bytes) -> None:
        """Takes note of a pack that is named."""
        for bit in self._places(pack_id):
            self._bits[bit >> 3] |= 1 << (bit & 7)

    def __contains__(self, pack_id: bytes) -> bool:
        return all(self._bits[bit >> 3] & (1 << (bit & 7)) for bit in self._places(pack_id))

    def _places(self, pack_id: bytes) -> tuple[int, int]:
        digest = xxhash.xxh3_64_intdigest(pack_id, self._salt)
        return digest % self._BITS, (digest >> 32) % self._BITS


@dataclass(frozen=True, slots=True)
class Walk:
    """How far the walk of one backend is: None as cursor is its begin.

    `identity` is the backend's; `under_way` until the end was reached.  `ended_ns` is the wall time of the last end
    (0: never yet), `ended` its running time in seconds.
    """

    identity: bytes
    cursor: bytes | None = None
    under_way: bool = False
    ended_ns: int = 0
    ended: float = -math.inf

    def due(self, now: float) -> bool:
        """Whether there is something to do."""
        return self.under_way or not self.ended <= now < self.ended + AGAIN_SECONDS

    def encode(self) -> bytes:
        """The row: msgpack array of schema 1, identity, cursor (empty: the begin), 1 if under way, both ends."""
        ended = _NEVER if self.ended == -math.inf else int(self.ended * 1e9)
        return schema.pack([_SCHEMA, self.identity, self.cursor or b"", int(self.under_way), self.ended_ns, ended])

    @classmethod
    def decode(cls, row: bytes) -> Walk | None:
        """What a row says; None for one of no known form: the walk begins anew."""
        try:
            fields = schema.record(row, _SCHEMA, 6, "scan in the local store")
            identity, cursor = fields.binary(), fields.binary()
            under_way, ended_ns, ended = bool(fields.integer(0, 1)), fields.integer(), fields.integer()
        except QsfsError:
            return None
        return cls(identity, cursor or None, under_way, ended_ns, -math.inf if ended == _NEVER else ended / 1e9)


def scan_key(number: int) -> bytes:
    """The key in LOCAL."""
    return SCAN_PREFIX + number.to_bytes(4, "big")


@dataclass(slots=True)
class Candidate:
    """A pack that was met and may be named by nothing."""

    owner_epoch: int
    places: list[Place] = field(default_factory=list)


class Scanner:
    """Walks the data namespaces of all members.

    `candidates` are what the round has met, by pack id.  `walks` is how far each backend is with that dealt with.
    """

    def __init__(self, members: Members, fsid: bytes, clock: Clock) -> None:
        self.sieve = Sieve(0)
        self.candidates: dict[bytes, Candidate] = {}
        self.walks: dict[int, Walk] = {}
        self._members = members
        self._fsid = fsid
        self._clock = clock
        self._reached: dict[int, Walk] = {}
        self._not_before: dict[int, float] = {}
        self._turn = 0
        self._round_begun = math.inf

    def restart(self) -> None:
        """Has every backend walked from the begin, also where that is not due."""
        for walks in (self.walks, self._reached):
            for number, walk in walks.items():
                if not walk.under_way:
                    walks[number] = replace(walk, ended=-math.inf)

    def due(self, now: float) -> list[Member]:
        """The backends that have a page to give, in their turn; `now` is running time."""
        found = [
            member
            for member in self._members
            if member.identified
            and member.state is State.UP
            and self._walk(member).due(now)
            and self._clock.monotonic() >= self._not_before.get(member.number, -math.inf)
        ]
        return [m for m in found if m.number > self._turn] + [m for m in found if m.number <= self._turn]

    def _walk(self, member: Member) -> Walk:
        walk = self._reached.get(member.number) or self.walks.get(member.number)
        if walk is None or walk.identity != member.entry.identity:
            return Walk(member.entry.identity)
        return walk

    async def page(self, now: float, owner_epoch: int) -> None:
        """Takes one page of the backend whose turn it is, if any is due.  Packs of epochs above are not met."""
        due = self.due(now)
        if not due:
            return
        member = due[0]
        self._turn = member.number
        self._round_begun = min(self._round_begun, self._clock.monotonic())
        walk = self._walk(member)
        try:
            page = await self._ask(member, walk.cursor)
        except BackendRefused:
            # The cursor is not one of this backend any more; what does refuse a scan refuses it from the begin too.
            self._failed(member, Walk(walk.identity, None, True, walk.ended_ns, walk.ended))
        except BackendError as error:
            member.failed(error)
            self._failed(member, walk)
        else:
            if page.cursor is None or page.cursor == walk.cursor:
                self._reached[member.number] = Walk(walk.identity, None, False, self._clock.time_ns(), now)
            else:
                self._reached[member.number] = replace(walk, cursor=page.cursor, under_way=True)
            self._take(member, page.entries, owner_epoch)

    async def _ask(self, member: Member, cursor: bytes | None) -> ScanPage:
        with trio.move_on_after(_PAGE_SECONDS):
            return await member.data.scan(cursor)
        raise BackendUnavailable(f"backend {member.name}: gave no page of a scan within {_PAGE_SECONDS:g} s")

    def _failed(self, member: Member, walk: Walk) -> None:
        self._reached[member.number] = walk
        self._not_before[member.number] = self._clock.monotonic() + FAILED_SECONDS

    def _take(self, member: Member, entries: Iterable[ScanEntry], owner_epoch: int) -> None:
        for entry in entries:
            named = parse_shard_key(entry.key)
            if named is None or named.fsid != self._fsid or named.owner_epoch > owner_epoch:
                continue
            if named.pack_id in self.sieve:
                continue
            if named.pack_id not in self.candidates and len(self.candidates) >= 2 * MOST_CANDIDATES:
                # A page without measure; the next walk meets the rest.
                continue
            found = self.candidates.setdefault(named.pack_id, Candidate(named.owner_epoch))
            # One id under two epochs is no pack of ours; the shards of the first are looked at.
            if found.owner_epoch == named.owner_epoch and len(found.places) < MOST_PLACES:
                # A backend may say any size.
                size = min(max(entry.size, 0), MAX_SHARD + OVERHEAD)
                found.places.append(Place(member.number, named.number, size))

    def round_over(self, now: float) -> bool:
        """Whether what was met should be dealt with before the next page."""
        if not self._reached:
            return False
        if len(self.candidates) >= MOST_CANDIDATES or not self.due(now):
            return True
        return self._clock.monotonic() - self._round_begun >= ROUND_SECONDS

    def dealt_with(self) -> list[int]:
        """Begins a new round; returns the numbers of the backends that got on in this one."""
        numbers = list(self._reached)
        self.walks.update(self._reached)
        self._reached.clear()
        self.candidates.clear()
        self._round_begun = math.inf
        return numbers
