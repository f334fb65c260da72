"""Pre-copy: pages that have not been rewritten for a while leave for the backends all the time.

They are read in short transactions, sealed into packs and uploaded; once a pack is written its pages
turn clean, where they are still what was read.  What remains for a cut is little.  A pass takes
whole packs and leaves small remainders to the cut; under pressure (more dirty than a cut may seal,
or a cache too full of what cannot be evicted) it takes everything.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from qsfs import failpoints
from qsfs.errors import CacheError, Corrupt
from qsfs.format.extent import PackRef
from qsfs.remote.context import FlushContext
from qsfs.remote.packing import PackSealing, row_of
from qsfs.remote.upload import Upload
from qsfs.store.packs import record_run, reserve_numbers, steps
from qsfs.store.reading import LocalDamage
from qsfs.store.schema import BLOCK_PAGES, PAGE, u64_pair
from qsfs.store.snapshot import CommittedState, DirtyPart, DirtyRun, Want
from qsfs.store.versions import PageVersions

_log = logging.getLogger(__name__)

STEP_SECONDS = 0.1
LEAST_IDLE_SECONDS = 0.5
_Pages = list[tuple[int, int, tuple[int, ...]]]
_WORTH_A_PACK = 2
"""A pass without pressure leaves what is less than a pack's bytes divided by this."""


class PreCopier:
    """Uploads quiet dirty pages.  `run` is a task; `pressed` says why it should take everything ("": not).

    `elsewhere` says of a block which of its pages a cut has sealed, as `Want.taken`.  `bytes_recorded`
    counts bytes that turned clean since the start; `garbage` holds packs of which nothing was of use when
    they were written.  `drained` is set once the last look found nothing to take, and nothing is under way.
    """

    def __init__(
        self, context: FlushContext, elsewhere: Callable[[int, Sequence[int]], int], quiet_seconds: float
    ) -> None:
        self.pressed = ""
        self.orphans_too = False
        self.bytes_recorded = 0
        self.garbage: list[PackRef] = []
        self.problem = ""
        self.drained = trio.Event()
        self._context = context
        self._elsewhere = elsewhere
        self._position = b""
        self._in_flight = PageVersions()
        self._recorded: deque[tuple[int, _Pages]] = deque()
        self._held = 0
        self._under_way = 0
        self._found = False
        self._ended = trio.Event()
        self._idle_seconds = max(quiet_seconds, LEAST_IDLE_SECONDS)
        self._wake = trio.Event()

    def press(self, why: str, *, orphans_too: bool = False) -> None:
        """Sets or, with "", ends the pressure."""
        if why and not self.pressed:
            self.kick()
        self.pressed, self.orphans_too = why, orphans_too

    def kick(self) -> None:
        """Has it look at once, since there may be something to take."""
        self.drained = trio.Event()
        self._wake.set()

    @asynccontextmanager
    async def held(self, seconds: float) -> AsyncIterator[None]:
        """Begins no pack in the block, and waits up to `seconds` at its start for those that are under way.

        What is not committed clean when a cut seals it is uploaded twice.
        """
        self._held += 1
        try:
            with trio.move_on_after(seconds):
                while self._under_way:
                    await self._ended.wait()
            yield
        finally:
            self._held -= 1
            self._wake.set()

    async def run(self) -> None:
        """Goes round the dirty pages until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                self._found = await self._pass(nursery)
                if not self._found:
                    self._wake = trio.Event()
                    self._look_drained()
                    # What is committed under pressure is wanted at once, and only a cut would wake.
                    with trio.move_on_after(LEAST_IDLE_SECONDS if self.pressed else self._idle_seconds):
                        await self._wake.wait()

    async def _pass(self, nursery: trio.Nursery) -> bool:
        """Reads and sends at most one pack; whether there was one."""
        context = self._context
        if self._held or not context.uploader.enough_backends():
            return False
        await context.packs.acquire()
        handed_over = False
        self._under_way += 1
        try:
            runs = () if self._held else await self._collect()
            if runs:
                self._mark(runs)
                nursery.start_soon(self._send, runs)
                handed_over = True
        finally:
            if not handed_over:
                self._end()
        return handed_over

    def _end(self) -> None:
        self._context.packs.release()
        self._under_way -= 1
        self._ended.set()
        self._ended = trio.Event()
        self._look_drained()

    def _look_drained(self) -> None:
        if not self._found and not self._under_way:
            self.drained.set()

    async def _collect(self) -> tuple[DirtyRun, ...]:
        """The runs of the next pack, read in as many transactions as it takes."""
        context = self._context
        target = context.sealer.pack_bytes
        self._forget_committed()
        runs: list[DirtyRun] = []
        size = 0
        while size < target:
            left = target - size
            try:
                part = await context.in_turn(lambda: self._read(left))  # noqa: B023 (awaited at once)
            except Corrupt as error:
                self._skip(error)
                break
            runs += part.runs
            size += sum(len(run.data) for run in part.runs)
            self._position = part.resume or b""
            if part.resume is None:
                break
        if not self.pressed and size < target // _WORTH_A_PACK:
            return ()
        return tuple(runs)

    def _read(self, most_bytes: int) -> DirtyPart:
        context = self._context
        quiet = None if self.pressed else self._quiet
        want = Want(
            most_bytes,
            until=context.clock.monotonic() + STEP_SECONDS,
            quiet=quiet,
            taken=self._taken,
            orphans=self.orphans_too,
        )
        with CommittedState(context.store.environment, context.clock) as state:
            return state.dirty(self._position, want)

    def _quiet(self, block: int) -> bool:
        # Called on a worker thread: membership of a set is one step for the interpreter.
        return block not in self._context.store.blocks.written

    def _taken(self, block: int, writes: Sequence[int]) -> int:
        return self._in_flight.held(block, writes) | self._elsewhere(block, writes)

    def _skip(self, error: Corrupt) -> None:
        """Goes on behind a damaged page; a cut will not leave it out."""
        if str(error) != self.problem:
            _log.error("%s; it is not uploaded, and no generation can be made before that is mended", error)
            self.problem = str(error)
        if isinstance(error, LocalDamage):
            self._position = _behind(error)

    def _mark(self, runs: tuple[DirtyRun, ...]) -> None:
        for run in runs:
            self._in_flight.add(run.inode, run.first, run.writes)

    def _forget_committed(self) -> None:
        """Lets go of pages that are clean in the last commit too: it is what pre-copy reads."""
        committed = self._context.store.layers.committed_number
        while self._recorded and self._recorded[0][0] <= committed:
            self._unmark(self._recorded.popleft()[1])

    def _unmark(self, pages: _Pages) -> None:
        for inode, first, writes in pages:
            self._in_flight.discard(inode, first, writes)

    async def _send(self, runs: tuple[DirtyRun, ...]) -> None:
        """Seals, uploads and records one pack."""
        context = self._context
        number = reserve_numbers(context.store, 1)[0]
        pages: _Pages = [(run.inode, run.first, run.writes) for run in runs]
        try:
            sealing = PackSealing(context.sealer, runs, number)
            del runs
            await context.in_turn(sealing.seal)
            upload = await context.uploader.upload(sealing.ref, sealing.shards)
            sealing.shards = []
            failpoints.hit("flush.precopy.written")
            with context.store.extents.recording(number):
                await self._record(number, sealing, upload)
            # The group of the last step: with its commit all of them are clean.
            self._recorded.append((context.store.layers.open.number, pages))
            pages = []
            failpoints.hit("flush.precopy.recorded")
        except CacheError as error:
            # The local store has failed: whoever commits says so, and nothing of this pack is lost.
            self.problem = str(error)
        finally:
            self._unmark(pages)
            self._end()

    async def _record(self, number: int, sealing: PackSealing, upload: Upload) -> None:
        """In steps, of which each may be in another group: the row of the pack comes with its first extent."""
        context = self._context
        added = False
        for runs in steps(sealing.runs):
            await context.committer.room()
            cleaned = sum(record_run(context.store, run) for run in runs)
            if cleaned and not added:
                row = row_of(upload.ref, upload.placement, context.clock.time_ns())
                context.add_pack(number, row, upload)
                added = True
            self.bytes_recorded += cleaned * PAGE
            failpoints.hit("flush.precopy.step")
            await trio.lowlevel.checkpoint()
        if not added:
            self.garbage.append(upload.ref)


def _behind(damage: LocalDamage) -> bytes:
    """The key behind the block of a damaged page."""
    return u64_pair(damage.inode, damage.page // BLOCK_PAGES) + b"\0"
