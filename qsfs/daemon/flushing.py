"""Flushing in the daemon: own when a quorum answers, then flush; what `sync` and `status` ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.config import FlushConfig
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import Opened
from qsfs.daemon.copies_upkeep import CopiesUpkeep
from qsfs.daemon.owning import local_state, own_when_possible
from qsfs.daemon.status import backends_of
from qsfs.daemon.supervision import supervised
from qsfs.errors import DeadlineExceeded, Fenced, QsfsBug, QsfsError, SplitHeads, StaleCache
from qsfs.format.erasure import Code
from qsfs.format.fleet import Fleet
from qsfs.format.head import Head
from qsfs.remote.base import BASE_KEY, local_head
from qsfs.remote.context import FlushContext
from qsfs.remote.exposure import Exposure
from qsfs.remote.flush import Flusher
from qsfs.remote.ledger import Ledger
from qsfs.remote.members import OUTSIDE, Members, State
from qsfs.remote.mount_check import check_offline, offline_warning
from qsfs.remote.packing import Sealer
from qsfs.remote.placement import FreeSpace
from qsfs.remote.pressure import room_may_come
from qsfs.remote.quorum import assess
from qsfs.remote.reader import PackReader
from qsfs.remote.snapshots import Snapshot, snapshots_of
from qsfs.remote.spool import Spool
from qsfs.remote.upload import Uploader
from qsfs.remote.worker_turn import WorkerTurn
from qsfs.store.store import Store

_log = logging.getLogger(__name__)


class Flushing:
    """Owns and flushes for one mount.  `flusher` is None until this mount owns the file system.

    `fenced` is why it may not (any more), `failure` what went wrong with flushing otherwise.  `hurried` tells
    whether somebody waits for the next head.  `full_waits` is what each sync waits for that wants full packs.
    `offline` is what follows from an offline mount that owns nothing yet ("": it is none, or it owns, or never will).
    """

    def __init__(
        self,
        config: FlushConfig,
        second_look_seconds: float,
        store: Store,
        spool: Spool,
        committer: Committer,
        opened: Opened,
        members: Members,
        reader: PackReader,
        clock: Clock,
        *,
        on_fenced: Callable[[QsfsError], None],
        waiting: Callable[[str], None],
    ) -> None:
        """`on_fenced` is told once why this mount may not own, `waiting` what the owning waits for ("": no more)."""
        self.members = members
        self.flusher: Flusher | None = None
        self.copies: CopiesUpkeep | None = None
        self.fenced: QsfsError | None = None
        self.waiting = ""
        self.offline = ""
        self.failure = ""
        self.hurried: Callable[[], bool] = lambda: False
        self.full_waits: dict[int, dict[str, Any]] = {}
        self._cause: QsfsError | None = None
        self._base: Head | None = None
        self._config = config
        self._store = store
        self._committer = committer
        self._opened = opened
        self._reader = reader
        self._clock = clock
        self._on_fenced = on_fenced
        self._tell = waiting
        self._ledger = Ledger(clock, second_look_seconds)
        self._spool = spool
        self._ready = trio.Event()
        self._exposure = Exposure(
            store, self._ledger, clock, lambda: 0 if self.flusher is None else self.flusher.uploaded_ahead
        )

    async def start(self, nursery: trio.Nursery, *, offline: bool) -> None:
        """Owns, and starts flushing in `nursery`; `offline` leaves both to when backends answer.

        Raises what says that this mount must not own.
        """
        await self._exposure.begin()
        base = local_head(self._store, BASE_KEY, self._opened.keys)
        self._base = None if base is None else base.head
        if not offline:
            await self._own(nursery)
            return
        local = local_state(self._store, self._spool, self._opened)
        check_offline(local)
        self.offline = offline_warning(local)
        _log.warning("%s", self.offline)
        nursery.start_soon(self._own_later, nursery)

    async def _own_later(self, nursery: trio.Nursery) -> None:
        try:
            await self._own(nursery)
        except (Fenced, StaleCache, SplitHeads) as error:
            self._fence(error)
        except QsfsError as error:
            self._cause = error
            self.failure = f"this mount does not own the file system and uploads nothing: {error}"
            self._ready.set()
            _log.error("%s; it goes on with what is local", self.failure)
        finally:
            self.offline = ""

    async def _own(self, nursery: trio.Nursery) -> None:
        opened, store = self._opened, self._store
        owned = await own_when_possible(
            store,
            self._spool,
            opened,
            self.members,
            self._clock,
            nursery,
            takeover=False,
            on_fenced=self._fence,
            waiting=self._wait,
        )
        await self._committer.commit()
        code = opened.superblock.code
        free = FreeSpace(self.members, self._clock)
        turn = WorkerTurn()
        context = FlushContext(
            store=store,
            committer=self._committer,
            sealer=Sealer(
                opened.keys,
                Code(code, around=turn.given_up),
                owned.owner.epoch,
                self._clock,
                self._config.compression_level,
            ),
            uploader=Uploader(
                self.members,
                free,
                code,
                opened.keys.fsid,
                self._clock,
                full_grace_seconds=self._config.full_grace_seconds,
            ),
            spool=self._spool,
            ledger=self._ledger,
            clock=self._clock,
            turn=turn,
        )
        context.uploader.hurried = lambda: bool(self.hurried())
        flusher = Flusher(
            context,
            self._config,
            owned.publisher,
            owned.first,
            self._reader,
            on_fenced=self._fence,
            exposure=self._exposure,
        )
        if self.fenced is not None:
            return
        self.flusher = flusher
        self.copies = CopiesUpkeep(store, self.members, owned.publisher, opened.keys, self._clock)
        await nursery.start(self._run, flusher)
        nursery.start_soon(supervised, self.copies.run)
        self._ready.set()
        _log.info("owner with epoch %d, at generation %d", owned.owner.epoch, owned.first_ref.generation)

    async def _run(
        self, flusher: Flusher, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Runs the flusher; a bug in it must not take the mount along, whose data are safe locally."""
        try:
            await flusher.run(task_status)
        except Exception as error:
            if flusher.generations is None:
                raise
            self.failure = f"flushing ended by an internal error: {error!r}; remount to start it again"
            _log.critical("%s", self.failure, exc_info=error)

    def _wait(self, what: str) -> None:
        if what != self.waiting:
            self.waiting = what
            self._tell(what)

    def _fence(self, error: QsfsError) -> None:
        """Ends flushing at once, whoever saw the other owner: a slow backend shows it between two cuts."""
        if self.fenced is None:
            self.fenced = error
            self._ready.set()
            self._on_fenced(error)
            if self.flusher is not None:
                self.flusher.fence(error)

    def makes_room(self, *, exhausted: bool) -> bool:
        """Whether there are pages that may be evicted later: see `room_may_come`."""
        flusher = self.flusher
        if flusher is None or self.fenced is not None or self.failure:
            return False
        enough = flusher.context.uploader.enough_backends()
        if enough and not flusher.knows_packs:
            return True
        return room_may_come(self._store, self._ledger, enough_backends=enough, exhausted=exhausted)

    @property
    def _fleet(self) -> Fleet | None:
        """The fleet that the newest head known here names."""
        generations = None if self.flusher is None else self.flusher.generations
        if generations is not None:
            return generations.fleets[-1]
        return None if self._base is None else self._base.fleets[-1]

    @property
    def fleets(self) -> tuple[Fleet, ...]:
        """The fleets that the newest head known here names."""
        generations = None if self.flusher is None else self.flusher.generations
        if generations is not None:
            return tuple(generations.fleets)
        return () if self._base is None else self._base.fleets

    async def sync(self) -> dict[str, Any]:
        """Publishes everything accepted so far; waits, visibly, for backends."""
        done = await (await self.owned()).sync()
        return {"generation": done.generation, "class": done.durability}

    async def published(self) -> None:
        """Returns when a published head has everything accepted so far; raises why none will."""
        await (await self.owned()).publish_all()

    def waits(self) -> list[str]:
        """What publishing waits for, or what went wrong with it; empty if it goes on."""
        if self.flusher is None:
            return [what for what in (self.failure, self.waiting) if what] or ["this mount does not own yet"]
        found = self.flusher.status()
        return [*found["waiting"], *([found["last_error"]] if found["last_error"] else [])]

    async def collect(self, *, dry_run: bool) -> dict[str, Any]:
        """Deletes the dead packs that may go (see `Flusher.collect`); `dry_run` only tells of them."""
        flusher = await self.owned()
        return flusher.dead_packs() if dry_run else await flusher.collect()

    async def owned(self) -> Flusher:
        """The flusher, once this mount owns the file system; raises why it does not, or does no more."""
        await self._ready.wait()
        if self.fenced is not None:
            raise self.fenced
        if self._cause is not None:
            raise self._cause
        if self.failure or self.flusher is None:
            raise QsfsBug(self.failure)
        return self.flusher

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those that hold, as far as is known here: a mount that does not own may not know the newest."""
        if self.flusher is not None:
            return self.flusher.pinning.snapshots
        return [] if self._base is None else snapshots_of(self._base.kept)

    async def stop(self, deadline: float) -> bool:
        """Makes a last generation if this mount owns; returns whether it was published."""
        if self.flusher is None or self.fenced is not None or self.failure:
            return False
        try:
            return await self.flusher.stop(deadline)
        except DeadlineExceeded:
            return False

    def status(self) -> dict[str, Any]:
        """Exposure, generations, backends, and what is waited for."""
        now_ns = self._clock.time_ns()
        found: dict[str, Any] = {
            "owner": self.flusher is not None and self.fenced is None,
            "failure": self.failure,
            "offline": self.offline,
            "snapshots": [[snapshot.name, snapshot.time_ns] for snapshot in self.snapshots],
            "full_waits": list(self.full_waits.values()),
            "packs_known": self.flusher is not None and self.flusher.knows_packs,
            "backends": backends_of(self.members, now_ns),
        }
        if self.flusher is not None:
            found["flush"] = self.flusher.status()
            found["copies"] = None if self.copies is None else self.copies.status()
        else:
            base_ns = None if self._base is None else self._base.time_ns
            found["exposure"] = self._exposure.report(base_ns, packs_known=False)
        if self._fleet is not None:
            assessment = assess(self._fleet, self._opened.superblock.code)
            entries = {entry.number for entry in self._fleet.entries}
            answering = sum(m.number in entries and m.identified and m.state is not State.DOWN for m in self.members)
            found["sentences"] = [*assessment.sentences(), assessment.may_be_down()]
            found["warnings"] = [
                *assessment.outage(len(entries) - answering),
                *assessment.warnings(),
                *(() if self.copies is None else self.copies.warnings()),
                *(
                    f"{member.name} is configured and not in the fleet; 'qsfs fleet list' says more"
                    for member in self.members
                    if member.entry.state == OUTSIDE
                ),
            ]
        return found
