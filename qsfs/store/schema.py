"""Tables of the local store, their keys and rows.  All integers in keys are big-endian.

Tables 1 to 8 are what a generation holds on the backends, so their numbers and rows are a remote
format too (docs/format.md, "Rows"); tables from 32 on are local and may change with the schema
version.  Rows are little-endian structs; a first byte names the row's version where a row may grow.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

from qsfs.errors import Corrupt

SCHEMA_VERSION = 1
"""Of the rows of a generation."""
LOCAL_SCHEMA_VERSION = 2
"""Of a store's local tables.  2 has the table START; a store of version 1 gets it when it is opened to write."""

PAGE = 4096
BLOCK_PAGES = 4
BLOCK_SIZE = PAGE * BLOCK_PAGES
TAIL = 16
VALUE_SIZE = BLOCK_SIZE - TAIL

ROOT_INODE = 1

Page = bytes | memoryview


class Table(IntEnum):
    """Table numbers.  The comment gives key -> row."""

    INODES = 1  # inode u64 -> Inode row
    ENTRIES = 2  # parent u64, name -> Entry row
    XATTRS = 3  # inode u64, name -> value
    SYMLINKS = 4  # inode u64 -> target
    EXTENTS = 5  # inode u64, first page u64 -> Extent row
    PACKS = 6  # pack number u64 -> Pack row
    TRUNCATIONS = 7  # inode u64 -> Truncations row
    COUNTERS = 8  # name -> u64
    COOKIES = 32  # parent u64, cookie u64 -> name (derived from ENTRIES)
    ORPHANS = 33  # inode u64 -> b""
    BLOCKS = 34  # inode u64, block u64 -> Block row
    VALUES = 35  # inode u64, block u64 -> the block's first VALUE_SIZE bytes
    DIRTY = 36  # inode u64, block u64 -> b""
    CHANGED = 37  # table u8, key -> commit number u64 (changed since the last generation)
    SPILL_BLOCKS = 38  # inode u64, block u64 -> Block row: uncovered pages that left memory
    SPILL_VALUES = 39  # inode u64, block u64 -> the block's first VALUE_SIZE bytes
    SPILL_COVERED = 40  # inode u64 -> write number u64: the inode's spilled pages were covered by it
    LOCAL = 41  # name -> value (docs/local-store.md)
    START = 42  # inode u64, chunk u64 -> bitmap of the pages in it that are read at a start (store/start.py)


REMOTE_TABLES = frozenset(t for t in Table if t < 32)
"""Tables whose rows a generation holds."""

_U64 = struct.Struct(">Q")
_U64U64 = struct.Struct(">QQ")
_PLAIN_U64 = struct.Struct("<Q")


def u64(number: int) -> bytes:
    """A big-endian key of one number."""
    return _U64.pack(number)


def u64_pair(first: int, second: int) -> bytes:
    """A big-endian key of two numbers."""
    return _U64U64.pack(first, second)


def u64_pairs(first: int, seconds: Iterable[int]) -> list[bytes]:
    """Big-endian keys that share their first number."""
    pack = _U64U64.pack
    return [pack(first, second) for second in seconds]


def split_u64(key: bytes) -> int:
    """The number that a key starts with."""
    return int(_U64.unpack_from(key)[0])


def split_u64_pair(key: bytes) -> tuple[int, int]:
    """The two numbers of a key."""
    first, second = _U64U64.unpack(key)
    return first, second


def plain_u64(number: int) -> bytes:
    """A little-endian counter row."""
    return _PLAIN_U64.pack(number)


def read_plain_u64(row: bytes) -> int:
    """The number in a counter row."""
    return int(_PLAIN_U64.unpack(row)[0])


class InodeFlag(IntFlag):
    """What policies say of an inode; stored, so that a decision outlives a change of the config."""

    LOCAL_ONLY = 1
    PINNED = 2
    ATOMIC_SYNC = 4
    WAIT = 8
    WRITE_THROUGH = 16
    RESTORE_ASIDE = 32
    PINNED_BY_HAND = 64  # by `qsfs cache pin`, not by a rule; directories carry it for what is made in them


_INODE = struct.Struct("<BIIIIQIqqqQQQQ")


@dataclass(slots=True, weakref_slot=True, eq=False)
class Inode:
    """One inode.  `size`, `allocated` and a file's `mtime_ns` belong to its data; the rest to the namespace.

    Times are nanoseconds since 1970 (signed 64 bit); `allocated` counts pages that are not holes;
    `next_cookie` is the next directory cookie, `parent` the directory that holds a directory.
    """

    number: int
    mode: int
    uid: int = 0
    gid: int = 0
    nlink: int = 0
    rdev: int = 0
    flags: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    size: int = 0
    allocated: int = 0
    next_cookie: int = 3
    parent: int = 0

    def encode(self) -> bytes:
        """The row, in the order of the struct below: version u8 = 1, u32 and u64 fields, times i64."""
        return _INODE.pack(
            1,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.rdev,
            self.flags,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.size,
            self.allocated,
            self.next_cookie,
            self.parent,
        )

    @classmethod
    def decode(cls, number: int, row: bytes) -> Inode:
        """The inode in a row; raises `Corrupt` if the row is not one."""
        try:
            version, *fields = _INODE.unpack(row)
        except struct.error:
            raise Corrupt(f"inode {number}: row of {len(row)} bytes; run 'qsfs fsck'") from None
        if version != 1:
            raise Corrupt(f"inode {number}: row version {version} is unknown; run 'qsfs fsck'")
        return cls(number, *fields)


_ENTRY = struct.Struct("<QQB")


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry: the inode, the readdir cookie, and the type bits of the mode (mode >> 12)."""

    inode: int
    cookie: int
    kind: int

    def encode(self) -> bytes:
        """The row: inode u64, cookie u64, kind u8."""
        return _ENTRY.pack(self.inode, self.cookie, self.kind)

    @classmethod
    def decode(cls, row: bytes) -> Entry:
        """The entry in a row; raises `Corrupt`."""
        try:
            return cls(*_ENTRY.unpack(row))
        except struct.error:
            raise Corrupt(f"directory entry row of {len(row)} bytes; run 'qsfs fsck'") from None


_EXTENT = struct.Struct("<QIIQIIIIB")
_EXTENT_PAGES = struct.Struct("<8xI4xQ17x")


@dataclass(frozen=True, slots=True)
class ExtentRow:
    """A run of pages of one file in one pack.

    `pages` is what is left of it here, starting at page `first` (the key); `skip` pages of the
    sealed extent lie before it.  `write_number` is the highest of the sealed pages, and with
    `first - skip` and `plain_length` part of what the seal binds.
    """

    first: int
    write_number: int
    pages: int
    skip: int
    pack: int
    ordinal: int
    offset: int
    sealed_length: int
    plain_length: int
    codec: int

    def encode(self) -> bytes:
        """The row: write number u64, pages and skip u32, pack u64, four u32, codec u8."""
        return _EXTENT.pack(
            self.write_number,
            self.pages,
            self.skip,
            self.pack,
            self.ordinal,
            self.offset,
            self.sealed_length,
            self.plain_length,
            self.codec,
        )

    @staticmethod
    def pages_and_pack(row: bytes) -> tuple[int, int]:
        """Only how many pages a row has, and in which pack: for counting; raises `Corrupt`."""
        try:
            pages, pack = _EXTENT_PAGES.unpack(row)
        except struct.error:
            raise Corrupt(f"extent row of {len(row)} bytes; run 'qsfs fsck'") from None
        return pages, pack

    @classmethod
    def decode(cls, first: int, row: bytes) -> ExtentRow:
        """The extent in a row; raises `Corrupt`."""
        try:
            return cls(first, *_EXTENT.unpack(row))
        except struct.error:
            raise Corrupt(f"extent row of {len(row)} bytes; run 'qsfs fsck'") from None

    def part(self, first: int, pages: int) -> ExtentRow:
        """The same sealed extent, cut to `pages` pages from page `first`, which lie inside it."""
        return ExtentRow(
            first,
            self.write_number,
            pages,
            self.skip + first - self.first,
            self.pack,
            self.ordinal,
            self.offset,
            self.sealed_length,
            self.plain_length,
            self.codec,
        )


_PACK = struct.Struct("<B16s32sBIQIIHQQQQB")


class PackState(IntFlag):
    """What is known of a pack's shards, and of what it holds."""

    FULL = 1  # all n shards were acknowledged
    LOOKED = 2  # a second look found every shard
    START = 4  # most of its pages are read when applications start: it is fetched as a whole


@dataclass(frozen=True, slots=True)
class PackRow:
    """A pack: how to key, find and open it, where its shards lie, and how much of it lives.

    `placement` names the fleet entry of each shard (-1: not stored); `live` counts bytes of pages
    that some extent row still names (metadata packs: their body); `unnamed_since_ns` is 0 while
    something names it; `verified_at_ns` is 0 until its shards were looked at again.
    """

    pack_id: bytes
    digest: bytes
    kind: int
    key_number: int
    owner_epoch: int
    body_length: int
    shard_size: int
    live: int
    written_at_ns: int
    verified_at_ns: int
    unnamed_since_ns: int
    state: int
    placement: tuple[int, ...]

    @property
    def written(self) -> bool:
        """Whether as many shards have a place as a pack needs to count as written: k + ceil(m / 2)."""
        k, n = self._k, len(self.placement)
        return n - self.placement.count(-1) >= k + (n - k + 1) // 2

    @property
    def readable(self) -> bool:
        """Whether as many shards have a place as it takes to read all of the pack: k."""
        return len(self.placement) - self.placement.count(-1) >= self._k

    def readable_on(self, backends: Container[int]) -> bool:
        """As `readable`, if only places on these backends count."""
        return sum(place >= 0 and place in backends for place in self.placement) >= self._k

    @property
    def _k(self) -> int:
        return self.body_length // max(1, self.shard_size)

    @property
    def looked_at(self) -> bool:
        """Whether a second look found every shard that has a place; LOOKED alone may stand for enough of them."""
        return bool(self.state & PackState.LOOKED) and self.verified_at_ns > 0

    def encode(self) -> bytes:
        """The row: version u8 = 1, the fields in order with n u16 before `live`, then n placements i32."""
        head = _PACK.pack(
            1,
            self.pack_id,
            self.digest,
            self.kind,
            self.key_number,
            self.owner_epoch,
            self.body_length,
            self.shard_size,
            len(self.placement),
            self.live,
            self.written_at_ns,
            self.verified_at_ns,
            self.unnamed_since_ns,
            self.state,
        )
        return head + struct.pack(f"<{len(self.placement)}i", *self.placement)

    @classmethod
    def decode(cls, row: bytes) -> PackRow:
        """The pack in a row; raises `Corrupt`."""
        try:
            version, pid, digest, kind, key, epoch, body, shard, count, *rest = _PACK.unpack_from(row)
            placement = struct.unpack(f"<{count}i", row[_PACK.size :])
        except struct.error:
            raise Corrupt(f"pack row of {len(row)} bytes; run 'qsfs fsck'") from None
        if version != 1:
            raise Corrupt(f"pack row version {version} is unknown; run 'qsfs fsck'")
        live, written, verified, unnamed, state = rest
        return cls(
            pid, digest, kind, key, epoch, body, shard, live, written, verified, unnamed, state, placement
        )


_BLOCK = struct.Struct("<BBQQQQQQQQ16s")


@dataclass(slots=True)
class BlockRow:
    """What is local of a block: resident and dirty bitmaps, per page a checksum and write number, the tail.

    A bit or number belongs to the page of that index in the block.  Checksums are xxh3-64 of the
    page.  `tail` is the block's last 16 bytes, so that the value fills its LMDB pages exactly.
    """

    resident: int
    dirty: int
    sums: tuple[int, int, int, int]
    writes: tuple[int, int, int, int]
    tail: bytes

    def encode(self) -> bytes:
        """The row: resident u8, dirty u8, 4 x checksum u64, 4 x write number u64, tail 16 bytes."""
        return pack_block(self.resident, self.dirty, self.sums, self.writes, self.tail)

    @classmethod
    def decode(cls, row: bytes | memoryview) -> BlockRow:
        """The block in a row; raises `Corrupt`."""
        f = unpack_block(row)
        return cls(f[0], f[1], f[2:6], f[6:10], f[10])


def pack_block(
    resident: int, dirty: int, sums: Sequence[int], writes: Sequence[int], tail: bytes
) -> bytes:
    """A block row of its fields: see `BlockRow.encode`."""
    return _BLOCK.pack(resident, dirty, *sums, *writes, tail)


def unpack_block(row: bytes | memoryview) -> tuple[Any, ...]:
    """The eleven fields of a block row as they lie there; raises `Corrupt`."""
    try:
        return _BLOCK.unpack(row)
    except struct.error:
        raise Corrupt(f"block row of {len(row)} bytes; run 'qsfs fsck'") from None


@dataclass(frozen=True, slots=True)
class Truncation:
    """A pending truncation: pages from `first` on that were written before `write_number` are holes."""

    first: int
    write_number: int


def encode_truncations(pending: tuple[Truncation, ...]) -> bytes:
    """The row: pairs of first page u64 and write number u64."""
    return b"".join(struct.pack("<QQ", t.first, t.write_number) for t in pending)


def decode_truncations(row: bytes) -> tuple[Truncation, ...]:
    """The pending truncations in a row; raises `Corrupt`."""
    if len(row) % 16:
        raise Corrupt(f"truncation row of {len(row)} bytes; run 'qsfs fsck'")
    return tuple(Truncation(*pair) for pair in struct.iter_unpack("<QQ", row))


def add_truncation(pending: tuple[Truncation, ...], new: Truncation) -> tuple[Truncation, ...]:
    """`pending` with `new`; those that `new` includes are dropped."""
    return (*(t for t in pending if t.first < new.first or t.write_number > new.write_number), new)


def is_cut(pending: tuple[Truncation, ...], page: int, write_number: int) -> bool:
    """Whether a page written at `write_number` is a hole because of a pending truncation."""
    for truncation in pending:  # noqa: SIM110 (a generator takes three times as long, for each page)
        if page >= truncation.first and write_number < truncation.write_number:
            return True
    return False
