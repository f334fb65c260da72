"""What `kill -9` leaves of a command or of a start is no obstacle to the next one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, check, store
from tests.system.load import check_clean

pytestmark = pytest.mark.mount

KILLED = -9
MIB = 1 << 20

FORMAT = ("format.tried", "format.marked", "format.announced", "format.prepared", "spool.head.stored", "publish.send")
RESTORE = ("restore.rows", "restore.derived", "restore.complete", "restore.renamed")
TAKEOVER = ("own.announce", "own.announced", "spool.head.stored", "publish.sealed", "publish.stored", "publish.send")


def killed(fs: FileSystem, command: str, point: str) -> None:
    """Runs a command that dies at a failpoint."""
    fs.run(command, code=KILLED, QSFS_FAILPOINTS=f"{point}=kill")


def a_format_dies(scratch: Path, point: str) -> None:
    """The next says what is there; named with --force, it is formatted over."""
    with FileSystem(scratch / point, count=6, settings=QUICK) as fs:
        killed(fs, "format", point)
        assert not (fs.cache / "data.mdb").exists()
        again = fs.run("format", code=None)
        if again.returncode:
            assert again.returncode == 12, again
            (system,) = re.findall(r"file system ([0-9a-f]{32}) on", again.stderr)
            fs.run("format", "--force", system)
        fs.mount()
        store(fs, "file", MIB)
        fs.umount()
        check_clean(fs)


def a_command_dies_elsewhere(fs: FileSystem, scratch: Path, command: str, point: str) -> None:
    """The same command once more, and the file system is there."""
    with fs.another_machine(scratch / point) as other:
        killed(other, command, point)
        if command == "takeover":
            other.run("takeover")
        else:
            # One that has done its work but not said so refuses to do it again.
            assert other.run("restore", code=None).returncode == (14 if point == "restore.renamed" else 0)
            other.run("takeover")
        other.mount()
        check(other, "file")
        other.umount()
        check_clean(other)


@pytest.fixture
def elsewhere(scratch: Path) -> Iterator[FileSystem]:
    """A file system that was written on a machine that is gone."""
    with FileSystem(scratch / "first", count=6, settings=QUICK) as fs:
        fs.format()
        fs.mount()
        store(fs, "file", MIB)
        fs.umount()
        yield fs


def test_a_format_that_was_killed(scratch: Path) -> None:
    a_format_dies(scratch, "format.marked")


def test_a_restore_and_a_takeover_that_were_killed(scratch: Path, elsewhere: FileSystem) -> None:
    a_command_dies_elsewhere(elsewhere, scratch, "restore", "restore.complete")
    a_command_dies_elsewhere(elsewhere, scratch, "takeover", "publish.stored")


@pytest.mark.slow
@pytest.mark.parametrize("point", FORMAT)
def test_a_format_that_was_killed_at_any_point(scratch: Path, point: str) -> None:
    a_format_dies(scratch, point)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_restore_and_a_takeover_that_were_killed_at_any_point(scratch: Path, elsewhere: FileSystem) -> None:
    for point in RESTORE:
        a_command_dies_elsewhere(elsewhere, scratch, "restore", point)
    for point in TAKEOVER:
        a_command_dies_elsewhere(elsewhere, scratch, "takeover", point)
