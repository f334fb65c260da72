"""Any m backends may be gone, and all goes on; with fewer spares, what goes on is what was promised."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import (
    QUICK,
    check,
    cold,
    dead,
    ended,
    eventually,
    forget,
    running,
    start,
    status,
    store,
    up,
)

pytestmark = pytest.mark.mount

MIB = 1 << 20
CHOICES = {
    "the-first": range(4),
    "the-last": range(20, 24),
    "some": random.Random("gone").sample(range(24), 4),
}


def any_four_of_24(fs: FileSystem, choices: dict[str, list[int] | range], size: int) -> None:
    fs.format()
    fs.mount()
    store(fs, "before", size)
    fs.sync()
    for name, gone in choices.items():
        with dead(fs.servers, gone):
            store(fs, name, size)
            # With 20 of 24 left each shard still finds a backend of its own.
            fs.run("sync", "--class", "full")
            check(fs, name)
        eventually(lambda: up(fs, 24), "all backends are up again")
    with dead(fs.servers, gone):
        cold(fs)
        check(fs, name)
    eventually(lambda: up(fs, 24), "all backends are up again")
    for other, gone in choices.items():
        if other != name:
            with dead(fs.servers, gone):
                check(fs, other)
    with dead(fs.servers, gone):
        check(fs, "before")
    eventually(lambda: not status(fs)["flush"]["packs_not_full"], "every pack is full")
    fs.umount()


def test_any_4_of_24_backends_may_be_gone_while_writing_reading_and_restoring(scratch: Path, fleet: Servers) -> None:
    with FileSystem(scratch, shards=(16, 4), servers=fleet, namespace="lost24", settings=QUICK) as fs:
        any_four_of_24(fs, CHOICES, 6 * MIB)


def test_a_file_system_of_the_faster_codec_comes_back_from_any_k(scratch: Path, fleet: Servers) -> None:
    settings = QUICK | {"code.codec": "isa_l_rs_cauchy"}
    with FileSystem(scratch, shards=(16, 4), servers=fleet, namespace="isal24", settings=settings) as fs:
        fs.format()
        fs.mount()
        store(fs, "file", 6 * MIB)
        fs.run("sync", "--class", "full")
        with dead(fs.servers, CHOICES["some"]):
            cold(fs)
            check(fs, "file")
        eventually(lambda: up(fs, 24), "all backends are up again")
        fs.umount()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_4_of_24_backends_may_be_gone_often(scratch: Path, fleet: Servers) -> None:
    choose = random.Random("often")
    choices = {f"choice-{number}": choose.sample(range(24), 4) for number in range(12)}
    with FileSystem(
        scratch, shards=(16, 4), servers=fleet, namespace="often24", settings=QUICK | {"cache.size": "1GiB"}
    ) as fs:
        any_four_of_24(fs, choices, 24 * MIB)


def test_of_20_backends_2_gone_stop_nothing_and_4_gone_stop_only_what_must_be_stored(
    scratch: Path, fleet: Servers
) -> None:
    gone = random.Random("twenty").sample(range(20), 4)
    settings = QUICK | {"flush.stop_deadline_seconds": 2}
    with FileSystem(scratch, shards=(16, 4), servers=fleet, count=20, namespace="lost20", settings=settings) as fs:
        fs.format()
        fs.mount()
        store(fs, "all", 5 * MIB)
        fs.run("sync", "--class", "full")
        with dead(fleet, gone[:2]):
            store(fs, "two-gone", 5 * MIB)
            assert fs.sync()["class"] == "written", "18 shards are a written pack, not a full one"
            check(fs, "two-gone")
            with dead(fleet, gone[2:]):
                cold(fs)
                check(fs, "all")
                # Two of its shards were never stored and two are gone: exactly k are left.
                check(fs, "two-gone")
                published = status(fs)["flush"]["generation"]
                store(fs, "four-gone", 5 * MIB)
                with running(fs, "sync") as sync:
                    waiting = eventually(lambda: status(fs)["flush"]["waiting"], "status says what sync waits for")
                    assert "of the 18 shards that a pack needs are stored" in waiting[0]
                    assert any(fs.servers.config(index, fs.namespace).name in waiting[0] for index in gone)
                    assert sync.poll() is None, "sync said that it was done, with 16 of 20 backends"
                    assert status(fs)["flush"]["generation"] == published
                    check(fs, "four-gone")
                    start(fleet, gone)
                    code, printed = ended(sync)
                assert code == 0, printed
        assert status(fs)["flush"]["generation"] > published
        eventually(lambda: not status(fs)["flush"]["packs_not_full"], "every pack is full", 200)
        forget(fs)
        fs.mount()
        for name in ("all", "two-gone", "four-gone"):
            check(fs, name)
        fs.umount()
