"""The daemon counts requests by kind and shows them."""

from __future__ import annotations

import os

import pytest

from qsfs.cli.status import lines
from tests.support.daemon import FileSystem


@pytest.mark.mount
def test_status_counts_requests_by_kind(scratch):
    with FileSystem(scratch, shards=(1, 1), count=2) as fs:
        fs.format()
        fs.mount()
        before = fs.status()["requests"]["by_kind"]
        for number in range(10):
            os.mkdir(fs.mountpoint / str(number))
        found = fs.status()
        assert found["requests"]["by_kind"]["mkdir"] - before.get("mkdir", 0) == 10
        assert found["requests"]["unexpected_errors_by_kind"] == {}
        assert any(line.startswith("requests: ") and "mkdir 10" in line for line in lines(found))
        fs.umount()


def test_what_waits_and_what_failed_is_said():
    found = {
        "mountpoint": "/m",
        "phase": "mounted",
        "process": 1,
        "file_system": "00",
        "waiting_for": "",
        "writable": True,
        "cache": dict.fromkeys(("used_bytes", "limit_bytes", "disk_bytes", "size_bytes", "dirty_blocks"), 0)
        | {"waiting_for_room": 0, "oldest_uncovered_seconds": None},
        "requests": {"by_kind": {"read": 1200, "write": 5}, "waiting": 3, "unexpected_errors": 2},
    }
    expected = "requests: 1,205 (read 1,200, write 5), 3 waiting, 2 failed unexpectedly (see the log)"
    assert expected in lines(found)
