"""The connections of one command or mount: all of them end with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsfs.clock import FixedClock
from qsfs.config import BackendConfig, Config
from qsfs.daemon.connect import links
from qsfs.errors import BackendUnavailable
from tests.support.backends import in_process


async def test_closing_ends_the_connections_to_heads_too(scratch: Path) -> None:
    """Those that stay open hold a socket of every backend for as long as the process lives."""
    async with in_process(scratch / "z", 2) as ports:
        backends = tuple(BackendConfig(address=f"127.0.0.1:{port}", namespace="default") for port in ports)
        found = links(Config(path=scratch / "qsfs.toml", backends=backends), FixedClock())
        opened = []
        for candidate in found.candidates:
            apart = candidate.connect("default")
            assert apart is not candidate.data
            opened += [candidate.data, apart]
        for backend in opened:
            assert await backend.get(b"k") is None
        await found.aclose()
        for backend in opened:
            with pytest.raises(BackendUnavailable, match="closed here"):
                await backend.get(b"k")
