"""Two machines and one file system: one writes, and whoever was taken over from stops by itself."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, Inside, check, eventually, status, store

pytestmark = pytest.mark.mount

COUNT = 6
MIB = 1 << 20
FENCED = (
    r"CRITICAL qsfs.remote.flush: another mount.* has taken over",
    r"ERROR qsfs.fuse.state: the mount is read-only from now on: another mount.* has taken over",
)


def everything(fs: FileSystem) -> dict[tuple[int, str, bytes], bytes]:
    """Every value on every backend, by backend, namespace and key."""
    found = {}
    for index in range(COUNT):
        for namespace in (fs.namespace, fs.namespace + ".control"):
            with Inside(fs.servers, index, namespace) as inside:
                found.update({(index, namespace, key): value for key, value in inside.values().items()})
    return found


def error_of(work: Callable[[], object]) -> int:
    """The error code of what must fail."""
    try:
        work()
    except OSError as error:
        return error.errno or 0
    raise AssertionError("it did not fail")


def is_fenced(fs: FileSystem) -> None:
    """The mount says that it is fenced, changes nothing any more, and still serves what is local."""
    found = eventually(lambda: not (now := status(fs))["writable"] and now, "the mount is fenced")
    assert "has taken over" in found["reason"] and not found["owner"]
    assert "READ-ONLY: another mount" in fs.run("status").stdout
    assert error_of((fs.mountpoint / "directory").mkdir) == errno.EROFS
    assert error_of(lambda: (fs.mountpoint / "base").rename(fs.mountpoint / "other")) == errno.EROFS
    assert error_of(lambda: _write_durably(fs.mountpoint / "base")) in (errno.EROFS, errno.EIO)
    check(fs, "base")
    assert fs.run("sync", code=None).returncode == 10, "sync says that another mount owns the file system"
    fs.expect(*FENCED)


def _write_durably(path: Path) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(file, b"too late", 0)
        os.fsync(file)
    finally:
        os.close(file)


def test_who_was_taken_over_from_fences_itself_and_touches_nothing(scratch: Path, fleet: Servers) -> None:
    with FileSystem(
        scratch / "one",
        shards=(3, 1),
        count=COUNT,
        servers=fleet,
        namespace="takeover",
        settings=QUICK | {"flush.cut_seconds": 1, "flush.stop_deadline_seconds": 3},
    ) as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.sync()
        with one.another_machine(scratch / "two") as two:
            # Restored only, it may not mount: the first may still be running.
            os.kill(one.process, signal.SIGSTOP)
            two.run("restore")
            refused = two.run("mount", code=None)
            assert refused.returncode == 11 and "takeover" in refused.stderr
            taken = two.run("--json", "takeover").json()
            two.mount()
            check(two, "base")
            store(two, "second", MIB)
            assert two.sync()["generation"] > taken["generation"]
            # What changes now is the first machine's doing.
            os.kill(two.process, signal.SIGSTOP)
            before = everything(two)
            os.kill(one.process, signal.SIGCONT)
            store(one, "late", MIB)
            is_fenced(one)
            one.umount()
            after = everything(two)
            os.kill(two.process, signal.SIGCONT)
            lost = [key for key in before if key not in after]
            assert not lost, f"{len(lost)} values are gone"
            changed = [key for key in before if after[key] != before[key]]
            assert not changed, f"{len(changed)} values were overwritten"
            check(two, "second")
            store(two, "third", MIB)
            two.sync()

            # And back: the first machine's own state is not what the second published.
            stale = one.run("mount", code=None)
            assert stale.returncode == 11 and "restore" in stale.stderr
            one.cache.rename(scratch / "old cache")
            one.cache.mkdir(mode=0o700)
            one.run("takeover")
            one.mount()
            for name in ("base", "second", "third"):
                check(one, name)
            assert not (one.mountpoint / "late").exists(), "it was written after the takeover"
            store(one, "fourth", MIB)
            one.sync()
            store(two, "late too", MIB)
            is_fenced(two)
            two.umount()
            check(one, "fourth")
            one.umount()


def test_a_clone_of_a_machine_at_rest_is_refused_once_the_other_has_mounted(scratch: Path, fleet: Servers) -> None:
    with FileSystem(
        scratch / "one", shards=(3, 1), count=COUNT, servers=fleet, namespace="at-rest", settings=QUICK
    ) as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.umount()
        with one.another_machine(scratch / "two", with_cache=True) as two:
            one.mount()
            two.expect("")
            for _ in range(2):
                refused = two.run("mount", code=11).stderr
                assert "another machine has published since, or this one was cloned" in refused
                store(one, "new", MIB)
                one.sync()
            check(one, "new")
            assert status(one)["writable"]
            one.umount()


def test_a_machine_fences_itself_when_its_clone_mounts(scratch: Path, fleet: Servers) -> None:
    with FileSystem(
        scratch / "one",
        shards=(3, 1),
        count=COUNT,
        servers=fleet,
        namespace="running",
        settings=QUICK | {"flush.cut_seconds": 1, "flush.stop_deadline_seconds": 3},
    ) as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.sync()
        os.kill(one.process, signal.SIGSTOP)
        with one.another_machine(scratch / "two") as two:
            # What a snapshot of its disk holds.
            two.cache.rmdir()
            shutil.copytree(one.cache, two.cache, ignore=shutil.ignore_patterns("control.sock"))
            two.mount()
            check(two, "base")
            store(two, "second", MIB)
            two.sync()
            os.kill(two.process, signal.SIGSTOP)
            before = everything(two)
            os.kill(one.process, signal.SIGCONT)
            store(one, "late", MIB)
            is_fenced(one)
            one.umount()
            after = everything(two)
            os.kill(two.process, signal.SIGCONT)
            assert all(after.get(key) == value for key, value in before.items()), "something was changed"
            check(two, "second")
            two.umount()


def test_a_second_mount_of_the_same_cache_is_refused(scratch: Path, fleet: Servers) -> None:
    with FileSystem(scratch, shards=(3, 1), count=COUNT, servers=fleet, namespace="twice", settings=QUICK) as fs:
        fs.format()
        fs.mount()
        store(fs, "base", MIB)
        again = fs.run("mount", code=None)
        assert again.returncode == 13 and f"in use by process {fs.process}" in again.stderr
        assert fs.run("takeover", code=None).returncode == 13
        check(fs, "base")
        fs.umount()
