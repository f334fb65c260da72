"""What was fsynced survives the death of the daemon at each step of commit, journal, replay and flush."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.daemon import FileSystem, FileSystemError
from tests.system.fleet import status
from tests.system.load import EAGER, LARGE, PROGRAMS, Programs, Rounds, check_clean

pytestmark = pytest.mark.mount

# The first crash of a row leaves appends in the journal, of which the next mount dies as well.
LOCAL = (
    "journal.flushed=kill@30",
    "replay.frame=kill@2",
    "journal.written=kill@50",
    "replay.frame=kill",
    "commit.applied=kill@5",
    "commit.before=kill@3",
    "commit.done=kill@4",
    "fuse.fsync@60>fuse.write=kill",
    "fuse.write=kill@200",
)
FLUSH = (
    "flush.precopy.written=kill@2",
    "flush.precopy.recorded=kill@2",
    "flush.cut.sealed=kill@2",
    "flush.cut.pack=kill",
    "flush.packs.uploaded=kill",
    "flush.metadata.uploaded=kill",
    "spool.head.before=kill",
    "spool.head.stored=kill",
    "publish.sealed=kill",
    "publish.stored=kill",
    "publish.send=kill",
    "quorum_write.acknowledged=kill@6",
    "publish.published=kill",
    "flush.head.sent=kill",
    "flush.record.step=kill",
    "flush.recorded=kill",
    "flush.spool.cleared=kill",
    "flush.look.asked=kill@3",
    "upload.written=kill@3",
    "own.announce=kill",
    "own.announced=kill",
)


# Under `load.LARGE`: in the middle of what one sync covers, of its spilling, of its commit and of its moving.
COVERS = (
    "fuse.fsync@4>fuse.write=kill",
    "fuse.fsync@6>fuse.write=kill@700",
    "fuse.fsync@5>commit.before=kill",
    "fuse.fsync@5>commit.applied=kill",
    "fuse.fsync@5>commit.done=kill",
    "fuse.fsync@5>commit.done=kill@3",
)


def survive(scratch: Path, points: Iterable[str], programs: Programs = PROGRAMS) -> None:
    """Lets the daemon die at each point in turn, then has everything of it restored elsewhere."""
    with FileSystem(scratch, count=6, settings=EAGER) as fs:
        fs.format()
        fs.mount()
        story = Rounds(fs)
        fs.kill()
        for number, point in enumerate(points):
            die_at(fs, story, number, point, programs)
            if point.startswith("journal"):
                continue
            fs.mount()
            story.judge()
            fs.kill()
        check_clean(fs)
        fs.mount()
        story.verify("at the end")
        fs.umount()
        check_clean(fs)
        restored_elsewhere(scratch, fs, story)


def die_at(fs: FileSystem, story: Rounds, number: int, point: str, programs: Programs) -> None:
    """Mounts with a failpoint armed; that the daemon ends there is all that is asked for."""
    mounted = fs.run("--json", "mount", code=None, QSFS_FAILPOINTS=point)
    if mounted.returncode == 0:
        fs.adopt(mounted.json()["process"])
        with story.ballast, story.load(number, programs):
            try:
                fs.wait_dead()
            except FileSystemError as error:
                raise AssertionError(f"{point} was not met; {status(fs)}") from error
    else:
        assert "ended with -9 before it was mounted" in mounted.stdout, mounted


def restored_elsewhere(scratch: Path, fs: FileSystem, story: Rounds) -> None:
    """The last generation holds what the last umount published."""
    with fs.another_machine(scratch / "other") as other:
        other.run("takeover", timeout=300)
        other.mount()
        for units in other.mountpoint.glob("*/unit_files/*.restored-*"):
            # What a validator signed is put beside, for its operator to decide.
            units.rename(units.with_name(units.name.partition(".restored-")[0]))
        story.verify("after a restore", mountpoint=other.mountpoint)
        other.umount()


def test_what_was_synced_survives_a_death_at_each_step_of_the_store(scratch: Path) -> None:
    survive(scratch, LOCAL)


def test_a_sync_larger_than_all_bounds_survives_a_death_right_after_it(scratch: Path) -> None:
    """Also with the first WRITE of what the next sync will cover."""
    survive(scratch, COVERS[::3], LARGE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sync_larger_than_all_bounds_survives_a_death_at_each_of_its_steps(scratch: Path) -> None:
    survive(scratch, COVERS, LARGE)


def test_what_was_synced_survives_a_death_while_a_generation_is_made(scratch: Path) -> None:
    survive(scratch, FLUSH[1::6])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_was_synced_survives_a_death_at_each_step_of_a_generation(scratch: Path) -> None:
    survive(scratch, FLUSH)
