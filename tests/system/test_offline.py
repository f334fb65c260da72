"""`mount --offline`: work goes on without any backend, and what follows is told before and is what was told."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backends import Servers
from tests.support.daemon import Command, FileSystem
from tests.system.fleet import QUICK, SILENCE, check, cold, dead, ended, eventually, running, status, store

pytestmark = pytest.mark.mount

COUNT = 4
EVERY = range(COUNT)
MIB = 1 << 20
TOLD = "mounted offline: nothing is uploaded until a quorum of backends answers"
COST = "If another machine takes over before then, what was written here since is on this disk only"
DOWN = (TOLD, r"[Cc]onnection refused|no answer|cannot be reached", r"WARNING qsfs.remote", *SILENCE)
STALE = r"another machine has published since, or this one was cloned or rolled back"


@pytest.fixture
def fs(scratch: Path) -> Iterator[FileSystem]:
    """A file system that one machine has written "base" to and unmounted."""
    settings = QUICK | {"flush.cut_seconds": 1, "flush.stop_deadline_seconds": 3}
    with (
        Servers(scratch / "zdb", COUNT, separate=True) as servers,
        FileSystem(scratch / "one", shards=(2, 1), count=COUNT, servers=servers, settings=settings) as one,
    ):
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.umount()
        one.expect(*DOWN)
        yield one


def mount_offline(fs: FileSystem) -> Command:
    """Mounts as an operator does, and takes the daemon for the file system's."""
    said = fs.run("mount", "--offline")
    fs.adopt(int(said.stdout.rpartition("process ")[2].split(")")[0]))
    return said


def test_offline_is_told_at_the_mount_and_in_status_and_ends_by_itself(fs: FileSystem) -> None:
    """All backends are down for a mount that would wait; they come back, and what was written is published."""
    with dead(fs.servers, EVERY):
        with running(fs, "mount", "--foreground") as waiting:
            eventually(lambda: "waiting for a quorum" in fs.log(), "an ordinary mount waits")
            waiting.send_signal(signal.SIGTERM)
            ended(waiting)
        said = mount_offline(fs)
        assert TOLD in said.stderr and "generation" in said.stderr and COST in said.stderr
        assert f"OFFLINE: {TOLD}" in fs.run("status").stdout and COST in fs.status()["offline"]
        check(fs, "base")
        store(fs, "offline", MIB)
        found = status(fs)
        assert found["writable"] and not found["owner"] and found["exposure"]["written"]["bytes"] >= MIB
        assert any(line.startswith("May be down") for line in found["sentences"])
    eventually(lambda: (now := status(fs))["owner"] and not now["flush"]["exposure"]["written"]["bytes"], "published")
    assert "OFFLINE" not in fs.run("status").stdout and not status(fs)["offline"]
    cold(fs)
    check(fs, "offline")
    fs.umount()


def test_who_was_taken_over_from_while_offline_turns_read_only_and_its_data_can_be_copied_out(
    scratch: Path, fs: FileSystem
) -> None:
    """Also after an unmount: an offline mount shows them again.  The other machine goes on undisturbed."""
    fs.expect(STALE)
    with dead(fs.servers, EVERY):
        mount_offline(fs)
        store(fs, "unpublished", MIB)
        os.sync()
        os.kill(fs.process, signal.SIGSTOP)
    with fs.another_machine(scratch / "two") as two:
        two.run("takeover")
        two.mount()
        store(two, "second", MIB)
        two.sync()
        os.kill(fs.process, signal.SIGCONT)
        _is_stale(fs)
        fs.umount()
        refused = fs.run("mount", code=11)
        assert "restore --set-aside" in refused.stderr
        mount_offline(fs)
        _is_stale(fs)
        fs.umount()
        check(two, "second")
        assert not (two.mountpoint / "unpublished").exists()
        store(two, "third", MIB)
        two.sync()
        assert status(two)["owner"]
        two.umount()


def _is_stale(fs: FileSystem) -> None:
    """The mount says that it is not the newest, changes nothing any more, and shows what is on its disk."""
    found = eventually(lambda: not (now := status(fs))["writable"] and now, "the mount is read-only")
    assert "another machine has published since" in found["reason"] and "restore --set-aside" in found["reason"]
    assert not found["owner"] and not found["offline"]
    assert "READ-ONLY: the newest generation on the backends is" in fs.run("status").stdout
    with pytest.raises(OSError) as refused:
        (fs.mountpoint / "late").mkdir()
    assert refused.value.errno == errno.EROFS
    check(fs, "base")
    check(fs, "unpublished")
    assert fs.run("sync", code=11).stderr


def test_what_was_written_offline_and_unmounted_is_published_by_a_later_mount(fs: FileSystem) -> None:
    """Nothing waits at the unmount for backends that are not there."""
    with dead(fs.servers, EVERY):
        mount_offline(fs)
        store(fs, "offline", MIB)
        assert "what is not on the backends yet is safe" in fs.umount()
    fs.mount()
    check(fs, "offline")
    eventually(lambda: not status(fs)["flush"]["exposure"]["written"]["bytes"], "published")
    cold(fs)
    check(fs, "base")
    check(fs, "offline")
    fs.umount()


def test_a_machine_that_was_restored_and_owns_nothing_is_not_mounted_offline(scratch: Path, fs: FileSystem) -> None:
    """The one that wrote it may still be at work: a takeover needs the backends."""
    with fs.another_machine(scratch / "two") as two:
        two.run("restore")
        assert "it needs `qsfs takeover` once, and that needs the backends" in two.run(
            "mount", "--offline", code=11
        ).stderr
