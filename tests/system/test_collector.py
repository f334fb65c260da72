"""The interpreter's cyclic collector stays out of the way of requests."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, eventually

pytestmark = pytest.mark.mount

FILES = 1000

# Runs in the daemon: at SIGUSR1 it writes what is frozen, and how often each generation was collected.
SPY = """
import gc, json, os, signal

def tell(number, frame):
    told = {"frozen": gc.get_freeze_count(), "collections": [g["collections"] for g in gc.get_stats()]}
    with open(os.environ["COLLECTOR_SPY"] + ".new", "w") as file:
        json.dump(told, file)
    os.rename(os.environ["COLLECTOR_SPY"] + ".new", os.environ["COLLECTOR_SPY"])

signal.signal(signal.SIGUSR1, tell)
"""


def test_a_burst_of_requests_meets_no_full_collection(scratch: Path) -> None:
    """What the start made is frozen, so a collection looks at little; and requests leave no garbage that needs one."""
    (scratch / "spy").mkdir()
    (scratch / "spy" / "sitecustomize.py").write_text(SPY)
    told = scratch / "told"
    with FileSystem(scratch, count=6, settings=QUICK) as fs:

        def ask() -> dict[str, Any]:
            told.unlink(missing_ok=True)
            os.kill(fs.process, signal.SIGUSR1)
            eventually(told.exists, "the daemon has told")
            found: dict[str, Any] = json.loads(told.read_text())
            return found

        fs.format()
        fs.mount(PYTHONPATH=str(scratch / "spy"), COLLECTOR_SPY=str(told))
        before = ask()
        assert before["frozen"] > 20_000, "modules, classes and functions"
        for number in range(FILES):
            (fs.mountpoint / str(number)).write_bytes(b"x" * 1024)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        for number in range(FILES):
            assert (fs.mountpoint / str(number)).stat().st_size == 1024
            assert (fs.mountpoint / str(number)).read_bytes() == b"x" * 1024
            (fs.mountpoint / str(number)).unlink()
        after = ask()
        assert after["frozen"] > 20_000
        assert after["collections"][2] == before["collections"][2]
        fs.umount()
