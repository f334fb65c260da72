"""Random histories of ownership, on the virtual clock; a failing seed repeats its history."""

from __future__ import annotations

import pytest

from tests.remote.simulation import simulate


@pytest.mark.parametrize("seed", range(40))
async def test_no_published_head_is_ever_lost(autojump_clock, seed):
    """At most one line of published heads, and every restore within its tolerance finds its end."""
    history = await simulate(seed)
    assert history.published
