"""What `scripts/bench` measures: each takes an empty directory and returns a rate.

More is better in every one of them.  Data are random, so that no layer can shrink them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lmdb

PAGE = 4096
MIB = 1 << 20
# SQLite transactions, commits and durable writes are stopped after so many seconds.
LONGEST = 5.0


@dataclass(frozen=True)
class Measure:
    """A figure: its name, its unit, and how it is obtained from a directory and a size in bytes."""

    name: str
    unit: str
    what: str
    run: Callable[[Path, int], float]


def drop_caches(*files: Path) -> None:
    """Makes the kernel forget what it cached: of these files, and of everything where we are root."""
    for file in files:
        with contextlib.closing(_Descriptor(file, os.O_RDONLY)) as opened:
            os.fsync(opened.number)
            os.posix_fadvise(opened.number, 0, 0, os.POSIX_FADV_DONTNEED)
    if os.geteuid() == 0:
        os.sync()
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")


def sequential_write(directory: Path, size: int) -> float:
    started = time.perf_counter()
    _fill(directory / "sequential", size)
    return size / MIB / (time.perf_counter() - started)


def sequential_read_cold(directory: Path, size: int) -> float:
    file = _fill(directory / "sequential", size)
    drop_caches(file)
    return _read_through(file, size)


def sequential_read_warm(directory: Path, size: int) -> float:
    file = _fill(directory / "sequential", size)
    _read_through(file, size)
    return _read_through(file, size)


def random_read_cold(directory: Path, size: int) -> float:
    file = _fill(directory / "random", size)
    drop_caches(file)
    offsets = _offsets(size, 4000)
    with contextlib.closing(_Descriptor(file, os.O_RDONLY)) as opened:
        os.posix_fadvise(opened.number, 0, 0, os.POSIX_FADV_RANDOM)
        started = time.perf_counter()
        for offset in offsets:
            os.pread(opened.number, PAGE, offset)
        return len(offsets) / (time.perf_counter() - started)


def random_read_direct(directory: Path, size: int) -> float:
    """O_DIRECT goes past the kernel's cache; the second round is answered from the daemon's memory."""
    file = _fill(directory / "random", size)
    offsets = _offsets(size, 4000)
    with (
        contextlib.closing(_Descriptor(file, os.O_RDONLY | os.O_DIRECT)) as opened,
        contextlib.closing(mmap.mmap(-1, PAGE)) as buffer,
    ):
        elapsed = 0.0
        for _ in range(2):
            started = time.perf_counter()
            for offset in offsets:
                os.preadv(opened.number, [buffer], offset)
            elapsed = time.perf_counter() - started
        return len(offsets) / elapsed


def random_write_buffered(directory: Path, size: int) -> float:
    file = _fill(directory / "random", size)
    offsets = _offsets(size, 20_000)
    page = os.urandom(PAGE)
    with contextlib.closing(_Descriptor(file, os.O_RDWR)) as opened:
        started = time.perf_counter()
        for offset in offsets:
            os.pwrite(opened.number, page, offset)
        elapsed = time.perf_counter() - started
        os.fsync(opened.number)
    return len(offsets) / elapsed


def random_write_durable(directory: Path, size: int) -> float:
    file = _fill(directory / "random", size)
    offsets = _offsets(size, 2000)
    page = os.urandom(PAGE)
    with contextlib.closing(_Descriptor(file, os.O_RDWR)) as opened:

        def step(index: int) -> None:
            os.pwrite(opened.number, page, offsets[index])
            os.fsync(opened.number)

        return _rate(step, len(offsets))


def files_create(directory: Path, size: int) -> float:
    return _files(directory)[0]


def files_stat(directory: Path, size: int) -> float:
    return _files(directory)[1]


def files_unlink(directory: Path, size: int) -> float:
    return _files(directory)[2]


def sqlite_wal(directory: Path, size: int) -> float:
    return _sqlite(directory, "wal", 2000)


def sqlite_rollback(directory: Path, size: int) -> float:
    return _sqlite(directory, "delete", 500)


def lmdb_commits(directory: Path, size: int) -> float:
    """20 values of 1 KiB a commit, opened as a Casper node opens its store."""
    environment = lmdb.open(
        str(directory / "store.lmdb"), subdir=False, map_size=1 << 40, writemap=True, readahead=False
    )
    value = os.urandom(1024)

    def step(index: int) -> None:
        with environment.begin(write=True) as transaction:
            for part in range(20):
                transaction.put(random.randbytes(32), value + part.to_bytes(4, "big"))

    try:
        return _rate(step, 1000)
    finally:
        environment.close()


def mmap_touch(directory: Path, size: int) -> float:
    """First touches of pages scattered over a large hole: each is one read request."""
    with _scattered(directory) as (mapping, offsets):
        started = time.perf_counter()
        for offset in offsets:
            mapping[offset] = 1
        return len(offsets) / (time.perf_counter() - started)


def mmap_msync(directory: Path, size: int) -> float:
    """msync of scattered dirty pages: each is one write request."""
    with _scattered(directory) as (mapping, offsets):
        for offset in offsets:
            mapping[offset] = 1
        started = time.perf_counter()
        mapping.flush()
        return len(offsets) / (time.perf_counter() - started)


MEASURES = (
    Measure("seq_write", "MB/s", "sequential write, then fsync", sequential_write),
    Measure("seq_read_cold", "MB/s", "sequential read, caches dropped", sequential_read_cold),
    Measure("seq_read_warm", "MB/s", "sequential read, warm", sequential_read_warm),
    Measure("rand_read_cold", "/s", "4 KiB random read, caches dropped", random_read_cold),
    Measure("rand_read_direct", "/s", "4 KiB random read, O_DIRECT, daemon's cache", random_read_direct),
    Measure("rand_write", "/s", "4 KiB random write, buffered", random_write_buffered),
    Measure("rand_write_fsync", "/s", "4 KiB random write + fsync each", random_write_durable),
    Measure("create", "/s", "create + write 100 B + close, 2,000 files", files_create),
    Measure("stat", "/s", "stat of 2,000 files, caches dropped", files_stat),
    Measure("unlink", "/s", "unlink of 2,000 files", files_unlink),
    Measure("sqlite_wal", "tx/s", "SQLite, WAL, synchronous=FULL", sqlite_wal),
    Measure("sqlite_rollback", "tx/s", "SQLite, rollback journal, synchronous=FULL", sqlite_rollback),
    Measure("lmdb_commits", "/s", "LMDB writemap commits, 20 x 1 KiB", lmdb_commits),
    Measure("mmap_touch", "/s", "first touches of mapped pages", mmap_touch),
    Measure("mmap_msync", "/s", "msync of 2,000 scattered pages, pages/s", mmap_msync),
)


class _Descriptor:
    def __init__(self, file: Path, flags: int) -> None:
        self.number = os.open(file, flags | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.number)


def _rate(step: Callable[[int], None], count: int) -> float:
    """Steps a second over `count` of them, or as many as there is time for."""
    started = time.perf_counter()
    for index in range(count):
        step(index)
        if time.perf_counter() - started > LONGEST:
            return (index + 1) / (time.perf_counter() - started)
    return count / (time.perf_counter() - started)


def _fill(file: Path, size: int) -> Path:
    """Writes `size` random bytes in order, 1 MiB at a time, and syncs them."""
    block = random.Random(size).randbytes(MIB)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        left = size
        while left > 0:
            left -= os.write(descriptor, block[: min(left, MIB)])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return file


def _read_through(file: Path, size: int) -> float:
    buffer = bytearray(MIB)
    started = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return size / MIB / (time.perf_counter() - started)


def _offsets(size: int, count: int) -> list[int]:
    """Page offsets in a file of `size` bytes, the same on every file system."""
    generator = random.Random(7)
    return [generator.randrange(size // PAGE) * PAGE for _ in range(count)]


def _files(directory: Path, count: int = 2000) -> tuple[float, float, float]:
    names = [directory / f"file-{index}" for index in range(count)]
    content = os.urandom(100)
    started = time.perf_counter()
    for name in names:
        with name.open("wb", buffering=0) as stream:
            stream.write(content)
    created = time.perf_counter()
    drop_caches()
    dropped = time.perf_counter()
    for name in names:
        name.stat()
    looked = time.perf_counter()
    for name in names:
        name.unlink()
    removed = time.perf_counter()
    return count / (created - started), count / (looked - dropped), count / (removed - looked)


def _sqlite(directory: Path, journal: str, count: int) -> float:
    connection = sqlite3.connect(directory / "bench.sqlite", isolation_level=None)
    try:
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, content BLOB)")
        content = os.urandom(100)
        return _rate(lambda index: _insert(connection, content), count)
    finally:
        connection.close()


def _insert(connection: sqlite3.Connection, content: bytes) -> None:
    connection.execute("INSERT INTO t (content) VALUES (?)", (content,))


@contextlib.contextmanager
def _scattered(directory: Path, count: int = 2000):
    """A shared mapping of a hole of 1 GiB and offsets of pages in it, none next to another."""
    file = directory / "mapped"
    size = 1 << 30
    with file.open("w+b") as stream:
        stream.truncate(size)
        mapping = mmap.mmap(stream.fileno(), size)
    try:
        mapping.madvise(mmap.MADV_RANDOM)
        pages = random.Random(7).sample(range(size // PAGE // 2), count)
        yield mapping, [page * 2 * PAGE for page in pages]
    finally:
        mapping.close()
