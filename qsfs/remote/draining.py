"""Moving shards off backends that are being emptied, and forgetting those on backends that left the fleet.

Both go by the pack rows.  A shard on a draining backend is stored at another one before the row says so, and
stays where it was: older generations, whose rows still name the old place, find either.  A shard on a backend that the
newest head does not name counts as missing, and is made again from the others like any that is missing.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

import trio

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.format.fleet import Fleet
from qsfs.remote.complete import Completer
from qsfs.remote.context import FlushContext
from qsfs.store.environment import Environment
from qsfs.store.packs import pack_row, set_placement
from qsfs.store.schema import PackRow, Table, split_u64
from qsfs.store.snapshot import CommittedState
from qsfs.store.store import NEXT_PACK
from qsfs.values import counted

_log = logging.getLogger(__name__)

LATE_SECONDS = 600.0
"""How long after the fleet changed all rows are looked at once more: an upload that was under way then may have
recorded a shard late."""
AGAIN_SECONDS = 60.0
"""When packs are tried again that could not be moved."""
MOST_QUEUED = 4096
_STEP_SECONDS = 0.02
_ROUND_SECONDS = 0.8


@dataclass(slots=True)
class Placed:
    """What a look at all pack rows found: packs with shards on draining backends, and on none of the fleet.

    `packs` counts the former by backend.  Of each kind the first `MOST_QUEUED` are listed.  `unproven` counts those
    up to number `upto` that were not looked at a second time where they lie now.
    """

    upto: int = 0
    unproven: int = 0
    packs: Counter[int] = field(default_factory=Counter)
    draining: list[int] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)

    def add(self, number: int, row: PackRow, draining: Set[int], named: Set[int]) -> None:
        """Adds a row."""
        places = {place for place in row.placement if place >= 0}
        leaving = places & draining
        if draining and number <= self.upto and not row.looked_at and not row.unnamed_since_ns:
            self.unproven += 1
        if leaving and not row.unnamed_since_ns:
            self.packs.update(leaving)
            if len(self.draining) < MOST_QUEUED:
                self.draining.append(number)
        if places - named and len(self.outside) < MOST_QUEUED:
            self.outside.append(number)


def read_step(
    environment: Environment, clock: Clock, placed: Placed, start: bytes, draining: Set[int], named: Set[int]
) -> bytes | None:
    """Adds committed rows from `start` on for a moment; where to go on, None at the end.  For a worker thread."""
    until = clock.monotonic() + _STEP_SECONDS
    with CommittedState(environment, clock) as state:
        for key, value in state.view.scan(Table.PACKS, start, None):
            placed.add(split_u64(key), PackRow.decode(bytes(value)), draining, named)
            if clock.monotonic() >= until:
                return bytes(key) + b"\0"
    return None


class Drainer:
    """Works for one mount that owns.  `fleets` are those that the newest head names."""

    def __init__(self, context: FlushContext, completer: Completer, fleets: Callable[[], tuple[Fleet, ...]]) -> None:
        self.moved_packs = 0
        self.forgotten_shards = 0
        self._context = context
        self._completer = completer
        self._fleets = fleets
        self._seen: tuple[Fleet, ...] = ()
        self._left: Counter[int] | None = None
        self._emptied: frozenset[int] = frozenset()
        self._upto = 0
        self._unproven = 0
        self._queue: list[int] = []
        self._moved = False
        self._again_at = 0.0
        self._late_at = math.inf

    @property
    def leaving(self) -> frozenset[int]:
        """The backends that are being emptied, by the newest fleet."""
        fleets = self._fleets()
        return fleets[-1].draining if fleets else frozenset()

    @property
    def left(self) -> Mapping[int, int] | None:
        """How many packs have still a shard on each draining backend; None until that was looked at."""
        if self._left is None or self._seen != self._fleets():
            return None
        return {number: self._left[number] for number in sorted(self.leaving)}

    @property
    def held_back(self) -> str:
        """Why no backend may be retired as empty, by the last look, or "": what was moved may not be there yet.

        An acknowledgement of a 0-db is a page cache; the copies that were left are given up last.
        """
        if not self._unproven:
            return ""
        return (
            f"{counted(self._unproven, 'pack')} may have been moved and were not looked at a second time yet; that "
            "takes [cache] second_look_seconds once they are full"
        )

    def report(self) -> dict[str, object]:
        """For `status`: packs left by backend (None: not known yet), and what was done since the mount began."""
        left = self.left
        return {
            "packs_left": None if left is None else {str(number): count for number, count in left.items()},
            "moved_packs": self.moved_packs,
            "forgotten_shards": self.forgotten_shards,
        }

    async def count(self) -> Mapping[int, int]:
        """As `left`, by looking at all rows now."""
        await self._context.committer.commit()
        await self._look()
        return self.left or {}

    async def work(self) -> None:
        """Looks at all rows when that is due, then moves for a moment."""
        context = self._context
        fleets, now = self._fleets(), context.clock.monotonic()
        changed = fleets != self._seen
        rest = not self._queue and self._left is not None and self._left.total() > 0
        if changed or now >= self._late_at or (rest and (self._moved or now >= self._again_at)):
            await self._look()
            if not changed and now >= self._late_at:
                self._late_at = math.inf
        until = context.clock.monotonic() + _ROUND_SECONDS
        while self._queue and context.uploader.enough_backends() and context.clock.monotonic() < until:
            await self._move(self._queue.pop())

    async def _look(self) -> None:
        context, fleets = self._context, self._fleets()
        if not fleets:
            return
        named = frozenset(entry.number for fleet in fleets for entry in fleet.entries)
        if self.leaving != self._emptied:
            # What is sealed from now on has no place on them.
            self._emptied, self._upto = self.leaving, context.store.counter(NEXT_PACK)
        while True:
            placed = await self._read(named)
            await self._forget(placed.outside, named)
            if len(placed.outside) < MOST_QUEUED:
                break
            await context.committer.commit()
        if fleets != self._seen:
            self._late_at = context.clock.monotonic() + LATE_SECONDS
        self._seen = fleets
        self._left = placed.packs
        self._unproven = placed.unproven
        self._queue = placed.draining[::-1]
        self._moved = False
        self._again_at = context.clock.monotonic() + AGAIN_SECONDS

    async def _read(self, named: Set[int]) -> Placed:
        context, draining, placed = self._context, self.leaving, Placed(self._upto)
        position: bytes | None = b""
        while position is not None:
            start = position
            position = await context.in_thread(
                lambda: read_step(context.store.environment, context.clock, placed, start, draining, named)  # noqa: B023
            )
        return placed

    async def _forget(self, numbers: list[int], named: Set[int]) -> None:
        context = self._context
        forgotten = 0
        for number in numbers:
            row = pack_row(context.store, number)
            if row is None:
                continue
            placement = tuple(place if place in named else -1 for place in row.placement)
            gone = sum(place not in named and place >= 0 for place in row.placement)
            if not gone:
                continue
            await context.committer.room()
            changed = set_placement(context.store, number, placement, context.clock.time_ns())
            if changed is not None:
                context.ledger.note(number, changed)
            forgotten += gone
            failpoints.hit("drain.forgotten")
            await trio.lowlevel.checkpoint()
        self.forgotten_shards += forgotten
        if forgotten:
            _log.info("%d shards lay on backends that left the fleet; they are made again", forgotten)

    async def _move(self, number: int) -> None:
        row = pack_row(self._context.store, number)
        leaving = self.leaving
        if row is None or row.unnamed_since_ns or not self._completer.room_for(row.placement):
            return
        before = leaving.intersection(row.placement)
        if not before or not self._completer.can_be_read(row.placement) or not await self._completer.complete(number):
            return
        row = pack_row(self._context.store, number)
        after = frozenset() if row is None else leaving.intersection(row.placement)
        if self._left is not None:
            self._left.subtract(before - after)
        self._moved |= before != after
        self.moved_packs += not after
        failpoints.hit("drain.moved")
