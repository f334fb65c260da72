"""Keeps the local store in order: evicts, works off truncations, moves covered pages, makes room."""

from __future__ import annotations

import logging
import math

import trio

from qsfs.clock import Clock
from qsfs.daemon.committer import Committer
from qsfs.errors import CacheError
from qsfs.filesystem.contents import Contents
from qsfs.store.eviction import Evictor
from qsfs.store.schema import BLOCK_SIZE, PAGE, Table
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

_STEP_ROWS = 128
_STEP_BLOCKS = 128
_WORK_STEPS = 128
_PARTS = 8
_TICK_SECONDS = 1.0
_SHORT_AFTER_SECONDS = 60.0
_FORGET_SECONDS = 10.0
"""Room is not short any more once nobody has waited for so long; who waits tries again and again meanwhile."""
_REST = 4.0
_LEAST_REST_SECONDS = 0.05
_MUCH = 16


class Keeper:
    """The background work on one store; whoever waits for room calls `room`.

    `futile` is whether there was nothing to evict when that was last tried, and nothing changed since; `exhausted`
    whether that holds for pages whose packs are only written, too, which go once room was short for long.
    `joined` counts the files that were covered without a sync because they filled the cache.
    """

    def __init__(
        self,
        store: Store,
        contents: Contents,
        committer: Committer,
        clock: Clock,
        *,
        all_remote: bool = False,
    ) -> None:
        """`all_remote`: the store has no data of its own, so everything may be evicted."""
        self._store = store
        self._contents = contents
        self._committer = committer
        self._clock = clock
        self._evictor = Evictor(store, all_remote=all_remote)
        committer.after_commit.append(self._committed)
        store.allowance.on_change = self._let_try
        self._wake = trio.Event()
        self._room = trio.Event()
        self._waiting = 0
        self.futile = self.exhausted = False
        self._rest_until = 0.0
        self._waited_at = -math.inf
        self._full_since: float | None = None
        self._alarmed = False
        self.evicted_bytes = 0
        self.joined = 0

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            with trio.move_on_after(_TICK_SECONDS):
                await self._wake.wait()
            self._wake = trio.Event()
            try:
                await self._work()
                await self._evict()
            except CacheError:
                # Nothing becomes durable any more; whoever waits for room learns it from the state.
                if self._committer.failed is None:
                    raise
            finally:
                self._let_try()

    def _let_try(self) -> None:
        self._room.set()
        self._room = trio.Event()

    def _committed(self) -> None:
        """Pages may be clean now, and packs safe; and there may be room, whatever work goes on."""
        self.futile = self.exhausted = False
        self._wake.set()
        self._let_try()

    async def _work(self) -> None:
        store = self._store
        # What is moved is not refused for lack of room, so a step must not overfill a group by much.
        steps = max(1, min(_WORK_STEPS, store.limits.group_bytes // (_PARTS * BLOCK_SIZE)))
        while not store.move_covered(steps):
            await self._pause()
        while not store.work_off_truncations(steps):
            await self._pause()
            if self._waiting or store.used_bytes >= store.limits.high_bytes:
                # It may go on for long, and eviction comes first.
                self._wake.set()
                break
        while not store.start.end_due(_WORK_STEPS):
            await self._pause()
        while not store.start.save(_WORK_STEPS):
            await self._pause()

    async def _pause(self) -> None:
        """Lets requests run, and the open group be committed where it is full."""
        await trio.lowlevel.checkpoint()
        await self._committer.room()

    async def _evict(self) -> None:
        limits = self._store.limits
        if self._store.used_bytes < limits.high_bytes and not self._waiting:
            self._full_since, self._alarmed = None, False
            self.futile = self.exhausted = False
            return
        begin = self._clock.monotonic()
        if begin < self._rest_until:
            return
        recent_too = start_too = written_too = False
        rounds = 0
        most_rounds = 3
        freed = 0
        later = later_so_far = 0
        target = self._store.used_bytes - limits.low_bytes
        while freed < target and rounds < most_rounds:
            written_too = self._is_short()
            done = self._evictor.step(
                _STEP_ROWS,
                _STEP_BLOCKS,
                recent_too=recent_too,
                written_will_do=written_too,
                start_too=start_too,
            )
            freed += done.bytes
            later_so_far += done.later_pages
            if done.came_round:
                later, later_so_far = later_so_far, 0
                rounds += 1
                recent_too, start_too = rounds > 1, rounds > 2
                if start_too and not freed and self._start_must_go(later * PAGE):
                    most_rounds = 4
            await self._pause()
        self.evicted_bytes += freed
        if freed and not self._alarmed:
            self._full_since = None
        store = self._store
        commits = bool(freed) or store.used_bytes < limits.new_bytes <= store.expected_bytes()
        # Without anything to evict room may be promised to what has no sync yet; or a commit makes it.
        waits = commits and (store.dirty or store.layers.committing is not None)
        self.futile = not freed and not (waits and target <= 0)
        self.exhausted = self.futile and (written_too or target <= 0)
        if self.futile:
            # To look at everything again at once would take the time that uploads and reads need.
            now = self._clock.monotonic()
            self._rest_until = now + max(_LEAST_REST_SECONDS, _REST * (now - begin))
            if self._waiting and self._store.expected_bytes() >= limits.full_bytes:
                self._join_largest(later * PAGE)
        if commits:
            await self._committer.commit()

    def _start_must_go(self, later_bytes: int) -> bool:
        """Whether what applications read while they start is evicted too: nothing else is left, nor will be soon."""
        return self._store.start.any and (self._is_short() or not self._much_later(later_bytes))

    def _much_later(self, later_bytes: int) -> bool:
        """Whether much can be evicted once it is clean or looked at: then waiting is enough."""
        store = self._store
        groups = (store.layers.open, store.layers.committing)
        dirty = store.layers.view.count(Table.DIRTY) * BLOCK_SIZE + sum(g.bytes for g in groups if g is not None)
        return dirty + later_bytes > store.limits.full_bytes // _MUCH

    def _join_largest(self, later_bytes: int) -> None:
        """Covers the file that fills the cache with what it wrote since its last sync, if that is the cause.

        Its sync can never come: it waits for room that only this makes.  `later_bytes` may still be
        evicted of themselves, as may what is dirty; as long as that is much, waiting is enough.
        """
        largest = self._contents.largest_uncovered()
        if largest is None or self._much_later(later_bytes):
            return
        inode, size = largest
        _log.warning(
            "the cache is full of what inode %d wrote since its last sync (%d bytes), which can never come: "
            "all of it is taken as synced now; give [cache] size more than such a file needs",
            inode.number,
            size,
        )
        self._contents.cover(inode)
        self.joined += 1
        self._wake.set()

    def _is_short(self) -> bool:
        """Whether room has been short for so long that packs that are only written must do."""
        now = self._clock.monotonic()
        if self._waiting:
            self._waited_at = now
        elif now - self._waited_at > _FORGET_SECONDS:
            self._full_since = None
        if not self._waiting:
            return False
        if self._full_since is None:
            self._full_since = now
        short = now - self._full_since > _SHORT_AFTER_SECONDS
        if short and not self._alarmed:
            self._alarmed = True
            self._alarm()
        return short

    def _alarm(self) -> None:
        store = self._store
        if 2 * store.tree_bytes >= store.limits.full_bytes:
            _log.warning(
                "the cache is full: %d bytes of it are names, attributes and records of where data lie, which are "
                "never evicted; give [cache] size more",
                store.tree_bytes,
            )
            return
        _log.warning(
            "the cache is full and packs do not become full on the backends, or wait for their second look "
            "([cache] second_look_seconds); what is only written is evicted too; bring missing backends back, "
            "unpin files ('qsfs cache status' shows pins), or give [cache] size more"
        )

    @property
    def waiting(self) -> int:
        """How many requests wait for room."""
        return self._waiting

    async def room(self) -> None:
        """Waits until what needed room may be tried again."""
        if self._store.allowance.used_up and not self._store.group_is_full():
            # Evictions would not help: whoever grants says so.
            await self._room.wait()
            return
        self._waiting += 1
        try:
            if self._store.group_is_full():
                await self._committer.room()
                return
            if self._clock.monotonic() >= self._rest_until:
                self._wake.set()
            await self._room.wait()
        finally:
            self._waiting -= 1
