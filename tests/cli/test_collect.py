"""`qsfs collect`: what it prints, given what the daemon answers."""

from __future__ import annotations

from typing import Any

from qsfs.cli.collect import lines
from qsfs.remote.graveyard import DeadPack, Graveyard, KeptFacts


def told(graveyard: Graveyard, now: float, unanswered: tuple[str, ...] = ()) -> list[str]:
    found: dict[str, Any] = {**graveyard.report(now), "unanswered": list(unanswered)}
    return lines(found)


def test_where_nothing_is_dead_one_line_says_so():
    assert told(Graveyard(3600), 0.0) == ["0 packs, 0 B, dead on the backends"]


def test_each_dead_pack_is_told_with_what_it_waits_for():
    """Every step of a dead pack's way is named, and who does not answer."""
    graveyard = Graveyard(3600)
    packs = [DeadPack(number, bytes([number]) * 16, True, 1 << 20) for number in range(1, 5)]
    for dead in packs[:3]:
        graveyard.died(dead)
    graveyard.published(graveyard.before_cut(0.0), 10)
    graveyard.release([1], [], 0.0)
    graveyard.published(graveyard.before_cut(3600.0), 11)
    graveyard.release([2], [], 3600.0)
    graveyard.release([3], [KeptFacts(9)], 3600.0)
    graveyard.died(packs[3])
    assert told(graveyard, 3660.0, ("10.0.0.1:9900/qsfs",)) == [
        "4 packs, 4.0 MiB, dead on the backends",
        "  1 wait until the next generations are published",
        "  1 wait because kept generations or snapshots may need them",
        "  1 wait for the retention time, the first 59 min more",
        "  1 are to be deleted now",
        "  no answer from 10.0.0.1:9900/qsfs: what it holds of them is deleted later",
    ]
