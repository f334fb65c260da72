"""Uploading the n shards of a pack in parallel, until it is written and, if that is soon, full.

Every shard goes to a backend of its own.  A backend that fails is replaced by a spare, one that is
slow holds up nothing once k + ceil(m / 2) shards are acknowledged and the grace for the rest is
over: its shard goes on in the background for a while.  Where too few backends take shards the
upload waits for them and says so; it ends with the pack written, or when it is cancelled.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import trio

from qsfs import failpoints
from qsfs.backend.limits import rates_of
from qsfs.clock import Clock
from qsfs.errors import BackendError, BackendUnavailable, QsfsBug
from qsfs.format.erasure import CodeParams
from qsfs.format.extent import PackRef
from qsfs.format.shard import shard_key
from qsfs.remote.members import Member, Members
from qsfs.remote.placement import FreeSpace, assign, group_count, ranking
from qsfs.remote.reasons import summary

_log = logging.getLogger(__name__)

SHARD_SECONDS = 60.0
"""How long one shard may take to be acknowledged by one backend."""
STRAGGLING_BYTES = 8 << 20
"""Bytes of shards that may still be on their way after their packs were given back as written."""
SETS_PER_BACKEND = 8
ROUND_SECONDS = 1.0
"""How often it is looked whether the free space of backends has to be asked for."""
HURRIED_GRACE_SECONDS = 0.1
"""How long a written pack is waited for to become full while fsyncs wait for the head."""
LATE_SECONDS = 2.0
"""A backend is late at the earliest after this; and not before three times what half of the others took."""
FIRST_PAUSE = 0.5
LAST_PAUSE = 15.0
_LOOKS_A_PAUSE = 8


class Upload:
    """One pack on its way.  `placement` names for each shard the backend that acknowledged it, or -1."""

    def __init__(self, ref: PackRef, shards: Sequence[bytes], placement: Sequence[int]) -> None:
        self.ref = ref
        self.placement = list(placement)
        self.finished = trio.Event()
        self.scope = trio.CancelScope()
        self.news = trio.Event()
        self.flying: dict[int, Member] = {}
        self.failed: set[int] = set()
        self.sets: dict[int, trio.CancelScope] = {}
        self._then: Callable[[], None] | None = None
        self._values = {n: value for n, value in enumerate(shards) if self.placement[n] < 0}

    @property
    def missing(self) -> list[int]:
        """Shards that nobody acknowledged."""
        return [number for number, member in enumerate(self.placement) if member < 0]

    @property
    def full(self) -> bool:
        """Whether every shard is stored."""
        return -1 not in self.placement

    @property
    def stored(self) -> int:
        """How many shards are stored."""
        return len(self.placement) - self.placement.count(-1)

    @property
    def held_bytes(self) -> int:
        """Bytes of shards that are held in memory."""
        return sum(map(len, self._values.values()))

    def value(self, number: int) -> bytes:
        """A shard that is not stored yet."""
        return self._values[number]

    def acknowledged(self, number: int, member: int) -> None:
        """Takes note that `member` stored a shard."""
        self.placement[number] = member
        del self._values[number]
        self.tell()

    def when_finished(self, then: Callable[[], None]) -> None:
        """Calls `then` once no more shards come in; not at all if that is so already."""
        if not self.finished.is_set():
            self._then = then

    def finish(self) -> None:
        """No more shards come in: forgets those that are left."""
        self._values.clear()
        self.finished.set()
        self.tell()

    def follow_up(self) -> None:
        """Does what `when_finished` asked for."""
        if self._then is not None:
            self._then()

    def tell(self) -> None:
        """Wakes whoever waits for a change."""
        self.news.set()
        self.news = trio.Event()


class Uploader:
    """Uploads packs to the members of the fleet.  `run` must be running.

    `hurried` tells whether somebody waits for a head, who needs written packs and no full ones.  `unrecorded`
    are the ids of packs that this mount began to upload and that got no row since: on their way, or given up.
    """

    def __init__(
        self,
        members: Members,
        free: FreeSpace,
        code: CodeParams,
        fsid: bytes,
        clock: Clock,
        *,
        full_grace_seconds: float,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.members = members
        self.code = code
        self.waiting: dict[bytes, str] = {}
        self.unrecorded: set[bytes] = set()
        self.hurried: Callable[[], bool] = lambda: False
        self._free = free
        self._fsid = fsid
        self._clock = clock
        self._grace = full_grace_seconds
        self._shard_seconds = shard_seconds
        self._limits: dict[int, trio.CapacityLimiter] = {}
        self._stragglers: OrderedDict[int, Upload] = OrderedDict()
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    if self._free.stale:
                        await self._free.refresh()
                    await trio.sleep(ROUND_SECONDS)
        finally:
            self._nursery = None

    def enough_backends(self) -> bool:
        """Whether as many backends take shards as a written pack needs."""
        return sum(member.writable for member in self.members) >= self.code.write_quorum

    async def upload(
        self, ref: PackRef, shards: Sequence[bytes], placement: Sequence[int] | None = None
    ) -> Upload:
        """Stores the shards of a pack; returns once it is written and full, or its grace is over.

        `placement` names what is stored already.  Goes on trying for as long as it takes: the caller
        cancels.  What comes in later shows in the upload's `placement` until it is `finished`.
        """
        if placement is None:
            self.unrecorded.add(ref.pack_id)
        upload = Upload(ref, shards, placement or [-1] * self.code.n)
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._nursery is None:
            raise QsfsBug("a pack was to be uploaded while the uploader does not run")
        self._nursery.start_soon(self._run, upload)
        try:
            await self._until_written(upload)
            await self._until_full(upload)
        except BaseException:
            upload.scope.cancel()
            raise
        if not upload.finished.is_set():
            self._let_straggle(upload)
        failpoints.hit("upload.written")
        return upload

    async def _until_written(self, upload: Upload) -> None:
        try:
            while upload.stored < self.code.write_quorum:
                await upload.news.wait()
        finally:
            self.waiting.pop(upload.ref.pack_id, None)

    async def _until_full(self, upload: Upload) -> None:
        """Waits for the grace, which is short while somebody waits for the head."""
        begin = trio.current_time()
        while not upload.finished.is_set() and not upload.full:
            grace = min(self._grace, HURRIED_GRACE_SECONDS) if self.hurried() else self._grace
            left = begin + grace - trio.current_time()
            if left <= 0:
                return
            with trio.move_on_after(min(left, HURRIED_GRACE_SECONDS)):
                await upload.news.wait()

    def _let_straggle(self, upload: Upload) -> None:
        self._stragglers[id(upload)] = upload
        while sum(u.held_bytes for u in self._stragglers.values()) > STRAGGLING_BYTES:
            _, oldest = self._stragglers.popitem(last=False)
            oldest.scope.cancel()

    async def _run(self, upload: Upload) -> None:
        try:
            with upload.scope:
                await self._write(upload)
        finally:
            self._stragglers.pop(id(upload), None)
            upload.finish()
        upload.follow_up()

    async def _write(self, upload: Upload) -> None:
        attempt = 0
        while True:
            await self._attempt(upload)
            if upload.stored >= self.code.write_quorum:
                return
            attempt += 1
            await self._pause(upload, attempt)

    async def _attempt(self, upload: Upload) -> None:
        """Gives every missing shard to a backend, then to spares until it is stored or none is left."""
        upload.failed.clear()
        async with trio.open_nursery() as nursery:
            for number, member in self._choose(upload, upload.missing).items():
                upload.flying[number] = member
                nursery.start_soon(self._store, upload, number)
            nursery.start_soon(self._replace_late, upload)

    async def _replace_late(self, upload: Upload) -> None:
        """Gives the shards of backends that are late to spares, for as long as the pack is not written."""
        start = trio.current_time()
        late = float("inf")
        while upload.flying and upload.stored < self.code.write_quorum:
            if late == float("inf") and 2 * upload.stored >= self.code.n:
                late = start + max(LATE_SECONDS, 3 * (trio.current_time() - start))
            if trio.current_time() >= late:
                for number in self._choose(upload, list(upload.flying)):
                    if number in upload.sets:
                        upload.sets[number].cancel()
                late = trio.current_time() + LATE_SECONDS
            with trio.move_on_at(min(late, trio.current_time() + LATE_SECONDS)):
                await upload.news.wait()

    def _choose(self, upload: Upload, shards: Sequence[int]) -> dict[int, Member]:
        holding = {number for number in upload.placement if number >= 0}
        busy = holding | upload.failed | {member.number for member in upload.flying.values()}
        usable = [m for m in self.members if m.writable and m.number not in busy]
        holders = [*self.members.of(holding), *upload.flying.values()]
        return assign(
            shards,
            ranking(upload.ref.pack_id, usable, self._free),
            holders,
            n=self.code.n,
            groups=group_count(list(self.members)),
        )

    async def _store(self, upload: Upload, number: int) -> None:
        while True:
            member = upload.flying[number]
            if await self._set(upload, number, member):
                del upload.flying[number]
                upload.acknowledged(number, member.number)
                return
            del upload.flying[number]
            upload.failed.add(member.number)
            spare = self._choose(upload, [number]).get(number)
            if spare is None:
                upload.tell()
                return
            upload.flying[number] = spare

    async def _set(self, upload: Upload, number: int, member: Member) -> bool:
        """Stores one shard at one backend; False if that failed, whatever the reason."""
        key = shard_key(self._fsid, upload.ref.owner_epoch, upload.ref.pack_id, number)
        limit = self._limits.setdefault(member.number, trio.CapacityLimiter(SETS_PER_BACKEND))
        try:
            try:
                limit.acquire_nowait()
            except trio.WouldBlock:
                await limit.acquire()
            try:
                value = upload.value(number)
                async with rates_of(member.data).upload.turn(len(key) + len(value)):
                    if not member.writable:
                        return False
                    await self._set_in_time(upload, number, member, key, value)
            finally:
                limit.release()
        except BackendError as error:
            member.failed(error)
            _log.debug("shard %d of pack %s: %s", number, upload.ref.pack_id.hex(), error)
            return False
        member.succeeded(stored=True)
        return True

    async def _set_in_time(self, upload: Upload, number: int, member: Member, key: bytes, value: bytes) -> None:
        start = trio.current_time()
        with trio.move_on_after(self._shard_seconds) as scope:
            upload.sets[number] = scope
            try:
                await member.data.set(key, value)
            finally:
                del upload.sets[number]
        if scope.cancelled_caught:
            seconds = trio.current_time() - start
            raise BackendUnavailable(f"backend {member.name}: a shard was not acknowledged within {seconds:.0f} s")

    async def _pause(self, upload: Upload, attempt: int) -> None:
        """Waits, with jitter, before the missing shards are tried again."""
        reasons = summary(
            f"backend {member.name}: no room left" if member.full else member.error
            for member in self.members
            if member.full or member.error is not None
        )
        self.waiting[upload.ref.pack_id] = (
            f"{upload.stored} of the {self.code.write_quorum} shards that a pack needs are stored; "
            + (reasons or "too few backends take shards")
        )
        longest = min(LAST_PAUSE, FIRST_PAUSE * 2 ** min(attempt - 1, 10))
        jitter = int.from_bytes(self._clock.random_bytes(2), "big") / 65536
        end = trio.current_time() + longest * (0.5 + jitter / 2)
        upload.failed.clear()
        step = max(FIRST_PAUSE, longest / _LOOKS_A_PAUSE)
        while trio.current_time() < end:
            await trio.sleep(min(step, max(0.0, end - trio.current_time())))
            able = upload.stored + sum(member.writable for member in self.members)
            if able < self.code.write_quorum:
                continue
            if upload.stored + len(self._choose(upload, upload.missing)) >= self.code.write_quorum:
                return
