"""Random histories of writes, pre-copies, cuts and crashes: what a restore finds is the state at the cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsfs.store import packs
from tests.remote.flush_history import FlushHistory
from tests.remote.harness import make_world

SEEDS = [*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 500))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_the_newest_head_alone_gives_the_file_system_at_its_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock, seed
):
    monkeypatch.setattr(packs, "STEP_RUNS", 2)
    world = await make_world(5, k=2, m=2)
    history = FlushHistory(world, tmp_path / "cache", seed)
    try:
        await history.run(mounts=4, steps=40)
    except BaseException:
        print(f"seed {seed}:", " | ".join(history.trace))
        raise
