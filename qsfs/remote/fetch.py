"""Fetch: brings pages that are only remote into the cache, for reads that need them.

A fetch begins with the extent rows as they are.  What arrives is installed page by page through
the open group, each only where the page is still remote only by the very extent that was fetched:
a truncation, write or newer extent that came meanwhile wins.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from typing import Never, Protocol, TypeAlias

import trio

from qsfs import failpoints
from qsfs.errors import CacheError, Corrupt, DataLost, GenerationExpired, QsfsBug, QsfsError, Unavailable
from qsfs.format.units import MAX_EXTENT, PAGE
from qsfs.remote.fetch_job import Job, JobKey, Stream, Wanted, page_name
from qsfs.remote.readahead import ReadAhead
from qsfs.remote.reader import PackReader
from qsfs.remote.start_fetch import Room, StartFetcher
from qsfs.remote.stored import StoredPack, entry_of
from qsfs.remote.waits import SaidLately, Wait, Waits
from qsfs.store.runs import runs
from qsfs.store.schema import BLOCK_PAGES, BLOCK_SIZE, ExtentRow, InodeFlag, PackRow, Table, u64
from qsfs.store.store import Store

log = logging.getLogger(__name__)

EXTENTS_AT_ONCE = 32
"""Extents of one call that are fetched at the same time."""
AHEAD_AT_ONCE = 32
"""Extents that are fetched ahead of all readers at the same time."""

_PARTS = 8
"""A step of installing fills at most this part of a group."""
_GIVEN_UP_SECONDS = 1.0
"""The kernel asks again, page by page, for what it did not get; so long that is the same read."""
_AGAIN_SECONDS = 0.25
"""How long such a read waits, whatever its policy."""
_WARN_SECONDS = 600.0
"""Longest time between two warnings of one that waits on."""


Expired: TypeAlias = Callable[[], Awaitable[QsfsError | None]]
"""Asked when data are positively lost: what their reader gets because that had, or may have had, to be expected
(`GenerationExpired`, `MayHaveExpired`); None if it is damage."""


async def _never() -> None:
    """What a mount reads that owns never expires."""


class Transient(Protocol):
    """A small bounded memory of pages for which the cache has no room."""

    def put(self, inode: int, page: int, data: bytes, extent: ExtentRow) -> None:
        """Keeps one page; it is valid while `remote_extent` still gives this pack and ordinal."""
        ...


class Fetcher:
    """Fetches for all readers of one mount.  `run` must be running."""

    def __init__(
        self,
        store: Store,
        reader: PackReader,
        room: Room,
        transient: Transient,
        *,
        deadline_seconds: float,
        path_of: Callable[[int], str] = lambda inode: "",
        expired: Expired = _never,
        take: Callable[[int, int, int], bool] = lambda inode, first, count: False,
    ) -> None:
        """`path_of` gives a path of an inode, for people; the policy `error` waits for `deadline_seconds`.

        `expired` judges what is positively lost.  `take` installs what can be had of a run of pages without the
        backends; whether all of them are here then.
        """
        self.reader = reader
        self.waits = Waits()
        self.fetched_pages = 0
        self.failed_reads = 0
        self._store = store
        self._room = room
        self._transient = transient
        self._deadline = deadline_seconds
        self._path_of = path_of
        self._expired = expired
        self._take = take
        self.expired_reads = 0
        self._jobs: dict[JobKey, Job] = {}
        self._given_up: dict[JobKey, float] = {}
        self._said = SaidLately()
        self.start = StartFetcher(store, reader, room, deadline_seconds=deadline_seconds)
        self._ahead = ReadAhead()
        self._ahead_slots = trio.Semaphore(AHEAD_AT_ONCE)
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; readers that still wait then get `Unavailable`."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.reader.run)
                self._nursery = nursery
                task_status.started()
        finally:
            self._nursery = None

    def unblock(self, inode: int | None = None) -> int:
        """Ends all waits for remote pages of a file (None: of all files); returns how many.

        Their readers get `Unavailable`.
        """
        return self.waits.unblock(inode)

    async def fetch(self, inode: int, first: int, count: int, *, may_wait: bool = True) -> None:
        """Returns once no page of [first, first + count) needs to be fetched, or the cache was passed by.

        What the cache has no room for went to the transient pages.  Pages that changed meanwhile
        are left as they are: whoever needs them looks again.

        Raises `Unavailable` after the deadline (policy `error`; without `may_wait` any policy, for commands, which
        must end), but not for what the download rate holds up, or when unblocked, `DataLost`, `Corrupt`,
        `GenerationExpired`, `MayHaveExpired`; each was logged with file, page, pack and shards.
        """
        nursery = None if self._fails_now() else self._nursery
        if nursery is None or not self.start.touch(inode, first, nursery):
            start, end = self._ahead.next(inode, first, count)
            if start < end and nursery is not None:
                nursery.start_soon(self._fetch_ahead, inode, start, end)
        page, stop = first, first + count
        while page < stop:
            wanted, page = self._wanted(inode, page, stop)
            if wanted:
                await self._fetch_extents(inode, wanted, may_wait)

    def _wanted(self, inode: int, page: int, stop: int) -> tuple[Wanted, int]:
        """The extents that hold remote-only pages from `page` on, up to a batch, and where to go on."""
        found: Wanted = {}
        rows = list(islice(self._store.extents.overlapping(inode, page, stop), EXTENTS_AT_ONCE))
        for row in rows:
            for number, bits in self._store.blocks.remote_blocks(inode, row, page, stop):
                _, pages = found.setdefault((inode, row.pack, row.ordinal), (row, set()))
                pages.update(number * BLOCK_PAGES + i for i in range(BLOCK_PAGES) if bits & 1 << i)
        if len(rows) < EXTENTS_AT_ONCE:
            return found, stop
        return found, rows[-1].first + rows[-1].pages

    async def _fetch_extents(self, inode: int, wanted: Wanted, may_wait: bool) -> None:
        live = self._store.inode(inode)
        again = self._was_given_up(wanted)
        wait = Wait(
            inode,
            min(min(pages) for _, pages in wanted.values()),
            sum(len(pages) for _, pages in wanted.values()),
            self._store.clock.time_ns(),
            may_wait and live is not None and bool(live.flags & InodeFlag.WAIT) and not again,
            trio.current_time(),
            again,
        )
        jobs = {self._job(key, row, pages): pages for key, (row, pages) in wanted.items()}
        wait.explain = lambda: self._explain(jobs)
        try:
            with self.waits.during(wait):
                await self._wait(wait, jobs)
        except Unavailable:
            # An application that reads this soon after a command did not get it has not waited yet.
            if may_wait:
                self._give_up(wanted)
            raise
        finally:
            for job in jobs:
                self._leave(job)

    def _was_given_up(self, wanted: Wanted) -> bool:
        """Whether a read of one of these extents has just failed."""
        now = trio.current_time()
        return any(now < self._given_up.get(key, 0.0) for key in wanted)

    def _fails_now(self) -> bool:
        """Whether any read has just failed: then nothing is fetched ahead."""
        now = trio.current_time()
        return any(now < until for until in self._given_up.values())

    def _give_up(self, wanted: Wanted) -> None:
        now = trio.current_time()
        for key in [key for key, until in self._given_up.items() if until <= now]:
            del self._given_up[key]
        for key in wanted:
            self._given_up.setdefault(key, now + _GIVEN_UP_SECONDS)

    async def _wait(self, wait: Wait, jobs: dict[Job, set[int]]) -> None:
        """Waits for pages of extents: until they are here or need not come any more, else as the policy says."""
        seconds = min(self._deadline, _AGAIN_SECONDS) if wait.again else self._deadline
        while True:
            with trio.CancelScope(deadline=trio.current_time() + seconds) as wait.scope:
                for job in jobs:
                    await job.done.wait()
            # Each reader is judged by its own pages: others may still need the same extent.
            for job, pages in jobs.items():
                if job.error is not None and self._current(job, pages):
                    error = await self._judged(job, job.error)
                    self._fail(wait, job, str(error), type(error))
            late = [job for job, pages in jobs.items() if not job.done.is_set() and self._current(job, pages)]
            if not late:
                return
            if wait.unblocked:
                self._fail(wait, late[0], f"the wait was ended by 'qsfs unblock'; {wait.why}", Unavailable)
            if not wait.keeps_waiting:
                if all(job.pack is not None and self.reader.held_up(job.pack) for job in late):
                    self._warn(wait, late[0], _WARN_SECONDS)
                    continue
                self._fail(wait, late[0], f"not here after {wait.seconds:.0f} s; {wait.why}", Unavailable)
            self._warn(wait, late[0], seconds)
            seconds = min(2 * seconds, max(self._deadline, _WARN_SECONDS))

    def _warn(self, wait: Wait, job: Job, seconds: float) -> None:
        """Says that a read waits; of many that wait for one pack only one is named."""
        if self._said.again(job.row.pack, seconds):
            return
        path = self._path_of(job.inode)
        for other in self.waits:
            if other.inode == job.inode:
                other.path = path
        log.warning("%s: has been waiting for %.0f s: %s", page_name(job, path), wait.seconds, wait.why)

    async def _judged(self, job: Job, error: QsfsError) -> QsfsError:
        """What the end of a job means: of what is positively lost, whether that had to be expected."""
        verdict = await self._expired() if isinstance(error, DataLost) else None
        if verdict is None:
            return error
        name = "" if job.pack is None else f" (pack {job.pack.name} is gone)"
        return type(verdict)(f"{verdict}{name}")

    def _fail(self, wait: Wait, job: Job, why: str, kind: type[QsfsError]) -> Never:
        """Logs and raises the end of a read; of what is lost, one for each file and pack now and then."""
        self.failed_reads += 1
        self.expired_reads += kind is GenerationExpired
        message = f"{page_name(job, self._path_of(job.inode))}: {why}"
        if kind is Unavailable:
            said_already = wait.again
        else:
            said_already = self._said.again((job.inode, job.row.pack, kind), _WARN_SECONDS)
        log.log(logging.DEBUG if said_already else logging.ERROR, "%s", message)
        raise kind(message)

    def _current(self, job: Job, pages: set[int]) -> bool:
        """Whether one of these pages is still only in this extent."""
        rows = ((page, self._row(job, page)) for page in pages)
        return any(row and self._store.blocks.remote_blocks(job.inode, row, page, page + 1) for page, row in rows)

    def _row(self, job: Job, page: int) -> ExtentRow | None:
        """The row that holds a page now, if it still is of this extent."""
        here = self._store.blocks.remote_extent(job.inode, page)
        return here if here and (here.pack, here.ordinal) == (job.row.pack, job.row.ordinal) else None

    def _explain(self, jobs: Iterable[Job]) -> str:
        named = [self._explain_one(job, job.pack) for job in jobs if job.pack is not None and not job.done.is_set()]
        return "; ".join(dict.fromkeys(named)) or "on its way"

    def _explain_one(self, job: Job, pack: StoredPack) -> str:
        if job.arrived:
            return f"pack {pack.name}: its data came, but the local store is busy and had no room for it yet"
        return self.reader.explain(pack)

    # jobs

    def _job(self, key: JobKey, row: ExtentRow, pages: set[int], *, held: bool = False) -> Job:
        job = self._jobs.get(key)
        if job is None or job.done.is_set():
            if self._nursery is None:
                raise Unavailable("pages that are only remote cannot be read: the daemon starts or stops")
            job = self._jobs[key] = Job(key[0], row, held=held)
            self._nursery.start_soon(self._run_job, key, job)
        job.readers += 1
        job.needed |= pages
        return job

    def _leave(self, job: Job) -> None:
        job.readers -= 1
        if not job.readers and not job.done.is_set():
            job.scope.cancel()
            key = (job.inode, job.row.pack, job.row.ordinal)
            if self._jobs.get(key) is job:
                del self._jobs[key]

    async def _run_job(self, key: JobKey, job: Job) -> None:
        finished = False
        try:
            with job.scope:
                await self._bring(job)
                finished = True
        except QsfsError as error:
            job.error = error
        except Exception as error:
            log.exception("inode %d, page %d: fetching failed unexpectedly", job.inode, job.row.first)
            job.error = QsfsBug(f"fetching failed: {error!r}")
        finally:
            if not finished and job.error is None:
                job.error = Unavailable("reading from the backends ended: the daemon stops")
            job.done.set()
            self._end_ahead(job)
            if self._jobs.get(key) is job:
                del self._jobs[key]

    async def _bring(self, job: Job) -> None:
        row = self._store.get(Table.PACKS, u64(job.row.pack))
        if row is None:
            raise Corrupt(f"its extent lies in pack number {job.row.pack}, which is unknown; run 'qsfs fsck'")
        job.pack = StoredPack.of_row(PackRow.decode(row), self.reader.code)
        entry = entry_of(job.inode, job.row)
        if job.row.skip + job.row.pages > entry.pages:
            raise Corrupt(f"its extent row names more than pack {job.pack.name} holds; run 'qsfs fsck'")
        if job.held:
            await self.reader.shards(job.pack, entry.shards(job.pack.ref))
            if not job.needed:
                return
        data = await self.reader.extent(job.pack, entry)
        job.arrived = True
        failpoints.hit("fetch.arrived")
        await self._install(job, entry.first_page, data)

    async def _install(self, job: Job, first: int, data: bytes) -> None:
        """Installs the pages that readers wait for, then the rest of the extent if that costs nobody."""
        done: set[int] = set()
        await self._install_needed(job, done, first, data)
        rest = set(range(first, first + len(data) // PAGE)) - done
        for start, stop in runs(rest, self._most_at_once):
            if not self._has_room(stop - start) or self._group_is_busy():
                break
            self._put(job, start, stop, first, data)
            await trio.lowlevel.checkpoint()
        await self._install_needed(job, done, first, data)

    async def _install_needed(self, job: Job, done: set[int], first: int, data: bytes) -> None:
        while fresh := job.needed - done:
            done |= fresh
            for start, stop in runs(fresh, self._most_at_once):
                await self._install_run(job, start, stop, first, data)
                await trio.lowlevel.checkpoint()

    async def _install_run(self, job: Job, start: int, stop: int, first: int, data: bytes) -> None:
        while self._has_room(stop - start):
            if not self._store.group_is_full():
                self._put(job, start, stop, first, data)
                return
            try:
                await self._room.room()
            except CacheError:
                # No group begins any more: the local disk failed.  What is on the backends can still be read.
                break
            # The committer may be content with a group that is as full as before.
            await trio.lowlevel.checkpoint()
        for page in range(start, stop):
            here = self._row(job, page)
            if here is not None:
                offset = (page - first) * PAGE
                self._transient.put(job.inode, page, data[offset : offset + PAGE], here)

    def _put(self, job: Job, start: int, stop: int, first: int, data: bytes) -> None:
        """Installs the pages [start, stop) of an extent whose bytes begin with page `first`."""
        inode = self._store.inode(job.inode)
        if inode is not None:
            part = memoryview(data)[(start - first) * PAGE : (stop - first) * PAGE]
            self.fetched_pages += self._store.blocks.install(inode, start, part, job.row)

    @property
    def _most_at_once(self) -> int:
        """Pages that are installed in one step: few enough that a group is not overfilled by much."""
        return max(1, min(MAX_EXTENT // PAGE, self._store.limits.group_bytes // (_PARTS * PAGE)))

    def _has_room(self, pages: int) -> bool:
        """Whether the cache has room for a run of pages, with the blocks at its ends."""
        blocks = (pages + BLOCK_PAGES - 2) // BLOCK_PAGES + 1
        return self._store.expected_bytes() + blocks * BLOCK_SIZE <= self._store.limits.full_bytes

    def _group_is_busy(self) -> bool:
        return 2 * self._store.layers.open.bytes >= self._store.limits.group_bytes

    # ahead of sequential readers

    async def _fetch_ahead(self, inode: int, first: int, stop: int) -> None:
        """Fetches the extents of [first, stop) for nobody in particular, until one does not come."""
        try:
            await self._fetch_stream(inode, first, stop)
        except QsfsError as error:
            log.debug("inode %d: nothing is fetched ahead: %s", inode, error)
        except Exception:
            log.exception("inode %d: fetching ahead failed unexpectedly", inode)

    async def _fetch_stream(self, inode: int, first: int, stop: int) -> None:
        """Fetches the extents of [first, stop); the first is not installed, so that reading it shows here.

        Gives each up after a deadline: nobody waits for it.
        """
        stream = Stream()
        begun: list[tuple[float, Job]] = []
        try:
            await self._begin_stream(stream, begun, inode, first, stop)
            for until, job in begun:
                with trio.move_on_at(until):
                    await job.done.wait()
                self._end_ahead(job)
        finally:
            for _, job in begun:
                self._end_ahead(job)

    async def _begin_stream(
        self, stream: Stream, begun: list[tuple[float, Job]], inode: int, first: int, stop: int
    ) -> None:
        while first < stop:
            rows = list(islice(self._store.extents.overlapping(inode, first, stop), AHEAD_AT_ONCE))
            for row in rows:
                if self._store.expected_bytes() >= self._store.limits.high_bytes or self._nursery is None:
                    return
                key = (inode, row.pack, row.ordinal)
                if not self._worth_fetching(key, row):
                    continue
                if self._take(inode, row.first, row.pages):
                    await trio.lowlevel.checkpoint()
                    continue
                placed = await self._place_ahead()
                if stream.failed or self._nursery is None or not placed:
                    if placed:
                        self._ahead_slots.release()
                    return
                # Another stream that waited for a place too, or a read, may have begun it meanwhile.
                if not self._worth_fetching(key, row):
                    self._ahead_slots.release()
                    continue
                job = self._job(key, row, set(), held=not begun)
                job.stream = stream
                begun.append((trio.current_time() + self._deadline, job))
            if len(rows) < AHEAD_AT_ONCE:
                return
            first = rows[-1].first + rows[-1].pages

    async def _place_ahead(self) -> bool:
        """Takes a place among what is fetched ahead; False if none came free in time."""
        try:
            self._ahead_slots.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_after(self._deadline) as scope:
                await self._ahead_slots.acquire()
            return not scope.cancelled_caught
        return True

    def _end_ahead(self, job: Job) -> None:
        """Gives back the place that a job took, if it still has one; without an end it was too slow."""
        if job.stream is not None:
            job.stream.failed |= job.error is not None or not job.done.is_set()
            job.stream = None
            self._ahead_slots.release()
            self._leave(job)

    def _worth_fetching(self, key: JobKey, row: ExtentRow) -> bool:
        """Whether an extent is not on its way and its first or last page is only remote: it was not fetched lately."""
        ends = (row.first, row.first + row.pages - 1)
        return key not in self._jobs and any(
            self._store.blocks.remote_blocks(key[0], row, page, page + 1) for page in ends
        )
