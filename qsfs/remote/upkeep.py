"""Upkeep of written packs: second looks, missing shards, shards of packs that were given up or are dead,
packs of which little lives, packs of what is read at a start, backends that are being emptied.

Each is a task of its own: what one of them waits for from backends must not hold up the others, by which
pages become evictable.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from qsfs.errors import QsfsError
from qsfs.format.fleet import Fleet
from qsfs.format.head import Head, HeadRef, Owner
from qsfs.remote.base import LocalHead
from qsfs.remote.chain import listed_ids
from qsfs.remote.collect import AbandonedCollector
from qsfs.remote.complete import Completer
from qsfs.remote.context import FlushContext
from qsfs.remote.dead_packs import DeadPackCollector
from qsfs.remote.draining import Drainer
from qsfs.remote.graveyard import CutView
from qsfs.remote.naming import Naming
from qsfs.remote.rewrite import Rewriter
from qsfs.remote.running import RunningTime
from qsfs.remote.salvage import Salvage
from qsfs.remote.second_look import SecondLook
from qsfs.remote.shards import ShardReader
from qsfs.remote.start_packs import StartPacker
from qsfs.remote.stray_collect import StrayCollector
from qsfs.remote.strays import StrayView
from qsfs.remote.unreclaimed import Unreclaimed

_log = logging.getLogger(__name__)

UPKEEP_SECONDS = 1.0
HEAD_SECONDS = 600.0
"""How often at most a head is published only so that something may be deleted."""
_LOST_HEAD_SECONDS = 10.0
"""How often one is that may name no lost metadata any more, as long as each names fewer."""
_LOOKS_A_ROUND = 32


@dataclass(frozen=True, slots=True)
class UpkeepView:
    """What was known when a cut began: what the head that follows may release for deletion."""

    given_up: frozenset[bytes]
    dead: CutView
    strays: StrayView


async def every_second(work: Callable[[], Awaitable[None]], failed: Callable[[QsfsError], None]) -> None:
    """Does `work` again and again, until cancelled; `failed` hears of errors that are not bugs."""
    while True:
        await trio.sleep(UPKEEP_SECONDS)
        try:
            await work()
        except QsfsError as error:
            failed(error)


class Upkeep:
    """Looks after the packs of one mount.

    `short_of_room` says whether the cache is.  `named` gives the ids of packs that heads list.
    """

    def __init__(
        self,
        context: FlushContext,
        reader: ShardReader,
        *,
        short_of_room: Callable[[], bool],
        named: Callable[[], frozenset[bytes]],
        base: Callable[[], LocalHead],
        published: Callable[[], HeadRef | None],
        owner_epoch: Callable[[], int],
        retention_seconds: float,
        rewrite_below: float,
        rewrite_bytes: int,
        fleets: Callable[[], tuple[Fleet, ...]] = tuple,
        renewing: Callable[[], bool] = lambda: False,
    ) -> None:
        """`renewing` says whether metadata are being written anew, and no head can list them yet.

        What the spool has given up by now was given up before this mount published its first head.
        """
        self.problem = ""
        self._context = context
        self._short_of_room = short_of_room
        self._named = named
        self._owner_epoch = owner_epoch
        self._base = base
        self._renewing = renewing
        self._lost_pause = _LOST_HEAD_SECONDS
        self._lost_named = 0
        self._seen: object = None
        self.salvage = Salvage(context, reader, short_of_room=short_of_room)
        self._completer = Completer(context, reader, lambda: self.drainer.leaving, self._failed)
        self.drainer = Drainer(context, self._completer, fleets)
        self._second_look = SecondLook(context)
        self._collector = AbandonedCollector(context)
        self._running = RunningTime(context.store, context.clock)
        self._time_goes_on = False
        self.dead = DeadPackCollector(
            context,
            reader,
            retention_seconds=retention_seconds,
            named=named,
            owner_epoch=owner_epoch,
            running=self._running,
        )
        self.strays = StrayCollector(
            context,
            Naming(context, reader, base=base, named=named),
            self._running,
            retention_seconds=retention_seconds,
            owner_epoch=owner_epoch,
            ready=lambda: published() == base().sealed.ref,
        )
        self.rewriter = Rewriter(
            context, reader, share=rewrite_below, short_of_room=short_of_room, most_bytes=rewrite_bytes
        )
        self.start = StartPacker(context, short_of_room=short_of_room)
        self._abandoned = self.given_up()
        self._head_at = context.clock.monotonic()

    # beginning

    def begin(self, owner: Owner, first: Head, base: LocalHead) -> None:
        """To be called once this mount owns as `owner`, before it forgets heads that it may have sent.

        `first` is its first head; what it records goes into the open group.
        """
        newest = first.predecessor if base.ours else None
        self._time_goes_on = self._running.resume(owner, newest, {base.sealed.ref, *self._context.spool.heads})
        self._running.note()

    async def take_over(self, last_pack: int) -> None:
        """Takes in what the ledger has found: packs up to number `last_pack` are from before this mount."""
        ledger, named = self._context.ledger, self._named()
        await self.dead.recall(goes_on=self._time_goes_on)
        await self.strays.recall(goes_on=self._time_goes_on)
        left = [n for pack_id, n in ledger.metadata.items() if n <= last_pack and pack_id not in named]
        self.dead.take_over(ledger.emptied, left)
        ledger.emptied.clear()
        self.rewriter.take_over(ledger.thin)
        ledger.thin.clear()

    # cuts

    def before_cut(self) -> UpkeepView:
        """To be called before the commit of a cut begins, which also records the running time."""
        self._running.note()
        return UpkeepView(self.given_up(), self.dead.before_cut(), self.strays.before_cut())

    def published(self, view: UpkeepView, ref: HeadRef, head: Head, before: Head) -> None:
        """A head was published and recorded; `view` is of before its cut, `before` was the base until then."""
        self._abandoned = view.given_up
        self.dead.published(view.dead, ref, head, before)
        self.strays.published(view.strays)
        self.rewriter.published()
        self._head_at = self._context.clock.monotonic()
        left = len(self.salvage.metadata & listed_ids(head)) if self.salvage.metadata else 0
        slower = left >= self._lost_named > 0
        self._lost_pause = min(2 * self._lost_pause, HEAD_SECONDS) if slower else _LOST_HEAD_SECONDS
        self._lost_named = left

    @property
    def head_due(self) -> bool:
        """Whether something on the backends waits for nothing but a head, and none was published for long.

        Else a file system at rest would keep it for ever.  Soon, where nothing could be restored as it is.
        """
        since = self._context.clock.monotonic() - self._head_at
        if since >= self._lost_pause and not self._renewing() and self.lost_is_named:
            return True
        return since >= HEAD_SECONDS and (self.dead.waits_for_a_head or self.strays.waits_for_a_head)

    @property
    def lost_is_named(self) -> bool:
        """Whether the published head names metadata packs that cannot be read: nothing could be restored by it."""
        lost = self.salvage.metadata
        return bool(lost) and not lost.isdisjoint(listed_ids(self._base().head))

    async def look_at_metadata(self) -> None:
        """Has `lost_is_named` know what the rows of packs say now."""
        self.salvage.take_metadata()
        base = self._base()
        seen = base.sealed.ref, frozenset(member.number for member in self._context.uploader.members)
        if seen != self._seen:
            await self.salvage.look_at_metadata(listed_ids(base.head))
            self._seen = seen

    def lost(self) -> dict[str, int]:
        """`Salvage.report`, and whether the published head names metadata packs that cannot be read."""
        return {**self.salvage.report(), "head_unreadable": int(self.lost_is_named)}

    def want_head(self) -> None:
        """Has a head that something waits for made with the next cut, however long ago the last one was."""
        self._head_at = -math.inf

    async def collect(self) -> dict[str, Any]:
        """Deletes what may go, and has backends scanned anew; what was deleted, and what waits for what."""
        before = self.report()
        await self.dead.finish()
        await self.strays.finish()
        self.strays.scan_now()
        report = self.report()
        return {
            **report,
            "deleted_now_packs": _deleted(report, "packs") - _deleted(before, "packs"),
            "deleted_now_bytes": _deleted(report, "bytes") - _deleted(before, "bytes"),
        }

    def report(self) -> dict[str, Any]:
        """What is dead on the backends, with `strays` for what nothing ever named or names any more.

        `unreclaimed` is what was deleted on each backend, whose disk has it still.
        """
        unreclaimed = Unreclaimed(self._context.store).report(self._context.uploader.members)
        return {**self.dead.report(), "strays": self.strays.report(), "unreclaimed": unreclaimed}

    def note_time(self) -> None:
        """Records the running time with the next commit if anything waits for it."""
        if self.dead.graveyard.counts_time or self.strays.strays.counts_time:
            self._running.note()

    @property
    def found_missing(self) -> int:
        """Shards that backends had acknowledged and lost, since the start."""
        return self._second_look.found_missing

    def given_up(self) -> frozenset[bytes]:
        """The ids of packs that were given up so far."""
        return frozenset(pack.pack_id for pack in self._context.spool.abandoned)

    async def run(self) -> None:
        """Works until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._complete, nursery)
            for work in (
                self._look,
                self.look_at_metadata,
                self.salvage.work,
                self.salvage.rescue,
                self._collect,
                self.dead.work,
                self.strays.work,
                self.rewriter.work,
                self.start.work,
                self._note_time,
                self.drainer.work,
            ):
                nursery.start_soon(every_second, work, self._failed)

    def _failed(self, error: QsfsError) -> None:
        if str(error) != self.problem:
            _log.error("upkeep of written packs: %s", error)
        self.problem = str(error)

    async def _note_time(self) -> None:
        if self._running.due:
            self.note_time()

    async def _look(self) -> None:
        await self._second_look.look(_LOOKS_A_ROUND, written_too=self._short_of_room())

    async def _complete(self, nursery: trio.Nursery) -> None:
        """Completes packs: without a pause while there are any that can be."""
        context = self._context
        while True:
            begun = 0
            try:
                if context.ledger.incomplete and context.uploader.enough_backends():
                    begun = await self._completer.complete_packs(nursery)
            except QsfsError as error:
                self._failed(error)
            if not begun:
                await trio.sleep(UPKEEP_SECONDS)

    async def _collect(self) -> None:
        known = self._abandoned
        done = not known or await self._collector.collect(known, self._named(), self._owner_epoch())
        if done and self._abandoned is known:
            self._abandoned = frozenset()


def _deleted(report: dict[str, Any], what: str) -> int:
    return int(report[f"deleted_{what}"] + report["strays"][f"deleted_{what}"])
