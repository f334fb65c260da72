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
from tests.system.test_cache_bound import Watch, memory_use

pytestmark = [pytest.mark.mount, pytest.mark.slow]

MIB = 1 << 20
CACHE, BOUND = 50 << 30, 500_000_000
DIRECTORIES, FILES = 20, 50_000
WRITTEN = 300 * MIB
# As a user has them, where a test has less.
SETTINGS = {
    "cache.size": CACHE,
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
        with Watch(fs, CACHE, BOUND) as watch:
            for step in (find, list_one, stat_at_random, write, read_back, touch):
                step(fs.mountpoint)
                if step == write:
                    fs.sync()
                now = memory_use(fs.process)
                print(f"{step.__name__}: RssAnon {now >> 20} MiB, so far at most {watch.memory >> 20}")
        fs.umount()


def find(mountpoint: Path) -> None:
    places = [mountpoint / "d0000", mountpoint / "d0001"]
    command = ["find", *places, "-type", "f", "-size", "+1k", "-printf", "."]
    assert len(subprocess.run(command, capture_output=True, check=True).stdout) == 2 * FILES


def list_one(mountpoint: Path) -> None:
    done = subprocess.run(["ls", "-l", mountpoint / "d0002"], capture_output=True, check=True)
    assert done.stdout.count(b"\n") == FILES + 1


def stat_at_random(mountpoint: Path) -> None:
    source = random.Random(1)
    for _ in range(50_000):
        (mountpoint / f"d{source.randrange(DIRECTORIES):04}/f{source.randrange(FILES):04}").stat()


def write(mountpoint: Path) -> None:
    with (mountpoint / "written").open("wb", buffering=0) as out:
        for _ in range(WRITTEN // MIB):
            out.write(os.urandom(MIB))
        os.fsync(out.fileno())


def read_back(mountpoint: Path) -> None:
    assert read(mountpoint / "written") == WRITTEN


def touch(mountpoint: Path) -> None:
    """What a cache of 50 GB would see of its blocks fills the memory of what was used lately; holes do, too."""
    with (mountpoint / "sparse").open("wb") as file:
        file.truncate(2 * MOST * BLOCK_SIZE)
    assert read(mountpoint / "sparse") == 2 * MOST * BLOCK_SIZE


def read(file: Path) -> int:
    """How many bytes the daemon gives of the file; the kernel's cache of it is dropped."""
    found = 0
    with file.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := source.read(MIB):
            found += len(piece)
    return found
