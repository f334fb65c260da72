"""Flushing: pre-copy all the time, a cut now and then, and what follows a written pack.

`Flusher` runs once this mount owns the file system.  It waits for backends visibly and goes on when
they are back; only a fence ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from qsfs.config import FlushConfig
from qsfs.errors import CacheError, DeadlineExceeded, Fenced, QsfsBug, QsfsError
from qsfs.format.head import Head
from qsfs.remote.ahead import Ahead
from qsfs.remote.base import BASE_KEY, local_head, record_published
from qsfs.remote.context import FlushContext
from qsfs.remote.cut import NoCut
from qsfs.remote.exposure import Exposure
from qsfs.remote.exposure_limit import ExposureWatch
from qsfs.remote.generation import Generations, HeadPublisher
from qsfs.remote.ledger import read_rows
from qsfs.remote.named import NamedPacks
from qsfs.remote.pace import Pace
from qsfs.remote.pinning import Pinning
from qsfs.remote.precopy import PreCopier
from qsfs.remote.pressure import Pressure
from qsfs.remote.renewal import Renewer
from qsfs.remote.rewrite import MARKED_BYTES
from qsfs.remote.shards import ShardReader
from qsfs.remote.upkeep import Upkeep, every_second
from qsfs.store.schema import Table
from qsfs.store.snapshot import CommittedState
from qsfs.store.store import NEXT_PACK

_log = logging.getLogger(__name__)

EARLY_DELTA_MARKS = 100_000
"""Change marks above which rows are uploaded ahead of the cut, which then reads only what is newer."""
_FEW_MARKS = 1000
_POLL_SECONDS = 0.5
_RETRY_SECONDS = 5.0
_MOVE_STEPS = 256
_HOLD_SECONDS = 2.0
"""How long a cut waits for packs that are on their way, whose pages it would upload once more."""


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The published generation that holds everything accepted before the sync, and how safe it is.

    `durability` is "full" if every pack has all of its shards, else "written".
    """

    generation: int
    durability: str


class Flusher:
    """Moves what is committed locally to the backends.

    `sealer.owner_epoch` in `context` is the owner's.  `on_fenced` is called once if another mount owns
    the file system: nothing is uploaded after that.
    """

    def __init__(
        self,
        context: FlushContext,
        config: FlushConfig,
        publisher: HeadPublisher,
        first: Head,
        reader: ShardReader,
        *,
        on_fenced: Callable[[QsfsError], None] = lambda _: None,
        exposure: Exposure | None = None,
    ) -> None:
        """`first` is the head with which this mount became the owner.

        The spool was opened before that head was published.
        """
        self.context = context
        context.store.backends = context.uploader.members.numbers
        self.generations: Generations | None = None
        self.last_error = ""
        self.phase = "starting"
        self._config = config
        self._publisher = publisher
        self._first = first
        self._on_fenced = on_fenced
        self._renewer = Renewer(
            context, reader, config.snapshot_ratio, lambda: self._upkeep.salvage.metadata
        )
        self._precopier = PreCopier(context, self._in_cut, config.quiet_seconds)
        self._ahead = Ahead(context, self._precopier, config.slow_writers_seconds)
        self.pinning = Pinning(self)
        self._named = NamedPacks(context.spool, context.sealer.keys, lambda: self._generations.base)
        self._upkeep = Upkeep(
            context,
            reader,
            short_of_room=lambda: self.short_of_room,
            named=self._named,
            base=lambda: self._generations.base,
            published=lambda: publisher.published,
            owner_epoch=lambda: publisher.owner.epoch,
            retention_seconds=config.retention_seconds,
            rewrite_below=config.rewrite_below,
            fleets=lambda: self._generations.fleets,
            renewing=lambda: self._generations.renewal is not None and self._generations.renewed is None,
            # What is marked counts as exposed, though a published head has it: it must not make cuts by itself.
            rewrite_bytes=config.exposure_bytes // 8 or MARKED_BYTES,
        )
        self.drainer = self._upkeep.drainer
        self._pace = Pace(config.cut_bytes)
        self._started = 0
        self._finished = 0
        self._wanted = 0
        self._wake = trio.Event()
        self._news = trio.Event()
        self._stopping = False
        self._fenced: QsfsError | None = None
        self.exposure = exposure or Exposure(context.store, context.ledger, context.clock, lambda: self.uploaded_ahead)
        self._pressure = Pressure(
            context, self._precopier, short=lambda: self.short_of_room,
            busy=lambda: self.phase == "uploading ahead",
        )  # fmt: skip
        self._limits = ExposureWatch(
            config, self.exposure, context.clock, base_ns=lambda: self._generations.base.head.time_ns,
            why=self._waits,
        )  # fmt: skip
        self._scope = trio.CancelScope()
        self._knows_packs = trio.Event()
        self._last_pack_before = 0

    # running

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Flushes until `stop`, a fence, or cancellation.

        Raises `CacheError` or `Corrupt` at the start if the local store lacks its base.
        """
        begun = False
        with self._scope:
            try:
                await self._begin()
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.context.uploader.run)
                    nursery.start_soon(self._watch_disk)
                    nursery.start_soon(self._read_ledger)
                    nursery.start_soon(self._turn)
                    nursery.start_soon(self._precopier.run)
                    nursery.start_soon(self._cuts, nursery)
                    nursery.start_soon(self._look_after_packs)
                    for look in (self._pressure.see_to_room, self._limits.look, self._ahead.slowdown.look):
                        nursery.start_soon(every_second, look, self._room_unseen)
                    begun = True
                    task_status.started()
            finally:
                self._ahead.slowdown.end()
                self.phase = "fenced" if self._fenced is not None else "stopped"
                self._tell()
        if not begun:
            task_status.started()

    async def _begin(self) -> None:
        """Takes over what the last mount left: the base, what it uploaded, heads in the spool."""
        context = self.context
        base = local_head(context.store, BASE_KEY, context.sealer.keys)
        if base is None:
            raise CacheError("the local store has no base generation; run 'qsfs restore'")
        self._upkeep.begin(self._publisher.owner, self._first, base)
        await self.exposure.begin()
        self.generations = Generations(context, self._publisher, base, self._first)
        self._last_pack_before = context.store.counter(NEXT_PACK)
        published = self._publisher.published
        sealed = context.spool.heads.get(published) if published is not None else None
        if sealed is not None:
            record_published(context.store, sealed)
            await context.committer.commit()
            await context.in_thread(lambda: context.spool.drop_heads(sealed.ref))
        self.phase = "reading pack rows"

    async def _read_ledger(self) -> None:
        """Reads which packs are not settled: of all packs, so nobody waits for it but who needs to know."""
        context = self.context
        position: bytes | None = b""
        while position is not None:
            start = position
            read = await context.in_thread(
                lambda: read_rows(context.store.environment, context.clock, start)  # noqa: B023
            )
            context.ledger.take(read)
            position = read.resume
        known = len(context.ledger.metadata)
        self._generations.take_chain()
        if len(context.ledger.metadata) > known:
            await context.committer.commit()
        await self._upkeep.take_over(self._last_pack_before)
        if self.phase == "reading pack rows":
            self.phase = "running"
        self._knows_packs.set()
        self._tell()

    async def _watch_disk(self) -> None:
        """Ends what waits for a generation when none can be made any more."""
        await self.context.committer.failure()
        self._tell()

    async def _look_after_packs(self) -> None:
        await self._knows_packs.wait()
        await self._upkeep.run()

    @property
    def knows_packs(self) -> bool:
        """Whether the ledger is complete; until then `status` may count too few packs as not settled."""
        return self._knows_packs.is_set()

    async def _turn(self) -> None:
        """Ages the memory of what was written lately: after two turns a block counts as quiet."""
        while True:
            await trio.sleep(max(self._config.quiet_seconds, _POLL_SECONDS))
            self.context.store.blocks.written.turn()

    def _in_cut(self, block: int, writes: Sequence[int]) -> int:
        cut = self.generations.cut if self.generations is not None else None
        return 0 if cut is None else cut.taken(block, writes)

    # cuts

    async def _cuts(self, nursery: trio.Nursery) -> None:
        due = self.context.clock.monotonic() + self._config.cut_seconds
        while True:
            while self._wanted <= self._finished and not self._head_due and self.context.clock.monotonic() < due:
                if self._limits.presses():
                    break
                self._wake = trio.Event()
                with trio.move_on_after(max(0.0, min(due - self.context.clock.monotonic(), self._limits.pause))):
                    await self._wake.wait()
            due = self.context.clock.monotonic() + self._config.cut_seconds
            self._limits.begin(self._generations.base)
            try:
                await self._generation()
                self._limits.ended(self._generations.base)
                self.last_error = ""
            except Fenced as error:
                self.fence(error)
                return
            except QsfsError as error:
                if str(error) != self.last_error:
                    _log.error("no generation could be made: %s", error)
                self.last_error = str(error)
                self._ahead.slowdown.end()
                await trio.sleep(_RETRY_SECONDS)
            if self.knows_packs:
                self._renewer.begin(self._generations, nursery)

    async def _generation(self) -> None:
        """Makes one generation of all that was accepted before it began, or finds nothing new."""
        generations, context = self._generations, self.context
        serial = self._started = self._started + 1
        while self._head_due or await self._something_new():
            if self.pinning.undecided:
                self.phase = "waiting for a snapshot to be confirmed"
                await self.pinning.decided()
            renewed = generations.renewed
            marks = context.store.layers.view.count(Table.CHANGED)
            if marks > EARLY_DELTA_MARKS and generations.pre_delta is None:
                self.phase = "uploading rows ahead"
                await self._ahead.rows(generations)
            view, before = self._upkeep.before_cut(), generations.base.head
            most_bytes = min(self._pace.most_bytes, context.spool.room() * 3 // 4)
            order = generations.next_order(most_bytes, forced=self._head_due)
            asked = self.pinning.waiting
            serial = self._started = self._started + 1
            self.phase = "committing"
            self._limits.cut()
            async with self._precopier.held(0.0 if context.uploader.hurried() else _HOLD_SECONDS):
                uploaded = self.exposure.uploaded
                await context.committer.commit()
                self.phase = "sealing"
                begin = context.clock.monotonic()
                cut = await generations.seal(order)
            if not isinstance(cut, NoCut):
                self._ahead.slowdown.end()
                self._pace.sealed(cut.bytes, context.clock.monotonic() - begin)
                self.pinning.cut_sealed(asked)
                await self._knows_packs.wait()
                self.phase = "publishing"
                try:
                    base = await generations.publish(cut, renewed)
                except QsfsError as error:
                    self.pinning.cut_given_up(error)
                    self._tell()
                    raise
                self.pinning.cut_published(base.sealed.ref)
                self.exposure.published(uploaded)
                self._upkeep.published(view, base.sealed.ref, base.head, before)
                break
            if cut is NoCut.UNCHANGED:
                break
            if cut is NoCut.MOVING:
                self.phase = "moving"
                await self._move_covered()
            else:
                self.phase = "uploading ahead"
                if cut is NoCut.TOO_SCATTERED:
                    self._pace.too_scattered()
                await self._ahead.pages(order.most_bytes)
                if marks > _FEW_MARKS:
                    self.phase = "uploading rows ahead"
                    await self._ahead.rows(generations)
        self.phase = "running"
        self._ahead.slowdown.end()
        self._precopier.press("")
        self._finished = serial
        self._tell()

    @property
    def _head_due(self) -> bool:
        if self.pinning.waiting or (self.generations is not None and self.generations.head_due):
            return True
        return self.knows_packs and self._upkeep.head_due

    async def _something_new(self) -> bool:
        """Whether a cut may find anything; False without a commit, so that an idle disk sleeps."""
        store = self.context.store
        if store.dirty or store.layers.committing is not None:
            return True
        uploaded = self.exposure.uploaded
        if await self.context.in_thread(self._has_changed):
            return True
        # Also of what was recorded while the last cut was being committed.
        self.exposure.published(uploaded)
        return False

    def _has_changed(self) -> bool:
        with CommittedState(self.context.store.environment, self.context.clock) as state:
            return state.moving or state.something_changed()

    @property
    def _generations(self) -> Generations:
        if self.generations is None:
            raise QsfsBug("flushing has not begun")
        return self.generations

    async def _move_covered(self) -> None:
        store = self.context.store
        while not store.move_covered(_MOVE_STEPS):
            await self.context.committer.room()
            await trio.lowlevel.checkpoint()

    # room

    def _room_unseen(self, error: QsfsError) -> None:
        if str(error) != self.last_error:
            _log.error("%s", error)
        self.last_error = str(error)

    @property
    def short_of_room(self) -> bool:
        """Whether the cache holds more than its high watermark."""
        store = self.context.store
        return store.expected_bytes() >= store.limits.high_bytes

    # for others

    async def sync(self) -> SyncResult:
        """Waits until a generation with everything accepted before this call is published.

        Joins a cut that is taken after the call.  A generation that cannot be restored, because backends lost metadata
        of it, is not enough.  Raises `Fenced`, `CacheError` if the local disk failed, and
        `DeadlineExceeded` if flushing stops first.
        """
        await self.publish_all()
        while not self.knows_packs:
            await self.progress()
        await self._upkeep.look_at_metadata()
        while self._upkeep.lost_is_named:
            await self.progress()
        base = self._generations.base
        return SyncResult(base.head.generation, "full" if not self.context.ledger.incomplete else "written")

    def dead_packs(self) -> dict[str, Any]:
        """How many dead packs there are, their bytes on the backends, and what they wait for."""
        return self._upkeep.report()

    async def collect(self) -> dict[str, Any]:
        """Publishes everything, then deletes the dead packs and strays that may go.

        What was deleted, and what waits for what.  Backends are scanned for strays anew, in the background.

        Raises as `sync`.
        """
        self._upkeep.want_head()
        await self.sync()
        return await self._upkeep.collect()

    async def publish_all(self) -> None:
        """As `sync`, without a result.  One cut serves all who came before it; the next follows at once."""
        target = self._started + 1
        self._wanted = max(self._wanted, target)
        self.kick()
        while self._finished < target:
            await self.progress()

    async def progress(self) -> None:
        """Waits until something was done; raises if nothing will be."""
        self.raise_if_ended()
        await self._news.wait()

    def raise_if_ended(self) -> None:
        """Raises why nothing will be done any more, if so."""
        if self._fenced is not None:
            raise self._fenced
        if self.context.committer.failed is not None:
            raise self.context.committer.failed
        if self.phase == "stopped":
            raise DeadlineExceeded("flushing stopped before everything was published; it is safe locally")

    def kick(self) -> None:
        """Has it looked at once whether a generation is to be made."""
        self._wake.set()

    async def stop(self, deadline: float) -> bool:
        """Makes a last generation within `deadline` seconds, then ends `run`; whether it was published."""
        done = False
        self._upkeep.note_time()
        try:
            with trio.move_on_after(deadline):
                await self.publish_all()
                done = True
        except QsfsError as error:
            _log.warning("the last generation was not published: %s", error)
        self._scope.cancel()
        return done

    @property
    def uploaded_ahead(self) -> int:
        """Bytes that turned clean ahead of cuts since this mount began."""
        return self._precopier.bytes_recorded

    @property
    def unreadable_packs(self) -> frozenset[int]:
        """The numbers of packs of which something cannot be read any more."""
        return self._upkeep.salvage.unreadable

    def fence(self, error: QsfsError) -> None:
        """Ends flushing at once and for good: this mount does not own the file system any more."""
        if self._fenced is None:
            self._fenced = error
            self.last_error = str(error)
            _log.critical("%s", error)
            self._scope.cancel()
            self._on_fenced(error)

    def status(self) -> dict[str, Any]:
        """What flushing does, waits for, and has not made safe yet.  Bytes; ages in seconds; None: not known yet."""
        context, generations = self.context, self.generations
        ledger = context.ledger
        base = generations.base.head if generations is not None else None
        return {
            "phase": self.phase,
            "generation": base.generation if base is not None else None,
            "published_ns": base.time_ns if base is not None else None,
            "exposure": self.exposure.report(
                base.time_ns if base is not None else None, packs_known=self.knows_packs
            ),
            "exposure_problem": self._limits.limit.problem,
            "waiting": self._waits(),
            "pressure": self._precopier.pressed,
            "writers_slowed": self._ahead.slowdown.active,
            "packs_not_full": len(ledger.incomplete) if self.knows_packs else None,
            "packs_not_looked_at": len(ledger.looks) if self.knows_packs else None,
            "next_look_seconds": ledger.next_look_seconds,
            "shards_found_missing": self._upkeep.found_missing,
            "lost": self._upkeep.lost(),
            "spool_bytes": context.spool.used_bytes,
            "dead": self.dead_packs(),
            "rewrite": self._upkeep.rewriter.report(),
            "drain": self.drainer.report(),
            "start": self._upkeep.start.report(),
            "last_error": self.last_error or self._precopier.problem or self._upkeep.problem,
        }

    def _waits(self) -> list[str]:
        """What packs and the head under way wait for."""
        waiting = list(dict.fromkeys(self.context.uploader.waiting.values()))
        if self.generations is not None and self.generations.waiting:
            waiting.append(self.generations.waiting)
        if self._upkeep.lost_is_named:
            why = f": {self._renewer.problem}" if self._renewer.problem else ""
            waiting.append(f"metadata that backends have lost are written anew{why}")
        return waiting

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()
