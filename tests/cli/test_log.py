"""The daemon's log: what lies in the cache directory stays within a bound, as everything there does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsfs.config import LogConfig
from qsfs.daemon import log


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger; gets its own handlers back."""
    found = logging.getLogger()
    handlers, level = found.handlers[:], found.level
    yield found
    for handler in found.handlers:
        if handler not in handlers:
            handler.close()
    found.handlers[:] = handlers
    found.setLevel(level)


def test_the_log_in_the_cache_directory_is_bounded(tmp_path: Path, root: logging.Logger) -> None:
    file = tmp_path / "daemon.log"
    log.set_up(LogConfig(), file, most_bytes=10_000)
    for number in range(1_000):
        logging.getLogger("qsfs.test").info("line %d %s", number, "x" * 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon.log", "daemon.log.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    assert "line 999 " in file.read_text()


def test_a_log_elsewhere_is_left_to_its_owner(tmp_path: Path, root: logging.Logger) -> None:
    log.set_up(LogConfig(), tmp_path / "log")
    for number in range(1_000):
        logging.getLogger("qsfs.test").info("line %d", number)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert len((tmp_path / "log").read_text().splitlines()) == 1_000
