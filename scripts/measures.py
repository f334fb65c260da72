"""What `scripts/bench` measures: each takes an empty directory, does something under a watch, and returns how much.

A rate comes of it, of which more is better.  Data are random, so that no layer can shrink them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lmdb
from watch import Watch

PAGE = 4096
MIB = 1 << 20
IN_FLIGHT = 16
# SQLite transactions, commits and durable writes are stopped after so many seconds.
LONGEST = 5.0


@dataclass(frozen=True)
class Measure:
    """A figure: its name, its unit (of what `run` returns, a second), and how to get it from a directory.

    `run` is given the size of large files in bytes, too, and what times it.
    """

    name: str
    unit: str
    what: str
    run: Callable[[Path, int, Watch], float]


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


def sequential_write(directory: Path, size: int, watch: Watch) -> float:
    with watch:
        _fill(directory / "sequential", size)
    return size / MIB


def sequential_read_cold(directory: Path, size: int, watch: Watch) -> float:
    file = _fill(directory / "sequential", size)
    drop_caches(file)
    with watch:
        _read_through(file)
    return size / MIB


def sequential_read_warm(directory: Path, size: int, watch: Watch) -> float:
    file = _fill(directory / "sequential", size)
    _read_through(file)
    with watch:
        _read_through(file)
    return size / MIB


def random_read_cold(directory: Path, size: int, watch: Watch) -> float:
    file = _fill(directory / "random", size)
    drop_caches(file)
    offsets = _offsets(size, 4000)
    with contextlib.closing(_Descriptor(file, os.O_RDONLY)) as opened:
        os.posix_fadvise(opened.number, 0, 0, os.POSIX_FADV_RANDOM)
        with watch:
            for offset in offsets:
                os.pread(opened.number, PAGE, offset)
    return len(offsets)


def random_read_direct(directory: Path, size: int, watch: Watch) -> float:
    """O_DIRECT goes past the kernel's cache; the second round is answered from the daemon's memory."""
    file = _fill(directory / "random", size)
    offsets = _offsets(size, 4000)
    _read_directly(file, offsets)
    with watch:
        _read_directly(file, offsets)
    return len(offsets)


def random_read_in_flight(directory: Path, size: int, watch: Watch) -> float:
    """The same with 16 threads, so that the daemon always has the next request before it."""
    file = _fill(directory / "random", size)
    offsets = _offsets(size, 16_000)
    _read_directly(file, offsets[:4000])
    with watch, concurrent.futures.ThreadPoolExecutor(IN_FLIGHT) as threads:
        list(threads.map(lambda part: _read_directly(file, offsets[part::IN_FLIGHT]), range(IN_FLIGHT)))
    return len(offsets)


def random_write_buffered(directory: Path, size: int, watch: Watch) -> float:
    file = _fill(directory / "random", size)
    offsets = _offsets(size, 20_000)
    page = os.urandom(PAGE)
    with contextlib.closing(_Descriptor(file, os.O_RDWR)) as opened:
        with watch:
            for offset in offsets:
                os.pwrite(opened.number, page, offset)
        os.fsync(opened.number)
    return len(offsets)


def random_write_durable(directory: Path, size: int, watch: Watch) -> float:
    file = _fill(directory / "random", size)
    offsets = _offsets(size, 2000)
    page = os.urandom(PAGE)
    with contextlib.closing(_Descriptor(file, os.O_RDWR)) as opened:

        def step(index: int) -> None:
            os.pwrite(opened.number, page, offsets[index])
            os.fsync(opened.number)

        return _repeat(step, len(offsets), watch)


def files_create(directory: Path, size: int, watch: Watch) -> float:
    with watch:
        return len(_make_files(directory))


def files_stat(directory: Path, size: int, watch: Watch) -> float:
    names = _make_files(directory)
    drop_caches()
    with watch:
        for name in names:
            name.stat()
    return len(names)


def files_unlink(directory: Path, size: int, watch: Watch) -> float:
    names = _make_files(directory)
    drop_caches()
    for name in names:
        name.stat()
    with watch:
        for name in names:
            name.unlink()
    return len(names)


def sqlite_wal(directory: Path, size: int, watch: Watch) -> float:
    return _sqlite(directory, "wal", 2000, watch)


def sqlite_rollback(directory: Path, size: int, watch: Watch) -> float:
    return _sqlite(directory, "delete", 500, watch)


def lmdb_commits(directory: Path, size: int, watch: Watch) -> float:
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
        return _repeat(step, 1000, watch)
    finally:
        environment.close()


def mmap_touch(directory: Path, size: int, watch: Watch) -> float:
    """First touches of pages scattered over a large hole: each is one read request."""
    with _scattered(directory) as (mapping, offsets):
        with watch:
            for offset in offsets:
                mapping[offset] = 1
        return len(offsets)


def mmap_msync(directory: Path, size: int, watch: Watch) -> float:
    """msync of scattered dirty pages: each is one write request."""
    with _scattered(directory) as (mapping, offsets):
        for offset in offsets:
            mapping[offset] = 1
        with watch:
            mapping.flush()
        return len(offsets)


MEASURES = (
    Measure("seq_write", "MB/s", "sequential write, then fsync", sequential_write),
    Measure("seq_read_cold", "MB/s", "sequential read, caches dropped", sequential_read_cold),
    Measure("seq_read_warm", "MB/s", "sequential read, warm", sequential_read_warm),
    Measure("rand_read_cold", "/s", "4 KiB random read, caches dropped", random_read_cold),
    Measure("rand_read_direct", "/s", "4 KiB random read, O_DIRECT, daemon's cache", random_read_direct),
    Measure("rand_read_16", "/s", "the same, 16 in flight", random_read_in_flight),
    Measure("rand_write", "/s", "4 KiB random write, buffered", random_write_buffered),
    Measure("rand_write_fsync", "/s", "4 KiB random write + fsync each", random_write_durable),
    Measure("create", "/s", "create + write 1 KiB + close, 2,000 files", files_create),
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


def _repeat(step: Callable[[int], None], count: int, watch: Watch) -> float:
    """Makes `count` steps, or as many as there is time for; returns how many."""
    with watch:
        for index in range(count):
            step(index)
            if watch.running_seconds > LONGEST:
                return index + 1
    return count


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


def _read_through(file: Path) -> None:
    buffer = bytearray(MIB)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def _read_directly(file: Path, offsets: list[int]) -> None:
    with (
        contextlib.closing(_Descriptor(file, os.O_RDONLY | os.O_DIRECT)) as opened,
        contextlib.closing(mmap.mmap(-1, PAGE)) as buffer,
    ):
        for offset in offsets:
            os.preadv(opened.number, [buffer], offset)


def _offsets(size: int, count: int) -> list[int]:
    """Page offsets in a file of `size` bytes, the same on every file system."""
    generator = random.Random(7)
    return [generator.randrange(size // PAGE) * PAGE for _ in range(count)]


def _make_files(directory: Path, count: int = 2000) -> list[Path]:
    names = [directory / f"file-{index}" for index in range(count)]
    content = os.urandom(1024)
    for name in names:
        with name.open("wb", buffering=0) as stream:
            stream.write(content)
    return names


def _sqlite(directory: Path, journal: str, count: int, watch: Watch) -> float:
    connection = sqlite3.connect(directory / "bench.sqlite", isolation_level=None)
    try:
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, content BLOB)")
        content = os.urandom(100)
        return _repeat(lambda index: _insert(connection, content), count, watch)
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
