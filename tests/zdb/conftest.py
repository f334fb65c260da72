"""Servers for the tests of this directory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.support.backends import Servers, in_process
from tests.zdb.wire import Wire, wire


@pytest.fixture
async def port(scratch: Path) -> AsyncIterator[int]:
    """A server without any restriction."""
    async with in_process(scratch / "zdb") as ports:
        yield ports[0]


@pytest.fixture
async def client(port: int) -> AsyncIterator[Wire]:
    """A connection to `port`."""
    async with wire(port) as connection:
        yield connection


@pytest.fixture
async def guarded(scratch: Path) -> AsyncIterator[int]:
    """A server with the admin password `root`."""
    async with in_process(scratch / "guarded", admin_password="root") as ports:
        yield ports[0]


@pytest.fixture
def start(scratch: Path) -> Iterator[Callable[..., Servers]]:
    """Starts servers in processes of their own."""
    started: list[Servers] = []

    def start(count: int = 1, **options: object) -> Servers:
        servers = Servers(scratch / f"zdb-{len(started)}", count, **options)
        started.append(servers)
        return servers.__enter__()

    yield start
    for servers in started:
        servers.kill()
