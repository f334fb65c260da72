"""Changes of the key slots: from one superblock to the next revision.  Pure; nothing is written.

Each takes the superblock, the whole key ring and what to change, and returns the next superblock with
the ring that it is sealed under.  None ever leaves a file system without a slot that opens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from qsfs.clock import Clock
from qsfs.errors import KeyFileError, NotFound
from qsfs.format.keys import SECRET_SIZE, KeyRing, KeySlot, MasterKey
from qsfs.format.passphrase import KdfCost
from qsfs.format.slots import (
    OPENABLE,
    Secret,
    Slot,
    cost_of,
    free_number,
    list_slots,
    masters_of,
    name_of,
    without,
    wrap,
)
from qsfs.format.superblock import Superblock


@dataclass(frozen=True, slots=True)
class Change:
    """The next superblock, the key ring that seals it, and the slot that was made or changed (0: none)."""

    superblock: Superblock
    keys: KeyRing
    slot: int = 0


def add_slot(
    superblock: Superblock, keys: KeyRing, secret: Secret, clock: Clock, cost: KdfCost | None = None
) -> Change:
    """One more secret.  `KeyFileError` if it opens a slot already, `LimitExceeded` if there are too many."""
    number = free_number(superblock.slots)
    _refuse_known(superblock, secret)
    made = wrap(secret, keys, slot_number=number, clock=clock, cost=cost)
    return Change(_next(superblock, (*superblock.slots, *made)), keys, number)


def remove_slot(superblock: Superblock, keys: KeyRing, number: int) -> Change:
    """Without one slot.  `NotFound` if there is no such slot, `KeyFileError` if no other one would open."""
    find_slot(superblock, number)
    left = without(superblock.slots, {number})
    if not any(_opens(slot, keys) for slot in list_slots(left)):
        raise KeyFileError(f"key slot {number} is the last that opens this file system; add another one first")
    return Change(_next(superblock, left), keys)


def rotate_slot(
    superblock: Superblock,
    keys: KeyRing,
    number: int,
    secret: Secret,
    clock: Clock,
    cost: KdfCost | None = None,
) -> Change:
    """A new secret for a slot, of whatever kind; the old secret need not be known.

    `KeyFileError` if the secret opens a slot already, this one too.
    """
    find_slot(superblock, number)
    _refuse_known(superblock, secret)
    made = wrap(secret, keys, slot_number=number, clock=clock, cost=cost)
    slots = sorted((*without(superblock.slots, {number}), *made), key=lambda slot: slot.number)
    return Change(_next(superblock, tuple(slots)), keys, number)


def rotate_master(
    superblock: Superblock,
    keys: KeyRing,
    secrets: Sequence[Secret],
    clock: Clock,
    *,
    number: int,
    drop: Collection[int] = (),
) -> Change:
    """A new master key `number` for what is sealed from now on, in each slot that one of `secrets` opens.

    A slot keeps opening only if the new key is wrapped into it, for which its secret is needed: slots that
    no secret opens must be named in `drop`, and are gone then (`KeyFileError` otherwise).
    """
    fresh = MasterKey(number, clock.random_bytes(SECRET_SIZE))
    ring = KeyRing(keys.fsid, [*(keys.get(old) for old in keys.numbers), fresh])
    for dropped in drop:
        find_slot(superblock, dropped)
    kept = without(superblock.slots, drop)
    of: dict[int, Secret] = {}
    for secret in secrets:
        opened, _ = masters_of(kept, secret, keys.fsid)
        if not opened and not masters_of(superblock.slots, secret, keys.fsid)[0]:
            raise KeyFileError(f"one of the {name_of(secret)}s that were given opens no key slot")
        of.update(dict.fromkeys(opened, secret))
    closed = [slot for slot in list_slots(kept) if slot.number not in of]
    if closed:
        told = ", ".join(f"{slot.number} ({slot.kind})" for slot in closed)
        raise KeyFileError(
            f"a new master key has to be put into every key slot, and nothing that was given opens slot {told}: give "
            "their secrets too, or name them to be dropped"
        )
    if not of:
        raise KeyFileError("no key slot would be left; keep one")
    costs = {slot.number: cost_of(slot) for slot in kept}
    slots: list[KeySlot] = []
    for slot_number in sorted(of):
        slots += wrap(of[slot_number], ring, slot_number=slot_number, clock=clock, cost=costs[slot_number])
    return Change(_next(superblock, tuple(slots)), ring)


def find_slot(superblock: Superblock, number: int) -> Slot:
    """The slot with this number; `NotFound` names those that there are."""
    slots = {slot.number: slot for slot in list_slots(superblock.slots)}
    if number not in slots:
        raise NotFound(f"there is no key slot {number}; there are {', '.join(map(str, slots))}")
    return slots[number]


def _next(superblock: Superblock, slots: tuple[KeySlot, ...]) -> Superblock:
    return replace(superblock, slots=slots, revision=superblock.revision + 1)


def _opens(slot: Slot, keys: KeyRing) -> bool:
    return slot.kind in OPENABLE and keys.current.number in slot.master_keys


def _refuse_known(superblock: Superblock, secret: Secret) -> None:
    opened, _ = masters_of(superblock.slots, secret, superblock.fsid)
    if opened:
        raise KeyFileError(
            f"this {name_of(secret)} opens key slot {min(opened)} already; a slot needs a secret of its own"
        )
