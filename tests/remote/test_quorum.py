"""The fence quorum: any two share enough backends, and what is printed of it is true."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsfs.errors import QsfsBug
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import Fleet, FleetEntry
from qsfs.remote.quorum import (
    FenceQuorum,
    FleetQuorum,
    assess,
    describe_shortage,
    fence_quorum,
    fleet_quorums,
    reached,
    withstands,
)

SIXTEEN_FOUR = CodeParams(16, 20)


def fleet(count: int, groups: int = 0, number: int = 1) -> Fleet:
    return Fleet(
        number,
        tuple(
            FleetEntry(i, bytes(16), f"h{i}:1", "q", "", f"g{i % groups}" if groups else "", "", 1, "active")
            for i in range(count)
        ),
    )


@pytest.mark.parametrize(
    ("backends", "parity", "group", "needed"),
    [(1, 0, 1, 1), (2, 1, 1, 2), (3, 1, 1, 2), (4, 1, 1, 3), (5, 2, 1, 3), (6, 2, 2, 4), (20, 4, 1, 13),
     (24, 4, 1, 15), (24, 4, 6, 16), (24, 4, 12, 13), (24, 4, 24, 13)],
)  # fmt: skip
def test_the_quorum_of_known_fleets(backends, parity, group, needed):
    assert fence_quorum(backends, parity, group) == FenceQuorum(backends, needed)


@given(st.integers(1, 200), st.integers(0, 40), st.data())
def test_any_two_quorums_share_a_backend_that_is_neither_stale_nor_lying(backends, parity, data):
    group = data.draw(st.integers(1, backends))
    quorum = fence_quorum(backends, parity, group)
    assert backends // 2 < quorum.needed <= backends
    assert 2 * quorum.needed - backends - quorum.may_be_stale == 1
    losses = max(parity, group)
    if backends >= 3 * losses + 1:
        # Big enough: it withstands the larger of m and a whole group both ways.
        assert quorum.may_be_down >= losses and quorum.may_be_stale >= losses
    elif backends > 2 * losses:
        # A whole group may still be down.
        assert quorum.may_be_down >= losses


@given(st.integers(1, 60), st.integers(0, 8), st.data())
def test_a_restore_withstands_what_it_says(backends, parity, data):
    """In the worst case one more of the answers holds a published head than may be lost, and never fewer."""
    quorum = fence_quorum(backends, parity, 1)
    answered = set(range(data.draw(st.integers(0, backends))))
    worst_holders = set(range(backends - quorum.needed, backends))
    bound = FleetQuorum(1, frozenset(range(backends)), quorum).withstands(answered)
    assert len(answered & worst_holders) == max(0, bound + 1)


def test_a_head_of_two_fleets_counts_with_both():
    old = FleetQuorum(1, frozenset({1, 2, 3}), FenceQuorum(3, 2))
    new = FleetQuorum(2, frozenset({3, 4, 5}), FenceQuorum(3, 2))
    assert not reached([old, new], {1, 2, 3})
    assert reached([old, new], {1, 3, 4})
    assert describe_shortage([old, new], {1, 2, 3}) == "fleet 2: 1 of the 2 backends needed (of 3) answered"
    assert withstands([old, new], {1, 2, 3}) == -1
    assert not reached([], {1, 2, 3})


def test_a_number_of_another_fleet_does_not_count():
    (quorum,) = fleet_quorums([fleet(4)], CodeParams(2, 3))
    assert quorum.short({7, 8, 9, 0}) == 2


def test_format_says_what_twenty_four_backends_withstand():
    found = assess(fleet(24), SIXTEEN_FOUR)
    assert found.sentences() == (
        "24 backends, 16 data and 4 parity shards (zfec): a full pack survives the loss of 4 shards, "
        "one that is only written of 2.",
        "The fence quorum is 15 of 24: 9 may be down, 5 may be stale or lie.",
        "Flushing goes on with 6 backends down; packs become full with up to 4 down.",
    )
    assert found.warnings() == ()


def test_format_warns_where_a_fleet_falls_short_of_m():
    found = assess(fleet(20), SIXTEEN_FOUR)
    assert [warning.split(";")[0] for warning in found.warnings()] == [
        "flushing stops with more than 2 backends down, fewer than m = 4",
        "packs become full with at most 0 backends down",
    ]
    small = assess(fleet(18), SIXTEEN_FOUR)
    assert small.warnings()[0].startswith("18 backends cannot hold 20 shards")
    assert assess(fleet(22), SIXTEEN_FOUR).warnings()[-1].endswith("from 24 backends")
    few = assess(fleet(4), CodeParams(2, 4))
    assert any(
        warning.startswith("heads are no longer published with more than 1") for warning in few.warnings()
    )
    assert any(warning.startswith("ownership withstands 1 stale") for warning in few.warnings())


def test_a_group_that_takes_more_than_m_shards_is_warned_of():
    assert not [w for w in assess(fleet(24, 6), SIXTEEN_FOUR).warnings() if "group" in w]
    assert [
        w
        for w in assess(fleet(24, 4), SIXTEEN_FOUR).warnings()
        if "the loss of one group may take 5 shards" in w
    ]


@pytest.mark.parametrize("k, m", [(2, 1), (4, 2), (16, 4), (10, 5)])
def test_the_sizes_that_flushing_needs(k, m):
    """N >= k + m + ceil(m / 2) to flush with m down, N >= n + m to stay full."""
    code = CodeParams(k, k + m)
    enough = k + m + math.ceil(m / 2)
    assert assess(fleet(enough), code).down_while_flushing == m
    assert assess(fleet(enough - 1), code).down_while_flushing < m
    assert assess(fleet(code.n + m), code).down_while_full == m


def test_impossible_fleets_are_refused():
    for arguments in [(0, 1, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)]:
        with pytest.raises(QsfsBug):
            fence_quorum(*arguments)
    with pytest.raises(QsfsBug):
        fleet_quorums([dataclasses.replace(fleet(1), entries=())], CodeParams(1, 1))


def test_an_outage_is_told_by_what_it_means_now():
    """16+4 on 24 backends: full with 4 down, flushing with 6 down."""
    fleet_24 = assess(fleet(24), SIXTEEN_FOUR)
    assert fleet_24.outage(0) == ()
    assert fleet_24.outage(1) == (
        "1 of 24 backends does not answer: what is full on the backends survives the loss of 3 more",
    )
    [four] = fleet_24.outage(4)
    assert "can be read; with one more gone, not all" in four
    assert fleet_24.outage(5)[0] == (
        "5 of 24 backends do not answer, more than m = 4: not all that is only on the backends can be read "
        "until 1 of them return"
    )
    assert fleet_24.outage(5)[1] == "new packs are written, and become full when enough of them return"
    assert fleet_24.outage(8)[1] == "nothing new gets safe on the backends until 2 of them return"


def test_an_outage_of_a_fleet_without_spares_stops_flushing_first():
    """16+4 on 20 backends: 2 gone stop nothing, 4 gone stop flushing and no reading."""
    fleet_20 = assess(fleet(20), SIXTEEN_FOUR)
    assert fleet_20.outage(2)[1] == "new packs are written, and become full when enough of them return"
    assert fleet_20.outage(4)[1] == "nothing new gets safe on the backends until 2 of them return"
