"""What holds for every test: logs are judged, mounts have what they need, nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from qsfs import failpoints
from tests.support import scratch as places
from tests.support.log_oracle import LogOracle

_oracle = LogOracle()
_left = pytest.StashKey[list[str]]()

# Every run of the suite tries the same examples; a soak draws new ones and prints what repeats them.
hypothesis.settings.register_profile(
    "ci", derandomize=True, max_examples=100, deadline=None, database=None, print_blob=True
)
hypothesis.settings.register_profile("soak", max_examples=5000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("QSFS_HYPOTHESIS", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # A run that is told to end clears away what it began, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    places.begin_session()
    places.sweep_abandoned()
    _oracle.install()
    config.pluginmanager.register(_oracle, "qsfs-log-oracle")


def pytest_unconfigure() -> None:
    _oracle.uninstall()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("mount") and (missing := _missing_for_mounts()):
        pytest.fail(f"this test mounts a file system: {missing}", pytrace=False)


def pytest_runtest_teardown() -> None:
    failpoints.disarm_all()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_left] = left = places.end_session()
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash.get(_left, []):
        terminalreporter.section("left behind by the tests, removed now", red=True, bold=True)
        for line in left:
            terminalreporter.line(line)


@pytest.fixture
def expect_log() -> Callable[..., None]:
    """Declares log records: `expect_log(r"backend .* is down", logging.WARNING, count=1)`.

    Without a level any at WARNING or above will do, without a count at least one must come; `optional=True`
    allows that none does.
    """
    return _oracle.expect


@pytest.fixture
def scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A new directory, its path short enough for sockets; cleared away with all that is mounted below."""
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_"))[:24]
    with places.scratch_directory(name) as path:
        yield path


def _missing_for_mounts() -> str:
    """What this machine lacks for mounting, and how to get it; empty if nothing."""
    if not Path("/dev/fuse").exists():
        return (
            "there is no /dev/fuse. Load the module ('modprobe fuse'), or give the container the device "
            "and the right ('--device /dev/fuse --cap-add SYS_ADMIN')."
        )
    if shutil.which("fusermount3") is None:
        return "there is no fusermount3. Install it ('apt-get install fuse3')."
    if os.geteuid() != 0:
        return "it needs root. Run it as root, or leave it out with '-m \"not mount\"'."
    return ""
