"""`qsfs collect`: what it prints, given what the daemon answers."""

from __future__ import annotations

from typing import Any

from qsfs.cli.collect import lines
from qsfs.remote.graveyard import DeadPack, Graveyard, KeptFacts
from qsfs.remote.strays import Place, Strays

NOW = 1_700_000_000.0
NOTHING: dict[str, Any] = {**Strays(3600).report(0.0), "unanswered": [], "problem": "", "scans": []}


def told(graveyard: Graveyard, now: float, unanswered: tuple[str, ...] = ()) -> list[str]:
    dead = {**graveyard.report(now), "unanswered": list(unanswered)}
    return lines({**dead, "strays": NOTHING, "unreclaimed": []}, NOW)[:-1]


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


def test_strays_are_told_with_their_age_and_the_scans_that_found_them():
    strays = Strays(3600)
    for name in range(1, 5):
        strays.met(bytes([name]) * 16, 1, [Place(1, 0, 1 << 20)], 900.0 * name, backends=1)
    strays.published(strays.before_cut(900.0 + 3600))
    strays.before_cut(1800.0 + 3600)
    scans = [
        {"backend": "10.0.0.1:9900/qsfs", "ended_ns": int((NOW - 7200) * 1e9), "under_way": True},
        {"backend": "10.0.0.2:9900/qsfs", "ended_ns": int((NOW - 600) * 1e9), "under_way": False},
        {"backend": "10.0.0.3:9900/qsfs", "ended_ns": 0, "under_way": False},
    ]
    found = {**strays.report(5400.0), "unanswered": ["10.0.0.3:9900/qsfs"], "problem": "why", "scans": scans}
    found["left_out"] = 1
    unreclaimed = [{"backend": "10.0.0.1:9900/qsfs", "bytes": 3 << 20}]
    dead = {**Graveyard(3600).report(0.0), "unanswered": []}
    everything = {**dead, "strays": found, "unreclaimed": unreclaimed}
    assert lines(everything, NOW)[1:] == [
        "4 packs, 4.0 MiB, on the backends named by nothing (strays), the first known for 75 min of running time",
        "  2 wait for the retention time",
        "  1 wait until the next generation is published",
        "  1 are to be deleted now",
        "  there are more than are kept in mind at a time; later scans take them",
        "  nothing of them is deleted now: why",
        "  no answer from 10.0.0.3:9900/qsfs: what it holds of them is deleted later",
        "  scans: 2 backends, the longest ago 10.0.0.1:9900/qsfs: 2.0 h",
        "  scans: 10.0.0.3:9900/qsfs was not scanned to its end yet",
        "deleted since this cache began, and still on the disks of backends that are 0-dbs, at least:",
        "  10.0.0.1:9900/qsfs: 3.0 MiB",
    ]
