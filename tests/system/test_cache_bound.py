"""The cache directory stays within its bound whatever is written, and nothing that was accepted is dropped."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.daemon import FileSystem
from tests.system.fleet import eventually, forget, status
from tests.system.load import check_clean

pytestmark = pytest.mark.mount

CACHE = 48 << 20
MEMORY = 400 << 20
PIECE = 1 << 20
PATIENCE = 240.0

SMALL = {
    "cache.size": CACHE,
    "cache.group_seconds": 1,
    "cache.second_look_seconds": 0,
    "flush.quiet_seconds": 0.2,
    "flush.cut_seconds": 2,
}


class Watch:
    """Looks from outside, all the time, at the disk use of the cache and the memory of the daemon."""

    def __init__(self, fs: FileSystem, cache: int = CACHE, most_memory: int = MEMORY) -> None:
        self.cache = cache
        self.most_memory = most_memory
        self.disk = 0
        self.memory = 0
        self._fs = fs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            assert 0 < self.disk <= self.cache, f"the cache took {self.disk} bytes of {self.cache}"
            assert 0 < self.memory < self.most_memory, f"the daemon took {self.memory} bytes of memory"

    def _run(self) -> None:
        while not self._stop.is_set():
            self.disk = max(self.disk, disk_use(self._fs.cache))
            self.memory = max(self.memory, memory_use(self._fs.process))
            self._stop.wait(0.02)


class Writer:
    """Writes files of random content in a thread of its own, as many as `total` bytes take."""

    def __init__(self, directory: Path, total: int, file_bytes: int = 6 << 20) -> None:
        self.written = 0
        self.error: OSError | None = None
        self._directory = directory
        self._file_bytes = file_bytes
        self._count = -(-total // file_bytes)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a failure it may wait for what never comes; it ends with the daemon.
        self._thread.join(PATIENCE if error is None else 0)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Waits for the end, for as long as anything is written."""
        before = -1
        while not self.done and self.written != before:
            before = self.written
            self._thread.join(PATIENCE)
        assert self.error is None, self.error
        assert self.done, f"after {self.written} bytes nothing was written for {PATIENCE} s"

    def verify(self, directory: Path | None = None) -> None:
        for number in range(self._count):
            path = (directory or self._directory) / f"file-{number}"
            with path.open("rb", buffering=0) as file:
                for piece in self._pieces(number):
                    assert file.read(len(piece)) == piece, f"{path} at {file.tell()}"
                assert not file.read(1)

    def _run(self) -> None:
        try:
            self._directory.mkdir(exist_ok=True)
            for number in range(self._count):
                with (self._directory / f"file-{number}").open("wb", buffering=0) as file:
                    for piece in self._pieces(number):
                        file.write(piece)
                        self.written += len(piece)
        except OSError as error:
            self.error = error

    def _pieces(self, number: int) -> Iterator[bytes]:
        choose = random.Random(number)
        for _ in range(self._file_bytes // PIECE):
            yield choose.randbytes(PIECE)


def disk_use(directory: Path) -> int:
    """What the directory takes on its disk, in bytes."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118
            except FileNotFoundError:
                continue
    return total


def memory_use(process: int) -> int:
    """The anonymous memory of a process, in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def test_five_times_the_cache_is_written_and_read_back(scratch: Path) -> None:
    with FileSystem(scratch, count=6, settings=SMALL) as fs:
        fs.format()
        fs.mount()
        with Watch(fs):
            with Writer(fs.mountpoint / "many", 5 * CACHE) as writer:
                writer.finish()
            writer.verify()
            found = status(fs)
            assert found["cache"]["evicted_bytes"] > 3 * CACHE
            assert found["requests"]["unexpected_errors"] == 0
            fs.umount()
        check_clean(fs)
        fs.mount()
        writer.verify()
        fs.umount()


def test_writers_wait_for_backends_that_are_gone_and_nothing_is_refused(scratch: Path) -> None:
    """Accepted data stay within the bound however long an outage lasts; all else goes on meanwhile."""
    with FileSystem(scratch, count=6, settings=SMALL) as fs:
        fs.expect(*OUTAGE)
        fs.format()
        fs.mount()
        (fs.mountpoint / "before").write_bytes(b"local")
        fs.sync()
        with Watch(fs) as watch:
            fs.servers.kill()
            with Writer(fs.mountpoint / "many", 2 * CACHE) as writer:
                eventually(lambda: status(fs)["cache"]["waiting_for_room"], "the writer waits for room")
                written = writer.written
                assert not writer.done
                # None of these needs room, or a backend.
                assert (fs.mountpoint / "before").read_bytes() == b"local"
                assert os.statvfs(fs.mountpoint).f_blocks > 0
                assert (fs.mountpoint / "many" / "file-0").stat().st_size > 0
                eventually(lambda: status(fs)["flush"]["waiting"], "the status says what is waited for")
                with pytest.raises(OSError, match="No space left"):
                    (fs.mountpoint / "new").mkdir()
                assert written < CACHE + (64 << 20), "the kernel's share apart, no more than the cache holds"
                fs.servers.start()
                writer.finish()
            writer.verify()
            assert watch.memory
            fs.umount()


def test_a_file_of_one_sync_may_be_larger_than_the_cache(scratch: Path) -> None:
    """`cp` of a database: its sync cannot come before the file is whole, so it joins before, with an alarm."""
    source = scratch / "source"
    with source.open("wb") as file:
        for number in range(3 * CACHE // 2 // PIECE):
            file.write(random.Random(number).randbytes(PIECE))
    with FileSystem(scratch / "fs", count=6, settings=SMALL) as fs:
        fs.format()
        fs.mount()
        fs.expect(r"since its last sync")
        with Watch(fs):
            shutil.copyfile(source, fs.mountpoint / "copy.lmdb")
            with source.open("rb") as wanted, (fs.mountpoint / "copy.lmdb").open("rb") as found:
                while piece := wanted.read(PIECE):
                    assert found.read(PIECE) == piece
                assert not found.read(1)
            fs.umount()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_bounded_with_the_bounds_that_a_user_has(scratch: Path) -> None:
    """Groups, uncovered data and cuts are as large as they get: a stream, a database of one sync, cold reads."""
    cache = 1536 << 20
    settings = {
        "cache.size": cache,
        "cache.journal_size": "64MiB",
        "cache.uncovered_size": "64MiB",
        "flush.spool_size": "256MiB",
        "flush.cut_size": "256MiB",
        "cache.second_look_seconds": 0,
    }
    with FileSystem(scratch, shards=(16, 4), count=24, settings=settings) as fs:
        fs.format()
        fs.mount()
        with Watch(fs, cache) as watch:
            with Writer(fs.mountpoint / "many", 900 << 20, 90 << 20) as writer:
                writer.finish()
            with (fs.mountpoint / "one.lmdb").open("wb", buffering=0) as file:
                for number in range(300):
                    file.write(random.Random(number).randbytes(PIECE))
                os.fsync(file.fileno())
            fs.sync()
            writer.verify()
            fs.umount()
            print(f"RssAnon {watch.memory >> 20} MiB, disk {watch.disk >> 20} of {cache >> 20} MiB")
        forget(fs)
        fs.mount()
        with Watch(fs, cache) as watch:
            writer.verify()
            fs.umount()
            print(f"RssAnon {watch.memory >> 20} MiB, disk {watch.disk >> 20} of {cache >> 20} MiB")


# What the daemon says while no backend answers.
OUTAGE = (
    r"the cache is full",
    r"backend .* (is|does|has)",
)
