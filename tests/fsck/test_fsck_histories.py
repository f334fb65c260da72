"""fsck finds nothing wrong with what the local store makes of random histories and crashes.

Those histories have no real packs and a bare namespace, so only what concerns pages and counts is
looked at.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qsfs.fsck.check import check_local
from qsfs.fsck.report import Report
from tests.core.history import LIMITS, History

PAGES_AND_COUNTS = {
    "row",
    "lmdb-structure",
    "page-rot",
    "page-lost",
    "clean-nowhere",
    "extent-overlap",
    "extent-shape",
    "past-end",
    "allocated",
    "dirty-index",
    "value-without-block",
    "data-of-nothing",
    "data-of-no-file",
}


def run(directory: Path, seed: int, steps: int) -> None:
    history = History(directory, seed)
    try:
        for _ in range(steps):
            history.step()
            if history.random.random() < 0.03:
                history.crash()
    finally:
        history.store.close()
    report = Report()
    environment = check_local(directory, LIMITS, report)
    assert environment is not None
    environment.close()
    wrong = [finding.message for finding in report.findings if finding.kind in PAGES_AND_COUNTS]
    assert not wrong and not report.failures


@pytest.mark.parametrize("seed", range(10))
def test_a_store_after_any_history_is_sound(scratch: Path, seed: int):
    run(scratch, seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5000, 5400))
def test_many_more_histories_are_sound(scratch: Path, seed: int):
    run(scratch, seed, 250)
