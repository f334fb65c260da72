"""Thousands of histories of the whole system; a seed that fails is repeated by the command that is printed.

`QSFS_SIMULATION_SEEDS=100000 pytest -m slow tests/simulation` lives through as many more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 100
SEEDS = 2000
MORE = int(os.environ.get("QSFS_SIMULATION_SEEDS", "10000"))


def simulate(*arguments: object) -> str:
    """What the command says; fails with it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_history_breaks_a_promise(first: int) -> None:
    """Invariants 3, 4, 5, 6, 8 and 10, over flush, publish, collect, takeover, rollback and restore."""
    half = BLOCK // 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda begin: simulate("--first", begin, "--count", half), (first, first + half)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(SEEDS, SEEDS + MORE, 500))
def test_many_more_histories(first: int) -> None:
    """The same, for long."""
    simulate("--first", first, "--count", 500)


def test_a_seed_is_one_history() -> None:
    """The same events in the same order, in another process: else a seed that fails could not be repeated."""
    digests = {line for _ in range(2) for line in simulate("--seed", 21).splitlines() if line.startswith("seed ")}
    assert len(digests) == 1
