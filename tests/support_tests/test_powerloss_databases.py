"""The disk that forgets spares programs that sync and bites those that do not: so its verdicts count."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import workload
from tests.support.powerloss import PowerLoss
from tests.support.workload import Running

pytestmark = pytest.mark.mount


def cut_rounds(
    top: Path,
    name: str,
    rounds: int,
    *,
    kind: str = "",
    metadata: str = "ordered",
    reach: int = 60,
    file: str = "*",
    **options: Any,
) -> Iterator[list[str]]:
    """Runs a workload into `rounds` power cuts on one disk that comes back each time; what each has lost.

    The cut comes at any of the first `reach` fsyncs or writes of files whose name matches `file`.
    """
    with PowerLoss(top / "backing", top / "mnt", metadata=metadata) as disk:
        for number in range(rounds):
            choose = random.Random(f"{name}/{number}")
            if number:
                disk.restart()
            disk.arm(
                kind=kind or choose.choice(("fsync", "write")),
                at=choose.randint(1, reach),
                before=choose.random() < 0.5,
                match=f"w{number}/{file}",
                seed=number,
            )
            with Running(
                name, top / "mnt" / f"w{number}", top / f"acks{number}", seed=number, **options
            ) as writer:
                assert writer.end() != 0
                disk.wait(timeout=5)
            yield workload.verify(top / "backing" / f"w{number}", top / f"acks{number}")


def spared(top: Path, name: str, rounds: int, **options: Any) -> None:
    """No cut of `rounds` takes anything that was acknowledged, nor does a later one."""
    for number, problems in enumerate(cut_rounds(top, name, rounds, **options)):
        assert problems == [], f"cut {number}"
    for number in range(rounds):
        assert workload.verify(top / "backing" / f"w{number}", top / f"acks{number}") == [], (
            f"cut {number}, later"
        )


def test_lmdb_loses_no_committed_transaction_in_50_power_cuts(scratch: Path) -> None:
    spared(scratch, "lmdb", 50)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lmdb", {"mode": "writemap", "single": "storage.lmdb"}),
        ("sqlite", {"journal": "wal"}),
        ("sqlite", {"journal": "delete"}),
        ("files", {"grain": 512}),
        ("files", {"grain": 512, "sync_every": 7}),
        ("files", {"grain": 512, "metadata": "strict"}),
    ],
    ids=["lmdb-writemap", "sqlite-wal", "sqlite-delete", "files", "files-every-7", "files-strict"],
)
def test_programs_that_sync_lose_nothing(scratch: Path, name: str, options: dict[str, Any]) -> None:
    spared(scratch, name, 12, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lmdb", {"mode": "nosync"}),
        ("lmdb", {"mode": "manual"}),
        ("sqlite", {"journal": "wal", "synchronous": "off"}),
        ("sqlite", {"journal": "delete", "synchronous": "off"}),
    ],
    ids=["lmdb-nosync", "lmdb-map-async", "sqlite-wal-off", "sqlite-delete-off"],
)
def test_programs_that_do_not_are_caught(scratch: Path, name: str, options: dict[str, Any]) -> None:
    """LMDB with MAP_ASYNC and NOMETASYNC is one: its new meta page may arrive before what it names."""
    assert sum(bool(problems) for problems in cut_rounds(scratch, name, 12, kind="write", **options)) >= 2


def test_a_casper_node_s_storage_is_spared_and_its_state_is_not(scratch: Path) -> None:
    """The hazard that atomic sync is for; on a bare disk only a power cut shows it."""
    found = Counter(
        Path(problem.partition(":")[0]).name
        for problems in cut_rounds(scratch, "casper", 12, kind="write", file="data.lmdb", reach=200)
        for problem in problems
    )
    assert set(found) == {"data.lmdb"}


def append(path: Path, *, sync: bool, records: int = 10) -> None:
    """Appends records of 1000 bytes to a log that exists, until the power goes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for number in range(records):
            os.write(descriptor, bytes([number + 1]) * 1000)
            if sync:
                os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("sync", [True, False], ids=["fdatasync", "nothing"])
def test_an_append_only_log_keeps_what_it_synced_and_only_that(scratch: Path, sync: bool) -> None:
    whole = b"".join(bytes([number + 1]) * 1000 for number in range(10))
    kept = Counter[bool]()
    with PowerLoss(scratch / "backing", scratch / "mnt") as disk:
        for number in range(15):
            log = f"log{number}"
            with (disk.mountpoint / log).open("wb") as file:
                os.fsync(file.fileno())
            append(disk.mountpoint / log, sync=sync)
            disk.cut(seed=number)
            kept[(disk.backing / log).read_bytes() == whole] += 1
            disk.restart()
    if sync:
        assert kept == {True: 15}
    else:
        assert kept[False] > 5


def test_a_log_that_is_cut_while_it_syncs_keeps_what_was_acknowledged(scratch: Path) -> None:
    whole = b"".join(bytes([number + 1]) * 1000 for number in range(10))
    lengths = set()
    with PowerLoss(scratch / "backing", scratch / "mnt") as disk:
        for number in range(20):
            log = f"log{number}"
            with (disk.mountpoint / log).open("wb") as file:
                os.fsync(file.fileno())
            disk.arm(at=5, seed=number)
            with pytest.raises(OSError) as caught:
                append(disk.mountpoint / log, sync=True)
            assert caught.value.errno == errno.EIO
            found = (disk.backing / log).read_bytes()
            assert found[:4000] == whole[:4000]
            assert len(found) <= 5000
            lengths.add(len(found.rstrip(b"\0")))
            disk.restart()
    # The fifth was in flight: absent, whole, or torn.
    assert {4000, 5000} < lengths


@pytest.mark.parametrize("metadata", ["ordered", "strict"])
def test_a_seed_repeats_its_power_cut(scratch: Path, metadata: str) -> None:
    """Also through the kernel: the same program and the same seed leave the same bytes."""
    found: dict[tuple[int, int], dict[str, bytes]] = {}
    for run in range(2):
        for seed in range(3):
            top = scratch / f"{run}-{seed}"
            with PowerLoss(top / "backing", top / "mnt", seed=seed, metadata=metadata) as disk:
                disk.arm(kind="write", at=60)
                with pytest.raises(OSError):
                    workload.run("files", disk.mountpoint, top / "acks", seed=7, sync_every=5)
            found[run, seed] = {
                str(path.relative_to(top)): path.read_bytes()
                for path in (top / "backing").rglob("*")
                if path.is_file()
            }
    for seed in range(3):
        assert found[0, seed] == found[1, seed]
    assert len({repr(sorted(found[0, seed].items())) for seed in range(3)}) > 1
