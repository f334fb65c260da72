"""Starting is O(what is not settled): a mount of a large file system reads neither its files nor its extents.

Times are CPU seconds of the daemon, which a busy machine does not stretch much, and are printed beside those
of the wall (`pytest -s`): `docs/performance.md` has them.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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

pytestmark = [pytest.mark.mount, pytest.mark.slow]

DIRECTORIES, FILES = 1000, 1000
FILE_PAGES = 25
PAGES_IN_PACK = 1024
FIRST = 1000
ROWS_AT_ONCE = 50_000
ROOT = 1


@pytest.mark.timeout(1800)
def test_a_million_files_and_the_extents_of_100_gb_are_mounted_at_once(scratch: Path) -> None:
    with FileSystem(scratch, shards=(2, 1), settings={"cache.size": "4GiB", "flush.cut_seconds": "1h"}) as fs:
        fs.format()
        fs.mount()
        fs.umount()
        fill(fs)
        clean = timed(fs, "mount after a clean stop", fs.mount)
        looked_at = random.Random(1).sample(range(DIRECTORIES), 5)
        for number in looked_at:
            directory = fs.mountpoint / f"d{number:04}"
            assert (directory / "f0007").stat().st_size == FILE_PAGES * 4096
            assert sum(1 for _ in directory.iterdir()) == FILES
        timed(fs, "umount of what is published", fs.umount)
        fs.mount()
        for number in range(200):
            with (fs.mountpoint / f"synced{number}").open("wb") as file:
                file.write(os.urandom(1 << 16))
                file.flush()
                os.fsync(file.fileno())
        fs.kill()
        crash = timed(fs, "mount after a crash", fs.mount)
        assert (fs.mountpoint / "synced199").stat().st_size == 1 << 16
        fs.umount()
    assert clean < 2.0, f"{clean:.2f} s of CPU to mount after a clean stop"
    assert crash < 5.0, f"{crash:.2f} s of CPU to mount after a crash"


def timed(fs: FileSystem, what: str, step: Callable[[], None]) -> float:
    """CPU seconds of the daemon that a step leaves running, else 0; prints them and those of the wall."""
    begin = time.monotonic()
    step()
    wall = time.monotonic() - begin
    cpu = time.clock_gettime(~fs.process << 3 | 2) if fs.process else 0.0
    print(f"{what}: {wall:.2f} s, {cpu:.2f} s of the daemon's CPU")
    return cpu


def fill(fs: FileSystem) -> None:
    """Puts the rows of files whose contents are remote, as a published generation leaves them.

    The packs do not exist, so nothing can be read of the files but what the rows say.
    """
    environment = Environment(fs.cache, (fs.cache / "data.mdb").stat().st_size + (3 << 30))
    try:
        rows: list[tuple[Table, bytes, bytes]] = []
        for row in large(environment):
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


def large(environment: Environment) -> Iterator[tuple[Table, bytes, bytes]]:
    view = environment.read()
    root = Inode.decode(ROOT, bytes(view.get(Table.INODES, u64(ROOT)) or b""))
    view.close()
    number = FIRST
    for place in range(DIRECTORIES):
        name, cookie = b"d%04d" % place, root.next_cookie + place
        directory = number
        number += 1
        yield Table.ENTRIES, u64(ROOT) + name, Entry(directory, cookie, 0o040000 >> 12).encode()
        yield Table.COOKIES, u64_pair(ROOT, cookie), name
        row = Inode(directory, 0o040755, nlink=2, next_cookie=3 + FILES, parent=ROOT)
        yield Table.INODES, u64(directory), row.encode()
        for index in range(FILES):
            name, cookie = b"f%04d" % index, 3 + index
            yield Table.ENTRIES, u64(directory) + name, Entry(number, cookie, 0o100000 >> 12).encode()
            yield Table.COOKIES, u64_pair(directory, cookie), name
            file = Inode(number, 0o100644, nlink=1, size=FILE_PAGES * 4096, allocated=FILE_PAGES)
            yield Table.INODES, u64(number), file.encode()
            pack, ordinal = divmod(place * FILES + index, PAGES_IN_PACK // FILE_PAGES)
            sealed = FILE_PAGES * 4096 + 16
            extent = ExtentRow(
                0, 1, FILE_PAGES, 0, FIRST + pack, ordinal, ordinal * sealed, sealed, sealed - 16, 0
            )
            yield Table.EXTENTS, u64_pair(number, 0), extent.encode()
            number += 1
    last = FIRST + pack
    for pack in range(FIRST, last + 1):
        yield Table.PACKS, u64(pack), pack_row(pack).encode()
    root.next_cookie += DIRECTORIES
    root.nlink += DIRECTORIES
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
