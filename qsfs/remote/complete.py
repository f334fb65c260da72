"""Completing packs that are written and not full, and moving shards off backends that are being emptied."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence, Set

import trio

from qsfs import failpoints
from qsfs.backend.limits import rates_of
from qsfs.errors import CacheError, DataLost, QsfsError
from qsfs.remote.context import FlushContext
from qsfs.remote.members import Members, State
from qsfs.remote.shards import ShardReader, rebuild
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import pack_row, set_placement

_log = logging.getLogger(__name__)

PACK_SECONDS = 300.0
"""How long one attempt at a pack may take."""
_RETRY_SECONDS = 60.0
_LOST_RETRY_SECONDS = 3600.0
"""After which a pack is tried again of which too few shards are left: a backend may come back that nobody knew."""
_LOOKED_AT = 128
AT_ONCE = 4
"""Packs that are completed at a time, each in memory: fewer than the shards that a backend takes at a time, so that one
that was away takes those of new packs too."""
_LOOK_SECONDS = 0.5
"""How often it is looked whether more may be completed at a time; the pause after a pack that got no more."""


class Completer:
    """Rebuilds and stores missing shards, of several packs at a time.

    A shard on a backend that is `leaving` counts as missing, until another one has it.  The ledger is told
    of packs of which too few shards are left, `failed` of errors that are not the backends'.
    """

    def __init__(
        self,
        context: FlushContext,
        reader: ShardReader,
        leaving: Callable[[], Set[int]] = frozenset,
        failed: Callable[[QsfsError], None] = lambda _: None,
    ) -> None:
        self.completed = 0
        self.problem = ""
        self._context = context
        self._reader = reader
        self._leaving = leaving
        self._failed = failed
        self._not_before: dict[int, float] = {}
        self._round: list[int] = []
        self._answering: set[int] = set()
        self._under_way: set[int] = set()
        self._begun: set[int] = set()
        self._ended = trio.Event()
        self._got_more = True
        self._rebuilding = trio.Lock()

    async def complete_packs(self, nursery: trio.Nursery) -> int:
        """Looks at some packs, and begins in `nursery` with those that can become more than they are.

        Returns with how many, without waiting for their ends; a pack that cannot be completed now is tried again later.
        """
        self._see_who_answers(self._context.clock.monotonic())
        begun = 0
        for number in self._next():
            if not self._is_due(number):
                continue
            await self._place()
            if not self._is_due(number):
                continue
            self._not_before[number] = self._context.clock.monotonic() + _RETRY_SECONDS
            self._begun.add(number)
            nursery.start_soon(self._one, number)
            begun += 1
        return begun

    async def _one(self, number: int) -> None:
        more = False
        try:
            more = await self.complete(number)
        except QsfsError as error:
            self._failed(error)
        finally:
            self._got_more = more
            self._begun.discard(number)
            self._ended.set()
            self._ended = trio.Event()

    async def _place(self) -> None:
        """Waits until one more may be begun."""
        if not self._got_more:
            # Reading for nothing, again and again, would take from those who read for something.
            await trio.sleep(_LOOK_SECONDS)
        await trio.lowlevel.checkpoint()
        while len(self._begun) >= self._at_once:
            with trio.move_on_after(_LOOK_SECONDS):
                await self._ended.wait()

    @property
    def _at_once(self) -> int:
        """How many may be completed at a time: where others wait for a rate, or for a head, they come first."""
        uploader = self._context.uploader
        rates = [rates_of(member.data) for member in uploader.members]
        busy = uploader.hurried() or any(rate.upload.waits or rate.download.waits for rate in rates)
        return 1 if busy else AT_ONCE

    def _is_due(self, number: int) -> bool:
        if number in self._begun or self._not_before.get(number, 0.0) > self._context.clock.monotonic():
            return False
        return self._can_become_more(number)

    def _see_who_answers(self, now: float) -> None:
        """Who answers again may have brought back what was lost."""
        answering = _answering(self._context.uploader.members)
        if answering - self._answering:
            self._not_before = {number: min(at, now + _RETRY_SECONDS) for number, at in self._not_before.items()}
        self._answering = answering

    def _next(self) -> Iterator[int]:
        """The packs that are not full, in turn, some at a call: while a backend is away they may be very many."""
        incomplete = self._context.ledger.incomplete
        if not self._round:
            self._round = list(reversed(incomplete))
            self._not_before = {n: at for n, at in self._not_before.items() if n in incomplete}
        for _ in range(min(_LOOKED_AT, len(self._round))):
            yield self._round.pop()

    def _can_become_more(self, number: int) -> bool:
        context = self._context
        if number not in context.ledger.incomplete or number in context.arriving:
            return False
        row = pack_row(context.store, number)
        if row is None or row.unnamed_since_ns:
            context.ledger.forget(number)
            return False
        return self.room_for(row.placement) and self.can_be_read(row.placement)

    def can_be_read(self, placement: tuple[int, ...]) -> bool:
        """Whether enough backends answer that should have a shard, or all do, and it is soon known what is left.

        Else one silent backend would hold up each pack that is lost, and all others behind it, for as long as may be.
        """
        members = self._context.uploader.members
        answering = _answering(members)
        if sum(place in answering for place in placement) >= self._context.sealer.code.params.k:
            return True
        return len(answering) == len(members) and all(place < 0 or place in answering for place in placement)

    async def complete(self, number: int) -> bool:
        """Stores what a pack lacks, whatever was tried before; whether it has got any more.  Not if that is under way.

        Raises nothing of the backends'.
        """
        row = pack_row(self._context.store, number)
        # Whoever is late, of two, would leave shards that no row names.
        if row is None or row.unnamed_since_ns or number in self._under_way:
            return False
        self._under_way.add(number)
        try:
            pack = StoredPack.of_row(row, self._context.sealer.code.params)
            with trio.move_on_after(PACK_SECONDS) as scope:
                return await self._complete(number, pack, scope)
        except CacheError:
            raise
        except QsfsError as error:
            level = logging.WARNING
            if isinstance(error, DataLost):
                # Of those whose rows say so people were told, of all together.
                level = logging.DEBUG if number in self._context.ledger.lost else level
                self._context.ledger.lose(number, row)
                self._not_before[number] = self._context.clock.monotonic() + _LOST_RETRY_SECONDS
            self.problem = str(error)
            _log.log(level, "pack %s lacks shards and could not be completed: %s", row.pack_id.hex(), error)
        finally:
            self._under_way.discard(number)
        return False

    def room_for(self, placement: tuple[int, ...]) -> bool:
        """Whether some backend could take a shard of a pack that lies there."""
        return any(m.writable and m.number not in placement for m in self._context.uploader.members)

    async def _complete(self, number: int, pack: StoredPack, scope: trio.CancelScope) -> bool:
        context = self._context
        params = context.sealer.code.params
        leaving = self._leaving()
        there = tuple(-1 if place in leaving else place for place in pack.placement)
        missing = [n for n, place in enumerate(there) if place < 0]
        # Data shards are themselves; parity follows from all of them.
        needed = missing if max(missing, default=0) < params.k else range(params.k)
        upload = await context.uploader.upload(pack.ref, await self._rebuilt(pack, needed, missing), there)
        # What is still on its way ends by its own deadlines, and counts only once it is recorded.
        scope.deadline = math.inf
        await upload.finished.wait()
        failpoints.hit("flush.complete.stored")
        placement = tuple(
            old if new < 0 else new for old, new in zip(pack.placement, upload.placement, strict=True)
        )
        if placement == pack.placement:
            return False
        await context.committer.room()
        row = pack_row(context.store, number)
        if row is None or row.placement != pack.placement:
            return False
        changed = set_placement(context.store, number, placement, context.clock.time_ns())
        if changed is not None:
            context.ledger.note(number, changed)
            self._not_before.pop(number, None)
            self.completed += upload.full
        return True


    async def _rebuilt(self, pack: StoredPack, needed: Collection[int], missing: Sequence[int]) -> list[bytes]:
        """The missing shards, from those that are needed; what was read is let go of before they are uploaded."""
        context = self._context
        payloads = await self._reader.shards(pack, needed)
        # Of the places in memory that cuts and pre-copy need none is taken, of the threads one.
        async with self._rebuilding:
            return await context.in_turn(lambda: rebuild(context.sealer, pack, payloads, missing))


def _answering(members: Members) -> set[int]:
    return {member.number for member in members if member.identified and member.state is not State.DOWN}
