"""From which size on a commit serves an fsync better than the journal: `scripts/bench --journal DIR`.

Two stores of its own are made below the directory, driven by the daemon's committer: one may journal an fsync of
any size, the other must commit for each.  They take turns.  For each size of dirty bytes, lying in a row and as
single pages scattered over blocks, it times

- one fsync, with everything else committed before;
- the commit that the journalled bytes still need afterwards, which nobody waits for;
- fsyncs in a row, the last commit included: what is journalled is written twice in the end.

Streams, which begin their own commits, are kept from that, else the journal would never see a large fsync.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from qsfs.cli.output import format_table
from qsfs.clock import SystemClock
from qsfs.config import CacheConfig
from qsfs.daemon.committer import Committer
from qsfs.daemon.runtime import tune_allocator, tune_interpreter
from qsfs.filesystem.contents import Contents
from qsfs.store.limits import Limits
from qsfs.store.schema import BLOCK_SIZE, PAGE, Inode
from qsfs.store.store import Store
from qsfs.values import format_size

KIB, MIB = 1 << 10, 1 << 20
SIZES = tuple(4 * KIB << power for power in range(13))
"""4 KiB to 16 MiB of dirty bytes."""
PATTERNS = {"row": "pages in a row", "scattered": "single pages in blocks of their own"}
WAYS = ("journal", "commit")
FIGURES = {
    "journal_ms": "journal",
    "commit_ms": "commit",
    "later_ms": "its later commit",
    "journal_row_ms": "in a row: journal",
    "commit_row_ms": "in a row: commit",
}
"""Milliseconds for an fsync, by what they are the time of, and how the table calls it."""
_LEAST_FILE_BYTES = 32 * MIB
_ROW_BYTES = 64 * MIB
_ROW_MOST = 64
_CACHE_BYTES = 2 << 30


def measure_journal(directory: Path, rounds: int, largest: int = SIZES[-1]) -> dict[str, Any]:
    """Medians of `rounds` for each pattern and size up to `largest` bytes; the report, for JSON."""
    tune_allocator()
    with tempfile.TemporaryDirectory(prefix="qsfs-bench-", dir=directory) as place:
        return trio.run(_measure, Path(place), rounds, [size for size in SIZES if size <= largest])


def journal_table(report: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{report['rounds']} rounds; milliseconds for each write and fsync of so much"]
    for pattern, what in PATTERNS.items():
        rows = [row for row in report["rows"] if row["pattern"] == pattern]
        cells = [[format_size(row["size"]), *(f"{row[name]:.2f}" for name in FIGURES)] for row in rows]
        lines += ["", f"{what}:", format_table(["dirty", *FIGURES.values()], cells)]
        for name, where in (("crossover", "alone"), ("row_crossover", "in a row")):
            size = report[name][pattern]
            found = "at no size" if size is None else f"from {format_size(size)} on"
            lines.append(f"{where} the commit is the quicker one {found}")
    return "\n".join(lines)


def crossover(rows: list[dict[str, Any]], journal: str, commit: str) -> int | None:
    """The smallest size from which on a commit is quicker at every size; None if it is not at the largest."""
    found = None
    for row in sorted(rows, key=lambda row: -row["size"]):
        if row[commit] >= row[journal]:
            break
        found = row["size"]
    return found


@dataclass
class _Target:
    """A store with one committed file of so many blocks, and who drives it."""

    store: Store
    contents: Contents
    committer: Committer
    inode: Inode
    blocks: int

    async def write(self, pages: list[int], data: bytes) -> None:
        """Writes runs of pages, at once as a mount would: a wait for room is the commit's."""
        run = len(data) // len(pages)
        for number, page in enumerate(pages):
            await self.committer.room()
            self.contents.write(self.inode, page * PAGE, data[number * run : (number + 1) * run])


@asynccontextmanager
async def _opened(directory: Path, largest_append: int, file_bytes: int) -> AsyncIterator[_Target]:
    directory.mkdir()
    limits = Limits.of(CacheConfig(directory=directory, size_bytes=_CACHE_BYTES, group_seconds=600.0), 0)
    store = Store(directory, replace(limits, largest_append=largest_append), SystemClock())
    try:
        contents = Contents(store)
        number = store.allocate_inode()
        with store.change() as change:
            change.create(Inode(number, 0o100644, nlink=1))
        inode = store.inode(number)
        assert inode is not None
        contents.opened(inode)
        async with trio.open_nursery() as nursery:
            committer = Committer(store, contents, 600.0, alone=lambda: True)
            store.on_stream = lambda: None
            nursery.start_soon(committer.run)
            target = _Target(store, contents, committer, inode, file_bytes // BLOCK_SIZE)
            for page in range(0, file_bytes // PAGE, MIB // PAGE):
                await target.write([page], os.urandom(MIB))
            await committer.commit()
            yield target
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def _measure(place: Path, rounds: int, sizes: list[int]) -> dict[str, Any]:
    taken: dict[tuple[str, int], dict[str, list[float]]] = {}
    file_bytes = max(_LEAST_FILE_BYTES, 8 * max(sizes))
    async with (
        _opened(place / "journal", 1 << 40, file_bytes) as journal,
        _opened(place / "commit", 0, file_bytes) as commit,
    ):
        tune_interpreter()
        targets = dict(zip(WAYS, (journal, commit), strict=True))
        choose = random.Random(7)
        for turn in range(rounds):
            for pattern in PATTERNS:
                for size in _fitting(pattern, sizes, journal.store.limits.group_bytes):
                    found = taken.setdefault((pattern, size), {name: [] for name in FIGURES})
                    for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
                        once, later = await _once(targets[way], pattern, size, choose)
                        found[f"{way}_ms"].append(once)
                        if way == "journal":
                            found["later_ms"].append(later)
                        found[f"{way}_row_ms"].append(await _in_a_row(targets[way], pattern, size, choose))
        flushes = {way: target.committer.flushes for way, target in targets.items()}
    rows: list[dict[str, Any]] = [
        {"pattern": pattern, "size": size, **{name: statistics.median(runs) for name, runs in found.items()}}
        for (pattern, size), found in taken.items()
    ]
    of = {pattern: [row for row in rows if row["pattern"] == pattern] for pattern in PATTERNS}
    return {
        "rounds": rounds,
        "rows": rows,
        "flushes": flushes,
        "crossover": {pattern: crossover(of[pattern], "journal_ms", "commit_ms") for pattern in PATTERNS},
        "row_crossover": {
            pattern: crossover(of[pattern], "journal_row_ms", "commit_row_ms") for pattern in PATTERNS
        },
    }


def _fitting(pattern: str, sizes: list[int], group_bytes: int) -> Iterator[int]:
    """Sizes that one group takes: a scattered page takes a block of it."""
    factor = BLOCK_SIZE // PAGE if pattern == "scattered" else 1
    return (size for size in sizes if size * factor < group_bytes)


def _pages(pattern: str, size: int, blocks: int, choose: random.Random) -> list[int]:
    """The first pages of the runs that an fsync covers, in a file of so many blocks."""
    in_block = BLOCK_SIZE // PAGE
    if pattern == "scattered":
        return [block * in_block for block in sorted(choose.sample(range(blocks), size // PAGE))]
    return [choose.randrange(blocks - size // BLOCK_SIZE) * in_block]


async def _once(target: _Target, pattern: str, size: int, choose: random.Random) -> tuple[float, float]:
    """Milliseconds of an fsync, and of the commit after it."""
    await target.committer.commit()
    await target.write(_pages(pattern, size, target.blocks, choose), os.urandom(size))
    began = time.perf_counter()
    await target.committer.sync(target.inode.number)
    synced = time.perf_counter()
    await target.committer.commit()
    return (synced - began) * 1e3, (time.perf_counter() - synced) * 1e3


async def _in_a_row(target: _Target, pattern: str, size: int, choose: random.Random) -> float:
    """Milliseconds for each of many fsyncs with their writes, until all is committed."""
    count = min(_ROW_MOST, _ROW_BYTES // size)
    places = [_pages(pattern, size, target.blocks, choose) for _ in range(count)]
    data = os.urandom(size)
    began = time.perf_counter()
    for pages in places:
        await target.write(pages, data)
        await target.committer.sync(target.inode.number)
    await target.committer.commit()
    return (time.perf_counter() - began) * 1e3 / count
