"""Servers in processes of their own for the tests of this directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.backends import Servers


@pytest.fixture
def start(scratch: Path) -> Iterator[Callable[..., Servers]]:
    """Starts servers; they are killed after the test."""
    started: list[Servers] = []

    def start(count: int = 1, **options: object) -> Servers:
        servers = Servers(scratch / f"zdb-{len(started)}", count, **options)
        started.append(servers)
        return servers.__enter__()

    yield start
    for servers in started:
        servers.kill()
