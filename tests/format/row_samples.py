"""One row of each table that a generation holds, with every field at a value of its own."""

from __future__ import annotations

import stat

from qsfs.format.rows import Row
from qsfs.store.schema import (
    ROOT_INODE,
    Entry,
    ExtentRow,
    Inode,
    InodeFlag,
    PackRow,
    PackState,
    Table,
    Truncation,
    encode_truncations,
    plain_u64,
    u64,
    u64_pair,
)
from tests.format.samples import TIME

FILE, DIRECTORY, LINK = 2**40 + 5, 6, 7
FIRST_PAGE = 2**33

DATA_PACK = PackRow(
    pack_id=bytes(range(16, 32)),
    digest=bytes(range(32, 64)),
    kind=1,
    key_number=2,
    owner_epoch=2**63 + 7,
    body_length=1_048_576,
    shard_size=262_144,
    live=16_384,
    written_at_ns=TIME,
    verified_at_ns=TIME + 1,
    unnamed_since_ns=0,
    state=PackState.FULL | PackState.LOOKED | PackState.START,
    placement=(3, 0, 65_535, 4, 5, 6),
)
METADATA_PACK = PackRow(
    pack_id=bytes(range(64, 80)),
    digest=bytes(range(80, 112)),
    kind=2,
    key_number=1,
    owner_epoch=8,
    body_length=256,
    shard_size=64,
    live=0,
    written_at_ns=TIME + 2,
    verified_at_ns=0,
    unnamed_since_ns=TIME + 3,
    state=PackState(0),
    placement=(1, -1, 2, 3, -1, 4),
)
INODES = {
    "file": Inode(
        FILE,
        stat.S_IFREG | 0o4751,
        uid=1000,
        gid=2**32 - 1,
        nlink=2,
        rdev=0,
        flags=int(InodeFlag.ATOMIC_SYNC | InodeFlag.PINNED_BY_HAND),
        atime_ns=-1,
        mtime_ns=TIME,
        ctime_ns=TIME + 4,
        size=FIRST_PAGE * 4096 + 9000,
        allocated=3,
    ),
    "directory": Inode(
        DIRECTORY,
        stat.S_IFDIR | 0o755,
        nlink=2,
        atime_ns=TIME,
        mtime_ns=TIME + 1,
        ctime_ns=TIME + 2,
        next_cookie=5,
        parent=ROOT_INODE,
    ),
    "device": Inode(8, stat.S_IFCHR | 0o600, nlink=1, rdev=2**32 + 0x0501),
}
ENTRY = Entry(FILE, 4, stat.S_IFREG >> 12)
EXTENT = ExtentRow(
    first=FIRST_PAGE,
    write_number=2**64 - 1,
    pages=3,
    skip=2,
    pack=2**32 + 9,
    ordinal=11,
    offset=65_536,
    sealed_length=4_112,
    plain_length=24_576,
    codec=1,
)
TRUNCATIONS = (Truncation(FIRST_PAGE + 3, 71), Truncation(0, 70))

ROWS: dict[str, Row] = {
    **{f"inode of a {name}": (Table.INODES, u64(inode.number), inode.encode()) for name, inode in INODES.items()},
    "entry": (Table.ENTRIES, u64(DIRECTORY) + "größe".encode(), ENTRY.encode()),
    "entry that is gone": (Table.ENTRIES, u64(DIRECTORY) + b"gone", None),
    "xattr": (Table.XATTRS, u64(FILE) + b"user.colour", b"\x00blue"),
    "symlink": (Table.SYMLINKS, u64(LINK), b"../target"),
    "extent": (Table.EXTENTS, u64_pair(FILE, EXTENT.first), EXTENT.encode()),
    "data pack": (Table.PACKS, u64(EXTENT.pack), DATA_PACK.encode()),
    "metadata pack": (Table.PACKS, u64(10), METADATA_PACK.encode()),
    "truncations": (Table.TRUNCATIONS, u64(FILE), encode_truncations(TRUNCATIONS)),
    "counter": (Table.COUNTERS, b"next-inode", plain_u64(FILE)),
}
