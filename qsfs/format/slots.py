"""Key slots by the secrets of people: of a key file, or a passphrase.

A slot is what one secret opens: one record for each master key, all with the same number.  A
passphrase's records share one salt, so that opening them costs one Argon2id; the salt is made of
all master keys in the slot, so that also machines whose random numbers repeat never wrap two
master keys under one wrapping key.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from blake3 import blake3

from qsfs.clock import Clock
from qsfs.errors import KeyFileError, LimitExceeded
from qsfs.format.keys import (
    ARGON2ID,
    KEYFILE,
    SLOT_DIGEST,
    KeyRing,
    KeySlot,
    MasterKey,
    derive,
    slot_salt,
    unwrap_key,
    unwrap_under,
    wrap_keys,
    wrap_under,
)
from qsfs.format.passphrase import KdfCost, Passphrase

Secret: TypeAlias = bytes | Passphrase
"""What opens a slot: the 32 bytes of a key file, or a passphrase."""

MOST_SLOTS = 16
"""So many slots a file system may have."""

OPENABLE = (KEYFILE, ARGON2ID)
"""The kinds that this version opens."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot: its number, its kind, and the numbers of the master keys in it."""

    number: int
    kind: str
    master_keys: tuple[int, ...]


def name_of(secret: Secret) -> str:
    """What a secret is called in messages."""
    return "passphrase" if isinstance(secret, Passphrase) else "key file"


def wrap(
    secret: Secret, keys: KeyRing, *, slot_number: int, clock: Clock, cost: KdfCost | None = None
) -> tuple[KeySlot, ...]:
    """The records of one slot: every master key of `keys` under `secret`.

    `cost` is of a passphrase (None: the default); one that would be refused when it is read is refused
    here (`KeyFileError`).
    """
    if not isinstance(secret, Passphrase):
        return wrap_keys(secret, keys, slot_number=slot_number, clock=clock)
    cost = cost or KdfCost()
    held = [keys.get(number) for number in keys.numbers]
    plain = b"".join(struct.pack(">I", master.number) + master.secret for master in held)
    # Under a key of the newest master key: nothing here helps one who guesses passphrases.
    digest = blake3(plain, key=derive(keys.current.secret, keys.fsid, SLOT_DIGEST)).digest()
    salt = slot_salt(digest, clock)
    derived = secret.derive(salt, cost)
    params: dict[str, int | bytes | str] = {
        "salt": salt,
        "memory_kib": cost.memory_kib,
        "iterations": cost.iterations,
        "lanes": cost.lanes,
    }
    return tuple(
        wrap_under(derived, master, ARGON2ID, params, salt, fsid=keys.fsid, slot_number=slot_number)
        for master in held
    )


def unwrap(slot: KeySlot, secret: Secret, *, fsid: bytes) -> MasterKey:
    """The master key in `slot`; `KeyFileError` if `secret` does not open it, or is not tried on it."""
    if not isinstance(secret, Passphrase):
        return unwrap_key(slot, secret, fsid=fsid)
    cost, salt = cost_of(slot), slot.params.get("salt")
    if cost is None or not isinstance(salt, bytes) or not 8 <= len(salt) <= 64:
        raise KeyFileError(f"key slot {slot.number} of kind '{slot.kind}' does not open with a passphrase")
    try:
        derived = secret.try_on(salt, cost)
    except KeyFileError as error:
        raise KeyFileError(f"key slot {slot.number}: {error}") from None
    master = unwrap_under(slot, derived, salt, fsid=fsid)
    secret.opened(salt, cost)
    return master


def cost_of(slot: KeySlot) -> KdfCost | None:
    """The cost of a passphrase's slot, as it says it; None for other kinds and for nonsense."""
    numbers = [slot.params.get(name) for name in ("memory_kib", "iterations", "lanes")]
    if slot.kind != ARGON2ID:
        return None
    memory, iterations, lanes = numbers
    if not isinstance(memory, int) or not isinstance(iterations, int) or not isinstance(lanes, int):
        return None
    return KdfCost(memory, iterations, lanes)


def masters_of(
    slots: Sequence[KeySlot], secret: Secret, fsid: bytes
) -> tuple[dict[int, dict[int, MasterKey]], list[str]]:
    """What `secret` opens: master keys by number, by slot; and why slots were not even tried."""
    opened: dict[int, dict[int, MasterKey]] = {}
    refused: list[str] = []
    for slot in slots:
        try:
            master = unwrap(slot, secret, fsid=fsid)
        except KeyFileError:
            cost, salt = cost_of(slot), slot.params.get("salt")
            if isinstance(secret, Passphrase) and cost is not None and isinstance(salt, bytes):
                reason = secret.refusal(salt, cost)
                if reason is not None:
                    refused.append(f"key slot {slot.number} was not tried: {reason}")
        else:
            opened.setdefault(slot.number, {})[master.number] = master
    return opened, list(dict.fromkeys(refused))


def list_slots(slots: Sequence[KeySlot]) -> tuple[Slot, ...]:
    """The slots by number."""
    found: dict[int, tuple[str, list[int]]] = {}
    for slot in slots:
        found.setdefault(slot.number, (slot.kind, []))[1].append(slot.master_key_number)
    return tuple(Slot(number, kind, tuple(sorted(masters))) for number, (kind, masters) in sorted(found.items()))


def free_number(slots: Sequence[KeySlot]) -> int:
    """The number of a new slot; `LimitExceeded` if there are too many."""
    numbers = {slot.number for slot in slots}
    if len(numbers) >= MOST_SLOTS:
        raise LimitExceeded(f"there are {len(numbers)} key slots, the most that are possible; remove one first")
    return max(numbers, default=0) + 1


def without(slots: Sequence[KeySlot], numbers: Collection[int]) -> tuple[KeySlot, ...]:
    """All slots but those with these numbers."""
    return tuple(slot for slot in slots if slot.number not in numbers)
