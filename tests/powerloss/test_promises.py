"""Each promise of durability against a power cut at the moment that tests it most.

Unlike the cuts at random moments these keep nothing, or anything, of what no fsync covered right after a call
returned, where a generation is half made, and while a lost machine is being restored.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import workload
from tests.support.daemon import FileSystem
from tests.support.workload import Running

pytestmark = pytest.mark.mount

# Nothing becomes durable by itself.
LAZY = {"cache.group_seconds": 600, "flush.cut_seconds": 600, "flush.quiet_seconds": 600, "log.level": "warning"}
EAGER = {"cache.group_seconds": 0.3, "flush.cut_seconds": 0.5, "flush.quiet_seconds": 0.1, "log.level": "warning"}

# Between what a generation stores here, what it sends, and what it records here.
POINTS = (
    "flush.packs.uploaded",
    "spool.head.stored",
    "publish.send",
    "quorum_write.acknowledged",
    "publish.published",
    "flush.record.step",
    "flush.recorded",
    "flush.spool.cleared",
    "flush.precopy.recorded",
    "own.announced",
)


def write(path: Path, data: bytes, *, flags: int = 0, sync: Callable[[int], None] | None = None) -> None:
    """Writes a file anew, and makes it durable by `sync`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    try:
        assert os.pwrite(descriptor, data, 0) == len(data)
        if sync is not None:
            sync(descriptor)
    finally:
        os.close(descriptor)


def touch_mapped(path: Path, data: bytes) -> None:
    """Writes a file through a shared mapping, and makes it durable by msync."""
    with path.open("w+b") as file:
        file.truncate(len(data))
        with mmap.mmap(file.fileno(), len(data)) as mapped:
            mapped[:] = data
            mapped.flush()


def sync_names(directory: Path) -> None:
    """An fsync of a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# By name of the file: how much of it is written, by which call.
CALLS: dict[str, tuple[int, Callable[[Path, bytes], None]]] = {
    "fsync": (10_000, lambda path, data: write(path, data, sync=os.fsync)),
    "fsync-large": (6 << 20, lambda path, data: write(path, data, sync=os.fsync)),
    "fdatasync": (10_000, lambda path, data: write(path, data, sync=os.fdatasync)),
    "O_SYNC": (10_000, lambda path, data: write(path, data, flags=os.O_SYNC)),
    "O_DSYNC": (10_000, lambda path, data: write(path, data, flags=os.O_DSYNC)),
    "msync": (10_000, touch_mapped),
    "atomic.lmdb": (10_000, touch_mapped),
    "atomic-large.lmdb": (30 << 20, touch_mapped),
}


def test_each_call_that_promises_durability_keeps_it(scratch: Path) -> None:
    """Right after each call the power goes: what it covered is there, with all before it, and nothing else."""
    wanted: dict[str, bytes] = {}
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True, metadata="strict", settings=LAZY) as fs:
        fs.format()
        fs.mount()
        for name, (size, call) in CALLS.items():
            data = random.Random(name).randbytes(size)
            call(fs.mountpoint / name, data)
            wanted[name] = data
            (fs.mountpoint / "lost").write_bytes(b"never covered")
            fs.power_cut(keep="none")
            fs.mount()
            found = {path.name: path.read_bytes() for path in fs.mountpoint.iterdir()}
            assert found.keys() == wanted.keys(), f"after {name}"
            assert [path for path in found if found[path] != wanted[path]] == [], f"after {name}"
        fs.umount()


def test_names_are_durable_once_their_directory_was_synced(scratch: Path) -> None:
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True, metadata="strict", settings=LAZY) as fs:
        fs.format()
        fs.mount()
        top = fs.mountpoint
        (top / "d").mkdir()
        for name in ("old", "gone", "over", "under"):
            write(top / name, name.encode(), sync=os.fsync)
        (top / "old").rename(top / "d" / "new")
        (top / "gone").unlink()
        (top / "over").rename(top / "under")
        (top / "link").hardlink_to(top / "under")
        (top / "sym").symlink_to("d/new")
        (top / "under").chmod(0o600)
        sync_names(top)
        (top / "later").mkdir()
        fs.power_cut(keep="none")
        fs.mount()
        assert sorted(str(path.relative_to(top)) for path in top.rglob("*")) == ["d", "d/new", "link", "sym", "under"]
        assert (top / "sym").read_bytes() == b"old"
        assert (top / "link").read_bytes() == (top / "under").read_bytes() == b"over"
        assert (top / "link").stat().st_nlink == 2
        assert (top / "link").stat().st_mode & 0o777 == 0o600
        fs.umount()


def test_what_a_qsfs_sync_returned_for_is_durable_here_too(scratch: Path) -> None:
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True, settings=LAZY) as fs:
        fs.format()
        fs.mount()
        (fs.mountpoint / "d").mkdir()
        (fs.mountpoint / "d" / "a").write_bytes(b"1" * 100_000)
        fs.sync()
        (fs.mountpoint / "d" / "b").write_bytes(b"2")
        fs.power_cut(keep="none")
        fs.mount()
        assert [path.name for path in (fs.mountpoint / "d").iterdir()] == ["a"]
        assert (fs.mountpoint / "d" / "a").read_bytes() == b"1" * 100_000
        fs.umount()


@pytest.mark.parametrize(("file", "size"), [("journal*", 5000), ("data.mdb", 6 << 20)])
def test_a_disk_that_failed_once_is_not_trusted_again(scratch: Path, file: str, size: int) -> None:
    """After a failed flush the kernel counts its pages as clean: the next one succeeds and proves nothing."""
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True, settings=LAZY) as fs:
        assert fs.disk is not None
        fs.expect("Input/output error")
        fs.format()
        fs.mount()
        write(fs.mountpoint / "before", b"1" * size, sync=os.fsync)
        fs.disk.fail("fsync", errno.EIO, match=file, count=1)
        for name in ("during", "after"):
            with pytest.raises(OSError):
                write(fs.mountpoint / name, b"2" * size, sync=os.fsync)
        assert (fs.mountpoint / "before").read_bytes() == b"1" * size
        fs.power_cut(keep="none")
        fs.mount()
        assert (fs.mountpoint / "before").read_bytes() == b"1" * size
        assert not (fs.mountpoint / "after").exists()
        write(fs.mountpoint / "again", b"3" * size, sync=os.fsync)
        fs.umount()
        fs.run("fsck", "--deep")


@pytest.mark.parametrize(
    ("file", "size", "said"),
    [
        ("journal*", 5000, "the journal cannot be written"),
        ("data.mdb", 6 << 20, "the local commit failed"),
    ],
)
def test_a_full_local_disk_costs_nothing_that_was_synced(scratch: Path, file: str, size: int, said: str) -> None:
    """What fails says so and what to do, the mount goes on reading, and with room again all is there and goes on."""
    wanted = {"small": b"1" * 5000, "large": b"2" * (6 << 20), "journalled": b"3" * 5000}
    reason = rf"{said}: .*No space left on device; see to the cache's disk, .* and mount again"
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True, settings=LAZY) as fs:
        assert fs.disk is not None
        fs.expect(reason)
        fs.format()
        fs.mount()
        for name, data in wanted.items():
            write(fs.mountpoint / name, data, sync=os.fsync)
        fs.disk.fail("write", errno.ENOSPC, match=file)
        for name in ("during", "after"):
            with pytest.raises(OSError) as caught:
                write(fs.mountpoint / name, b"4" * size, sync=os.fsync)
            assert caught.value.errno == errno.EIO
        assert {name: (fs.mountpoint / name).read_bytes() for name in wanted} == wanted
        state = fs.status()
        assert not state["writable"]
        assert re.search(reason, state["reason"])
        assert re.search(f"what was written since may be lost: .*{reason}", fs.umount())
        if file == "data.mdb":
            refused = fs.run("mount", code=14)
            assert re.search(reason, refused.stderr)
        fs.power_cut(keep="none")
        fs.disk.heal()
        fs.mount()
        found = {path.name: path.read_bytes() for path in fs.mountpoint.iterdir()}
        assert wanted.items() <= found.items()
        assert "after" not in found
        write(fs.mountpoint / "again", b"5" * size, sync=os.fsync)
        fs.umount()
        fs.run("fsck", "--deep")


def lose_power_at(scratch: Path, points: tuple[str, ...], keep: tuple[str, ...]) -> None:
    """The daemon dies at each point, and what no fsync covered is gone with it."""
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True, metadata="strict", settings=EAGER) as fs:
        fs.format()
        for number, point in enumerate(points):
            # Pre-copy takes whole packs: where cuts come too often for this machine, it never finds enough.
            fs.configure(flush__cut_seconds=600 if point.startswith("flush.precopy") else EAGER["flush.cut_seconds"])
            mounted = fs.run("--json", "mount", code=None, QSFS_FAILPOINTS=f"{point}=kill")
            place, acks = fs.mountpoint / f"w{number}", scratch / f"acks{number}"
            if mounted.returncode == 0:
                fs.adopt(mounted.json()["process"])
                with Running("files", place, acks, seed=number):
                    fs.wait_dead()
            fs.power_cut(seed=number, keep=keep[number % len(keep)])
            fs.run("fsck", "--local")
            fs.mount()
            for earlier in range(number + 1):
                problems = workload.verify(fs.mountpoint / f"w{earlier}", scratch / f"acks{earlier}")
                assert problems == [], f"w{earlier} after {point}"
            fs.sync()
            fs.umount()
            fs.run("fsck", "--deep")


def test_a_generation_that_was_half_made_when_the_power_went_harms_nothing(scratch: Path) -> None:
    """A head that was sent is known again, or the machine would take its own for a stranger's."""
    lose_power_at(scratch, ("publish.send", "publish.published", "flush.recorded"), ("none",))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_step_of_a_generation_is_harmed_by_a_power_cut(scratch: Path) -> None:
    lose_power_at(scratch, POINTS * 2, ("none", "random", "newest"))


def run_through(fs: FileSystem, command: str, requests: dict[str, int], choose: random.Random | None) -> None:
    """Runs a command, again if the power went at one of its `requests`, which are counted where none does.

    Whether it had returned or not: nothing more becomes durable afterwards.
    """
    assert fs.disk is not None
    if choose is not None:
        kind = choose.choice(sorted(requests))
        at = choose.randint(1, requests[kind])
        fs.disk.arm(kind=kind, at=at, before=choose.random() < 0.5, seed=choose.random())
    done = fs.run(command, code=None)
    status = fs.disk.stat()
    if status["dead"]:
        fs.wait_power_cut()
        # It may have come so far that there is nothing left to restore.
        done = fs.run(command, code=None)
        assert done.returncode == 0 or (command == "restore" and (fs.cache / "data.mdb").exists()), done
    elif choose is None:
        requests |= {kind: sum(status[f"{kind}s"].values()) for kind in ("fsync", "write")}
    else:
        assert done.returncode == 0, done
    fs.power_cut(keep="none")


def restore_through(scratch: Path, rounds: int) -> None:
    """A lost machine is brought back, and its new one loses its power meanwhile."""
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True, metadata="strict", settings=EAGER) as fs:
        assert fs.disk is not None
        fs.format()
        fs.mount()
        with Running("files", fs.mountpoint / "w", scratch / "acks", seed=1, count=60) as writer:
            assert writer.end() == 0
        fs.umount()
        requests: dict[str, dict[str, int]] = {"restore": {}, "takeover": {}}
        for number in range(rounds):
            # A new machine.
            for path in fs.cache.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            fs.power_cut(keep="all")
            choose = random.Random(f"restore/{number}")
            for command in ("restore", "takeover"):
                run_through(fs, command, requests[command], choose if number else None)
                assert (fs.cache / "data.mdb").exists(), f"round {number}, after {command}"
            fs.mount()
            assert workload.verify(fs.mountpoint / "w", scratch / "acks") == [], f"round {number}"
            fs.umount()
        fs.run("fsck", "--deep")


def test_a_restore_that_loses_its_power_is_repeated_and_one_that_returned_is_durable(scratch: Path) -> None:
    restore_through(scratch, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_restore_loses_its_power_at_many_moments(scratch: Path) -> None:
    restore_through(scratch, 40)
