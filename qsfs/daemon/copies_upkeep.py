"""Keeps on every backend what each carries of heads and ownership: the newest head, the owner record, the kept heads.

Publishing sends each of these once, to whoever answers then.  A backend that was away, or came back as it was long ago,
would lack the others for ever; and backends that lose them one after the other would in the end leave none.  So
one backend after the other is asked for all of them, and gets back what it lacks, the newest head first: no older one
is ever the newest of a backend because of this.

Only what the last published head keeps is brought, only to backends that this head names, and only while this mount
is shown to own and publishes nothing: what has expired does not come back.

A configured backend that left the fleet while it did not answer gets its tombstone here.
"""

from __future__ import annotations

import logging
import math
from collections import Counter

import trio

from qsfs.clock import Clock
from qsfs.errors import BackendError, BackendUnavailable, Corrupt, Fenced, QsfsError, QuorumUnavailable
from qsfs.format.head import HeadRef, Owner, head_key
from qsfs.format.keys import KeyRing
from qsfs.format.owner import owner_key
from qsfs.health.copies import Copy, CopySet, head_copies, owner_copies, refill
from qsfs.remote.ask import Finding
from qsfs.remote.base import PUBLISHED_KEY, LocalHead, local_head
from qsfs.remote.identity import read_tombstone, write_tombstone
from qsfs.remote.members import ACTIVE, DRAINING, OUTSIDE, Member, Members, State
from qsfs.remote.publish import Publisher
from qsfs.remote.reasons import listed
from qsfs.remote.survey import Timing
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

LOOK_SECONDS = 3600.0
"""How often each backend is looked at, on average; besides, when it is back, and after a start."""
STEP_SECONDS = 5.0
"""At most one backend is looked at in each such step."""
MOST_AT_ONCE = 16
"""Values that one look brings at most; the rest comes with the next."""
_CHECK_SECONDS = 10.0
_OWNER_SECONDS = 20.0
_AGAIN = Timing(retry=30.0, retry_most=LOOK_SECONDS)

_LOOKED_AT = (ACTIVE, DRAINING, OUTSIDE)

Value = Owner | HeadRef
"""What a backend carries, by its name: an owner record, or a head."""


class CopiesUpkeep:
    """Looks after the copies of one mount that owns.  `refilled` counts values that backends lacked."""

    def __init__(
        self, store: Store, members: Members, publisher: Publisher, keys: KeyRing, clock: Clock
    ) -> None:
        self.refilled = 0
        self._last = ""
        self._lost: dict[HeadRef, str] = {}
        self._store = store
        self._members = members
        self._publisher = publisher
        self._keys = keys
        self._clock = clock
        self._next: dict[int, float] = {}
        self._pauses: dict[int, tuple[int, float]] = {}
        self._problems: dict[int, str] = {}
        self._looks: Counter[int] = Counter()

    async def run(self) -> None:
        """Looks until cancelled, or until this mount is fenced."""
        while self._publisher.fenced is None:
            await trio.sleep(STEP_SECONDS * self._jitter())
            await self.step()

    async def step(self) -> None:
        """Looks at the backend that is most due, if any is.  Raises nothing of the backends'."""
        member, published = self._due(), self._published()
        if member is None or published is None:
            return
        now = self._clock.monotonic()
        try:
            done = await self._look_at(member, published)
        except Fenced:
            return
        except QsfsError as error:
            failures = self._pauses.get(member.number, (0, 0.0))[0] + 1
            self._pauses[member.number] = failures, now + _AGAIN.pause(failures, self._clock)
            if self._problems.get(member.number) != str(error):
                _log.info("backend %s: the copies of heads there could not be looked after: %s", member.name, error)
            self._problems[member.number] = str(error)
            return
        self._pauses.pop(member.number, None)
        self._problems.pop(member.number, None)
        self._next[member.number] = now + LOOK_SECONDS * self._jitter() if done else now

    def _jitter(self) -> float:
        return 0.5 + int.from_bytes(self._clock.random_bytes(2), "big") / 0x10000

    def _due(self) -> Member | None:
        now = self._clock.monotonic()
        there = []
        for member in self._members:
            if member.identified and member.state is State.UP and member.entry.state in _LOOKED_AT:
                there.append(member)
            else:
                # It is looked at as soon as it is back: it may have missed something, or be what it was before.
                self._next.pop(member.number, None)
        due = {m.number: self._next.get(m.number, -math.inf) for m in there}
        ready = [m for m in there if max(due[m.number], self._pauses.get(m.number, (0, -math.inf))[1]) <= now]
        return min(ready, key=lambda member: (due[member.number], member.number), default=None)

    def _published(self) -> LocalHead | None:
        """The last published head; None until the local store knows of it, which is soon."""
        published = local_head(self._store, PUBLISHED_KEY, self._keys)
        return published if published is not None and published.sealed.ref == self._publisher.published else None

    async def _look_at(self, member: Member, published: LocalHead) -> bool:
        """Brings what the backend lacks; returns whether it has all then."""
        fleets = published.head.fleets
        entries = (fleet.entry(member.number) for fleet in fleets)
        if not any(entry is not None and entry.identity == member.entry.identity for entry in entries):
            if member.entry.state == OUTSIDE and len(fleets) == 1:
                await self._bury(member, published)
            return True
        newest, owner = published.sealed.ref, self._publisher.owner
        kept = [entry.head for entry in published.head.kept if entry.head != newest]
        wanted: list[Value] = [newest, owner, *sorted(kept, reverse=True)]
        self._lost = {ref: why for ref, why in self._lost.items() if ref in kept}
        self._looks[member.number] += 1
        lacking: list[tuple[Copy, bytes]] = []
        for index, value in enumerate(wanted):
            copy = await self._lacking(member, value, read=index == self._looks[member.number] % len(wanted))
            if copy is None:
                continue
            right = published.sealed.value if value == newest else await self._right(member, value, published)
            if right is not None:
                lacking.append((copy, right))
        if lacking:
            await self._bring(member, published, lacking[:MOST_AT_ONCE])
        return len(lacking) <= MOST_AT_ONCE

    async def _lacking(self, member: Member, value: Value, *, read: bool) -> Copy | None:
        """What the backend has in place of a value; None if it is right.  Cheap, unless it is to be `read`.

        Raises `BackendUnavailable` if that is not known now.
        """
        if not read and await self._is_whole(member, self._key(value)):
            return None
        copy = (await self._copies(Members([member]), value)).copies[0]
        if copy.finding is Finding.UNKNOWN:
            raise BackendUnavailable(copy.why)
        return None if copy.finding is Finding.GOOD else copy

    async def _is_whole(self, member: Member, key: bytes) -> bool:
        """Whether the backend says so of what it has there; what is not certain is read."""
        with trio.move_on_after(_CHECK_SECONDS):
            try:
                return await member.control.check(key) is True
            except BackendError:
                return False
        return False

    async def _right(self, lacks: Member, value: Value, published: LocalHead) -> bytes | None:
        """What the value should be, from the first backend that has it; None where none gives it now."""
        without = {lacks.number}
        for member in self._members:
            if member.number in without or not member.identified or not member.ready:
                continue
            copies = await self._copies(Members([member]), value)
            if copies.right is not None:
                if isinstance(value, HeadRef):
                    self._lost.pop(value, None)
                return copies.right
            if copies.copies[0].finding is not Finding.UNKNOWN:
                without.add(member.number)
        pins = [name for entry in published.head.kept if entry.head == value for name in entry.pins]
        everywhere = {entry.number for fleet in published.head.fleets for entry in fleet.entries}
        if isinstance(value, HeadRef) and pins and everywhere <= without and value not in self._lost:
            self._lost[value] = (
                f"the head of snapshot {listed(pins)} is on no backend any more: it can be neither mounted nor rolled "
                "back to; delete it with 'qsfs snapshot delete'"
            )
            _log.error("%s", self._lost[value])
        return None

    async def _bring(self, member: Member, published: LocalHead, lacking: list[tuple[Copy, bytes]]) -> None:
        brought: list[str] = []

        async def bring() -> None:
            for copy, right in lacking:
                reason = await refill(copy, right)
                if reason is not None:
                    raise BackendUnavailable(reason)
                brought.append(copy.what)

        try:
            done = await self._publisher.as_owner(
                published.sealed, published.head, bring, deadline_seconds=_OWNER_SECONDS
            )
        finally:
            if brought:
                self.refilled += len(brought)
                self._last = f"backend {member.name} lacked, and has again: {listed(brought)}"
                _log.info("%s", self._last)
        if not done:
            raise QuorumUnavailable("it lacks some, and too few backends confirm that this mount owns, or in time")

    async def _bury(self, member: Member, published: LocalHead) -> None:
        """Sees to it that a backend which no fleet has any more says so itself."""

        async def write() -> None:
            await write_tombstone(member, "the newest head does not name it", self._keys, self._clock)

        stone = None
        with trio.move_on_after(_CHECK_SECONDS) as scope:
            try:
                stone = await read_tombstone(member.data, self._keys)
            except Corrupt:
                stone = None
        if scope.cancelled_caught:
            raise BackendUnavailable(f"backend {member.name}: no answer in {_CHECK_SECONDS:g} s")
        if stone is not None and stone.identity == member.entry.identity:
            return
        if not await self._publisher.as_owner(
            published.sealed, published.head, write, deadline_seconds=_OWNER_SECONDS
        ):
            raise QuorumUnavailable("it lacks its tombstone, and too few confirm that this mount owns, or in time")
        _log.info("backend %s left the fleet and got its tombstone", member.name)

    def _key(self, value: Value) -> bytes:
        fsid = self._keys.fsid
        return owner_key(fsid, value) if isinstance(value, Owner) else head_key(fsid, value)

    async def _copies(self, members: Members, value: Value) -> CopySet:
        if isinstance(value, Owner):
            return await owner_copies(members, self._keys, value)
        return await head_copies(members, self._keys, value)

    def warnings(self) -> list[str]:
        """What is lost, for people."""
        return list(self._lost.values())

    def status(self) -> dict[str, object]:
        """For `status`: how many values backends lacked and got again since the start, and the last time."""
        return {"refilled": self.refilled, "last": self._last}
