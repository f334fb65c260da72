"""The named steps at which machines of a simulation die."""

from __future__ import annotations

import re
from pathlib import Path

import qsfs

_OUTSIDE = ("format.", "fuse.", "superblock.", "fetch.")
"""Steps of what no history does: formatting, requests of the kernel, changes of keys."""


def all_points() -> list[str]:
    """Every failpoint in the code."""
    found: set[str] = set()
    for module in Path(qsfs.__file__).parent.rglob("*.py"):
        found.update(re.findall(r'failpoints\.hit\("([^"]+)"\)', module.read_text(encoding="utf-8")))
    return sorted(found)


POINTS = [name for name in all_points() if not name.startswith(_OUTSIDE)]
