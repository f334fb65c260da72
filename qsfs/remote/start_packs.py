"""Packs of the pages that are read at a start: marked where they lie together, put together where they do not.

What is recorded (`store/start.py`) lies all over the packs of its file.  A pack of which it is at least half is a
start pack already and is only marked as one.  The pages in all others are sealed once more, into packs of their own,
once a start would fetch more than half as much again as it reads: each page that lies elsewhere costs a shard.  What
lies in start packs stays there, so what is added is packed by itself.  Only clean pages are, and each moves over
only if it still is what was sealed, so neither a write nor a crash meanwhile makes a difference: both packs hold the
same bytes.  The mark is in the row of a pack, which
generations hold: a restored file system knows its start packs.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from itertools import islice

import trio

from qsfs import failpoints
from qsfs.remote.context import FlushContext
from qsfs.remote.packing import PackSealing, row_of
from qsfs.remote.upload import Upload
from qsfs.store.block import block_key
from qsfs.store.packs import move_run, pack_row, reserve_numbers, set_start, steps
from qsfs.store.schema import (
    PAGE,
    ExtentRow,
    PackRow,
    PackState,
    Table,
    plain_u64,
    read_plain_u64,
    split_u64,
    u64,
)
from qsfs.store.snapshot import CommittedState, DirtyRun
from qsfs.store.start import CHUNK_PAGES, bits_of, blocks_of
from qsfs.store.store import NEXT_PACK

_log = logging.getLogger(__name__)

MOST_FETCHED = 1.5
"""What a start may fetch for each byte that it reads before that is mended: it promises twice."""
LEAST_PAGES = 16
"""Fewer pages outside of start packs are not worth one: whatever they cost, it is little."""
AGAIN_SECONDS = 86400.0
"""Between two packings, and between two looks while nothing is recorded anew."""
_LEAST_SECONDS = 30.0
"""Between two looks, while more is recorded all the time."""
_RETRY_SECONDS = 600.0
_MOST_STARTS = 2
"""What is recorded waits so many times as long as a file is recorded for others that still are."""
_PACKED_KEY = b"start-packed-ns"
_OWN_KEY = b"start-own-packs"
_ROWS_A_STEP = 256
_EXTENTS_A_STEP = 128

_Blocks = list[tuple[int, int, int]]


@dataclass(slots=True)
class _Plan:
    """Recorded pages by the pack in which they lie, and which of these packs are dense of them.

    `fetched` counts the bytes that a start would fetch: packs that are dense, and the shards of others.
    """

    pages: Counter[int] = field(default_factory=Counter)
    dense: set[int] = field(default_factory=set)
    fetched: int = 0

    @property
    def stale(self) -> int:
        """Pages in packs that are not dense."""
        return sum(count for pack, count in self.pages.items() if pack not in self.dense)

    @property
    def worth_it(self) -> bool:
        """Whether the stale pages should be packed."""
        return self.stale >= LEAST_PAGES and self.fetched > MOST_FETCHED * self.pages.total() * PAGE


class StartPacker:
    """Sees to the start packs of one mount, while the cache has room and enough backends answer.

    `packed_packs` and `packed_bytes` count what was packed, in plain bytes.
    """

    def __init__(self, context: FlushContext, *, short_of_room: Callable[[], bool]) -> None:
        self.packed_packs = 0
        self.packed_bytes = 0
        self._context = context
        self._short_of_room = short_of_room
        self._seen = 0
        self._look_at = 0.0
        self._retry_at = 0.0
        self._due_since: float | None = None
        self._marked: set[int] | None = None

    def report(self) -> dict[str, int]:
        """How many pages are recorded, how many packs were made of such, and the bytes of their pages."""
        return {
            "recorded_pages": self._context.store.start.pages,
            "packed_packs": self.packed_packs,
            "packed_bytes": self.packed_bytes,
        }

    async def work(self) -> None:
        """Looks where the recorded pages lie when others are recorded, else once a day; packs them if that pays."""
        context, start = self._context, self._context.store.start
        self._note_own()
        now = context.clock.monotonic()
        if (start.version == self._seen and now < self._look_at) or now < self._retry_at:
            return
        if self._due_since is None:
            self._due_since = now
        # Databases that are made and read all the time must not keep the others from being packed.
        if start.recording and now - self._due_since < _MOST_STARTS * start.seconds:
            return
        if self._short_of_room() or not context.uploader.enough_backends():
            return
        self._retry_at = now + _RETRY_SECONDS
        version = start.version
        plan = await self._plan()
        await self._unmark(plan)
        if plan.worth_it:
            wait = self._wait_seconds()
            if wait > 0:
                self._retry_at = now + wait
                return
            await self._pack(plan)
            context.store.set_local(_PACKED_KEY, plain_u64(context.clock.time_ns()))
        self._seen = version
        self._due_since = None
        self._look_at = now + AGAIN_SECONDS
        self._retry_at = now + _LEAST_SECONDS if plan.pages else 0.0

    def _wait_seconds(self) -> float:
        """How long nothing is packed yet because something was lately."""
        row = self._context.store.local(_PACKED_KEY)
        if row is None:
            return 0.0
        age = (self._context.clock.time_ns() - read_plain_u64(row)) / 1e9
        # A wall clock that was set back must not put it off for longer.
        return min(AGAIN_SECONDS - age, AGAIN_SECONDS)

    # planning

    async def _plan(self) -> _Plan:
        """Counts the recorded pages by pack, and marks the packs that are dense of them."""
        store = self._context.store
        plan = _Plan()
        sizes: dict[int, int] = {}
        shards: defaultdict[int, int] = defaultdict(int)
        async for _, row, chunk, bits in self._recorded():
            plan.pages[row.pack] += (bits & bits_of(chunk, row.first, row.first + row.pages)).bit_count()
            if row.pack not in sizes:
                pack = pack_row(store, row.pack)
                sizes[row.pack] = 1 if pack is None else pack.shard_size
            first, last = row.offset, row.offset + max(1, row.sealed_length) - 1
            for shard in range(first // sizes[row.pack], last // sizes[row.pack] + 1):
                shards[row.pack] |= 1 << shard
        for index, (number, pages) in enumerate(plan.pages.items()):
            if index % _ROWS_A_STEP == 0:
                await self._pause()
            pack = pack_row(store, number)
            if pack is not None and _is_dense(pack, pages):
                plan.dense.add(number)
                plan.fetched += pack.body_length
                self._mark(number)
            else:
                plan.fetched += shards[number].bit_count() * sizes[number]
        return plan

    # marks

    def _note_own(self) -> None:
        """Makes the store know for ever which packs are older than it: others than it have marked them."""
        store = self._context.store
        if store.local(_OWN_KEY) is None:
            store.set_local(_OWN_KEY, plain_u64(store.counter(NEXT_PACK) + 1))

    def _mark(self, number: int) -> None:
        set_start(self._context.store, number, True)
        if self._marked is not None:
            self._marked.add(number)

    async def _unmark(self, plan: _Plan) -> None:
        """Takes the mark from packs of which nothing is recorded any more: each would be fetched whole.

        Not from those that others have marked: what is recorded here may not be of their files.
        """
        store = self._context.store
        if self._marked is None:
            self._marked = await self._own_marked()
        gone = self._marked - plan.pages.keys()
        for index, number in enumerate(sorted(gone)):
            if index % _ROWS_A_STEP == 0:
                await self._pause()
            set_start(store, number, False)
        self._marked -= gone

    async def _own_marked(self) -> set[int]:
        """The packs with a mark that this store has written; goes once through all of its packs."""
        store = self._context.store
        found: set[int] = set()
        start = u64(read_plain_u64(store.local(_OWN_KEY) or plain_u64(0)))
        while True:
            rows = list(islice(store.scan(Table.PACKS, start, None), _ROWS_A_STEP))
            found.update(split_u64(key) for key, row in rows if PackRow.decode(row).state & PackState.START)
            if len(rows) < _ROWS_A_STEP:
                return found
            start = rows[-1][0] + b"\0"
            await self._pause()

    async def _recorded(self) -> AsyncIterator[tuple[int, ExtentRow, int, int]]:
        """The extents with recorded pages: inode, row, chunk, what is recorded of the chunk.

        Forgets files that are gone.
        """
        store = self._context.store
        for number in store.start.files:
            inode = store.inode(number)
            if inode is None or not inode.nlink:
                while not store.start.drop(number, _ROWS_A_STEP):
                    await self._pause()
                continue
            for chunk, bits in store.start.chunks(number):
                first, stop = chunk * CHUNK_PAGES, (chunk + 1) * CHUNK_PAGES
                for rows in store.extents.parts(number, first, stop, _EXTENTS_A_STEP):
                    for row in rows:
                        if bits & bits_of(chunk, row.first, row.first + row.pages):
                            yield number, row, chunk, bits
                    await self._pause()

    async def _pause(self) -> None:
        await trio.lowlevel.checkpoint()
        await self._context.committer.room()

    # packing

    async def _pack(self, plan: _Plan) -> None:
        """Packs what lies in packs that are not dense, and takes the mark from those of them that had it."""
        context = self._context
        most = context.sealer.pack_bytes // PAGE
        _log.info("%d of %d pages that are read at a start are packed together", plan.stale, plan.pages.total())
        wanted: _Blocks = []
        pages = 0
        async for inode, row, chunk, bits in self._recorded():
            if row.pack in plan.dense:
                continue
            for block, some in blocks_of(chunk, bits & bits_of(chunk, row.first, row.first + row.pages)):
                if block_key(inode, block) in context.store.blocks.written:
                    continue
                wanted.append((inode, block, some))
                pages += some.bit_count()
            if pages >= most:
                plan.dense |= await self._pack_blocks(wanted)
                wanted, pages = [], 0
        if wanted:
            await self._pack_blocks(wanted)
        for index, number in enumerate(sorted(plan.pages.keys() - plan.dense)):
            if index % _ROWS_A_STEP == 0:
                await self._pause()
            set_start(context.store, number, False)

    async def _pack_blocks(self, wanted: _Blocks) -> set[int]:
        """Packs the clean pages of some blocks; the number of the pack, if there is one."""
        context = self._context
        # A block may have pages in two extents: as one they may become one.
        runs = await context.in_thread(lambda: self._read(_joined(wanted)))
        if not runs:
            return set()
        await context.packs.acquire()
        try:
            number = reserve_numbers(context.store, 1)[0]
            sealing = PackSealing(context.sealer, runs, number)
            await context.in_turn(sealing.seal)
            upload = await context.uploader.upload(sealing.ref, sealing.shards)
            sealing.shards = []
            failpoints.hit("start.pack.written")
            with context.store.extents.recording(number):
                moved = await self._record(number, sealing, upload)
            if not moved:
                await context.in_thread(lambda: context.spool.add_abandoned([sealing.ref]))
                return set()
            failpoints.hit("start.pack.recorded")
        finally:
            context.packs.release()
        if self._marked is not None:
            self._marked.add(number)
        self.packed_packs += 1
        self.packed_bytes += moved * PAGE
        return {number}

    async def _record(self, number: int, sealing: PackSealing, upload: Upload) -> int:
        """How many pages moved to the new pack; in steps, its row with the first extent."""
        context = self._context
        moved = 0
        for runs in steps(sealing.runs):
            await context.committer.room()
            some = sum(move_run(context.store, run) for run in runs)
            if some and not moved:
                row = row_of(upload.ref, upload.placement, context.clock.time_ns())
                context.add_pack(number, replace(row, state=row.state | PackState.START), upload)
            moved += some
            await trio.lowlevel.checkpoint()
        return moved

    def _read(self, wanted: _Blocks) -> tuple[DirtyRun, ...]:
        """For a worker thread."""
        with CommittedState(self._context.store.environment, self._context.clock) as state:
            return state.clean(wanted)


def _is_dense(pack: PackRow, pages: int) -> bool:
    """Whether at least half of a pack, and of what lives of it, are these recorded pages."""
    return 2 * pages * PAGE >= max(pack.live, pack.body_length)


def _joined(wanted: _Blocks) -> _Blocks:
    """The same with each block once."""
    found: dict[tuple[int, int], int] = {}
    for inode, block, bits in wanted:
        found[inode, block] = found.get((inode, block), 0) | bits
    return [(inode, block, bits) for (inode, block), bits in sorted(found.items())]
