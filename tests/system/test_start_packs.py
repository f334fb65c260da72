"""A database that starts on a real mount: what it reads is packed, and comes in bulk when the cache is empty."""

from __future__ import annotations

import os
import random

import pytest

from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, cold, content, eventually, status

PAGE = 4096
PAGES = 4096
START_SECONDS = 6
SETTINGS = QUICK | {
    "cache.second_look_seconds": 0.1,
    "cache.start_seconds": START_SECONDS,
    "fetch.deadline_seconds": 30,
    "mount.read_ahead_kb": 0,
}


@pytest.fixture
def fs(scratch):
    with FileSystem(scratch, settings=SETTINGS) as fs:
        fs.format()
        fs.mount()
        yield fs


def start(fs: FileSystem, pages: list[int], data: bytes) -> None:
    """Reads as a mapped database does: 4 KiB at a time, all over the file."""
    fd = os.open(fs.mountpoint / "storage.lmdb", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for page in pages:
            assert os.pread(fd, PAGE, page * PAGE) == data[page * PAGE : (page + 1) * PAGE]
    finally:
        os.close(fd)


def cost(fs: FileSystem, pages: list[int], data: bytes) -> float:
    """Bytes from the backends for each byte that a start touches."""
    before = status(fs)["reads"]["bytes"]
    start(fs, pages, data)
    return (status(fs)["reads"]["bytes"] - before) / (len(pages) * PAGE)


def looked(fs: FileSystem) -> bool:
    found = fs.run("info", "--json", "storage.lmdb").json()["packs"]
    return bool(found["looked"] == found["count"])


def test_a_start_on_an_empty_cache_fetches_at_most_twice_what_it_touches(fs: FileSystem):
    data = content("storage.lmdb", PAGES * PAGE)
    pages = random.Random(1).sample(range(PAGES), PAGES * 26 // 1000)
    (fs.mountpoint / "storage.lmdb").write_bytes(data)
    fs.sync()
    eventually(lambda: looked(fs), "second look")
    fs.umount()
    fs.mount()
    fs.run("cache", "evict", "storage.lmdb")
    scattered = cost(fs, pages, data)
    eventually(lambda: status(fs)["flush"]["start"]["packed_bytes"], "packing")
    assert status(fs)["flush"]["start"]["packed_bytes"] == len(pages) * PAGE
    fs.sync()
    eventually(lambda: looked(fs), "second look")
    fs.umount()
    fs.mount()
    assert status(fs)["flush"]["start"]["recorded_pages"] == len(pages)
    fs.run("cache", "evict", "storage.lmdb")
    assert cost(fs, pages, data) <= 2 < scattered
    cold(fs)
    assert cost(fs, pages, data) <= 2
    # How many came in bulk depends on how many were asked for before they were there.
    assert status(fs)["start_fetched"]["pages"] > 0
    assert fs.run("cache", "--json", "warm", "--start").json()["fetched_bytes"] == 0
    assert (fs.mountpoint / "storage.lmdb").read_bytes() == data
