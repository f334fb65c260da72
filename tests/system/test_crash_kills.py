"""What was fsynced survives `kill -9` of the daemon at any moment, under the load of several programs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.daemon import FileSystem
from tests.system.load import EAGER, LARGE, PROGRAMS, Programs, Rounds, check_clean

pytestmark = pytest.mark.mount


def survive(scratch: Path, rounds: int, first: int = 0, *, programs: Programs = PROGRAMS, most: int = 40) -> int:
    """Kills the daemon `rounds` times at random moments, at most `most` steps after all programs have begun.

    Returns how many steps were acknowledged in all.
    """
    with FileSystem(scratch, count=6, settings=EAGER) as fs:
        fs.format()
        fs.mount()
        story = Rounds(fs)
        for number in range(first, first + rounds):
            choose = random.Random(f"kill/{number}")
            with story.ballast, story.load(number, programs) as load:
                load.wait_for_any(choose, most)
                fs.kill()
            fs.mount()
            story.judge()
        assert fs.status()["cache"]["evicted_bytes"] > 0
        story.verify("at the end")
        fs.umount()
        check_clean(fs)
    return story.steps


def test_what_was_synced_survives_kills_under_load(scratch: Path) -> None:
    assert survive(scratch, 8) > 8 * len(PROGRAMS)


def test_one_sync_larger_than_all_bounds_survives_kills(scratch: Path) -> None:
    """It is there wholly, or not at all where it had not returned."""
    assert survive(scratch, 3, programs=LARGE, most=4) > 3


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_what_was_synced_survives_200_kills_under_load(scratch: Path) -> None:
    survive(scratch, 200, first=1000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_sync_larger_than_all_bounds_survives_50_kills(scratch: Path) -> None:
    survive(scratch, 50, first=1000, programs=LARGE, most=6)
