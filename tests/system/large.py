"""A file system of a million files with the extents of 100 GB, made of rows alone.

What the rows name is on no backend, so nothing can be read of these files but what the rows say.
"""

from __future__ import annotations

from collections.abc import Iterator

from qsfs.store.environment import Environment
from qsfs.store.schema import (
    Entry,
    ExtentRow,
    Inode,
    PackRow,
    PackState,
    Table,
    plain_u64,
    u64,
    u64_pair,
)
from qsfs.store.store import NEXT_INODE, NEXT_PACK
from tests.support.daemon import FileSystem

DIRECTORIES, FILES = 1000, 1000
FILE_PAGES = 25
PAGES_IN_PACK = 1024
FIRST = 1000
ROWS_AT_ONCE = 50_000
ROOT = 1


def fill(fs: FileSystem, directories: int = DIRECTORIES, files: int = FILES) -> None:
    """Puts the rows of files whose contents are remote, as a published generation leaves them.

    There are `directories` of `files` each: `d0000/f0000` and so on.
    """
    environment = Environment(fs.cache, (fs.cache / "data.mdb").stat().st_size + (3 << 30))
    try:
        rows: list[tuple[Table, bytes, bytes]] = []
        for row in large(environment, directories, files):
            rows.append(row)
            if len(rows) >= ROWS_AT_ONCE:
                put(environment, rows)
        put(environment, rows)
    finally:
        environment.close()


def put(environment: Environment, rows: list[tuple[Table, bytes, bytes]]) -> None:
    with environment.write() as txn:
        for table, key, value in rows:
            txn.put(key, value, db=environment.databases[table])
    rows.clear()


def large(environment: Environment, directories: int, files: int) -> Iterator[tuple[Table, bytes, bytes]]:
    view = environment.read()
    root = Inode.decode(ROOT, bytes(view.get(Table.INODES, u64(ROOT)) or b""))
    view.close()
    number = FIRST
    for place in range(directories):
        name, cookie = b"d%04d" % place, root.next_cookie + place
        directory = number
        number += 1
        yield Table.ENTRIES, u64(ROOT) + name, Entry(directory, cookie, 0o040000 >> 12).encode()
        yield Table.COOKIES, u64_pair(ROOT, cookie), name
        row = Inode(directory, 0o040755, nlink=2, next_cookie=3 + files, parent=ROOT)
        yield Table.INODES, u64(directory), row.encode()
        for index in range(files):
            name, cookie = b"f%04d" % index, 3 + index
            yield Table.ENTRIES, u64(directory) + name, Entry(number, cookie, 0o100000 >> 12).encode()
            yield Table.COOKIES, u64_pair(directory, cookie), name
            file = Inode(number, 0o100644, nlink=1, size=FILE_PAGES * 4096, allocated=FILE_PAGES)
            yield Table.INODES, u64(number), file.encode()
            pack, ordinal = divmod(place * files + index, PAGES_IN_PACK // FILE_PAGES)
            sealed = FILE_PAGES * 4096 + 16
            extent = ExtentRow(
                0, 1, FILE_PAGES, 0, FIRST + pack, ordinal, ordinal * sealed, sealed, sealed - 16, 0
            )
            yield Table.EXTENTS, u64_pair(number, 0), extent.encode()
            number += 1
    last = FIRST + pack
    for pack in range(FIRST, last + 1):
        yield Table.PACKS, u64(pack), pack_row(pack).encode()
    root.next_cookie += directories
    root.nlink += directories
    yield Table.INODES, u64(ROOT), root.encode()
    yield Table.COUNTERS, NEXT_INODE, plain_u64(number)
    yield Table.COUNTERS, NEXT_PACK, plain_u64(last)


def pack_row(number: int) -> PackRow:
    return PackRow(
        pack_id=number.to_bytes(16, "big"),
        digest=bytes(32),
        kind=1,
        key_number=1,
        owner_epoch=1,
        body_length=PAGES_IN_PACK * 4096,
        shard_size=PAGES_IN_PACK * 2048,
        live=PAGES_IN_PACK * 4096,
        written_at_ns=1,
        verified_at_ns=1,
        unnamed_since_ns=0,
        state=int(PackState.FULL | PackState.LOOKED),
        placement=(0, 1, 2),
    )
