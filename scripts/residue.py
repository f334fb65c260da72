"""How many bytes of LMDB's file a resident page takes, by the size of blocks: what defends the one that qsfs has.

Blocks of a size are stored as `qsfs/store/schema.py` lays them out, rows and values, in the order of their keys as a
commit does; a database of its own is made for each size, and its pages are counted.
"""

from __future__ import annotations

import struct
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import lmdb

from qsfs.cli.output import format_table
from qsfs.store.environment import Environment
from qsfs.store.schema import PAGE, Table
from qsfs.store.start import blocks_of

SIZES = (1, 2, 4, 8, 16)
"""Pages in a block."""
_TAIL = 16
_DENSE_PAGES = 4096
_GROUP_BYTES = 32 << 20


def recorded_pages(cache: Path) -> list[int]:
    """The pages that are recorded in the table START of a cache directory, of its file with most."""
    environment = Environment(cache, 1 << 40, readonly=True)
    view = environment.read()
    found: dict[bytes, list[int]] = {}
    for key, row in view.scan(Table.START, b"", None):
        pages = found.setdefault(key[:8], [])
        for block, bits in blocks_of(int.from_bytes(key[8:], "big"), int.from_bytes(row, "little")):
            pages += [4 * block + i for i in range(4) if bits & 1 << i]
    view.close()
    environment.close()
    return max(found.values(), key=len)


def measure_residue(pages: Collection[int]) -> list[dict[str, float]]:
    """For each size of blocks: bytes for each of these scattered pages, for one of many in a row, seconds of CPU."""
    found = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="qsfs-residue-") as place:
            used, _ = _store(Path(place), size, sorted({page // size for page in pages}))
            scattered = used / len(pages)
        with tempfile.TemporaryDirectory(prefix="qsfs-residue-") as place:
            used, seconds = _store(Path(place), size, range(_DENSE_PAGES // size))
            dense = used / _DENSE_PAGES
        found.append(
            {
                "block_bytes": size * PAGE,
                "scattered_bytes_per_page": scattered,
                "dense_bytes_per_page": dense,
                "cpu_seconds_per_dense_gib": seconds * (1 << 30) / (_DENSE_PAGES * PAGE),
            }
        )
    return found


def residue_table(found: list[dict[str, float]]) -> str:
    """The same for people."""
    rows = [
        [
            f"{row['block_bytes'] // 1024} KiB",
            f"{row['scattered_bytes_per_page']:,.0f}",
            f"{row['dense_bytes_per_page']:,.0f}",
            f"{row['cpu_seconds_per_dense_gib']:.1f}",
        ]
        for row in found
    ]
    headers = ["blocks of", "bytes a page, scattered", "bytes a page, in a row", "CPU to store a GiB in a row, s"]
    return format_table(headers, rows)


def _store(place: Path, size: int, blocks: Collection[int]) -> tuple[int, float]:
    """Stores blocks of `size` pages in groups; bytes of all LMDB pages in use, and seconds of CPU."""
    with lmdb.open(str(place), map_size=1 << 36, max_dbs=4, sync=False) as environment:
        rows, values = environment.open_db(b"blocks"), environment.open_db(b"values")
        begun = time.process_time()
        for group in _groups(list(blocks), max(1, _GROUP_BYTES // (size * PAGE))):
            with environment.begin(write=True) as txn:
                row, value = bytes(2 + 16 * size + _TAIL), bytes(size * PAGE - _TAIL)
                keys = [struct.pack(">QQ", 2, block) for block in group]
                txn.cursor(rows).putmulti((key, row) for key in keys)
                txn.cursor(values).putmulti((key, value) for key in keys)
        seconds = time.process_time() - begun
        with environment.begin() as txn:
            stats = [txn.stat(table) for table in (rows, values)]
    return sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats) * PAGE, seconds


def _groups(blocks: list[int], count: int) -> Iterator[list[int]]:
    for start in range(0, len(blocks), count):
        yield blocks[start : start + count]
