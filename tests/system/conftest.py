"""Backends that the tests of this directory share: starting two dozen processes takes longer than a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import scratch as places
from tests.support.backends import Servers

FLEET = 24


@pytest.fixture(scope="session")
def all_servers() -> Iterator[Servers]:
    with places.scratch_directory("zdb") as path, Servers(path, FLEET, separate=True) as servers:
        yield servers


@pytest.fixture
def fleet(all_servers: Servers) -> Iterator[Servers]:
    """24 backends, a process each.  They run again after the test, whatever it did to them."""
    try:
        yield all_servers
    finally:
        for index in range(FLEET):
            if all_servers.running(index):
                all_servers.resume(index)
        all_servers.start()
