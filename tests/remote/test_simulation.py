"""Random histories of ownership, on the virtual clock; a failing seed repeats its history."""

from __future__ import annotations

import pytest

from tests.remote.simulation import simulate

SEEDS = (*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 2000)))


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_published_head_is_ever_lost(autojump_clock, seed):
    """At most one line of published heads, and every restore within its tolerance finds its end."""
    history = await simulate(seed)
    assert history.published
