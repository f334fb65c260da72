"""Preparing a new backend before a head names it: everything that one of the fleet carries.

It is tried like one of a format, and refused if another file system has anything there.  Then it gets the superblock,
our owner record, the newest head and the kept ones, and an identity of its own.  Until a head names that identity it
is a backend of no fleet: whoever finds it, after a crash at any step, takes it for a new one, and begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from qsfs import failpoints
from qsfs.backend.contract import Backend
from qsfs.clock import Clock
from qsfs.errors import AlreadyFormatted, BackendError, BackendRefused, Corrupt, NotFound
from qsfs.format.head import HeadRef, Owner, SealedHead, head_key, open_head
from qsfs.format.identity import identity_key, tombstone_key
from qsfs.format.keys import KeyRing
from qsfs.format.owner import open_owner_record, owner_key, parse_owner_key
from qsfs.remote.format_trial import Trial, everywhere, try_backends
from qsfs.remote.identity import identify, read_identity, write_identity
from qsfs.remote.members import Member, Members
from qsfs.remote.superblock_write import Standing, spread_superblock

SECONDS = 30.0
"""How long one step may take at one backend."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What every backend of the fleet carries: the sealed superblock, and (key, value) of owner record and heads."""

    superblock: bytes
    records: tuple[tuple[bytes, bytes], ...]


async def collect_carried(
    members: Members, keys: KeyRing, superblock: bytes, owner: Owner, newest: SealedHead, kept: Sequence[HeadRef]
) -> Carried:
    """Gathers it: the records from whichever members give them.

    A kept head or the owner record that none gives now is left out: it is where it always was.
    """
    records = []
    wanted = [owner_key(keys.fsid, owner), *(head_key(keys.fsid, ref) for ref in kept if ref != newest.ref)]
    for key in wanted:
        value = await _fetch(members, keys, key)
        if value is not None:
            records.append((key, value))
    return Carried(superblock, (*records, (newest.key, newest.value)))


async def _fetch(members: Members, keys: KeyRing, key: bytes) -> bytes | None:
    for member in members:
        if not member.identified or not member.ready:
            continue
        try:
            with trio.move_on_after(SECONDS):
                value = await member.control.get(key)
                if value is not None and _authentic(key, value, keys):
                    return value
        except BackendError as error:
            member.failed(error)
    return None


def _authentic(key: bytes, value: bytes, keys: KeyRing) -> bool:
    try:
        if parse_owner_key(key) is not None:
            open_owner_record(key, value, keys)
        else:
            open_head(key, value, keys)
    except Corrupt:
        return False
    return True


async def try_new(members: Sequence[Member], keys: KeyRing, clock: Clock) -> Trial:
    """Tries backends that are to join; nothing of the trial stays.

    Raises `AlreadyFormatted` if another file system has anything there, and what `try_backends` raises.
    """
    for space in _spaces(members):
        # It may have shown an identity before.
        space.expect(identity_key(keys.fsid), None)
    trial = await try_backends(_spaces(members), clock, SECONDS)
    others = {fsid: names for fsid, names in trial.systems.items() if fsid != keys.fsid}
    if others or trial.unreadable:
        Trial(others, trial.unreadable).require_free(None)
        raise AlreadyFormatted("the backends are not empty")
    return trial


async def prepare_new(
    members: Sequence[Member], carried: Carried, shown: Mapping[int, bytes], keys: KeyRing, clock: Clock
) -> None:
    """Makes backends ready that `try_new` has tried.  All of them must answer; the identity comes last.

    `shown` is the identity that each carried when the change was planned (empty: none), by the number of its entry.
    One that carries another by now was given it by another owner, whose fleet may name it: `BackendRefused`.
    """
    by_space = {id(member.control): member for member in members}

    async def clear(control: Backend) -> None:
        for space in dict.fromkeys((by_space[id(control)].data, control)):
            await space.delete(tombstone_key(keys.fsid))

    async def bring(control: Backend, key: bytes, value: bytes) -> None:
        await control.set(key, value)

    controls = [member.control for member in members]
    await everywhere(controls, clear, SECONDS)
    for key, value in carried.records:
        await everywhere(controls, partial(bring, key=key, value=value), SECONDS)
    failpoints.hit("join.records")

    async def mark(control: Backend) -> None:
        member = by_space[id(control)]
        await _require_shown(member, shown[member.number], keys)
        await write_identity(member.entry, member.data, member.control, keys, clock)

    await everywhere(controls, mark, SECONDS)
    failpoints.hit("join.marked")
    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(identify, member, keys)
    for member in members:
        if not member.identified:
            raise member.error or BackendRefused(f"backend {member.name}: does not show the identity that it was given")
    spread = await spread_superblock(Members(members), carried.superblock, keys)
    for number, reason in spread.reasons.items():
        # A newer one is right, and is taken up here before long.
        if number not in spread.others or spread.others[number][0] is not Standing.NEWER:
            raise BackendRefused(reason)
    failpoints.hit("join.prepared")


async def _require_shown(member: Member, shown: bytes, keys: KeyRing) -> None:
    try:
        found = (await read_identity(member.data, keys)).identity
    except NotFound:
        found = b""
    if found != shown:
        raise BackendRefused(
            f"backend {member.name}: was given another identity since it was looked at, by another mount that changed "
            "the fleet; it is left as it is: look with 'qsfs fleet list' who owns the file system now"
        )


def _spaces(members: Sequence[Member]) -> list[Backend]:
    return [s for m in members for s in ([m.data] if m.control is m.data else [m.data, m.control])]
