"""Sealing of one small object (a head, an owner record, ...) under a key of its own.

A sealed value is, integers big-endian:

    preamble           28  magic, version, kind, zero, file system id, master key's number
    object id          16
    plaintext digest   32  keyed BLAKE3
    plaintext length    4
    ciphertext, tag    plaintext length + 16: AES-256-GCM, nonce 0

The 80 bytes before the ciphertext are the associated data.  All versions keep this envelope.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from typing import TypeVar

from blake3 import blake3
from cryptography.exceptions import InvalidTag

from qsfs.clock import Clock
from qsfs.errors import Corrupt, FormatMismatch, LimitExceeded, QsfsBug
from qsfs.format.keys import KeyRing
from qsfs.format.units import (
    FORMAT_VERSION,
    ID_SIZE,
    MAX_VALUE,
    PREAMBLE_SIZE,
    TAG_SIZE,
    Buffer,
    ObjectKind,
    Preamble,
)

T = TypeVar("T")

_REST = struct.Struct(">16s32sI")
_HEADER_SIZE = PREAMBLE_SIZE + _REST.size
OVERHEAD = _HEADER_SIZE + TAG_SIZE
"""Bytes that sealing adds (96)."""


def new_object_id(digest: bytes, clock: Clock) -> bytes:
    """A 128-bit id made of random bits and of what the object holds.

    Machines that repeat each other's random numbers still give different contents different ids.
    """
    context = "qsfs 1 object id"
    return blake3(clock.random_bytes(ID_SIZE) + digest, derive_key_context=context).digest(length=ID_SIZE)


def nonce(position: int) -> bytes:
    """The 96-bit nonce of a position inside an object."""
    return position.to_bytes(12, "big")


def seal(kind: ObjectKind, plaintext: bytes, keys: KeyRing, clock: Clock) -> bytes:
    """The sealed value of `plaintext`; `LimitExceeded` if a backend could not hold it."""
    if len(plaintext) + OVERHEAD > MAX_VALUE:
        size = len(plaintext) + OVERHEAD
        raise LimitExceeded(f"a sealed {kind.name.lower()} of {size} bytes exceeds the limit of {MAX_VALUE}")
    number = keys.current.number
    digest = blake3(plaintext, key=keys.digest_key(number)).digest()
    object_id = new_object_id(digest, clock)
    preamble = Preamble(FORMAT_VERSION, kind, keys.fsid, number)
    header = preamble.encode() + _REST.pack(object_id, digest, len(plaintext))
    cipher = keys.cipher(number, FORMAT_VERSION, kind, object_id, digest)
    return header + cipher.encrypt(nonce(0), plaintext, header)


def open_sealed(kind: ObjectKind, value: Buffer, keys: KeyRing, what: str) -> bytes:
    """The plaintext of a sealed value; `what` names it in messages.

    `Corrupt` unless it is exactly what the holder of a master key sealed as this kind for this file
    system; `FormatMismatch` if it is, but in a newer version.
    """
    preamble = Preamble.decode(value, what)
    if preamble.kind != kind:
        raise Corrupt(f"{what}: is of kind {preamble.kind}, not {kind.name.lower()}")
    if preamble.fsid != keys.fsid:
        raise Corrupt(f"{what}: belongs to file system {preamble.fsid.hex()}, not {keys.fsid.hex()}")
    if len(value) < OVERHEAD:
        raise Corrupt(f"{what}: cut short to {len(value)} bytes")
    object_id, digest, length = _REST.unpack_from(value, PREAMBLE_SIZE)
    if len(value) != length + OVERHEAD:
        raise Corrupt(f"{what}: {len(value)} bytes instead of {length + OVERHEAD}")
    cipher = keys.cipher(preamble.key_number, preamble.version, kind, object_id, digest)
    view = memoryview(value)
    try:
        plaintext = cipher.decrypt(nonce(0), view[_HEADER_SIZE:], bytes(view[:_HEADER_SIZE]))
    except InvalidTag:
        raise Corrupt(f"{what}: does not authenticate") from None
    actual = blake3(plaintext, key=keys.digest_key(preamble.key_number)).digest()
    if not hmac.compare_digest(actual, digest):
        raise Corrupt(f"{what}: its digest does not fit its contents")
    require_version(preamble.version, what)
    return plaintext


def require_readable(record: T, reopen: Callable[[], T], what: str) -> None:
    """`QsfsBug` unless `reopen` gives `record` back: what could not be read is never sent."""
    try:
        again = reopen()
    except (Corrupt, FormatMismatch) as error:
        raise QsfsBug(f"{what} could not be read back: {error}") from error
    if again != record:
        raise QsfsBug(f"{what} reads back as something else")


def require_version(version: int, what: str) -> None:
    """`FormatMismatch` unless this code reads `version`.  Ask only about authenticated bytes."""
    if version != FORMAT_VERSION:
        raise FormatMismatch(
            f"{what}: written in format version {version}, this qsfs reads {FORMAT_VERSION}: "
            "use the qsfs that wrote it"
        )
