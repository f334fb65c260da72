"""Starting is O(what is not settled): a mount of a large file system reads neither its files nor its extents.

Times are CPU seconds of the daemon, which a busy machine does not stretch much, and are printed beside those
of the wall (`pytest -s`): `docs/performance.md` has them.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import FileSystem
from tests.system.large import DIRECTORIES, FILE_PAGES, FILES, fill

pytestmark = [pytest.mark.mount, pytest.mark.slow]


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
