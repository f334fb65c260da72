"""Random histories of the local store: nothing fsynced is lost, no state is invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.history import History


def run(directory: Path, seed: int, steps: int) -> None:
    history = History(directory, seed)
    try:
        for count in range(steps):
            history.step()
            if history.random.random() < 0.03:
                history.crash()
            if count % 20 == 0:
                history.check()
        history.crash()
        history.check()
    finally:
        history.store.close()


@pytest.mark.parametrize("seed", range(40))
def test_a_crash_at_any_point_leaves_an_allowed_state(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, 250)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 3000))
def test_many_more_histories(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, 250)
