"""Carrying out a change of the fleet on a mount that owns: the new backends, then two heads, then tombstones.

The first head names the old fleet and the new one and counts with a quorum of each; the second names only the new
one.  A crash before the first was sent leaves the old fleet, and backends that no fleet names; after that whoever owns
next finds the first head, or not, and goes on from what it names: `Generations` names only the newer fleet next.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.errors import BackendError
from qsfs.format.fleet import Fleet, FleetEntry
from qsfs.format.head import KeptGeneration
from qsfs.format.keys import KeyRing
from qsfs.format.units import ID_SIZE
from qsfs.remote.base import PUBLISHED_KEY, local_head
from qsfs.remote.fleet_plan import Configured, FleetPlan, new_entry
from qsfs.remote.flush import Flusher
from qsfs.remote.generation import Generations
from qsfs.remote.identity import write_tombstone
from qsfs.remote.joining import collect_carried, prepare_new, try_new
from qsfs.remote.members import JOINING, Candidate, Member
from qsfs.remote.rollback import LEFT, LEFT_BEHIND
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

ENTRIES = b"fleet-entry"
"""The counter of numbers of fleet entries."""
FLEETS = b"fleet"
"""The counter of numbers of fleets."""
TOMBSTONE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Joining:
    """A new backend: as it is configured, how it is reached, and the control namespace that it has."""

    configured: Configured
    candidate: Candidate
    control_namespace: str


class FleetChange:
    """One change on a running flusher.  `step` is what is being done, for people."""

    def __init__(
        self, flusher: Flusher, generations: Generations, keys: KeyRing, superblock: bytes, clock: Clock
    ) -> None:
        """`superblock` is the sealed one that new backends get."""
        self.step = ""
        self._flusher = flusher
        self._generations = generations
        self._store = flusher.context.store
        self._members = flusher.context.uploader.members
        self._keys = keys
        self._superblock = superblock
        self._clock = clock

    async def run(self, plan: FleetPlan, joining: Sequence[Joining]) -> Fleet:
        """Changes the fleet as planned; returns when a head that names only the new one is published.

        Raises, with the old fleet as it was, `AlreadyFormatted` and what else a new backend is refused for;
        and what flushing raises: then the change goes on with the next owner if its first head was sent.
        Waits for backends as long as it takes, like any publishing.
        """
        before = self._generations.fleets
        # What is lost may be at the address of a new one: nobody is to ask there for it.
        gone = [member for entry in plan.lost if (member := self._members.remove(entry.number)) is not None]
        new: list[Member] = []
        try:
            new += await self._join(joining)
            fleet = plan.fleet(self._next_fleet, [member.entry for member in new])
            for member in new:
                member.entry = replace(member.entry, state=JOINING)
                self._members.add(member)
            self.step = "publishing the head that names both fleets"
            self._generations.change_fleet(fleet)
        except BaseException:
            for member in new:
                self._members.remove(member.number)
            for member in gone:
                self._members.add(member)
            raise
        failpoints.hit("fleet.ordered")
        while self._generations.fleets != (fleet,):
            if self._generations.fleets != before:
                self.step = "publishing the head that names only the new fleet"
            await self._flusher.publish_all()
        failpoints.hit("fleet.changed")
        self.step = ""
        await self._bury([*plan.retired, *plan.lost])
        return fleet

    @property
    def _next_fleet(self) -> int:
        known = max((fleet.number for fleet in self._generations.fleets), default=0)
        number = max(known, self._store.counter(FLEETS)) + 1
        self._store.set_counter(FLEETS, number)
        return number

    async def _join(self, joining: Sequence[Joining]) -> list[Member]:
        """The new backends as members, ready to be named."""
        if not joining:
            return []
        self.step = "trying the new backends"
        first = self._reserve(len(joining), [one.configured.number for one in joining])
        members = [self._member(one, number) for number, one in enumerate(joining, first)]
        await try_new(members, self._keys, self._clock)
        # No number is used twice, also where a crash forgets what was done with it.
        await self._flusher.context.committer.commit()
        failpoints.hit("fleet.reserved")
        self.step = "preparing the new backends"
        for one in joining:
            # One that carried an identity of no fleet was taken in as a member when the mount began.
            known = self._members.by_number(one.configured.number)
            if known is not None and known.entry.identity == one.configured.identity:
                self._members.remove(known.number)
        generations = self._generations
        newest = local_head(self._store, PUBLISHED_KEY, self._keys) or generations.base
        carried = await collect_carried(
            self._members,
            self._keys,
            self._superblock,
            generations.publisher.owner,
            newest.sealed,
            [kept.head for kept in generations.kept],
        )
        shown = {number: one.configured.identity for number, one in enumerate(joining, first)}
        await prepare_new(members, carried, shown, self._keys, self._clock)
        return members

    def _reserve(self, count: int, carried: Sequence[int]) -> int:
        """The first of `count` entry numbers above all that are known to have been used."""
        used = [entry.number for fleet in self._generations.fleets for entry in fleet.entries]
        used += [member.number for member in self._members]
        first = max(self._store.counter(ENTRIES), *used, *carried) + 1
        self._store.set_counter(ENTRIES, first + count - 1)
        return first

    def _member(self, one: Joining, number: int) -> Member:
        entry = new_entry(one.configured, number, self._clock.random_bytes(ID_SIZE), one.control_namespace)
        candidate = one.candidate
        return Member(entry, candidate.data, candidate.control(one.control_namespace), self._clock)

    async def _bury(self, gone: Sequence[FleetEntry]) -> None:
        """Writes tombstones where that is possible now, and takes the members out."""
        async with trio.open_nursery() as nursery:
            for entry in gone:
                member = self._members.remove(entry.number)
                if member is not None and member.identified and member.ready:
                    nursery.start_soon(self._bury_one, member)

    async def _bury_one(self, member: Member) -> None:
        try:
            with trio.move_on_after(TOMBSTONE_SECONDS):
                await write_tombstone(member, "left the fleet", self._keys, self._clock)
        except BackendError as error:
            _log.info("backend %s left the fleet and got no tombstone: %s", member.name, error)


def held_back(store: Store, kept: Sequence[KeptGeneration]) -> str:
    """Why no backend may be retired as empty, or "": packs may be needed that the local tables do not know.

    A rollback leaves generations whose packs its own do not list; what kept ones of them hold is not moved.
    """
    left = store.counter(LEFT_BEHIND)
    names = sorted(n for one in kept for n in one.pins if one.head.generation <= left or n.startswith(LEFT))
    if not names:
        return ""
    return (
        f"a rollback left what these snapshots hold, which is not moved: {', '.join(names)}; delete them, or give the "
        "backend up with --lost once it is disconnected"
    )
