"""What was fsynced survives `kill -9` of the daemon at any moment, under the load of several programs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.daemon import FileSystem
from tests.system.load import EAGER, PROGRAMS, Rounds, check_clean

pytestmark = pytest.mark.mount


def survive(scratch: Path, rounds: int, first: int = 0) -> int:
    """Kills the daemon `rounds` times at random moments; returns how many steps were acknowledged in all."""
    with FileSystem(scratch, count=6, settings=EAGER) as fs:
        fs.format()
        fs.mount()
        story = Rounds(fs)
        for number in range(first, first + rounds):
            choose = random.Random(f"kill/{number}")
            with story.ballast, story.load(number) as load:
                load.wait_for_any(choose, 40)
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_was_synced_survives_200_kills_under_load(scratch: Path) -> None:
    survive(scratch, 200, first=1000)
