"""`qsfs cache warm --start`: what applications read while they start, fetched before they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import trio

from qsfs.daemon.caching import Committing
from qsfs.daemon.jobs import Progress
from qsfs.errors import DataLost, LimitExceeded, QsfsError, Unavailable
from qsfs.remote.fetch import Fetcher
from qsfs.remote.start_fetch import PACKS_AT_ONCE
from qsfs.store.schema import BLOCK_PAGES, PAGE, ExtentRow
from qsfs.store.start import CHUNK_PAGES, bits_of, blocks_of
from qsfs.store.store import Store
from qsfs.values import format_size

_READS_AT_ONCE = 16
_EXTENTS_A_STEP = 128
_MOST_FAILURES = 8
"""Packs and pages that did not come after which it gives up: each costs a deadline."""


async def warm_start(store: Store, fetcher: Fetcher, committer: Committing, progress: Progress) -> dict[str, Any]:
    """Fetches all start packs whole, then what else is recorded here and only remote; tells bytes and packs.

    Raises `LimitExceeded` before it begins if the packs cannot fit without eviction, or when the cache is full;
    `Unavailable` or `DataLost` when too much did not come.  What came stays.
    """
    work = _Work(store, fetcher, progress)
    here = await work.local_pages()
    # What a pack lacks of which half is here is fetched page by page.
    packs = {n: live for n, live in await fetcher.start.all_packs() if 2 * here[n] * PAGE < live}
    wanted, room = sum(packs.values()), store.limits.high_bytes - store.expected_bytes()
    progress["wanted_bytes"] = wanted
    if wanted > room:
        raise LimitExceeded(
            f"what is read at a start takes {format_size(wanted)} or more; the cache has room for "
            f"{format_size(max(0, room))} without evicting anything: evict something ('qsfs cache evict'), or give "
            "[cache] size more"
        )
    await work.fetch_packs(list(packs))
    await work.fetch_rest()
    await committer.commit()
    work.complain()
    return {"packs": work.packs, "fetched_bytes": work.fetched_bytes}


class _Work:
    """One warm: what came, and what went wrong."""

    def __init__(self, store: Store, fetcher: Fetcher, progress: Progress) -> None:
        self.packs = 0
        self._store = store
        self._fetcher = fetcher
        self._progress = progress
        self._before = self._pages
        self._full = False
        self._failures: list[QsfsError] = []

    @property
    def _pages(self) -> int:
        return self._fetcher.fetched_pages + self._fetcher.start.counts.pages

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came since it began."""
        return (self._pages - self._before) * PAGE

    @property
    def _ends(self) -> bool:
        return self._full or len(self._failures) >= _MOST_FAILURES

    async def fetch_packs(self, numbers: list[int]) -> None:
        """Fetches packs whole, some at a time."""
        slots = trio.Semaphore(PACKS_AT_ONCE)

        async def fetch(number: int) -> None:
            try:
                if await self._fetcher.start.fetch(number):
                    self.packs += 1
                else:
                    self._full = True
            except QsfsError as error:
                self._failures.append(error)
            finally:
                slots.release()
            self._progress["fetched_bytes"] = self.fetched_bytes

        async with trio.open_nursery() as nursery:
            for number in numbers:
                await slots.acquire()
                if self._ends:
                    break
                nursery.start_soon(fetch, number)

    async def fetch_rest(self) -> None:
        """Fetches the recorded pages that are still only remote, many at a time."""
        slots = trio.Semaphore(_READS_AT_ONCE)

        async def fetch(inode: int, first: int, count: int) -> None:
            try:
                await self._fetcher.fetch(inode, first, count, may_wait=False)
            except QsfsError as error:
                self._failures.append(error)
            finally:
                slots.release()
            self._progress["fetched_bytes"] = self.fetched_bytes

        async with trio.open_nursery() as nursery:
            async for _, inode, first, count in self._rest():
                await slots.acquire()
                self._full = self._full or self._store.expected_bytes() >= self._store.limits.high_bytes
                if self._ends:
                    slots.release()
                    continue
                nursery.start_soon(fetch, inode, first, count)

    async def local_pages(self) -> Counter[int]:
        """How many recorded pages are here, by the pack that has them too."""
        found: Counter[int] = Counter()
        async for _, _, row, some in self._recorded():
            found[row.pack] += some.bit_count()
        async for row, _, _, count in self._rest():
            found[row.pack] -= count
        return found

    async def _recorded(self) -> AsyncIterator[tuple[int, int, ExtentRow, int]]:
        """The extents with recorded pages: inode, chunk, row, and the bits of these pages."""
        store = self._store
        for inode in store.start.files:
            for chunk, bits in store.start.chunks(inode):
                first, stop = chunk * CHUNK_PAGES, (chunk + 1) * CHUNK_PAGES
                for rows in store.extents.parts(inode, first, stop, _EXTENTS_A_STEP):
                    for row in rows:
                        some = bits & bits_of(chunk, row.first, row.first + row.pages)
                        if some:
                            yield inode, chunk, row, some
                    await trio.lowlevel.checkpoint()

    async def _rest(self) -> AsyncIterator[tuple[ExtentRow, int, int, int]]:
        """The recorded pages that are only remote, by block: extent, inode, first page, pages."""
        async for inode, chunk, row, some in self._recorded():
            wanted = dict(blocks_of(chunk, some))
            for block, missing in self._store.blocks.remote_blocks(inode, row, row.first, row.first + row.pages):
                missing &= wanted.get(block, 0)
                if missing:
                    low, high = (missing & -missing).bit_length() - 1, missing.bit_length()
                    yield row, inode, block * BLOCK_PAGES + low, high - low

    def complain(self) -> None:
        """Raises what kept it from fetching everything."""
        if self._failures:
            lost = any(isinstance(failure, DataLost) for failure in self._failures)
            raise (DataLost if lost else Unavailable)(
                f"{format_size(self.fetched_bytes)} were fetched, then {len(self._failures)} parts did not come: "
                f"{self._failures[0]}"
            )
        if self._full:
            raise LimitExceeded(
                f"{format_size(self.fetched_bytes)} were fetched, then the cache was full; what was fetched is here: "
                "evict something ('qsfs cache evict'), or give [cache] size more"
            )
