"""What marks a backend as one of a file system's, or as retired from it."""

from __future__ import annotations

from dataclasses import dataclass

from qsfs.clock import Clock
from qsfs.errors import Corrupt
from qsfs.format import schema
from qsfs.format.keys import KeyRing
from qsfs.format.seal import open_sealed, require_readable, seal
from qsfs.format.units import FSID_SIZE, ID_SIZE, KEY_PREFIX, Buffer, ObjectKind

IDENTITY_KEY = KEY_PREFIX + b"i:"
"""The key of a backend's identity is this and the file system id."""
TOMBSTONE_KEY = KEY_PREFIX + b"t:"
"""The key of a retired backend's tombstone is this and the file system id."""

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class BackendIdentity:
    """Says that this backend is entry `number` of the fleet of `fsid`, and where its heads are.

    A backend that was swapped carries another one's identity; one that was re-created carries none.
    """

    fsid: bytes
    identity: bytes
    number: int
    control_namespace: str


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Says that the backend with this identity was retired, when and why."""

    fsid: bytes
    identity: bytes
    number: int
    time_ns: int
    reason: str


def identity_key(fsid: bytes) -> bytes:
    """The key (23 bytes) of the backend's identity for this file system."""
    return IDENTITY_KEY + fsid


def tombstone_key(fsid: bytes) -> bytes:
    """The key (23 bytes) of the backend's tombstone for this file system."""
    return TOMBSTONE_KEY + fsid


def parse_identity_key(key: bytes) -> bytes | None:
    """The file system id in the key of an identity, or None if it is not one."""
    return _parse(IDENTITY_KEY, key)


def parse_tombstone_key(key: bytes) -> bytes | None:
    """The file system id in the key of a tombstone, or None if it is not one."""
    return _parse(TOMBSTONE_KEY, key)


def seal_identity(record: BackendIdentity, keys: KeyRing, clock: Clock) -> tuple[bytes, bytes]:
    """(key, value) of a backend's identity."""
    plaintext = schema.pack([_SCHEMA, record.fsid, record.identity, record.number, record.control_namespace])
    key, value = identity_key(record.fsid), seal(ObjectKind.IDENTITY, plaintext, keys, clock)
    require_readable(record, lambda: open_identity(key, value, keys), "a backend identity")
    return key, value


def open_identity(key: bytes, value: Buffer, keys: KeyRing) -> BackendIdentity:
    """The identity at `key`; `Corrupt` unless this file system wrote it for this key."""
    what = f"backend identity at key {key.hex()}"
    fields = schema.record(open_sealed(ObjectKind.IDENTITY, value, keys, what), _SCHEMA, 5, what)
    record = BackendIdentity(
        fsid=fields.binary(FSID_SIZE),
        identity=fields.binary(ID_SIZE),
        number=fields.integer(0, schema.U16),
        control_namespace=fields.text(),
    )
    if record.fsid != keys.fsid or key != identity_key(record.fsid):
        raise Corrupt(f"{what}: belongs to another key")
    return record


def seal_tombstone(record: Tombstone, keys: KeyRing, clock: Clock) -> tuple[bytes, bytes]:
    """(key, value) of a retired backend's tombstone."""
    plaintext = schema.pack(
        [_SCHEMA, record.fsid, record.identity, record.number, record.time_ns, record.reason]
    )
    key, value = tombstone_key(record.fsid), seal(ObjectKind.TOMBSTONE, plaintext, keys, clock)
    require_readable(record, lambda: open_tombstone(key, value, keys), "a tombstone")
    return key, value


def open_tombstone(key: bytes, value: Buffer, keys: KeyRing) -> Tombstone:
    """The tombstone at `key`; `Corrupt` unless this file system wrote it for this key."""
    what = f"tombstone at key {key.hex()}"
    fields = schema.record(open_sealed(ObjectKind.TOMBSTONE, value, keys, what), _SCHEMA, 6, what)
    record = Tombstone(
        fsid=fields.binary(FSID_SIZE),
        identity=fields.binary(ID_SIZE),
        number=fields.integer(0, schema.U16),
        time_ns=fields.integer(),
        reason=fields.text(),
    )
    if record.fsid != keys.fsid or key != tombstone_key(record.fsid):
        raise Corrupt(f"{what}: belongs to another key")
    return record


def _parse(prefix: bytes, key: bytes) -> bytes | None:
    return key[len(prefix) :] if key.startswith(prefix) and len(key) == len(prefix) + FSID_SIZE else None
