"""Fixtures of the tests of the local store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with an empty file system."""
    running = Machine(tmp_path)
    yield running
    running.close()
