"""A program cannot tell the mount from a plain directory, whatever it calls and whatever happens to the daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.random_calls.field import make_field
from tests.random_calls.machine import machine_on

pytestmark = pytest.mark.mount

COMMON = settings(
    deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck), report_multiple_bugs=False
)


@pytest.mark.timeout(1800)
def test_random_calls_give_the_same_on_a_mount_and_on_a_plain_directory(scratch: Path) -> None:
    with make_field(scratch) as field:
        run_state_machine_as_test(
            machine_on(field), settings=settings(COMMON, max_examples=18, stateful_step_count=50, derandomize=True)
        )
    met = field.seen
    assert all(met[event] for event in ("forget", "publish", "evict", "remount", "kill", "restore")), met
    assert met["fetched bytes"] and met["evicted bytes"], met


@pytest.mark.slow
@pytest.mark.timeout(8 * 3600)
def test_random_calls_for_hours(scratch: Path) -> None:
    """New ones each time; a failure prints its calls.  `QSFS_CASES` says how many cases."""
    with make_field(scratch) as field:
        run_state_machine_as_test(
            machine_on(field),
            settings=settings(
                COMMON,
                max_examples=int(os.environ.get("QSFS_CASES", "2000")),
                stateful_step_count=100,
                derandomize=False,
            ),
        )
