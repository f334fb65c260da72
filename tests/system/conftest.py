"""What the tests of this directory share: starting two dozen processes takes longer than a test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import scratch as places
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.load import check_clean

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


@pytest.fixture(scope="module")
def shared() -> Iterator[FileSystem]:
    """One mounted file system for all tests of this module, each of which has a directory of its own."""
    with places.scratch_directory("programs") as path, FileSystem(path, count=6) as fs:
        path.chmod(0o711)
        fs.format()
        fs.mount()
        yield fs
        fs.umount()
        check_clean(fs)


@pytest.fixture
def place(shared: FileSystem, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on the mount."""
    path = shared.mountpoint / request.node.name
    path.mkdir()
    yield path
    shutil.rmtree(shared.mountpoint / request.node.name)
