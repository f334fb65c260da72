"""How a mount ends: what an unmount publishes, a stop while files are open, and a dead mount that stays visible."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import scratch as places
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, check, ended, eventually, running, status, store
from tests.system.load import check_clean

pytestmark = pytest.mark.mount

MIB = 1 << 20


@pytest.fixture
def fs(scratch: Path) -> Iterator[FileSystem]:
    """A mounted file system that makes a generation only when it is told to."""
    with FileSystem(scratch, count=6, settings=QUICK) as fs:
        fs.format()
        fs.mount()
        yield fs


def test_an_unmount_publishes_what_was_written_last(fs: FileSystem, scratch: Path) -> None:
    """Nothing but the key and the backends is needed after it."""
    store(fs, "before", MIB)
    fs.sync()
    store(fs, "after", MIB)
    with (fs.mountpoint / "never synced").open("w") as file:
        file.write("closed is enough")
    said = fs.umount()
    assert said == f"{fs.mountpoint}: unmounted; everything is on the backends\n"
    assert not places.mounts_below(fs.mountpoint)
    with fs.another_machine(scratch / "other") as other:
        other.run("takeover")
        other.mount()
        check(other, "before")
        check(other, "after")
        assert (other.mountpoint / "never synced").read_text() == "closed is enough"
        other.umount()


def test_an_unmount_that_takes_the_kernel_long_is_answered(fs: FileSystem, scratch: Path) -> None:
    """The session may end long before: the kernel forgets names by the million after it."""
    fs.umount()
    slow = scratch / "bin" / "fusermount3"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n{shutil.which("fusermount3")} "$@"\nstatus=$?\nsleep 5\nexit $status\n')
    slow.chmod(0o755)
    fs.mount(PATH=f"{slow.parent}:{os.environ['PATH']}")
    assert fs.umount() == f"{fs.mountpoint}: unmounted; everything is on the backends\n"


def test_an_unmount_is_refused_while_the_mount_is_in_use(fs: FileSystem) -> None:
    """It says by whom, and the mount goes on as if nothing had been."""
    with (fs.mountpoint / "open").open("w") as file:
        refused = fs.run("umount", code=13).stderr
        assert f"in use by {Path('/proc/self/comm').read_text().strip()} ({os.getpid()})" in refused
        file.write("still there")
        file.flush()
        os.fsync(file.fileno())
    assert status(fs)["phase"] == "mounted"
    fs.umount()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_waits_for_files_that_are_open_and_loses_nothing(
    fs: FileSystem, scratch: Path, number: signal.Signals
) -> None:
    """What is written until the last close is published; a database is not covered half-way by the stop."""
    fs.expect(r"cannot be unmounted; in use by .*waiting for them to end")
    with (fs.mountpoint / "open").open("wb", buffering=0) as file, (fs.mountpoint / "data.mdb").open("wb") as database:
        file.write(b"before")
        database.write(b"x" * 8192)
        database.flush()
        os.kill(fs.process, number)
        eventually(lambda: "waiting for them to end" in fs.log(), "the stop has met the open files")
        file.write(b" and after")
        assert (fs.mountpoint / "open").read_bytes() == b"before and after"
    fs.wait_ended()
    assert not places.mounts_below(fs.mountpoint)
    with fs.another_machine(scratch / "other") as other:
        other.run("takeover")
        other.mount()
        assert (other.mountpoint / "open").read_bytes() == b"before and after"
        assert (other.mountpoint / "data.mdb").read_bytes() == b"x" * 8192
        other.umount()


def test_an_unmount_without_backends_keeps_everything_for_the_next_mount(fs: FileSystem) -> None:
    """It gives up at its deadline; the local commit suffices."""
    fs.umount()
    fs.configure(flush__stop_deadline_seconds=1)
    fs.expect(r"was not published|stopped before everything|backend")
    fs.mount()
    store(fs, "local", MIB)
    fs.servers.kill()
    assert "safe in" in fs.umount()
    fs.servers.start()
    fs.mount()
    check(fs, "local")
    assert fs.sync()["generation"] > 1
    fs.umount()
    check_clean(fs)


def test_a_dead_mount_stays_dead_until_the_next_mount_clears_it(fs: FileSystem) -> None:
    """Never an empty directory, into which a node would start a new database."""
    store(fs, "there", MIB)
    os.sync()
    fs.run("sync")
    fs.kill()
    for call in (fs.mountpoint.iterdir, (fs.mountpoint / "new").mkdir, (fs.mountpoint / "there").read_bytes):
        with pytest.raises(OSError) as caught:
            list(call() or ())
        assert caught.value.errno == errno.ENOTCONN
    assert fs.run("status", code=16).stderr.startswith("qsfs: ")
    # What is below is not to be seen either while the next one starts.
    fs.mount()
    check(fs, "there")
    fs.kill()
    assert "its dead mount is cleared" in fs.run("umount").stdout
    assert not places.mounts_below(fs.mountpoint)
    fs.mount()
    check(fs, "there")
    fs.umount()


def test_a_stop_before_the_mount_ends_the_start(fs: FileSystem) -> None:
    """A start that waits for backends says so, and ends when it is told to."""
    fs.umount()
    fs.expect(r"waiting for a quorum of backends")
    fs.servers.kill()
    with running(fs, "mount", "--foreground") as process:
        eventually(lambda: "waiting for a quorum" in fs.log(), "the start waits")
        with contextlib.suppress(OSError):
            assert list(fs.mountpoint.iterdir()) == []
        process.terminate()
        code, _ = ended(process)
        assert code == 0
    fs.servers.start()
    fs.mount()
    fs.umount()


def test_a_stop_while_silent_backends_are_asked_who_they_are_ends_the_start(fs: FileSystem) -> None:
    """In its first seconds too, when there is nothing yet that could publish."""
    fs.umount()
    fs.servers.pause()
    with running(fs, "mount", "--foreground") as process:
        eventually((fs.cache / "control.sock").exists, "the daemon can be told to stop")
        process.terminate()
        code, printed = ended(process)
    fs.servers.resume()
    assert (code, printed) == (0, "")
    fs.mount()
    fs.umount()


def test_an_unmount_before_the_mount_ends_the_start(fs: FileSystem) -> None:
    """As a stop does, and it says that nothing was mounted yet."""
    fs.umount()
    fs.servers.pause()
    try:
        with running(fs, "mount", "--foreground") as process:
            eventually(lambda: fs.run("status", code=None).returncode == 0, "the daemon answers")
            assert "ended before it was mounted" in fs.run("umount").stdout
            code, printed = ended(process)
            assert code == 0, printed
    finally:
        fs.servers.resume()
    fs.mount()
    fs.umount()
