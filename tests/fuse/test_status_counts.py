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
