"""fsync means power-loss durability, and a crash yields an honest state: the running system, cut off.

The cache lies on a disk that loses at each cut what no fsync covered and tears what was in flight.  Programs
write to the mount until it dies under them; after each remount all that they, and those before them, were
promised must be there, and nothing that they never wrote.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import scratch as places
from tests.support import workload
from tests.support.daemon import FileSystem
from tests.support.workload import Running

pytestmark = pytest.mark.mount

# Groups commit, pages are uploaded and generations are cut between the power cuts too.
EAGER = {
    "cache.second_look_seconds": 0,
    "cache.group_seconds": 0.3,
    "flush.quiet_seconds": 0.2,
    "flush.cut_seconds": 1,
    "log.level": "warning",
}

# One sync of `lmdb-map-async-large` is larger than each of these, and than all of them together.
TIGHT = {"cache.uncovered_size": "1MiB", "cache.group_size": "1MiB", "cache.journal_size": "1MiB"}


@dataclass(frozen=True)
class Case:
    """A workload with its options, settings of the file system, and at which file of the cache the power goes.

    `steps` are acknowledged before a kill.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ("*", "journal*")
    steps: int = 20


CASES = {
    "files": Case("files"),
    "files-unsynced": Case("files", {"sync_every": 20}),
    "lmdb": Case("lmdb", {"single": "plain.db"}),
    "lmdb-map-async": Case("lmdb", {"mode": "manual", "single": "data.lmdb"}),
    "lmdb-map-async-large": Case("lmdb", {"mode": "manual", "large": 500}, TIGHT, ("*", "data.mdb"), 5),
    "casper": Case("casper", {"validators": 6, "units": "durable"}),
    "sqlite-wal": Case("sqlite", {"journal": "wal"}),
    "sqlite-delete": Case("sqlite", {"journal": "delete"}),
}


def survive(scratch: Path, chosen: str, rounds: int, first_seed: int = 0, metadata: str = "ordered") -> None:
    """Runs one workload into `rounds` ends of the daemon, by power cut or SIGKILL, at random moments."""
    case = CASES[chosen]
    with FileSystem(
        scratch, shards=(2, 1), count=4, forgetting=True, metadata=metadata, settings=EAGER | case.settings
    ) as fs:
        fs.format()
        fs.power_cut(keep="none")
        fs.mount()
        for number in range(first_seed, first_seed + rounds):
            cut_off(fs, scratch, number, random.Random(f"{chosen}/{number}"), case)
            # Copies on the backends that the power cut off may lack until the next mount sees to them.
            fs.run("fsck", "--local")
            fs.mount()
            check_all(fs, scratch, number, first_seed)
        fs.umount()
        fs.power_cut(keep="none")
        fs.run("fsck", "--deep")
        fs.mount()
        check_all(fs, scratch, first_seed + rounds - 1, first_seed)
        fs.umount()


def cut_off(fs: FileSystem, scratch: Path, number: int, choose: random.Random, case: Case) -> None:
    """Lets one program write until the machine fails under it."""
    assert fs.disk is not None
    by_power = choose.random() < 0.75
    if by_power:
        fs.disk.arm(
            kind=choose.choice(("fsync", "write")),
            at=choose.randint(1, 120),
            before=choose.random() < 0.5,
            match=choose.choice(case.files),
            seed=number,
            victims=[fs.process],
        )
    place, acks = fs.mountpoint / f"w{number}", scratch / f"acks{number}"
    with Running(case.name, place, acks, seed=number, **case.options) as writer:
        if by_power:
            fs.wait_power_cut()
        else:
            writer.wait_for(case.steps)
            fs.kill()
            # A power cut takes the programs with it; so does this.
            writer.kill()
    for mountpoint in places.mounts_below(fs.mountpoint):
        places.detach(mountpoint)


def check_all(fs: FileSystem, scratch: Path, last: int, first_seed: int) -> None:
    """What each program was promised is there, after the last crash and all before it."""
    for number in range(first_seed, last + 1):
        problems = workload.verify(fs.mountpoint / f"w{number}", scratch / f"acks{number}")
        assert problems == [], f"w{number} after crash {last}"


@pytest.mark.parametrize(
    ("chosen", "metadata"),
    [
        ("files", "strict"),
        ("files-unsynced", "ordered"),
        ("casper", "ordered"),
        ("lmdb-map-async-large", "ordered"),
    ],
)
def test_what_was_synced_survives_power_cuts_and_kills(scratch: Path, chosen: str, metadata: str) -> None:
    """A "strict" disk keeps names only where their directory was synced, as POSIX has it."""
    survive(scratch, chosen, 3, metadata=metadata)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("metadata", ["ordered", "strict"])
@pytest.mark.parametrize("chosen", CASES)
def test_what_was_synced_survives_many_power_cuts_and_kills(scratch: Path, chosen: str, metadata: str) -> None:
    survive(scratch, chosen, 15, first_seed=100, metadata=metadata)


def test_a_daemon_that_does_not_sync_its_journal_is_caught(scratch: Path) -> None:
    """Else the tests above would prove nothing."""
    (scratch / "liar").mkdir()
    (scratch / "liar" / "sitecustomize.py").write_text("import os\nos.fdatasync = lambda descriptor: None\n")
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True) as fs:
        fs.format()
        fs.mount(PYTHONPATH=str(scratch / "liar"))
        with Running("files", fs.mountpoint / "w", scratch / "acks", seed=1) as writer:
            writer.wait_for(40)
            fs.power_cut(keep="none")
        fs.mount()
        assert workload.verify(fs.mountpoint / "w", scratch / "acks") != []
