"""What `qsfs cache` does: pins, drops and fetches what an operator names, in short steps.

A warm or a pin that would not fit is refused before it begins: neither displaces what is in use, and
pins never fill the cache with what cannot be evicted.
"""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import trio

from qsfs.daemon.jobs import Progress
from qsfs.daemon.walking import walk
from qsfs.errors import DataLost, LimitExceeded, QsfsError, Unavailable
from qsfs.filesystem.tree import Tree
from qsfs.remote.plain import plain_errors
from qsfs.store.dropping import Dropper
from qsfs.store.schema import BLOCK_SIZE, PAGE, ROOT_INODE, Inode, InodeFlag, Table, split_u64, u64
from qsfs.store.store import Store
from qsfs.values import format_size

PINNED_SHARE = 0.5
"""The part of the cache's room that pinned data may take: the rest must stay fit to be evicted."""
_PINNED = int(InodeFlag.PINNED | InodeFlag.PINNED_BY_HAND)
_BY_HAND = int(InodeFlag.PINNED_BY_HAND)
_STEP = 32
_CHUNK_PAGES = 1024
_CHUNKS_AT_ONCE = 6
_MOST_FAILURES = 8
"""Chunks that did not come after which a warm gives up: each costs a deadline."""


class Fetching(Protocol):
    """What fetches: see `remote.fetch.Fetcher.fetch`."""

    async def fetch(self, inode: int, first: int, count: int, *, may_wait: bool) -> None:
        """Brings pages into the cache."""
        ...


class Committing(Protocol):
    """What commits: see `daemon.committer.Committer`."""

    async def room(self) -> None:
        """Returns once the open group is not full."""
        ...

    async def commit(self) -> object:
        """Returns once everything accepted so far is committed."""
        ...


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of each file: from `start` to `stop` (None: to its end)."""

    start: int = 0
    stop: int | None = None


class Caching:
    """The cache commands of one mount."""

    def __init__(self, store: Store, tree: Tree, fetcher: Fetching, committer: Committing) -> None:
        self._tree = tree
        self._store = store
        self._fetcher = fetcher
        self._committer = committer

    # evict

    async def evict(self, roots: Iterable[Inode], progress: Progress) -> dict[str, Any]:
        """Drops what may be dropped of all files at and below `roots`; says in pages what stays and why."""
        dropper = Dropper(self._store)
        async for inode in self._files(roots):
            start: int | None = 0
            while start is not None:
                start = dropper.step(inode, start, _STEP)
                progress["dropped_bytes"] = dropper.dropped * PAGE
                await self._pause()
        await self._committer.commit()
        return {
            "dropped_bytes": dropper.dropped * PAGE,
            "stays": {reason.value: pages * PAGE for reason, pages in sorted(dropper.stays.items(), key=str)},
        }

    # warm

    async def warm(self, roots: Iterable[Inode], part: Range, progress: Progress) -> dict[str, Any]:
        """Fetches what is only remote of all files at and below `roots`.

        Raises `LimitExceeded` before anything is fetched if it does not fit without eviction; `Unavailable` or
        `DataLost` when too much did not come: what came stays.
        """
        roots = list(roots)
        files = blocks = pages = 0
        async for inode in self._files(roots):
            files += 1
            async for _, bits in self._remote(inode, part):
                blocks += 1
                pages += bits.bit_count()
                progress["counted_bytes"] = pages * PAGE
        room = self.room()
        if blocks * BLOCK_SIZE > room:
            raise LimitExceeded(
                f"{format_size(pages * PAGE)} would have to be fetched, which take {format_size(blocks * BLOCK_SIZE)} "
                f"of the cache; it has room for {format_size(max(0, room))} without evicting anything: evict "
                "something ('qsfs cache evict'), fetch less, or give [cache] size more"
            )
        return await self._fetch_all(roots, part, pages, progress)

    async def warm_pinned(self, progress: Progress) -> dict[str, Any]:
        """Fetches what is only remote of everything that is pinned: after a restore for example."""
        pinned = [inode async for inode in self._pinned()]
        return await self.warm(pinned, Range(), progress)

    async def _fetch_all(
        self, roots: list[Inode], part: Range, pages: int, progress: Progress
    ) -> dict[str, Any]:
        failures: list[QsfsError] = []
        done = 0
        full = False
        slots = trio.Semaphore(_CHUNKS_AT_ONCE)

        async def fetch(inode: int, first: int, count: int, wanted: int) -> None:
            nonlocal done
            try:
                await self._fetcher.fetch(inode, first, count, may_wait=False)
                done += wanted
                progress["fetched_bytes"] = done * PAGE
            except QsfsError as error:
                failures.append(error)
            finally:
                slots.release()

        progress["wanted_bytes"] = pages * PAGE
        with plain_errors():
            async with trio.open_nursery() as nursery:
                async for inode in self._files(roots):
                    async for first, count, wanted in self._chunks(inode, part):
                        full = full or self.room() <= 0
                        if full or len(failures) >= _MOST_FAILURES:
                            continue
                        await slots.acquire()
                        nursery.start_soon(fetch, inode.number, first, count, wanted)
        await self._committer.commit()
        fetched = {"wanted_bytes": pages * PAGE, "fetched_bytes": done * PAGE}
        if failures:
            lost = any(isinstance(failure, DataLost) for failure in failures)
            raise (DataLost if lost else Unavailable)(
                f"{format_size(done * PAGE)} of {format_size(pages * PAGE)} were fetched, then "
                f"{len(failures)} parts did not come: {failures[0]}"
            )
        if full:
            raise LimitExceeded(
                f"{format_size(done * PAGE)} of {format_size(pages * PAGE)} were fetched, then the cache was full of "
                "what applications wrote and read meanwhile; what was fetched is here"
            )
        return fetched

    async def _chunks(self, inode: Inode, part: Range) -> AsyncIterator[tuple[int, int, int]]:
        """First page, pages and remote-only pages of stretches that are worth one fetch each."""
        first = stop = wanted = 0
        async for number, bits in self._remote(inode, part):
            page = number * (BLOCK_SIZE // PAGE)
            if wanted and page + 4 - first > _CHUNK_PAGES:
                yield first, stop - first, wanted
                wanted = 0
            if not wanted:
                first = page
            stop = page + BLOCK_SIZE // PAGE
            wanted += bits.bit_count()
        if wanted:
            yield first, stop - first, wanted

    async def _remote(self, inode: Inode, part: Range) -> AsyncIterator[tuple[int, int]]:
        """The blocks with pages that are only remote, and those pages' bits."""
        store = self._store
        page = part.start // PAGE
        end = 1 << 62 if part.stop is None else -(-part.stop // PAGE)
        while page < end:
            rows = list(islice(store.extents.overlapping(inode.number, page, end), _STEP))
            found = [
                block for row in rows for block in store.blocks.remote_blocks(inode.number, row, page, end)
            ]
            for number, bits in found:
                yield number, bits
            await trio.lowlevel.checkpoint()
            if len(rows) < _STEP:
                return
            page = rows[-1].first + rows[-1].pages

    def room(self) -> int:
        """Bytes that may be fetched before eviction begins."""
        return self._store.limits.high_bytes - self._store.expected_bytes()

    # pins

    async def pin(self, roots: Iterable[Inode], progress: Progress) -> dict[str, Any]:
        """Pins everything at and below `roots`, and fetches what of it is only remote.

        The pin is recorded in the inodes before anything is fetched, so that it holds though a fetch fails.
        Raises `LimitExceeded` before it changes anything if pinned data would take too much of the cache, and
        what `warm` raises.
        """
        roots = list(roots)
        new = 0
        async for inode in self._files(roots):
            if not inode.flags & _PINNED:
                new += inode.allocated * PAGE
        pinned, _ = await self._count_pinned()
        most = self.most_pinned()
        if pinned + new > most:
            raise LimitExceeded(
                f"{format_size(new)} would be pinned beside {format_size(pinned)} that are: more than the "
                f"{format_size(most)} that pinned data may take of this cache ({PINNED_SHARE:.0%}); nothing was "
                "pinned: unpin something, or give [cache] size more"
            )
        changed = await self._mark(roots, True)
        fetched = await self.warm(roots, Range(), progress)
        return {"changed": changed, "pinned_bytes": pinned + new, **fetched}

    async def unpin(self, roots: Iterable[Inode]) -> dict[str, Any]:
        """Takes the pins of commands away; counts the files that a policy keeps pinned."""
        roots = list(roots)
        changed = await self._mark(roots, False)
        by_policy = 0
        async for inode in self._files(roots):
            by_policy += bool(inode.flags & InodeFlag.PINNED)
        return {"changed": changed, "pinned_by_policy": by_policy}

    async def _mark(self, roots: Iterable[Inode], pinned: bool) -> int:
        """Sets or clears the pin of files and directories; returns how many changed, durably."""
        changed = 0
        for root in roots:
            for batch in walk(self._tree, root):
                marked = []
                for number in batch:
                    inode = self._store.inode(number)
                    if inode is None or not (stat.S_ISREG(inode.mode) or stat.S_ISDIR(inode.mode)):
                        continue
                    flags = inode.flags | _BY_HAND if pinned else inode.flags & ~_BY_HAND
                    if flags != inode.flags:
                        marked.append((number, flags))
                if marked:
                    with self._store.change() as change:
                        for number, flags in marked:
                            change.patch(number, flags=flags)
                changed += len(marked)
                await self._pause()
        await self._committer.commit()
        return changed

    def most_pinned(self) -> int:
        """Bytes that pinned data may take."""
        return int(PINNED_SHARE * self._store.limits.full_bytes)

    async def status(self) -> dict[str, Any]:
        """What is pinned, and how much room is left; goes once through all inodes."""
        pinned, files = await self._count_pinned()
        limits = self._store.limits
        return {
            "used_bytes": self._store.used_bytes,
            "evict_from_bytes": limits.high_bytes,
            "limit_bytes": limits.full_bytes,
            "room_bytes": max(0, self.room()),
            "pinned_bytes": pinned,
            "pinned_files": files,
            "pinned_limit_bytes": self.most_pinned(),
            "dirty_bytes": self._store.layers.view.count(Table.DIRTY) * BLOCK_SIZE,
        }

    async def _count_pinned(self) -> tuple[int, int]:
        total = files = 0
        async for inode in self._pinned():
            total += inode.allocated * PAGE
            files += 1
        return total, files

    async def _pinned(self) -> AsyncIterator[Inode]:
        """All files that are pinned, by policy or by hand."""
        # A scan shows committed inodes only.
        await self._committer.commit()
        start = u64(ROOT_INODE)
        while True:
            numbers = [split_u64(key) for key, _ in islice(self._store.scan(Table.INODES, start, None), 8 * _STEP)]
            for number in numbers:
                inode = self._store.inode(number)
                if inode is not None and inode.flags & _PINNED and stat.S_ISREG(inode.mode):
                    yield inode
            await trio.lowlevel.checkpoint()
            if len(numbers) < 8 * _STEP:
                return
            start = u64(numbers[-1] + 1)

    # steps

    async def _files(self, roots: Iterable[Inode]) -> AsyncIterator[Inode]:
        """The regular files at and below `roots` as they are when their turn comes."""
        for number in self._numbers(roots):
            if number is None:
                await trio.lowlevel.checkpoint()
                continue
            inode = self._store.inode(number)
            if inode is not None and stat.S_ISREG(inode.mode):
                yield inode

    def _numbers(self, roots: Iterable[Inode]) -> Iterator[int | None]:
        """The numbers of what lies at and below `roots`; None between two steps."""
        for root in roots:
            for batch in walk(self._tree, root):
                yield from batch
                yield None

    async def _pause(self) -> None:
        await trio.lowlevel.checkpoint()
        await self._committer.room()
