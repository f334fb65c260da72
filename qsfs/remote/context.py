"""What the parts of flushing share: the store and who commits it, sealing, uploads, the spool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import trio

from qsfs.clock import Clock
from qsfs.errors import CacheError
from qsfs.remote.ledger import Ledger
from qsfs.remote.packing import Sealer
from qsfs.remote.spool import Spool
from qsfs.remote.upload import Upload, Uploader
from qsfs.remote.worker_turn import WorkerTurn
from qsfs.store.packs import add_pack, pack_row, set_placement
from qsfs.store.schema import PackRow
from qsfs.store.store import Store

T = TypeVar("T")

PACKS_IN_FLIGHT = 3
"""Packs in memory at a time, each with its shards."""
THREADS = 2


class Committer(Protocol):
    """Who drives the store's groups.  `failed` is set once the local disk failed: no way back."""

    failed: CacheError | None

    async def commit(self) -> int:
        """Commits everything accepted so far; returns the number of the commit that has it."""
        ...

    async def room(self) -> None:
        """Waits while the open group is full."""
        ...

    async def failure(self) -> CacheError:
        """Waits until the local disk fails; returns why."""
        ...


@dataclass(frozen=True, slots=True)
class FlushContext:
    """Shared by pre-copy, cuts, full snapshots and what completes packs.

    `packs` bounds the new packs in memory, `limiter` the worker threads; of those that read what was
    written lately, seal and encode, one has the `turn`.  `arriving` are the numbers of recorded packs of which more
    shards are on their way.
    """

    store: Store
    committer: Committer
    sealer: Sealer
    uploader: Uploader
    spool: Spool
    ledger: Ledger
    clock: Clock
    limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(THREADS))
    turn: WorkerTurn = field(default_factory=WorkerTurn)
    arriving: set[int] = field(default_factory=set)
    packs: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(PACKS_IN_FLIGHT))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs `work` on one of the worker threads.  A caller that is cancelled waits for its end."""
        return await trio.to_thread.run_sync(work, limiter=self.limiter)

    async def in_turn(self, work: Callable[[], T]) -> T:
        """As `in_thread`, for what hardly waits for a disk: the thread has the `turn` meanwhile."""

        def in_turn() -> T:
            with self.turn:
                return work()

        return await self.in_thread(in_turn)

    def add_pack(self, number: int, row: PackRow, upload: Upload | None) -> None:
        """Records a written pack in the open group; shards that come in late are recorded when they do."""
        add_pack(self.store, number, row)
        self.uploader.unrecorded.discard(row.pack_id)
        self.ledger.note(number, row)
        if upload is not None and not upload.finished.is_set():
            self.arriving.add(number)
            upload.when_finished(lambda: self._came_late(number, upload))

    def _came_late(self, number: int, upload: Upload) -> None:
        self.arriving.discard(number)
        row = pack_row(self.store, number)
        if row is None or row.pack_id != upload.ref.pack_id:
            return
        both = zip(row.placement, upload.placement, strict=True)
        merged = tuple(old if old >= 0 else new for old, new in both)
        if merged != row.placement:
            changed = set_placement(self.store, number, merged, self.clock.time_ns())
            if changed is not None:
                self.ledger.note(number, changed)
