"""The owner of a mount, and the record with which it announces itself."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qsfs.clock import Clock
from qsfs.errors import Corrupt
from qsfs.format import schema
from qsfs.format.keys import KeyRing
from qsfs.format.seal import open_sealed, require_readable, seal
from qsfs.format.units import FSID_SIZE, ID_SIZE, KEY_PREFIX, Buffer, ObjectKind, make_key

OWNER_PREFIX = KEY_PREFIX + b"o:"
_KEY = struct.Struct(">16sQ16s")
_SCHEMA = 1


@dataclass(frozen=True, order=True, slots=True)
class Owner:
    """(epoch, random mount id): the one mount that may publish heads.  The larger one is newer."""

    epoch: int
    mount_id: bytes


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """Announces `owner`; `host` is the machine's name, for people."""

    fsid: bytes
    owner: Owner
    time_ns: int
    host: str


@dataclass(frozen=True, slots=True)
class OwnerKey:
    """What the key of an owner record says."""

    fsid: bytes
    owner: Owner


def owner_key(fsid: bytes, owner: Owner) -> bytes:
    """The key (47 bytes) of an owner's record."""
    return make_key(OWNER_PREFIX, _KEY, fsid, owner.epoch, owner.mount_id)


def parse_owner_key(key: bytes) -> OwnerKey | None:
    """What `key` says, or None if it is not the key of an owner record."""
    if not key.startswith(OWNER_PREFIX) or len(key) != len(OWNER_PREFIX) + _KEY.size:
        return None
    fsid, epoch, mount_id = _KEY.unpack_from(key, len(OWNER_PREFIX))
    return OwnerKey(fsid, Owner(epoch, mount_id))


def seal_owner_record(record: OwnerRecord, keys: KeyRing, clock: Clock) -> tuple[bytes, bytes]:
    """(key, value) of an owner record."""
    plaintext = schema.pack([_SCHEMA, record.fsid, pack_owner(record.owner), record.time_ns, record.host])
    key, value = owner_key(record.fsid, record.owner), seal(ObjectKind.OWNER, plaintext, keys, clock)
    require_readable(record, lambda: open_owner_record(key, value, keys), "an owner record")
    return key, value


def open_owner_record(key: bytes, value: Buffer, keys: KeyRing) -> OwnerRecord:
    """The record at `key`; `Corrupt` unless it is exactly the one that this key names."""
    what = f"owner record at key {key.hex()}"
    fields = schema.record(open_sealed(ObjectKind.OWNER, value, keys, what), _SCHEMA, 5, what)
    record = OwnerRecord(
        fsid=fields.binary(FSID_SIZE),
        owner=take_owner(fields.any(), what),
        time_ns=fields.integer(),
        host=fields.text(255),
    )
    if record.fsid != keys.fsid or key != owner_key(record.fsid, record.owner):
        raise Corrupt(f"{what}: is another record than this key names")
    return record


def pack_owner(owner: Owner) -> list[object]:
    """The elements of an owner inside a record."""
    return [owner.epoch, owner.mount_id]


def take_owner(value: object, what: str) -> Owner:
    """Reads what `pack_owner` wrote."""
    fields = schema.Fields(value, 2, what)
    return Owner(fields.integer(), fields.binary(ID_SIZE))
