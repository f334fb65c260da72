"""Which backend is which: every one carries a sealed identity, so a swapped or re-created one is noticed.

Three results are kept apart: the identity that was read, positively none (`NotFound`), one that is not
what this file system wrote (`Corrupt`); what did not answer is `BackendUnavailable` as ever.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import trio

from qsfs.backend.contract import Session
from qsfs.clock import Clock
from qsfs.errors import BackendError, BackendUnavailable, Corrupt, FormatMismatch, NotFound, WrongBackend
from qsfs.format.head import Fleet, FleetEntry
from qsfs.format.identity import (
    BackendIdentity,
    Tombstone,
    identity_key,
    open_identity,
    open_tombstone,
    seal_identity,
    seal_tombstone,
    tombstone_key,
)
from qsfs.format.keys import KeyRing
from qsfs.remote.members import ACTIVE, Candidate, Member, Members


@dataclass(frozen=True, slots=True)
class Stranger:
    """A configured backend that is no member, and why (`WrongBackend`, or what its calls raised)."""

    candidate: Candidate
    error: BackendError


async def read_identity(session: Session, keys: KeyRing) -> BackendIdentity:
    """The identity that a namespace carries for this file system.

    `NotFound` if it positively has none, `Corrupt` if what lies there does not authenticate.
    """
    return (await _sealed_identity(session, keys))[0]


async def _sealed_identity(session: Session, keys: KeyRing) -> tuple[BackendIdentity, bytes]:
    key = identity_key(keys.fsid)
    value = await session.get(key)
    if value is None:
        raise NotFound(f"backend {session.name}: carries no identity of file system {keys.fsid.hex()}")
    return open_identity(key, value, keys), value


async def read_tombstone(session: Session, keys: KeyRing) -> Tombstone | None:
    """The tombstone of a retired backend; None if it has none.  `Corrupt` as `read_identity`."""
    key = tombstone_key(keys.fsid)
    value = await session.get(key)
    return None if value is None else open_tombstone(key, value, keys)


async def write_tombstone(member: Member, why: str, keys: KeyRing, clock: Clock) -> None:
    """Tells a backend that it is of no fleet any more, for whoever finds it later.  Raises what its calls raise."""
    record = Tombstone(keys.fsid, member.entry.identity, member.number, clock.time_ns(), why)
    key, value = seal_tombstone(record, keys, clock)
    await member.data.set(key, value)


async def require_identity(session: Session, entry: FleetEntry, keys: KeyRing) -> bytes:
    """The sealed identity, or `WrongBackend` unless `session` leads to the backend of `entry`."""
    try:
        found, sealed = await _sealed_identity(session, keys)
    except NotFound:
        raise WrongBackend(
            f"backend {session.name}: has lost the identity of entry {entry.number}: it was re-created or "
            "emptied; what it held must be rebuilt there"
        ) from None
    except Corrupt as error:
        raise WrongBackend(
            f"backend {session.name}: the identity of entry {entry.number} does not authenticate ({error})"
        ) from error
    if (found.identity, found.number) != (entry.identity, entry.number):
        raise WrongBackend(
            f"backend {session.name}: is entry {found.number} of the fleet, not {entry.number}: backends "
            "were swapped; check the addresses in the configuration"
        )
    return sealed


async def identify(member: Member, keys: KeyRing) -> bool:
    """Asks a member for its identity in both its namespaces, and records the result in it.

    From then on its connections are used only where they lead to just these records.
    """
    key = identity_key(keys.fsid)
    try:
        for namespace in dict.fromkeys((member.data, member.control)):
            if not member.identified:
                namespace.expect(key, None)
            namespace.expect(key, await require_identity(namespace, member.entry, keys))
    except WrongBackend as error:
        member.not_ours(error)
    except BackendError as error:
        member.failed(error)
    else:
        member.identified = True
        member.succeeded()
    return member.identified


async def write_identity(
    entry: FleetEntry, data: Session, control: Session, keys: KeyRing, clock: Clock
) -> None:
    """Makes a backend entry `entry` of the fleet, in both its namespaces; that of the data, which is asked, last."""
    record = BackendIdentity(keys.fsid, entry.identity, entry.number, entry.control_namespace)
    key, value = seal_identity(record, keys, clock)
    if control is not data:
        await control.set(key, value)
    await data.set(key, value)


async def find_members(
    candidates: Sequence[Candidate],
    keys: KeyRing,
    clock: Clock,
    *,
    fleets: Collection[Fleet] = (),
    attempt_seconds: float = 10.0,
) -> tuple[Members, list[Stranger]]:
    """Asks every configured backend who it is.

    A member is one that shows an identity of this file system.  One that does not answer becomes
    a member that is not `identified`, where `fleets` (those of the local base) name its address
    and namespace.  All others are returned as strangers, each with the reason.
    """
    stored = {entry.number: entry for fleet in fleets for entry in fleet.entries}
    found: list[tuple[Candidate, BackendIdentity | BackendError]] = []

    async def ask(candidate: Candidate) -> None:
        found.append((candidate, await _who(candidate, keys, attempt_seconds)))

    async with trio.open_nursery() as nursery:
        for candidate in candidates:
            nursery.start_soon(ask, candidate)
    members, strangers = Members(), list[Stranger]()
    answered = [(c, who) for c, who in found if isinstance(who, BackendIdentity)]
    for candidate, identity in sorted(answered, key=lambda pair: pair[0].name):
        entry = stored.get(identity.number)
        if entry is None or entry.identity != identity.identity:
            entry = _entry(candidate, identity)
        _add(members, strangers, candidate, entry, clock, identified=True)
    for candidate, error in sorted(
        ((c, e) for c, e in found if isinstance(e, BackendError)), key=lambda p: p[0].name
    ):
        entry = _by_address(stored.values(), candidate)
        if entry is None or isinstance(error, WrongBackend):
            strangers.append(Stranger(candidate, error))
        else:
            _add(members, strangers, candidate, entry, clock, identified=False, error=error)
    return members, strangers


async def ask_identity(candidate: Candidate, keys: KeyRing, attempt_seconds: float) -> BackendIdentity:
    """Asks a configured backend who it is; its connections then lead to that one only.

    Raises `BackendError` if it does not answer in time, and as `read_identity`.
    """
    try:
        with trio.fail_after(attempt_seconds):
            identity, sealed = await _sealed_identity(candidate.data, keys)
            candidate.data.expect(identity_key(keys.fsid), sealed)
            return identity
    except trio.TooSlowError:
        raise BackendUnavailable(f"backend {candidate.name}: no answer in {attempt_seconds:g} s") from None


async def ask_anew(
    candidate: Candidate, members: Members, keys: KeyRing, attempt_seconds: float
) -> BackendIdentity:
    """As `ask_identity`, of a backend that may be a member, which it may have ceased to be.

    Connections of a member lead to nothing but the identity that it has shown; what is not that any more is taken
    note of first.
    """
    with trio.move_on_after(attempt_seconds):
        for member in members:
            if member.data is candidate.data and not await identify(member, keys):
                # Only the second time is it asked whatever it is now.
                await identify(member, keys)
    return await ask_identity(candidate, keys, attempt_seconds)


async def _who(candidate: Candidate, keys: KeyRing, attempt_seconds: float) -> BackendIdentity | BackendError:
    try:
        return await ask_identity(candidate, keys, attempt_seconds)
    except BackendError as error:
        return error
    except (NotFound, Corrupt, FormatMismatch) as error:
        return WrongBackend(f"{error}; it was re-created, swapped, or is not of this file system")


def _entry(candidate: Candidate, identity: BackendIdentity) -> FleetEntry:
    return FleetEntry(
        number=identity.number,
        identity=identity.identity,
        address=candidate.address,
        namespace=candidate.namespace,
        control_namespace=identity.control_namespace,
        group=candidate.group,
        node=candidate.node,
        weight=candidate.weight,
        state=ACTIVE,
    )


def _by_address(entries: Collection[FleetEntry], candidate: Candidate) -> FleetEntry | None:
    named = (e for e in entries if (e.address, e.namespace) == (candidate.address, candidate.namespace))
    return next(named, None)


def _add(
    members: Members,
    strangers: list[Stranger],
    candidate: Candidate,
    entry: FleetEntry,
    clock: Clock,
    *,
    identified: bool,
    error: BackendError | None = None,
) -> None:
    taken = members.by_number(entry.number)
    if taken is not None and taken.entry.identity != entry.identity:
        # One of the two is left from a change of the fleet that was not finished; the newest head tells which.
        members.add_rival(
            Member(entry, candidate.data, candidate.control(entry.control_namespace), clock, identified=identified)
        )
        return
    if taken is not None:
        strangers.append(
            Stranger(
                candidate,
                WrongBackend(
                    f"backend {candidate.name}: has the same identity as {taken.name} (entry "
                    f"{entry.number}): one is a "
                    "copy of the other, or they are one backend under two addresses; configure only the "
                    "right one"
                ),
            )
        )
        return
    control = candidate.control(entry.control_namespace)
    member = Member(entry, candidate.data, control, clock, identified=identified)
    if error is not None:
        member.failed(error)
    members.add(member)
