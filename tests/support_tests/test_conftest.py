"""The rules that hold for every test are enforced: each is broken once in a test run of its own."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import scratch as places

UNDECLARED = "undeclared log: WARNING qsfs.area"

LOG_TESTS = """
import logging
import pytest

log = logging.getLogger("qsfs.area")

def test_warning(): log.warning("odd %d", 3)
def test_error_of_the_root(): logging.getLogger("qsfs").error("odd")
def test_information(): log.info("well")
def test_another_project(): logging.getLogger("other").warning("odd")
def test_a_name_that_begins_alike(): logging.getLogger("qsfsx").warning("odd")

def test_logger_that_does_not_propagate():
    quiet = logging.getLogger("qsfs.quiet")
    quiet.propagate = False
    quiet.warning("odd")

def test_declared(expect_log):
    expect_log("o.d")
    log.warning("odd")

def test_another_declared(expect_log):
    expect_log("even", optional=True)
    log.warning("odd")

def test_another_level_declared(expect_log):
    expect_log("odd", logging.ERROR, optional=True)
    log.warning("odd")

def test_declared_and_never_came(expect_log): expect_log("odd")
def test_declared_as_optional(expect_log): expect_log("odd", optional=True)

def test_declared_once_came_twice(expect_log):
    expect_log("odd", count=1)
    log.warning("odd")
    log.warning("odd")

@pytest.fixture
def ending():
    yield
    log.warning("odd")

def test_warning_of_a_fixture_that_ends(ending): pass

@pytest.fixture
def beginning():
    log.warning("odd")

def test_warning_of_a_fixture_that_begins(beginning): pass
def test_the_next_starts_anew(): pass
async def test_warning_of_an_async_test(): log.warning("odd")
"""


def run(folder: Path, body: str, *, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs pytest over a file with `body` under the conftest of this suite."""
    (folder / "conftest.py").write_text((places.ROOT / "tests" / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = mount: mounts\ntrio_mode = true\n")
    (folder / "test_it.py").write_text(body)
    environment = (
        os.environ
        | {"PYTHONPATH": str(places.ROOT), "COLUMNS": "200"}
        | ({"PATH": path} if path is not None else {})
    )
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_warning_that_no_test_declared_fails_it(scratch: Path) -> None:
    said = run(scratch, LOG_TESTS).stdout
    verdicts = {
        "warning": ("FAILED", UNDECLARED),
        "error_of_the_root": ("FAILED", "undeclared log: ERROR qsfs "),
        "information": ("PASSED", ""),
        "another_project": ("PASSED", ""),
        "a_name_that_begins_alike": ("PASSED", ""),
        "logger_that_does_not_propagate": ("FAILED", "undeclared log: WARNING qsfs.quiet"),
        "declared": ("PASSED", ""),
        "another_declared": ("FAILED", UNDECLARED),
        "another_level_declared": ("FAILED", UNDECLARED),
        "declared_and_never_came": ("ERROR", "log /odd/: declared, but never came"),
        "declared_as_optional": ("PASSED", ""),
        "declared_once_came_twice": ("FAILED", "log /odd/: declared 1 times, came 2"),
        "warning_of_a_fixture_that_ends": ("ERROR", UNDECLARED),
        "warning_of_a_fixture_that_begins": ("FAILED", UNDECLARED),
        "the_next_starts_anew": ("PASSED", ""),
        "warning_of_an_async_test": ("FAILED", UNDECLARED),
    }
    lines = [line for line in said.splitlines() if line.startswith(("PASSED ", "FAILED ", "ERROR "))]
    for name, (verdict, says) in verdicts.items():
        mine = [line for line in lines if re.search(rf"::test_{name}( |$)", line)]
        # A test that passed by itself and is faulted when its fixtures end has two lines.
        assert [line for line in mine if line.startswith(verdict) and says in line], (name, mine)
        assert verdict != "PASSED" or len(mine) == 1, (name, mine)


def test_declared_logs_are_seen_in_this_run_too(expect_log) -> None:
    expect_log("^on purpose$", logging.WARNING, count=1)
    logging.getLogger("qsfs.tests").warning("on purpose")


def test_a_mount_test_says_what_to_install_where_it_cannot_run(scratch: Path) -> None:
    done = run(
        scratch,
        "import pytest\n@pytest.mark.mount\ndef test_it(): raise RuntimeError('ran')",
        path="/nowhere",
    )
    assert done.returncode == 1
    assert "Install it ('apt-get install fuse3')" in done.stdout
    assert "ran" not in done.stdout.replace("no tests ran", "")


@pytest.mark.mount
def test_what_tests_leave_behind_fails_the_run_and_is_removed(scratch: Path) -> None:
    """Also a process whose parents are gone, so that only its environment tells where it comes from."""
    body = """
import subprocess
from tests.support import scratch
from tests.support.powerloss import PowerLoss

kept = []

def test_process(): subprocess.Popen(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"]).wait()
def test_directory(): (scratch.session_directory() / "forgotten").mkdir()
def test_mount():
    folder = scratch.session_directory() / "kept"
    folder.mkdir()
    kept.append(PowerLoss(folder / "backing", folder / "mnt"))
"""
    before = set(places.session_processes())
    done = run(scratch, body)
    assert done.returncode == 1, done.stdout
    assert "3 passed" in done.stdout
    left = done.stdout.partition("left behind by the tests")[2]
    for pattern in (r"^process .*sleep 1000", r"^directory .*/forgotten$", r"^mount .*/kept/mnt$"):
        assert re.search(pattern, left, re.MULTILINE), (pattern, left)
    assert set(places.session_processes()) == before
    for path in re.findall(r"^(?:directory|mount) (.*)$", left, re.MULTILINE):
        assert not Path(path).exists()
        assert not places.mounts_below(Path(path))


KILLED_TEST = """
import os, pathlib, signal, subprocess, time
from tests.support import scratch
from tests.support.powerloss import PowerLoss

def test_killed():
    with scratch.scratch_directory() as folder, PowerLoss(folder / "backing", folder / "mnt"):
        sleeper = subprocess.Popen(["sleep", "1000"], cwd=folder, start_new_session=True)
        where = pathlib.Path(__file__).parent
        (where / "folder").write_text(str(folder))
        (where / "sleeper").write_text(str(sleeper.pid))
        os.kill(os.getpid(), signal.{})
        time.sleep(1000)
"""


def is_gone(process: int) -> bool:
    """Whether a process has ended, or is only waiting to be asked for."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() == b""
    except OSError:
        return True


@pytest.mark.mount
def test_a_run_that_is_told_to_end_clears_away_what_it_began(scratch: Path) -> None:
    done = run(scratch, KILLED_TEST.format("SIGTERM"))
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout
    assert "sleep 1000" in done.stdout.partition("left behind by the tests")[2]
    folder = Path((scratch / "folder").read_text())
    assert not places.mounts_below(folder)
    assert not folder.parent.exists()
    assert is_gone(int((scratch / "sleeper").read_text()))


@pytest.mark.mount
def test_what_a_killed_run_left_goes_with_the_next_one(scratch: Path) -> None:
    assert run(scratch, KILLED_TEST.format("SIGKILL")).returncode == -signal.SIGKILL
    folder, sleeper = Path((scratch / "folder").read_text()), int((scratch / "sleeper").read_text())
    # Another run that starts just now may be the next one.
    places.sweep_abandoned()
    assert not places.mounts_below(folder)
    assert not folder.parent.exists()
    assert is_gone(sleeper)
