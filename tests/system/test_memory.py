"""The daemon's memory depends neither on how many files there are nor on how large its cache is."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from qsfs.store.recency import MOST
from qsfs.store.schema import BLOCK_SIZE
from tests.support.daemon import FileSystem
from tests.system.large import fill
from tests.system.test_cache_bound import memory_use

pytestmark = [pytest.mark.mount, pytest.mark.slow]

MIB = 1 << 20
BOUND = 500 * MIB
DIRECTORIES, FILES = 20, 50_000
WRITTEN = 300 * MIB
# As a user has them, where a test has less.
SETTINGS = {
    "cache.size": "50GiB",
    "cache.journal_size": "64MiB",
    "cache.uncovered_size": "64MiB",
    "flush.spool_size": "1GiB",
    "flush.cut_size": "256MiB",
}


@pytest.mark.timeout(3600)
def test_a_million_files_and_a_cache_of_50_gb_take_less_than_500_mb(scratch: Path) -> None:
    with FileSystem(scratch, shards=(16, 4), count=24, settings=SETTINGS) as fs:
        fs.format()
        fs.mount()
        fs.umount()
        fill(fs, DIRECTORIES, FILES)
        fs.mount()
        taken = {"start": memory_use(fs.process)}
        listed = subprocess.run(
            ["find", fs.mountpoint / "d0000", fs.mountpoint / "d0001", "-type", "f", "-size", "+1k", "-printf", "."],
            capture_output=True, check=True,
        )  # fmt: skip
        assert len(listed.stdout) == 2 * FILES
        taken["find over 100,000 names"] = memory_use(fs.process)
        lines = subprocess.run(["ls", "-l", fs.mountpoint / "d0002"], capture_output=True, check=True).stdout
        assert lines.count(b"\n") == FILES + 1
        taken["ls -l of 50,000"] = memory_use(fs.process)
        source = random.Random(1)
        for _ in range(50_000):
            name = f"d{source.randrange(DIRECTORIES):04}/f{source.randrange(FILES):04}"
            (fs.mountpoint / name).stat()
        taken["stat of 50,000 at random"] = memory_use(fs.process)
        file = fs.mountpoint / "written"
        write(file)
        taken["300 MiB written"] = memory_use(fs.process)
        fs.sync()
        taken["and flushed"] = memory_use(fs.process)
        assert read(file) == WRITTEN
        taken["read back"] = memory_use(fs.process)
        touch_as_many_blocks_as_are_remembered(fs.mountpoint / "sparse")
        taken["16 GiB touched"] = memory_use(fs.process)
        for what, memory in taken.items():
            print(f"{what}: RssAnon {memory >> 20} MiB")
        fs.umount()
    worst = max(taken, key=lambda what: taken[what])
    assert min(taken.values()) > 0
    assert taken[worst] < BOUND, f"{taken[worst] >> 20} MiB after: {worst}"


def write(file: Path) -> None:
    with file.open("wb", buffering=0) as out:
        for _ in range(WRITTEN // MIB):
            out.write(os.urandom(MIB))
        os.fsync(out.fileno())


def read(file: Path) -> int:
    """How many bytes the daemon gives of the file; the kernel's cache of it is dropped."""
    found = 0
    with file.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := source.read(MIB):
            found += len(piece)
    return found


def touch_as_many_blocks_as_are_remembered(file: Path) -> None:
    """What a cache of 50 GB would see of its blocks fills the memory of what was used lately; holes do, too."""
    with file.open("wb", buffering=0) as stream:
        stream.truncate(2 * MOST * BLOCK_SIZE)
    assert read(file) == 2 * MOST * BLOCK_SIZE
