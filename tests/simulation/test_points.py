"""Whoever dies at any named step has what was promised by then, on the backends and on its disk, and goes on.

After each death: a restore gives exactly the state at the cut of a head that follows every published one; the machine
comes up again, publishes, and another restore gives that.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulation.play import Play, live
from tests.simulation.points import ELSEWHERE, POINTS, all_points
from tests.support.scratch import scratch_directory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def undisturbed() -> Play:
    """The story in which nobody dies."""
    with scratch_directory("play") as root:
        return live(root)


def test_the_story_comes_by_every_step(undisturbed: Play, expect_log) -> None:
    """A step that is new in the code must be reached here, or be named as one that dies in a test elsewhere."""
    expect_log(".", optional=True)
    assert set(all_points()) == set(POINTS) | set(ELSEWHERE)
    assert not {name for name in POINTS if not undisturbed.hits[name]}


@pytest.mark.parametrize(("name", "place"), ELSEWHERE.items())
def test_the_other_steps_are_died_at_elsewhere(name: str, place: str) -> None:
    assert name in (ROOT / place).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", POINTS)
def test_a_death_at_any_step_costs_nothing_that_was_promised(
    undisturbed: Play, scratch: Path, name: str, expect_log
) -> None:
    expect_log(".", optional=True)
    total = undisturbed.hits[name]
    often = name.startswith(("flush.", "publish.", "spool.", "quorum_write.", "upload.", "commit."))
    for number, time in enumerate(sorted({1, total // 2 + 1 if often else 1})):
        root = scratch / str(number)
        root.mkdir()
        assert live(root, (name, time)).died
