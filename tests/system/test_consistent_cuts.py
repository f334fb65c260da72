"""A generation that is cut at any moment under load is, restored elsewhere, what a crash at that moment leaves."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import workload
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.support.workload import Running, casper
from tests.system.load import EAGER, check_clean

pytestmark = pytest.mark.mount

# Both kinds of files of a node are sparse and mapped; of `data.lmdb` the kernel may write a new meta page before
# the pages that it points to, so that a cut of it between two syncs would be a corrupt database.
NODE = {"validators": 6, "units": "plain", "default_names": True}


def blocks_in_generations(fs: FileSystem, scratch: Path, count: int) -> None:
    choose = random.Random(count)
    acks = scratch / "acks"
    fs.format()
    fs.mount()
    acked: dict[str, int] = {}
    with Running("casper", fs.mountpoint / "node", acks, seed=count, **NODE) as node:
        done = node.wait_for(1)
        for number in range(count):
            done = node.wait_for(done + 1 + choose.randint(1, 4))
            acked[f"s{number}"] = node.acked
            fs.run("snapshot", "create", f"s{number}")
    promises = workload.read(acks)
    fs.kill()
    with fs.another_machine(scratch / "two") as other:
        other.run("restore")
        other.run("takeover")
        for name, blocks in acked.items():
            other.run("rollback", name, "--yes")
            other.mount()
            place = other.mountpoint / "node"
            problems = casper.verify(place, replace(promises, acked=blocks))
            assert not problems, (name, problems)
            other.umount()
        check_clean(other)


def test_databases_of_generations_cut_under_load_open_and_hold_all_blocks_until_then(
    scratch: Path, fleet: Servers
) -> None:
    """Each snapshot has every block that was synced before it was asked for, and `data` no fewer than `storage`."""
    with FileSystem(scratch / "one", shards=(3, 1), count=6, servers=fleet, namespace="cuts", settings=EAGER) as fs:
        blocks_in_generations(fs, scratch, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_databases_of_many_generations(scratch: Path, fleet: Servers) -> None:
    with FileSystem(
        scratch / "one", shards=(3, 1), count=6, servers=fleet, namespace="many-cuts", settings=EAGER
    ) as fs:
        blocks_in_generations(fs, scratch, 40)
