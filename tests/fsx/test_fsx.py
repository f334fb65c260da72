"""Every byte reads as it was last written, by whatever way, whatever happened to the caches and the daemon since."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fsx.game import Game, field_of_play
from tests.fsx.operations import FILES, operations

pytestmark = pytest.mark.mount

CI_SEEDS = (9, 32)


def test_a_seed_gives_the_same_operations_again() -> None:
    """What a failure prints repeats it: a shorter run is the beginning of a longer one."""
    long = list(operations(5, 400))
    assert list(operations(5, 150)) == long[:150]
    assert {operation.file for operation in long} == {"", *FILES}


@pytest.mark.timeout(900)
def test_files_hold_what_was_written(scratch: Path) -> None:
    with field_of_play(scratch) as fs:
        games = [Game(fs, seed, 5_000).play() for seed in CI_SEEDS]
    for event in ("publish", "evict", "remount", "kill", "restore"):
        assert any(seen.events.get(event) for seen in games), f"no {event} in these games; take other seeds"
    assert all(seen.evicted_bytes and seen.fetched_bytes for seen in games)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_files_hold_what_was_written_in_a_million_operations(scratch: Path) -> None:
    with field_of_play(scratch) as fs:
        for seed in range(100, 120):
            Game(fs, seed, 50_000).play()
