"""More backends gone than may be: cold reads fail in time or wait as told, all else goes on, nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import (
    QUICK,
    check,
    cold,
    content,
    dead,
    ended,
    eventually,
    keys_of,
    program,
    status,
    store,
    up,
)

pytestmark = pytest.mark.mount

MIB = 1 << 20
COUNT = 8
# 3 of 8 are left: fewer than the 4 shards from which a pack follows, wherever they lie.  What lies in
# shards that are left can still be read.
GONE = range(5)
EVERY = range(COUNT)
WAITING = {"policy": [{"match": "*.wait", "unavailable": "wait"}]}

# Each page in a thread of its own: the error, or a digest.
READ = """
import hashlib, os, sys, threading
path, offsets = sys.argv[1], [int(word) for word in sys.argv[2:]]
results = [""] * len(offsets)
def read(number):
    try:
        results[number] = hashlib.sha256(os.pread(file, 4096, offsets[number])).hexdigest()
    except OSError as error:
        results[number] = "errno-%d" % error.errno
file = os.open(path, os.O_RDONLY)
threads = [threading.Thread(target=read, args=(number,)) for number in range(len(offsets))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*results)
"""
FAILED = f"errno-{errno.EIO}"

# Threads in page faults: memcpy by way of ctypes leaves the interpreter to the others.
FAULTS = """
import ctypes, hashlib, os, sys, threading
path, count = sys.argv[1], int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
size = os.stat(path).st_size
area = libc.mmap(None, ctypes.c_size_t(size), 1, 1, os.open(path, os.O_RDONLY), ctypes.c_size_t(0))
assert libc.madvise(ctypes.c_void_p(area), ctypes.c_size_t(size), 1) == 0
step = size // count // 4096 * 4096
pages = [ctypes.create_string_buffer(4096) for _ in range(count)]
def touch(number):
    libc.memcpy(pages[number], ctypes.c_void_p(area + number * step), ctypes.c_size_t(4096))
threading.stack_size(256 << 10)
threads = [threading.Thread(target=touch, args=(number,)) for number in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(hashlib.sha256(b"".join(pages)).hexdigest())
"""


def nothing_deleted(before: dict[int, set[bytes]], fs: FileSystem) -> None:
    now = keys_of(fs, before)
    assert all(keys <= now[index] for index, keys in before.items()), "shards or heads were deleted"


def with_history(fs: FileSystem, *names: str) -> None:
    """Mounts with only remote files of these names, and `hot`, which is local."""
    fs.format()
    fs.mount()
    store(fs, "hot", MIB)
    # In packs of their own: what was read of a pack lately stays in memory.
    for name in names:
        fs.sync()
        store(fs, name, 4 * MIB)
    fs.sync()
    cold(fs)
    check(fs, "hot")


def reading(fs: FileSystem, name: str, offsets: Collection[int] = (0,)) -> Any:
    return program(READ, fs.mountpoint / name, *map(str, offsets))


def digest(name: str, offset: int = 0) -> str:
    return hashlib.sha256(content(name, offset + 4096)[offset:]).hexdigest()


def test_a_cold_read_without_enough_backends_fails_in_time_and_says_why(scratch: Path, fleet: Servers) -> None:
    with FileSystem(scratch, shards=(4, 2), count=COUNT, servers=fleet, namespace="waits-error", settings=QUICK) as fs:
        with_history(fs, "history")
        held = keys_of(fs, range(COUNT))
        with dead(fleet, GONE):
            offsets = range(0, 4 * MIB, MIB // 4)
            begun = time.monotonic()
            code, said = ended(reading(fs, "history", offsets))
            took = time.monotonic() - begun
            results = said.split()
            assert code == 0 and FAILED in results
            for offset, result in zip(offsets, results, strict=True):
                assert result in (FAILED, digest("history", offset)), "something else than the data or EIO"
            assert took < 30, f"it took {took} s, with a deadline of 2 s"
            check(fs, "hot")
            store(fs, "new", MIB)
            check(fs, "new")
            assert sorted(path.name for path in fs.mountpoint.iterdir()) == ["history", "hot", "new"]
            assert (fs.mountpoint / "history").stat().st_size == 4 * MIB
        fs.expect(r"ERROR qsfs.remote.fetch: history \(inode \d+\), page \d+: not here after")
        lines = [line for line in fs.log().splitlines() if "not here after" in line]
        assert lines
        for line in lines:
            assert re.search(r"pack [0-9a-f]{32}: \d of the 4 shards needed can be had; .*shard \d: ", line)
            assert any(fleet.config(index, fs.namespace).name in line for index in GONE)
        eventually(lambda: up(fs, COUNT), "all backends are up again")
        check(fs, "history")
        nothing_deleted(held, fs)
        fs.umount()


def test_a_read_that_may_wait_shows_and_ends_with_the_data_or_when_told(scratch: Path, fleet: Servers) -> None:
    with FileSystem(
        scratch,
        shards=(4, 2),
        count=COUNT,
        servers=fleet,
        namespace="waits-wait",
        settings=QUICK | {"fetch.deadline_seconds": 1} | WAITING,
    ) as fs:
        with_history(fs, "a.wait", "b.wait", "c.wait")
        held = keys_of(fs, range(COUNT))
        with dead(fleet, EVERY):
            first, second, third = (reading(fs, name) for name in ("a.wait", "b.wait", "c.wait"))
            waits = eventually(lambda: _waits(fs, 3), "three reads wait, and status shows them")
            assert all(wait["until_data"] for wait in waits)
            eventually(lambda: all("shards needed" in w["why"] for w in status(fs)["waits"]), "status says why")
            eventually(lambda: "has been waiting" in fs.log(), "the log says that a read waits")
            shown = fs.run("status").stdout
            assert "wait" in shown
            assert fs.run("--json", "unblock", "b.wait").json()["ended"] == 1
            assert ended(second)[1].split() == [FAILED]
            assert first.poll() is None and third.poll() is None, "only the named file's wait was to end"
            check(fs, "hot")
            assert fs.run("--json", "unblock", fs.mountpoint / "c.wait").json()["ended"] == 1
            assert ended(third)[1].split() == [FAILED]
        assert ended(first)[1].split() == [digest("a.wait")]
        eventually(lambda: not status(fs)["waits"], "nothing waits any more")
        for name in ("a.wait", "b.wait", "c.wait"):
            check(fs, name)
        fs.expect(r"WARNING qsfs.remote.fetch: [abc].wait \(inode \d+\), page \d+: has been waiting")
        fs.expect(r"ERROR qsfs.remote.fetch: [bc].wait \(inode \d+\), page \d+: .*qsfs unblock")
        nothing_deleted(held, fs)
        fs.umount()


def _waits(fs: FileSystem, count: int) -> list[dict[str, Any]]:
    waits: list[dict[str, Any]] = status(fs)["waits"]
    return waits if len(waits) >= count else []


def median_seconds(work: Callable[[], object], times: int = 25) -> float:
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


class Foreground:
    """What an application that needs no backend does, each in a way that the daemon sees."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._hot = os.open(fs.mountpoint / "hot", os.O_RDWR)
        self._choose = random.Random("foreground")
        self._count = 0

    def measure(self) -> dict[str, float]:
        return {
            work.__name__: median_seconds(work)
            for work in (self.stat, self.listing, self.read, self.write, self.create, self.status)
        }

    def stat(self) -> None:
        self._count += 1
        assert not (self._fs.mountpoint / f"no such name {self._count}").exists()
        os.statvfs(self._fs.mountpoint)

    def listing(self) -> None:
        assert "hot" in os.listdir(self._fs.mountpoint)  # noqa: PTH208

    def read(self) -> None:
        os.posix_fadvise(self._hot, 0, 0, os.POSIX_FADV_DONTNEED)
        offset = self._choose.randrange(256) * 4096
        assert os.pread(self._hot, 4096, offset) == content("hot", MIB)[offset : offset + 4096]

    def write(self) -> None:
        os.pwrite(self._hot, content("hot", 4096), 0)
        os.fsync(self._hot)

    def create(self) -> None:
        path = self._fs.mountpoint / "short-lived"
        path.write_bytes(b"x")
        path.unlink()

    def status(self) -> None:
        assert status(self._fs)["phase"] == "mounted"

    def close(self) -> None:
        os.close(self._hot)


def faults(fs: FileSystem, count: int, paused: Collection[int], killed: Collection[int]) -> None:
    """`count` page faults wait for backends of which some are silent and some are dead."""
    size = 64 * 4096 * count
    choose = random.Random("faults")
    pages = [choose.randbytes(4096) for _ in range(count)]
    with (fs.mountpoint / "map.wait").open("wb") as file:
        for number, data in enumerate(pages):
            file.seek(64 * 4096 * number)
            file.write(data)
        file.truncate(size)
    fs.sync()
    store(fs, "hot", MIB)
    fs.sync()
    cold(fs)
    check(fs, "hot")
    foreground = Foreground(fs)
    before = foreground.measure()
    for index in paused:
        fs.servers.pause(index)
    with dead(fs.servers, killed):
        touching = program(FAULTS, fs.mountpoint / "map.wait", count)
        try:
            eventually(lambda: len(status(fs)["waits"]) >= count, f"{count} page faults wait")
            during = foreground.measure()
            assert touching.poll() is None
            assert len(status(fs)["waits"]) >= count, "all of them still wait"
        finally:
            for index in paused:
                fs.servers.resume(index)
    assert ended(touching)[1].strip() == hashlib.sha256(b"".join(pages)).hexdigest()
    foreground.close()
    for work, seconds in during.items():
        usual = max(before[work], 0.001)
        assert seconds < 20 * usual, f"{work}: {seconds:.4f} s beside waits, {before[work]:.4f} s without"
    fs.expect(r"WARNING qsfs.remote.fetch: map.wait \(inode \d+\), page \d+: has been waiting")
    fs.umount()


def test_300_page_faults_that_wait_for_dead_backends_leave_the_rest_quick(scratch: Path, fleet: Servers) -> None:
    with FileSystem(
        scratch, shards=(4, 2), count=COUNT, servers=fleet, namespace="faults", settings=QUICK | WAITING
    ) as fs:
        fs.format()
        fs.mount()
        faults(fs, 300, paused=EVERY[:4], killed=EVERY[4:])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_2000_page_faults_that_wait_for_dead_backends_leave_the_rest_quick(scratch: Path, fleet: Servers) -> None:
    with FileSystem(
        scratch,
        shards=(16, 4),
        servers=fleet,
        namespace="many-faults",
        settings=QUICK | WAITING | {"cache.size": "1GiB"},
    ) as fs:
        fs.format()
        fs.mount()
        faults(fs, 2000, paused=range(12), killed=range(12, 24))
