"""`qsfs info` and `qsfs cache` on a real mount: what they say is what is, and files keep their bytes."""

from __future__ import annotations

import os

import pytest

from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, check, eventually, store


@pytest.fixture
def fs(scratch):
    with FileSystem(scratch, settings=QUICK | {"cache.second_look_seconds": 0.1}) as fs:
        fs.format()
        fs.mount()
        (fs.mountpoint / "dir").mkdir()
        yield fs


def info(fs: FileSystem, path: str) -> dict:
    found: dict = fs.run("info", "--json", path).json()
    return found


def test_a_file_goes_and_comes_back(fs, scratch):
    """Dirty, then clean, evicted, fetched, pinned: each is shown, and the bytes are the same at the end."""
    store(fs, "dir/a", 900_000)
    fs.sync()
    looked = eventually(lambda: (f := info(fs, "dir"))["packs"]["looked"] == f["packs"]["count"] and f, "second look")
    assert looked["pages"]["clean"] == 220 and looked["packs"]["spare_shards"] == {"2": looked["packs"]["count"]}
    assert fs.run("cache", "--json", "evict", fs.mountpoint / "dir").json()["dropped_bytes"] == 220 * 4096
    assert info(fs, "dir/a")["pages"]["remote"] == 220
    (scratch / "link").symlink_to(fs.mountpoint / "dir")
    assert fs.run("cache", "--json", "warm", scratch / "link" / "a").json()["fetched_bytes"] == 220 * 4096
    assert fs.run("cache", "--json", "pin", "dir").json()["changed"] == 2
    store(fs, "dir/later", 10_000)
    os.sync()
    assert info(fs, "dir/later")["policy"] == ["pinned_by_hand"]
    assert fs.run("cache", "--json", "evict", "dir/a").json() == {
        "dropped_bytes": 0,
        "stays": {"pinned": 220 * 4096},
    }
    check(fs, "dir/a")
    (fs.mountpoint / "dir/a").unlink()
    assert "removed" in fs.run("info", "dir/a", code=8).stderr
    assert "outside the mount" in fs.run("info", "/", code=3).stderr
