"""The line of `format`, `status` and `placement check` on what may be down: compared with what really decides.

For small fleets with everything that can happen: every set of backends that are down, every set that a pack or the
newest head may lie on.  For large ones with the worst of each, as all backends are alike there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import pytest

from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import ACTIVE, DRAINING, Fleet, FleetEntry
from qsfs.remote.losses import Loss, LossTable
from qsfs.remote.quorum import assess, fleet_quorums, reached, withstands
from tests.remote.whole import WholeFleet

LINE = re.compile(
    r"May be down: for reading, (\d+) \(for what is only written, (\d+)\); for flushing, (\d+|not even 0, as \d+ "
    r"backends? that would take shards are lacking); for a restore that proves its generation to be the newest, (\d+) "
    r"\(if that is only written, (\d+)\), and for writing on there, (\d+|not even 0)\."
)
SMALL = [
    (k, n - k, count, draining)
    for count in range(2, 7)
    for n in range(2, count + 1)
    for k in range(1, n)
    for draining in range(3)
    if count - draining >= n - (n - k) // 2
]
LARGE = [(16, 4, 20, 0), (16, 4, 24, 0), (16, 4, 24, 3), (10, 5, 16, 0), (20, 80, 100, 0), (20, 80, 255, 0),
         (200, 55, 255, 0), (100, 100, 200, 0), (1, 254, 255, 0), (254, 1, 255, 0)]  # fmt: skip


def fleet(count: int, draining: int) -> Fleet:
    return Fleet(
        1,
        tuple(
            FleetEntry(i, bytes(16), f"h{i}:1", "q", "", "", "", 1, DRAINING if i < draining else ACTIVE)
            for i in range(count)
        ),
    )


class Truth:
    """What is so without the backends of a set, by the functions that decide it in a mount and in a restore."""

    def __init__(self, fleet: Fleet, code: CodeParams) -> None:
        self.fleet, self.code = fleet, code
        self.numbers = frozenset(entry.number for entry in fleet.entries)
        self.takers = frozenset(entry.number for entry in fleet.entries if entry.state == ACTIVE)
        self.quorums = fleet_quorums([fleet], code)

    def readable(self, down: frozenset[int], shards: Iterable[int]) -> bool:
        """Whether a pack with shards on these backends can be read."""
        placement = [*shards]
        table = LossTable(self.fleet.entries, self.code, [Loss("down", down)])
        table.add(bytes(16), 1, [*placement, *[-1] * (self.code.n - len(placement))])
        return table.outcomes[0].survived

    def flushes(self, down: frozenset[int]) -> bool:
        """Whether packs get written and heads published."""
        takers = len(self.takers - down)
        return takers >= self.code.write_quorum and reached(self.quorums, self.numbers - down)

    def proves(self, down: frozenset[int], heads: Iterable[int]) -> bool:
        """Whether a restore knows that none is newer; then it has seen a published head, which lies on a quorum."""
        answered = self.numbers - down
        proved = withstands(self.quorums, answered) >= 0
        assert not proved or answered & set(heads), "proved, and a published head may have been missed"
        return proved


def most(truth: Truth, holds: Callable[[frozenset[int]], bool], *, all_sets: bool) -> int:
    """How many backends may be down, whichever they are, so that it holds; -1 where it does not with all up."""
    count = -1
    for down in range(len(truth.numbers) + 1):
        worst = sorted(truth.takers) + sorted(truth.numbers - truth.takers)
        sets = combinations(worst, down) if all_sets else [tuple(worst[:down])]
        if not all(holds(frozenset(gone)) for gone in sets):
            break
        count = down
    return count


def true_numbers(truth: Truth, *, all_sets: bool) -> list[int]:
    """The numbers that the line must say, in its order."""
    needed, takers = truth.quorums[0].quorum.needed, sorted(truth.takers)

    def sets(among: Iterable[int], size: int) -> list[tuple[int, ...]]:
        return list(combinations(sorted(among), size)) if all_sets else [tuple(sorted(among)[:size])]

    full, written = sets(takers, min(truth.code.n, len(takers))), sets(takers, truth.code.write_quorum)
    heads = sets(truth.numbers, needed)

    def reads(down: frozenset[int], packs: list[tuple[int, ...]]) -> bool:
        return all(truth.readable(down, pack) for pack in packs)

    def restores(down: frozenset[int], packs: list[tuple[int, ...]]) -> bool:
        return reads(down, packs) and all(truth.proves(down, head) for head in heads)

    return [
        most(truth, lambda down: reads(down, full), all_sets=all_sets),
        most(truth, lambda down: reads(down, written), all_sets=all_sets),
        most(truth, truth.flushes, all_sets=all_sets),
        most(truth, lambda down: restores(down, full), all_sets=all_sets),
        most(truth, lambda down: restores(down, written), all_sets=all_sets),
        most(truth, lambda down: restores(down, full) and truth.flushes(down), all_sets=all_sets),
    ]


@pytest.mark.parametrize("all_sets, fleets", [(True, SMALL), (False, LARGE)], ids=["small", "large"])
def test_each_number_is_true_and_with_one_more_down_there_is_a_case_in_which_it_is_not(all_sets, fleets):
    """From 1+1 on 2 backends up.  Where too few backends take shards no pack becomes full, as a warning says."""
    for k, m, count, draining in fleets:
        entries, code = fleet(count, draining), CodeParams(k, k + m)
        truth = Truth(entries, code)
        match = LINE.fullmatch(assess(entries, code).may_be_down())
        assert match is not None
        said, found = [int(number) for number in match.groups()], true_numbers(truth, all_sets=all_sets)
        compared = range(6) if len(truth.takers) >= code.n else (1, 2, 4)
        assert [said[i] for i in compared] == [found[i] for i in compared], (k, m, count, draining)


def test_a_fleet_too_small_to_flush_says_that_even_with_all_up_it_does_not():
    """As where too many backends drain."""
    line = assess(fleet(6, 3), CodeParams(3, 5)).may_be_down()
    said = LINE.fullmatch(line)
    assert said is not None and said[3] == "not even 0, as 1 backend that would take shards are lacking"
    assert said[6] == "not even 0"


async def test_status_of_a_mount_and_its_format_say_the_line(scratch: Path, clock):
    with WholeFleet(3, CodeParams(1, 2), scratch, clock) as whole:
        report = await whole.format()
        async with whole.mounted("first") as mount:
            told = mount.flushing.status()["sentences"]
    assert told[-1] == report.sentences[-1] == report.assessment.may_be_down()
