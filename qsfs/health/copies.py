"""Superblock, identities, owner records and heads: the same few values that every backend carries.

Each has one right value, known once any copy of it authenticates; a copy that is missing or
something else is refilled.  Heads and owner records lie in the control namespace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

import trio

from qsfs.backend.contract import Backend
from qsfs.errors import BackendError, Corrupt, FormatMismatch, KeyFileError
from qsfs.format.head import HeadRef, Owner, head_key, open_head, open_owner_record, owner_key
from qsfs.format.identity import identity_key, open_identity
from qsfs.format.keys import KeyRing
from qsfs.format.superblock import SUPERBLOCK_KEY, is_whole, read_superblock
from qsfs.remote.ask import Finding
from qsfs.remote.members import Member, Members

CALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Copy:
    """One value that a backend should carry, and what it carries."""

    what: str
    member: Member
    backend: Backend
    key: bytes
    finding: Finding
    why: str
    value: bytes | None = None


@dataclass(frozen=True, slots=True)
class CopySet:
    """All copies of one value; `right` is what each should be, None if none authenticates."""

    what: str
    copies: tuple[Copy, ...]
    right: bytes | None

    @property
    def wrong(self) -> list[Copy]:
        """The copies that are positively missing or something else."""
        return [copy for copy in self.copies if copy.finding in (Finding.ABSENT, Finding.CORRUPT)]


async def superblock_copies(members: Members, keys: KeyRing) -> CopySet:
    """The superblock on every backend; the right one is that of the highest revision.

    One that says it is of a newer master key than `keys` has is unknown, and stays; so does one that is
    whole and sealed under another key.
    """
    revisions: dict[bytes, int] = {}

    def check(value: bytes) -> None:
        try:
            revisions[value] = read_superblock(value, keys).revision
        except Corrupt as error:
            if is_whole(value, keys.fsid):
                what = f"{error}, and is whole: of another change of the key slots; see 'qsfs key list'"
                raise KeyFileError(what) from None
            raise

    found = await _read(members, "superblock", SUPERBLOCK_KEY, lambda member: member.data, check)
    held = Counter(copy.value for copy in found)
    right = max(revisions, key=lambda value: (revisions[value], held[value], value), default=None)
    copies = tuple(
        copy
        if copy.finding is not Finding.GOOD or copy.value == right
        else _changed(copy, f"backend {copy.backend.name}: carries an older superblock")
        for copy in found
    )
    return CopySet("superblock", copies, right)


async def identity_copies(members: Members, keys: KeyRing) -> list[CopySet]:
    """The identity of every backend, in both its namespaces; each has its own."""
    sets = []
    key = identity_key(keys.fsid)
    for member in members:
        spaces = [member.data] if member.control is member.data else [member.data, member.control]

        def check(value: bytes, member: Member = member) -> None:
            found = open_identity(key, value, keys)
            if (found.identity, found.number) != (member.entry.identity, member.entry.number):
                raise Corrupt(f"it is the identity of entry {found.number}")

        copies = [
            await _read_one(member, space, "identity", key, check) for space in spaces if member.identified
        ]
        right = next((copy.value for copy in copies if copy.finding is Finding.GOOD), None)
        sets.append(CopySet(f"identity of entry {member.number}", tuple(copies), right))
    return sets


async def head_copies(members: Members, keys: KeyRing, ref: HeadRef) -> CopySet:
    """One head on every backend."""
    key = head_key(keys.fsid, ref)
    what = f"head of generation {ref.generation} of epoch {ref.owner.epoch}"
    found = await _read(
        members, what, key, lambda member: member.control, lambda value: open_head(key, value, keys)
    )
    return CopySet(what, tuple(found), _right(found))


async def owner_copies(members: Members, keys: KeyRing, owner: Owner) -> CopySet:
    """One owner record on every backend."""
    key = owner_key(keys.fsid, owner)
    what = f"owner record of epoch {owner.epoch}"
    found = await _read(
        members, what, key, lambda member: member.control, lambda value: open_owner_record(key, value, keys)
    )
    return CopySet(what, tuple(found), _right(found))


async def refill(copy: Copy, right: bytes) -> str | None:
    """Stores the right value where a copy is missing or wrong; returns why that failed, or None."""
    try:
        with trio.fail_after(CALL_SECONDS):
            await copy.backend.set(copy.key, right)
            if await copy.backend.get(copy.key) != right:
                return f"backend {copy.backend.name}: gives back something else than was stored"
    except BackendError as error:
        copy.member.failed(error)
        return str(error)
    except trio.TooSlowError:
        return f"backend {copy.backend.name}: no answer in {CALL_SECONDS:.0f} s"
    return None


def _right(copies: Collection[Copy]) -> bytes | None:
    return next((copy.value for copy in copies if copy.finding is Finding.GOOD), None)


def _changed(copy: Copy, why: str) -> Copy:
    return Copy(copy.what, copy.member, copy.backend, copy.key, Finding.CORRUPT, why, copy.value)


async def _read(
    members: Members,
    what: str,
    key: bytes,
    space: Callable[[Member], Backend],
    check: Callable[[bytes], object],
) -> list[Copy]:
    found: dict[int, Copy] = {}

    async def read(member: Member) -> None:
        found[member.number] = await _read_one(member, space(member), what, key, check)

    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(read, member)
    return [found[number] for number in sorted(found)]


async def _read_one(
    member: Member, backend: Backend, what: str, key: bytes, check: Callable[[bytes], object]
) -> Copy:
    def copy(finding: Finding, why: str, value: bytes | None = None) -> Copy:
        return Copy(what, member, backend, key, finding, why, value)

    try:
        with trio.fail_after(CALL_SECONDS):
            value = await backend.get(key)
    except BackendError as error:
        member.failed(error)
        return copy(Finding.UNKNOWN, str(error))
    except trio.TooSlowError:
        return copy(Finding.UNKNOWN, f"backend {backend.name}: no answer in {CALL_SECONDS:.0f} s")
    member.succeeded()
    if value is None:
        if not member.identified:
            return copy(Finding.UNKNOWN, f"backend {backend.name}: has not shown its identity yet")
        return copy(Finding.ABSENT, f"backend {backend.name}: lacks the {what}")
    try:
        check(value)
    except KeyFileError as error:
        return copy(Finding.UNKNOWN, f"backend {backend.name}: its {what} cannot be judged: {error}")
    except (Corrupt, FormatMismatch) as error:
        return copy(Finding.CORRUPT, f"backend {backend.name}: its {what} is not what was written ({error})")
    return copy(Finding.GOOD, "", value)
