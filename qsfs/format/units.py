"""Sizes, limits and the bytes with which every value on a backend begins."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from qsfs.errors import Corrupt, QsfsBug

Buffer: TypeAlias = bytes | bytearray | memoryview

PAGE = 4096
"""Bytes in a page."""

DEFAULT_BLOCK = 16 * 1024
"""Bytes in a block of the local cache unless chosen otherwise at format time."""

MAX_EXTENT = 256 * 1024
"""Plain bytes in the largest extent that callers should build (64 pages)."""

PACK_TARGET_PER_SHARD = 256 * 1024
"""Plain bytes for each data shard at which callers should close a pack."""

MAX_SHARD = 4 * 1024 * 1024
"""Largest shard payload in bytes; a 0-db refuses values above 8 MiB."""

MAX_VALUE = 8 * 1024 * 1024 - 64 * 1024
"""Largest value in bytes that is ever written to a backend."""

FORMAT_VERSION = 1
"""The version of the format that this code writes, and the newest that it reads."""

MAGIC = b"QSFS"
"""The first four bytes of every value."""

KEY_PREFIX = b"qsfs:"
"""The first bytes of every key; what does not begin with them was not written by qsfs."""

FSID_SIZE = 16
ID_SIZE = 16
DIGEST_SIZE = 32
TAG_SIZE = 16


class ObjectKind(IntEnum):
    """What a value or a sealed object is.  Numbers are never used again."""

    DATA_PACK = 1
    METADATA_PACK = 2
    HEAD = 3
    OWNER = 4
    IDENTITY = 5
    TOMBSTONE = 6
    SUPERBLOCK = 7
    SHARD = 8
    ARCHIVE = 16


def make_key(prefix: bytes, layout: struct.Struct, *fields: bytes | int) -> bytes:
    """The key of a value; `QsfsBug` if a number does not fit into its place."""
    try:
        return prefix + layout.pack(*fields)
    except struct.error as error:
        raise QsfsBug(f"no key begins with {prefix!r} and holds {fields}: {error}") from error


_PREAMBLE = struct.Struct(">4sHBB16sI")
PREAMBLE_SIZE = _PREAMBLE.size
"""Bytes of the preamble (28)."""


@dataclass(frozen=True, slots=True)
class Preamble:
    """The first 28 bytes of every value, the same in all versions, all integers big-endian.

    `QSFS`, version u16, kind u8, zero u8, file system id (16 bytes), master key's number u32.
    They say which key authenticates the value, so that what a newer version wrote is
    authenticated before it is believed to be newer.
    """

    version: int
    kind: int
    fsid: bytes
    key_number: int

    def encode(self) -> bytes:
        """The 28 bytes."""
        return _PREAMBLE.pack(MAGIC, self.version, self.kind, 0, self.fsid, self.key_number)

    @staticmethod
    def decode(value: Buffer, what: str) -> Preamble:
        """Reads the preamble of `value`; `Corrupt` (naming `what`) if it cannot be one."""
        if len(value) < PREAMBLE_SIZE:
            raise Corrupt(f"{what}: {len(value)} bytes are too few to be a qsfs value")
        magic, version, kind, zero, fsid, key_number = _PREAMBLE.unpack_from(value)
        if magic != MAGIC or zero != 0:
            raise Corrupt(f"{what}: does not begin like a qsfs value")
        return Preamble(version, kind, fsid, key_number)
