"""The named steps at which machines of a simulation die."""

from __future__ import annotations

import re
from pathlib import Path

import qsfs

ELSEWHERE = {
    "format.tried": "tests/remote/test_format_fs.py",
    "format.marked": "tests/remote/test_format_fs.py",
    "format.announced": "tests/remote/test_format_fs.py",
    "format.prepared": "tests/remote/test_format_fs.py",
    "fuse.write": "tests/system/test_crash_points.py",
    "fuse.fsync": "tests/system/test_crash_points.py",
    "snapshot.cut": "tests/system/test_snapshots.py",
    "stray.deleted.one": "tests/remote/test_strays.py",
    "superblock.stored": "tests/system/test_keys.py",
    "superblock.spread": "tests/system/test_keys.py",
    "start.pack.written": "tests/remote/test_start_packs.py",
    "start.pack.recorded": "tests/remote/test_start_packs.py",
    "aside.store": "tests/remote/test_restore.py",
    "template.applied": "tests/remote/test_template.py",
    "template.copied": "tests/remote/test_template.py",
}
"""Steps of what no history does (formatting, requests of the kernel, changes of keys, starts, readers, scans for
strays), and the tests that die there."""


def all_points() -> list[str]:
    """Every failpoint in the code."""
    found: set[str] = set()
    for module in Path(qsfs.__file__).parent.rglob("*.py"):
        found.update(re.findall(r'failpoints\.hit\("([^"]+)"\)', module.read_text(encoding="utf-8")))
    return sorted(found)


POINTS = [name for name in all_points() if name not in ELSEWHERE]
