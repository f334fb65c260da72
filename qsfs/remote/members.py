"""The backends of the fleet as the running system sees them: who they are, and whether they answer.

Nothing here waits on a backend.  Uploads, fetches and heads report what their calls gave
(`succeeded`, `failed`) and ask for a member's state; both are plain attributes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, KeysView
from dataclasses import dataclass, replace
from enum import Enum

from qsfs.backend.contract import Backend
from qsfs.clock import Clock
from qsfs.errors import BackendError, BackendFull, QsfsBug, WrongBackend
from qsfs.format.fleet import ACTIVE as ACTIVE  # noqa: PLC0414 - the states of members are here
from qsfs.format.fleet import DRAINING as DRAINING  # noqa: PLC0414
from qsfs.format.fleet import Fleet, FleetEntry
from qsfs.remote.control import ControlIndex

_log = logging.getLogger(__name__)

JOINING = "joining"
"""State of a member, in no head, that the next head will name: until one does it takes no shards."""
OUTSIDE = "outside"
"""State of a member, in no head, that the newest head does not name: retired, or left from a change that was not
finished.  It may hold shards, and takes none."""

DOWN_AFTER = 3
"""Failures in a row after which a suspect backend counts as down."""
FIRST_PROBE_SECONDS = 1.0
LAST_PROBE_SECONDS = 30.0
QUIET_SECONDS = 30.0
"""A backend that nothing was asked for so long is probed: else it is up for as long as nobody needs it."""


class State(Enum):
    """What recent calls say of a backend."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configured backend of which it is not yet known whether it is one of the fleet.

    `connect` opens another namespace of the same server, for the heads and owner records;
    `control_namespace` is the one that a format makes use of ("": the same namespace).
    """

    address: str
    namespace: str
    data: Backend
    connect: Callable[[str], Backend]
    group: str = ""
    node: str = ""
    weight: int = 1
    control_namespace: str = ""

    @property
    def name(self) -> str:
        """`address/namespace`."""
        return f"{self.address}/{self.namespace}"

    def control(self, namespace: str) -> Backend:
        """The backend of heads and owner records, given the namespace that the identity names."""
        return self.data if namespace in ("", self.namespace) else self.connect(namespace)


class Member:
    """One entry of the fleet with its two namespaces and its health.

    `index` is what is known of the control keys where they share the data's namespace (see
    `ControlIndex`), else None.  `identified` is whether it has shown its identity since it was
    connected: what has not must be asked for it before anything is stored there.
    """

    def __init__(
        self, entry: FleetEntry, data: Backend, control: Backend, clock: Clock, *, identified: bool = False
    ) -> None:
        self.entry = entry
        self.data = data
        self.control = control
        self.identified = identified
        self.index = ControlIndex() if control is data else None
        self._clock = clock
        self._failures = 0
        self._waits = 0
        self._state = State.UP
        self._since_ns = clock.time_ns()
        self._error: BackendError | None = None
        self._full = False
        self._next_probe = -math.inf
        self._heard = clock.monotonic()

    def __repr__(self) -> str:
        return f"Member({self.number}, {self.name}, {self._state.value})"

    @property
    def number(self) -> int:
        """The entry's number, which placements name."""
        return self.entry.number

    @property
    def name(self) -> str:
        """`host:port/namespace` of the data."""
        return self.data.name

    @property
    def state(self) -> State:
        """Up, suspect (the last call failed) or down (several in a row failed)."""
        return self._state

    @property
    def since_ns(self) -> int:
        """Wall time since which it is in this state."""
        return self._since_ns

    @property
    def error(self) -> BackendError | None:
        """What the last failed call raised; None once a call succeeded."""
        return self._error

    @property
    def full(self) -> bool:
        """Whether the last attempt to store found no room.  Reading is not affected."""
        return self._full

    @property
    def ready(self) -> bool:
        """Whether a call is worth trying now: it is not down, or its next probe is due."""
        return self._state is not State.DOWN or self._clock.monotonic() >= self._next_probe

    @property
    def due(self) -> bool:
        """Whether it should be probed: it is in trouble and a call is worth trying, or it was long quiet."""
        if self._state is State.UP:
            return self._clock.monotonic() >= self._heard + QUIET_SECONDS
        return self.ready

    @property
    def writable(self) -> bool:
        """Whether new shards may go there: identified, ready, not full, not draining."""
        return self.identified and self.ready and not self._full and self.entry.state == ACTIVE

    def succeeded(self, *, stored: bool = False) -> None:
        """Records a call that was answered; `stored` if it stored a value."""
        self._failures = self._waits = 0
        self._next_probe = -math.inf
        self._heard = self._clock.monotonic()
        self._error = None
        if stored:
            self._full = False
        self._enter(State.UP)

    def failed(self, error: BackendError) -> None:
        """Records a call that failed.  A full backend answers, so it stays up; one that is not the one
        that was there before (`WrongBackend`) has to show who it is.

        Calls that fail together are one reason to wait: the pause before the next probe grows with the
        probes that failed, not with the calls that were under way.
        """
        self._heard = self._clock.monotonic()
        if isinstance(error, BackendFull):
            self._full = True
            self._error = error
            self._failures = self._waits = 0
            self._next_probe = -math.inf
            self._enter(State.UP)
            return
        if isinstance(error, WrongBackend) and self.identified:
            self.not_ours(error)
            return
        self._error = error
        self._failures += 1
        now = self._clock.monotonic()
        if now >= self._next_probe:
            self._next_probe = now + min(LAST_PROBE_SECONDS, FIRST_PROBE_SECONDS * 2 ** min(self._waits, 10))
            self._waits += 1
        self._enter(State.DOWN if self._failures >= DOWN_AFTER else State.SUSPECT)

    def has_room(self) -> None:
        """Records that the backend says it has room again."""
        self._full = False

    def not_ours(self, error: BackendError) -> None:
        """Records that what answers there is not this entry of the fleet: down until it shows who it is."""
        if self.identified:
            _log.warning("%s; nothing is stored there until it shows its identity", error)
        self.identified = False
        if self.index is not None:
            # The cursor came from another namespace than what answers there from now on.
            self.index.reset()
        self._failures = max(self._failures, DOWN_AFTER)
        self.failed(error)

    async def probe(self) -> None:
        """Asks for the cheapest answer there is, and records it.  Raises nothing of the backend's."""
        try:
            await self.data.info()
        except BackendError as error:
            self.failed(error)
        else:
            self.succeeded()

    def _enter(self, state: State) -> None:
        if state is not self._state:
            if state is State.DOWN:
                _log.info("backend %s is down: %s", self.name, self._error)
            elif self._state is State.DOWN:
                _log.info("backend %s is up again", self.name)
            self._state = state
            self._since_ns = self._clock.time_ns()


class Members:
    """All members of the fleets in use, by number."""

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self._members: dict[int, Member] = {}
        self._rivals: list[Member] = []
        for member in members:
            self.add(member)

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._members.values(), key=lambda member: member.number))

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: Member) -> None:
        """Adds a member; `QsfsBug` if its number is taken."""
        if member.number in self._members:
            raise QsfsBug(
                f"two backends have number {member.number}: {self._members[member.number].name}, "
                f"{member.name}"
            )
        self._members[member.number] = member

    def add_rival(self, member: Member) -> None:
        """Keeps a member whose number another one has, with another identity: a head tells which one is meant."""
        self._rivals.append(member)

    def remove(self, number: int) -> Member | None:
        """Takes the member out; None if there is none."""
        return self._members.pop(number, None)

    def by_number(self, number: int) -> Member | None:
        """The member that placements call `number`; None if no configured backend is that entry."""
        return self._members.get(number)

    @property
    def numbers(self) -> KeysView[int]:
        """The numbers of all members, also of those that come later."""
        return self._members.keys()

    def of(self, numbers: Collection[int]) -> list[Member]:
        """The members with these numbers, in order; numbers without a member are left out."""
        return [self._members[number] for number in sorted(numbers) if number in self._members]

    def adopt(self, fleets: Collection[Fleet]) -> list[FleetEntry]:
        """Takes the entries from the fleets that the newest head names; later fleets win.

        Returns the entries that no member is: their backends are not configured, or carry another
        identity.  Members that no fleet names take no shards any more, and may still hold some.
        """
        entries = {entry.number: entry for fleet in fleets for entry in fleet.entries}
        for number in entries.keys() - {entry.number for fleet in (*fleets,)[-1:] for entry in fleet.entries}:
            # It leaves with the next head: what is stored now must not count on it.
            entries[number] = replace(entries[number], state=DRAINING)
        for member in self._members.values():
            if member.number not in entries and member.entry.state != JOINING:
                member.entry = replace(member.entry, state=OUTSIDE)
        missing = []
        for _, entry in sorted(entries.items()):
            meant = self._meant_by(entry)
            if meant is None:
                missing.append(entry)
            elif meant.entry.identity != entry.identity:
                missing.append(entry)
                meant.entry = replace(meant.entry, state=OUTSIDE)
            else:
                meant.entry = entry
        return missing

    def _meant_by(self, entry: FleetEntry) -> Member | None:
        member = self._members.get(entry.number)
        if member is None or member.entry.identity == entry.identity:
            return member
        for index, rival in enumerate(self._rivals):
            if (rival.number, rival.entry.identity) == (entry.number, entry.identity):
                self._rivals[index] = member
                member.entry = replace(member.entry, state=OUTSIDE)
                self._members[entry.number] = rival
                return rival
        return member

    def due(self) -> list[Member]:
        """Members that should be probed now."""
        return [member for member in self if member.due]
