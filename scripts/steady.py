"""What a database costs on the backends in the long run: the part `steady` of `scripts/bench --remote`.

The load of `tests/remote/steady.py`, on a virtual clock and on backends in memory, so that days pass in minutes: a
database of 16 MiB in packs of 512 KiB (16+4, 24 backends), of which a tenth is overwritten between two cuts, again and
again, while dead packs are collected, thin ones rewritten and the metadata renewed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.remote.steady import Load, steady_cost
from tests.support.virtual_time import virtual_time

LOAD = Load(pages=4096, changed=400, cuts=75, warm_up=35, cut_seconds=300.0, pack_pages=128)


def measure_steady(directory: Path) -> dict[str, float]:
    """Bytes sent to all backends for each byte of the pages that changed, and held for each byte that lives."""
    with tempfile.TemporaryDirectory(prefix="qsfs-steady-", dir=directory) as place, virtual_time() as clock:
        return trio.run(steady_cost, LOAD, Path(place), clock, clock=clock).report()
