"""More backends are gone for good than may be: what is left of the data is saved, and what is not is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qsfs.format.shard import parse_shard_key
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, Inside, cold, configured, content, dead, eventually, forget, status, store, up

pytestmark = pytest.mark.mount

KIB = 1 << 10
SIZE = 700 * KIB
PAGE = 4096


def unreadable(fs: FileSystem, name: str) -> set[int]:
    """The pages of a file that give EIO; all others are right."""
    wanted, gone = content(name, SIZE), set()
    with (fs.mountpoint / name).open("rb", buffering=0) as file:
        for page in range(SIZE // PAGE):
            try:
                found = os.pread(file.fileno(), PAGE, page * PAGE)
            except OSError as error:
                assert error.errno == errno.EIO
                gone.add(page)
                continue
            assert found == wanted[page * PAGE : (page + 1) * PAGE], f"{name}, page {page}"
    return gone


def all_that_is_gone(fs: FileSystem, names: list[str]) -> dict[str, set[int]]:
    """What cannot be read, once that is what the mount says it is."""
    flush = status(fs)["flush"]
    lost = flush["lost"]
    if lost["packs_to_read"] or not lost["unreadable_packs"] == flush["packs_not_full"] > 0:
        return {}
    gone = {name: unreadable(fs, name) for name in names}
    return gone if sum(map(len, gone.values())) * PAGE == lost["unreadable_bytes"] else {}


def whose_loss_is_one_too_many(fs: FileSystem) -> list[int]:
    """Three backends that hold shards of one data pack of 4+2, only one of them a data shard."""
    holds: dict[bytes, dict[int, int]] = {}
    for index in range(9):
        with Inside(fs.servers, index, fs.namespace) as inside:
            for key, value in inside.values().items():
                shard = parse_shard_key(key)
                if shard is not None and len(value) > 200 * KIB:
                    holds.setdefault(shard.pack_id, {})[shard.number] = index
    placed = next(iter(holds.values()))
    return [placed[number] for number in (1, 4, 5)]


def test_three_of_nine_are_gone_where_two_may_be(scratch: Path, fleet: Servers) -> None:
    """They are given up when told so twice; extents in shards that are left move on, and a restore has them."""
    with FileSystem(scratch, shards=(4, 2), servers=fleet, count=9, namespace="rescue", settings=QUICK) as fs:
        fs.format()
        fs.mount()
        names = [store(fs, f"file-{number}", SIZE) for number in range(6)]
        fs.run("sync", "--class", "full")
        cold(fs)
        kept = store(fs, "written-since", SIZE)
        fs.sync()
        gone_backends = whose_loss_is_one_too_many(fs)
        with dead(fs.servers, gone_backends):
            fs.expect("lacks shards and could not be completed|fewer shards than it needs|shards that are left")
            fs.expect("is lost: all 6 backends answered", "cannot be read any more")
            eventually(lambda: not up(fs, 7), "their loss is noticed")
            fs.set({"backend": [one for index, one in enumerate(configured(fs)) if index not in gone_backends]})
            give_up = ("fleet", "apply", "--lost", *(str(index + 1) for index in gone_backends))
            refused = fs.run(*give_up, code=3).stderr
            assert "could not be read any more" in refused and "--accept-loss" in refused
            told = fs.run(*give_up, "--accept-loss", "--dry-run").stdout
            assert "the rest is lost" in told and "nothing was changed" in told
            fs.run(*give_up, "--accept-loss")
            gone = eventually(lambda: all_that_is_gone(fs, names), "all lost packs were looked through")
            lost = status(fs)["flush"]["lost"]
            assert lost["rescued_bytes"] > 0
            assert "DATA LOST" in fs.run("status").stdout
            assert not unreadable(fs, kept), "the cache had it"
            fs.sync()
            forget(fs)
            fs.mount()
            assert {name: unreadable(fs, name) for name in names} == gone
            assert not unreadable(fs, kept)
            fs.umount()
