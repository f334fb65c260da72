"""The bytes of a data file: what each record holds and how a damaged one is told from a whole one.

All numbers are little-endian.

    file header, 16 bytes:    "qsfs-zdb"  8s | format version u32 | file number u32
    record header, 36 bytes:  mark u16 | flags u8 | key length u8 | value length u32 | time u32
                              | durable u64 | value checksum u64 | header checksum u64
    then the key, then the value.

`durable` is the length of the file that was known to be on the disk when the record was written;
what lies before it was never torn.  Checksums are XXH3-64.  That of the header also covers the
key and is seeded with a secret number of the namespace, so that no client can store a value that
would pass for a record when a damaged file is searched for the next whole one.

XXH3 rather than CRC32C: it is wider, ten times as fast as zlib's CRC on large values, takes any
buffer, and is a dependency already; nothing but this server reads these files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

FILE_MAGIC = b"qsfs-zdb"
FORMAT_VERSION = 1
FILE_HEADER = struct.Struct("<8sII")
RECORD_MARK = 0xB5D7
RECORD_MARK_BYTES = RECORD_MARK.to_bytes(2, "little")

DELETED = 1
"""The key was deleted here; no value follows."""
VOID = 2
"""Torn by a crash and never acknowledged: skip it."""
SEAL = 4
"""No key, no value: carries only `durable`."""

_RECORD = struct.Struct("<HBBIIQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _RECORD.size + _CHECKSUM.size
_KNOWN_FLAGS = DELETED | VOID | SEAL
MAX_TIME = 0xFFFFFFFF

Content = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Record:
    """The header of a record and its key; `offset` is where it begins in its file."""

    offset: int
    flags: int
    key: bytes
    value_length: int
    time_s: int
    durable: int
    value_checksum: int

    @property
    def value_offset(self) -> int:
        """Where the value begins."""
        return self.offset + HEADER_BYTES + len(self.key)

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.value_offset + self.value_length


def value_checksum(value: Content) -> int:
    """The checksum of a value."""
    return xxhash.xxh3_64_intdigest(value)


def encode_record(
    key: bytes, value: Content, *, time_s: int, durable: int, seed: int, flags: int = 0
) -> bytes:
    """The header and key of a record; the value follows them."""
    head = _RECORD.pack(
        RECORD_MARK, flags, len(key), len(value), time_s, durable, value_checksum(value) if value else 0
    )
    return b"".join((head, _CHECKSUM.pack(_header_checksum(head, key, seed)), key))


def with_flags(record: Record, flags: int, seed: int) -> bytes:
    """The header and key of `record` with other flags, to be written over it."""
    head = _RECORD.pack(
        RECORD_MARK,
        flags,
        len(record.key),
        record.value_length,
        record.time_s,
        record.durable,
        record.value_checksum,
    )
    return b"".join((head, _CHECKSUM.pack(_header_checksum(head, record.key, seed)), record.key))


def decode_record(window: memoryview, offset: int, seed: int) -> Record | None:
    """The record whose header and key begin `window`; `None` if they are cut short or damaged."""
    if len(window) < HEADER_BYTES:
        return None
    mark, flags, key_length, value_length, time_s, durable, checksum = _RECORD.unpack_from(window)
    if mark != RECORD_MARK or flags & ~_KNOWN_FLAGS or len(window) < HEADER_BYTES + key_length:
        return None
    key = bytes(window[HEADER_BYTES : HEADER_BYTES + key_length])
    head = bytes(window[: _RECORD.size])
    if _CHECKSUM.unpack_from(window, _RECORD.size)[0] != _header_checksum(head, key, seed):
        return None
    return Record(offset, flags, key, value_length, time_s, durable, checksum)


def _header_checksum(head: bytes, key: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(head + key, seed=seed)
