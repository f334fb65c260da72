"""Fetching start packs whole: a start that finds its pages gone needs all of them, in any order.

A read that misses a page of a start pack has the pack fetched in bulk, from all of its data shards at once, and with
it packs behind it: twice as many as were touched so far, so that what is fetched in vain stays below what is needed.
What arrives is installed as a fetch of single extents installs: only where a page is still remote only by the very
extent that was fetched.  The reads that wait do so for their own extents, which are on their way already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import trio

from qsfs.errors import CacheError, QsfsError, Unavailable
from qsfs.format.extent import ExtentEntry
from qsfs.format.keys import KeyRing
from qsfs.format.pack import open_extent, open_index
from qsfs.remote.reader import PackReader
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import set_start
from qsfs.store.schema import BLOCK_SIZE, PAGE, ExtentRow, PackRow, PackState, Table, split_u64, u64
from qsfs.store.store import Store

log = logging.getLogger(__name__)

PACKS_AT_ONCE = 4
"""Packs that are fetched whole at the same time; each is in memory twice."""
MOST_AHEAD = 16
"""Packs behind one that was touched that are fetched with it, at most."""
_AGAIN_SECONDS = 600.0
"""How long a pack that was fetched whole is not fetched so again, whatever became of its pages."""
_RETRY_SECONDS = 10.0
"""When one that did not come may be fetched again."""
_LOOKED_AT = 256
_SAMPLED_ROWS = 64
_SAMPLED_PAGES = 1 << 16
_OPENED_AT_ONCE = 64


class Room(Protocol):
    """What the daemon's committer offers."""

    async def room(self) -> None:
        """Returns once the open group is not full."""
        ...


@dataclass(slots=True)
class StartCounts:
    """What was fetched in bulk: packs, and pages that were installed from them."""

    packs: int = 0
    pages: int = 0


@dataclass(slots=True)
class _Use:
    """What is left of a pack, and how much of that is recorded."""

    pages: int = 0
    recorded: int = 0


class StartFetcher:
    """Fetches start packs for all readers of one mount."""

    def __init__(self, store: Store, reader: PackReader, room: Room, *, deadline_seconds: float) -> None:
        """A pack that backends do not give in `deadline_seconds` is given up: its extents can be read one by one."""
        self.counts = StartCounts()
        self._store = store
        self._reader = reader
        self._room = room
        self._deadline = deadline_seconds
        self._slots = trio.Semaphore(PACKS_AT_ONCE)
        self._until: dict[int, float] = {}
        self._touched = 0

    # automatic

    def touch(self, inode: int, page: int, nursery: trio.Nursery) -> bool:
        """Takes note of a read that misses `page`; whether it lies in a start pack.

        That pack, and some behind it, are fetched by tasks in `nursery`.
        """
        row = self._store.extents.at(inode, page)
        if row is None or not self._is_start(row.pack):
            return False
        if self._is_free(row.pack) and self._has_room() and self._mostly_gone(inode, row):
            self._touched += 1
            for number in (row.pack, *self._behind(row.pack, min(MOST_AHEAD, 2 * self._touched))):
                self._claim(number)
                nursery.start_soon(self._fetch_quietly, number)
        return True

    def _is_start(self, number: int) -> bool:
        row = self._store.get(Table.PACKS, u64(number))
        return row is not None and bool(PackRow.decode(row).state & PackState.START)

    def _is_free(self, number: int) -> bool:
        """Whether a pack is neither being fetched nor was lately."""
        until = self._until.get(number)
        return until is None or until <= trio.current_time()

    def _claim(self, number: int) -> None:
        self._until[number] = float("inf")

    def _behind(self, number: int, most: int) -> list[int]:
        """Up to `most` start packs that follow one: those that were packed with it do."""
        rows = islice(self._store.scan(Table.PACKS, u64(number + 1), None), _LOOKED_AT)
        found = (split_u64(key) for key, row in rows if PackRow.decode(row).state & PackState.START)
        return list(islice((other for other in found if self._is_free(other)), most))

    def _mostly_gone(self, inode: int, row: ExtentRow) -> bool:
        """Whether at least half of the next pages of the file that lie in the pack of `row` are remote only."""
        store = self._store
        near = islice(store.extents.overlapping(inode, row.first, row.first + _SAMPLED_PAGES), 4 * _SAMPLED_ROWS)
        here = list(islice((other for other in near if other.pack == row.pack), _SAMPLED_ROWS))
        remote = sum(
            bits.bit_count()
            for other in here
            for _, bits in store.blocks.remote_blocks(inode, other, other.first, other.first + other.pages)
        )
        return 2 * remote >= sum(other.pages for other in here)

    def _has_room(self) -> bool:
        return self._store.expected_bytes() < self._store.limits.high_bytes

    async def _fetch_quietly(self, number: int) -> None:
        try:
            await self._fetch(number)
        except QsfsError as error:
            log.debug("start pack %d: is not fetched as a whole: %s", number, error)
        except Exception:
            log.exception("start pack %d: fetching it failed unexpectedly", number)

    # by hand

    async def all_packs(self) -> list[tuple[int, int]]:
        """The start packs that there are, with their live bytes; goes once through all packs."""
        found: list[tuple[int, int]] = []
        start = u64(0)
        while True:
            rows = list(islice(self._store.scan(Table.PACKS, start, None), _LOOKED_AT))
            for key, value in rows:
                row = PackRow.decode(value)
                if row.state & PackState.START and row.live:
                    found.append((split_u64(key), row.live))
            if len(rows) < _LOOKED_AT:
                return found
            start = rows[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()

    async def fetch(self, number: int) -> bool:
        """Fetches a start pack whole; False once the cache has no room for more.  Raises why it does not come."""
        self._claim(number)
        return await self._fetch(number)

    # one pack

    async def _fetch(self, number: int) -> bool:
        seconds = _RETRY_SECONDS
        try:
            async with self._slots:
                if not self._has_room():
                    return False
                complete = await self._bring(number)
            seconds = _AGAIN_SECONDS
            return complete
        finally:
            self._until[number] = trio.current_time() + seconds

    async def _bring(self, number: int) -> bool:
        stored = self._store.get(Table.PACKS, u64(number))
        if stored is None:
            return True
        pack = StoredPack.of_row(PackRow.decode(stored), self._reader.code)
        shards = await self._shards(number, pack)
        body = b"".join(shards[shard] for shard in range(pack.ref.k))
        shards.clear()
        keys = self._reader.keys
        entries = await self._reader.compute(len(body), open_index, keys, pack.ref, body)
        self.counts.packs += 1
        use = _Use()
        for some in _parts(entries):
            wanted = [entry for entry in some if self._wanted(number, entry, use)]
            size = sum(entry.plain_length for entry in wanted)
            for entry, data in await self._reader.compute(size, _open_all, keys, pack, body, wanted):
                if not await self._install(number, entry, data):
                    return False
            await trio.lowlevel.checkpoint()
        if 2 * use.recorded < use.pages:
            # Starts read little of it by now: the next one must not fetch all of it again.
            set_start(self._store, number, False)
        return True

    async def _shards(self, number: int, pack: StoredPack) -> dict[int, memoryview]:
        """The data shards of a pack.  The deadline is for backends: what the download rate holds up is not late."""
        while True:
            with trio.move_on_after(self._deadline):
                return await self._reader.shards(pack, range(pack.ref.k))
            if not self._reader.held_up(pack):
                raise Unavailable(f"start pack {number}: not here after {self._deadline:.0f} s")
            # Reading goes on from where it is: whoever asks again before it looks finds it under way.

    def _rows(self, number: int, entry: ExtentEntry) -> list[ExtentRow]:
        """What is left of a sealed extent of pack `number`."""
        rows = self._store.extents.overlapping(entry.inode, entry.first_page, entry.first_page + entry.pages)
        return [row for row in rows if (row.pack, row.ordinal) == (number, entry.ordinal)]

    def _wanted(self, number: int, entry: ExtentEntry, use: _Use) -> bool:
        """Whether something of an extent is remote only.

        What is left of it is a start page from here on, unless this store knows better.
        """
        store = self._store
        wanted = False
        for row in self._rows(number, entry):
            use.pages += row.pages
            use.recorded += store.start.seed(entry.inode, row.first, row.pages)
            wanted |= bool(store.blocks.remote_blocks(entry.inode, row, row.first, row.first + row.pages))
        return wanted

    async def _install(self, number: int, entry: ExtentEntry, data: bytes) -> bool:
        """Installs what is still remote only of an extent; False where the cache has no room."""
        store = self._store
        while store.group_is_full():
            try:
                await self._room.room()
            except CacheError:
                # No group begins any more: the local disk failed.
                return False
            await trio.lowlevel.checkpoint()
        if store.expected_bytes() + (len(data) // PAGE + 1) * BLOCK_SIZE > store.limits.full_bytes:
            return False
        inode, rows = store.inode(entry.inode), self._rows(number, entry)
        if inode is not None and rows:
            self.counts.pages += store.blocks.install(inode, entry.first_page, data, rows[0])
        return True


def _parts(entries: tuple[ExtentEntry, ...]) -> Iterator[tuple[ExtentEntry, ...]]:
    for start in range(0, len(entries), _OPENED_AT_ONCE):
        yield entries[start : start + _OPENED_AT_ONCE]


def _open_all(
    keys: KeyRing, pack: StoredPack, body: bytes, entries: list[ExtentEntry]
) -> list[tuple[ExtentEntry, bytes]]:
    view = memoryview(body)
    return [
        (entry, open_extent(keys, pack.ref, entry, view[entry.offset : entry.offset + entry.sealed_length]))
        for entry in entries
    ]
