"""The forgetting disk as programs meet it: coherent mappings, locks, synchronous writes, and the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import scratch as places
from tests.support.powerloss import PowerLoss
from tests.support.powerloss.handle import PowerLossError

pytestmark = pytest.mark.mount


@pytest.fixture
def disk(scratch: Path) -> Iterator[PowerLoss]:
    with PowerLoss(scratch / "backing", scratch / "mnt") as disk:
        yield disk


def refused(number: int, call: Callable[[], object]) -> None:
    """`call` fails with errno `number`."""
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == number, caught.value


def test_an_orderly_unmount_keeps_everything(disk: PowerLoss) -> None:
    (disk.mountpoint / "d").mkdir()
    (disk.mountpoint / "d" / "a").write_bytes(b"1" * 10_000)
    (disk.mountpoint / "link").symlink_to("d/a")
    (disk.mountpoint / "d" / "b").hardlink_to(disk.mountpoint / "d" / "a")
    os.mkfifo(disk.mountpoint / "fifo", 0o640)
    os.utime(disk.mountpoint / "d" / "a", ns=(10**18, 10**18 + 1))
    (disk.mountpoint / "d").chmod(0o2750)
    assert list(disk.backing.iterdir()) == []
    disk.unmount()
    assert (disk.backing / "d" / "b").read_bytes() == b"1" * 10_000
    assert (disk.backing / "d" / "b").stat().st_nlink == 2
    assert (disk.backing / "d" / "a").stat().st_mtime_ns == 10**18 + 1
    assert (disk.backing / "link").readlink() == Path("d/a")
    assert stat.S_ISFIFO((disk.backing / "fifo").stat().st_mode)
    assert stat.S_IMODE((disk.backing / "d").stat().st_mode) == 0o2750
    assert not places.mounts_below(disk.mountpoint)


def test_what_the_medium_holds_is_there_after_mounting_again(scratch: Path) -> None:
    for round_ in range(3):
        with PowerLoss(scratch / "backing", scratch / "mnt") as disk:
            assert len(list(disk.mountpoint.iterdir())) == round_
            with (disk.mountpoint / f"{round_}").open("wb") as file:
                file.write(b"x")
                os.fsync(file.fileno())
            disk.cut()


def test_from_the_cut_on_every_request_fails_and_the_process_ends_when_unmounted(disk: PowerLoss) -> None:
    path = disk.mountpoint / "a"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(descriptor, b"1", 0)
        disk.cut()
        refused(errno.EIO, lambda: os.pwrite(descriptor, b"2", 0))
        refused(errno.EIO, lambda: os.fsync(descriptor))
        refused(errno.EIO, (disk.mountpoint / "b").touch)
        refused(errno.EIO, lambda: list(disk.mountpoint.iterdir()))
        assert disk.stat()["dead"]
        with pytest.raises(PowerLossError, match="the power went already"):
            disk.cut()
    finally:
        os.close(descriptor)
    disk.unmount()
    assert not places.mounts_below(disk.mountpoint)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_armed_cut_comes_at_its_fsync_and_nobody_gets_an_answer(disk: PowerLoss, before: bool) -> None:
    """The first fsync counted is the one after arming; files that do not match do not count."""
    with (disk.mountpoint / "journal").open("wb", buffering=0) as file:
        other = (disk.mountpoint / "other").open("wb", buffering=0)
        os.fsync(file.fileno())
        disk.arm(at=2, before=before, match="jour*", keep="none")
        for number in (b"1", b"2"):
            other.write(number)
            os.fsync(other.fileno())
        file.write(b"1")
        os.fsync(file.fileno())
        file.write(b"2")
        refused(errno.EIO, lambda: os.fsync(file.fileno()))
        other.close()
    report = disk.wait()
    assert (disk.backing / "journal").read_bytes() == (b"1" if before else b"12")
    assert (disk.backing / "other").read_bytes() == b"12"
    assert report.lost_pages == (1 if before else 0)


def test_an_armed_cut_comes_at_its_write(disk: PowerLoss) -> None:
    with (disk.mountpoint / "a").open("wb", buffering=0) as file:
        file.write(b"1")
        os.fsync(file.fileno())
        disk.arm(kind="write", at=2, keep="all")
        file.write(b"2")
        refused(errno.EIO, lambda: file.write(b"3"))
    assert (disk.backing / "a").read_bytes() == b"12"


def test_a_disarmed_cut_does_not_come(disk: PowerLoss) -> None:
    disk.arm(at=1)
    disk.disarm()
    with (disk.mountpoint / "a").open("wb") as file:
        os.fsync(file.fileno())
    assert not disk.stat()["dead"]


def test_the_processes_that_run_on_the_disk_die_with_it(disk: PowerLoss) -> None:
    """Before anything else: none of them can see an error and report it as if the machine still ran."""
    program = textwrap.dedent(
        """
        import os
        input()
        file = open("a", "wb")
        os.fsync(file.fileno())
        try: os.fsync(file.fileno())
        finally: print("lived")
        """
    )
    held = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=disk.mountpoint,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    disk.arm(at=2, victims=[held.pid])
    said, _ = held.communicate("\n")
    assert held.returncode == -signal.SIGKILL
    assert said == ""


def test_mappings_and_reads_and_writes_see_each_other(disk: PowerLoss) -> None:
    path = disk.mountpoint / "a"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(descriptor, 64 << 10)
        writable = mmap.mmap(descriptor, 64 << 10)
        readable = mmap.mmap(descriptor, 64 << 10, prot=mmap.PROT_READ)
        os.pwrite(descriptor, b"written", 5000)
        assert readable[5000:5007] == writable[5000:5007] == b"written"
        writable[9000:9006] = b"mapped"
        assert readable[9000:9006] == os.pread(descriptor, 6, 9000) == b"mapped"
        writable.flush()
        assert (disk.backing / "a").read_bytes()[9000:9006] == b"mapped"
        writable[0:5] = b"never"
        writable.close()
        readable.close()
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("flag", ["O_DSYNC", "O_SYNC"])
def test_a_synchronous_write_is_covered_before_it_returns(disk: PowerLoss, flag: str) -> None:
    """LMDB writes its meta page this way, on a second descriptor of the file."""
    plain = os.open(disk.mountpoint / "a", os.O_RDWR | os.O_CREAT)
    synchronous = os.open(disk.mountpoint / "a", os.O_WRONLY | getattr(os, flag))
    try:
        os.pwrite(plain, b"1" * 4096, 0)
        assert disk.stat()["uncovered_bytes"] == 4096
        for number in range(3):
            os.pwrite(synchronous, b"22", 10 * number)
            assert disk.stat()["uncovered_bytes"] == 0
        assert disk.stat()["fsyncs"] == {"a": 3}
        assert (disk.backing / "a").read_bytes()[:24] == b"22111111112211111111221" + b"1"
    finally:
        os.close(plain)
        os.close(synchronous)


def test_locks_exclude_other_processes(disk: PowerLoss) -> None:
    with (disk.mountpoint / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 1 << 40)
        program = textwrap.dedent(
            """
            import fcntl, sys
            file = open(sys.argv[1], "r+b")
            for lock in (lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
                         lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 << 40)):
                try: lock()
                except BlockingIOError: continue
                sys.exit("not excluded")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            """
        )
        subprocess.run([sys.executable, "-c", program, file.name], check=True)


def test_names_behave(disk: PowerLoss) -> None:
    top = disk.mountpoint
    for number in range(500):
        (top / f"{number:03}").touch()
    assert sorted(path.name for path in top.iterdir()) == [f"{number:03}" for number in range(500)]
    (top / "d").mkdir()
    refused(errno.ENOTEMPTY, lambda: (top / "000").rename(top / "d" / "000") and (top / "d").rmdir())
    refused(errno.EEXIST, (top / "d").mkdir)
    refused(errno.ENOENT, (top / "000").unlink)
    refused(errno.EISDIR, lambda: (top / "001").rename(top / "d"))
    with (top / "002").open("r+b") as file:
        (top / "002").unlink()
        file.write(b"still here")
        file.flush()
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.pread(file.fileno(), 100, 0) == b"still here"
    assert top.stat().st_nlink == 3


def test_sparse_files_take_no_room_and_shrink(disk: PowerLoss) -> None:
    path = disk.mountpoint / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"end", (1 << 40) - 3)
        os.fsync(file.fileno())
        assert path.stat().st_blocks * 512 < 1 << 20
        assert os.fstat(file.fileno()).st_size == 1 << 40
        file.truncate(100)
    assert path.read_bytes() == bytes(100)
    disk.unmount()
    assert (disk.backing / "sparse").read_bytes() == bytes(100)


@pytest.mark.parametrize("kind", ["write", "fsync", "create"])
def test_a_failing_disk_fails_what_it_is_told_to_until_it_heals(disk: PowerLoss, kind: str) -> None:
    with (disk.mountpoint / "a").open("wb", buffering=0) as file:
        calls: dict[str, Callable[[], object]] = {
            "write": lambda: file.write(b"1"),
            "fsync": lambda: os.fsync(file.fileno()),
            "create": (disk.mountpoint / "b").touch,
        }
        disk.fail(kind, errno.ENOSPC)
        for other, call in calls.items():
            refused(errno.ENOSPC, call) if other == kind else call()
        disk.fail(kind, errno.EIO, count=1)
        refused(errno.EIO, calls[kind])
        calls[kind]()
        disk.fail(kind, errno.EIO, match="other")
        calls[kind]()
        disk.fail(kind, errno.EIO)
        disk.heal()
        calls[kind]()


def test_closing_the_handle_loses_what_was_not_covered_and_leaves_no_mount(scratch: Path) -> None:
    with pytest.raises(RuntimeError, match="a failing test"), PowerLoss(scratch / "b", scratch / "m") as disk:
        (scratch / "m" / "a").write_bytes(b"1")
        raise RuntimeError("a failing test")
    assert not places.mounts_below(scratch)
    assert list((scratch / "b").iterdir()) == []
    with pytest.raises(PowerLossError, match=r"disk on .*/m:"):
        disk.stat()


def test_the_disk_goes_when_the_test_run_is_killed(scratch: Path) -> None:
    """No handle is left to close it: the end of its standard input is what it notices."""
    program = textwrap.dedent(
        """
        import os, pathlib, signal, sys
        from tests.support.powerloss import PowerLoss
        top = pathlib.Path(sys.argv[1])
        disk = PowerLoss(top / "backing", top / "mnt")
        print(disk._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, scratch],
        cwd=places.ROOT,
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL
    with contextlib.suppress(ProcessLookupError):
        ended = os.pidfd_open(int(done.stdout))
        assert select.select([ended], [], [], 60)[0], "the disk's process still runs"
        os.close(ended)
    assert not places.mounts_below(scratch)


def test_a_disk_that_cannot_be_mounted_says_why(scratch: Path) -> None:
    before = set(places.session_processes())
    with pytest.raises(PowerLossError, match=r"(?s)no disk on .*invalid choice: 'none'"):
        PowerLoss(scratch / "backing", scratch / "mnt", metadata="none")
    assert set(places.session_processes()) == before
