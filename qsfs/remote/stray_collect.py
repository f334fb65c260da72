"""Finding strays and deleting them: what `scanning` meets, `naming` judges, and `strays` permits.

Never by the absence of an answer: where a table, a head or the metadata of a generation cannot be read, everything
stays as it is and is asked again later.  The judgement is made twice, when a pack is met and just before its shards
are deleted.  Shards are deleted where they were met, one by one, and the row goes last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import trio

from qsfs import failpoints
from qsfs.errors import QsfsError
from qsfs.format.shard import shard_key
from qsfs.remote.collect import delete_on
from qsfs.remote.context import FlushContext
from qsfs.remote.members import State
from qsfs.remote.naming import Naming
from qsfs.remote.running import RunningTime
from qsfs.remote.scanning import SCAN_PREFIX, Scanner, Sieve, Walk, scan_key
from qsfs.remote.strays import STRAY_PREFIX, Stray, Strays, StrayView, stray_key
from qsfs.remote.unreclaimed import Unreclaimed
from qsfs.store.schema import Table

_log = logging.getLogger(__name__)

PACKS_AT_ONCE = 256
"""How many are judged together: each judgement reads all that may name a pack."""
AGAIN_SECONDS = 60.0
"""When a judgement that could not be made, or a deletion that some backend did not answer, is tried again."""
SIEVE_SECONDS = 6 * 3600.0
_A_STEP = 256


class StrayCollector:
    """Looks for strays, and deletes those that may go.

    `ready` is whether the base is a generation that this mount has published and recorded: until then there may be one
    on the backends that only its head knows.
    """

    def __init__(
        self,
        context: FlushContext,
        naming: Naming,
        running: RunningTime,
        *,
        retention_seconds: float,
        owner_epoch: Callable[[], int],
        ready: Callable[[], bool],
    ) -> None:
        self.strays = Strays(retention_seconds)
        self.problem = ""
        self._context = context
        self._naming = naming
        self._running = running
        self._owner_epoch = owner_epoch
        self._ready = ready
        self._scanner = Scanner(context.uploader.members, context.sealer.keys.fsid, context.clock)
        self._unreclaimed = Unreclaimed(context.store)
        self._sieve_until = -math.inf
        self._judge_not_before = -math.inf
        self._not_before: dict[bytes, float] = {}
        self._unanswered: dict[bytes, frozenset[str]] = {}
        self._turn = trio.Lock()

    async def recall(self, *, goes_on: bool) -> None:
        """Reads what earlier mounts have recorded; unless their time `goes_on`, forgets all but how far walks are."""
        layers = self._context.store.layers
        for key, row in list(layers.scan(Table.LOCAL, SCAN_PREFIX, b"scan;")):
            walk = Walk.decode(row)
            if walk is not None and goes_on and len(key) == len(scan_key(0)):
                self._scanner.walks[int.from_bytes(key[len(SCAN_PREFIX) :], "big")] = walk
        found = []
        start: bytes | None = STRAY_PREFIX
        while start is not None:
            rows = layers.scan(Table.LOCAL, start, b"stray;")
            part = [row for _, row in zip(range(_A_STEP), rows, strict=False)]
            for key, row in part:
                stray = Stray.decode(key, row)
                if stray is None or not goes_on:
                    layers.delete(Table.LOCAL, key)
                else:
                    found.append(stray)
            start = part[-1][0] + b"\0" if part else None
            await trio.lowlevel.checkpoint()
        for stray in found:
            self.strays.remember(stray, self._running.seconds)
        self.strays.news.clear()

    # cuts and heads

    def before_cut(self) -> StrayView:
        """To be called before the commit of a cut begins."""
        return self.strays.before_cut(self._running.seconds)

    def published(self, view: StrayView) -> None:
        """A head was published and recorded; `view` is of before its cut."""
        self.strays.published(view)

    # working

    def scan_now(self) -> None:
        """Has all backends walked anew."""
        self._scanner.restart()
        self._sieve_until = -math.inf

    async def work(self) -> None:
        """One step: deletes some of what may go, and reads on in what a backend lists."""
        if not self._ready():
            return
        async with self._turn:
            await self._delete_some()
            await self._scan()

    async def finish(self) -> None:
        """Deletes all that may go now; what some backend does not answer for stays for later."""
        async with self._turn:
            while self._ready() and await self._delete_some():
                pass

    # scanning

    async def _scan(self) -> None:
        clock, scanner = self._context.clock, self._scanner
        if clock.monotonic() < self._judge_not_before:
            return
        if scanner.due(self._running.seconds) and clock.monotonic() >= self._sieve_until:
            salt = int.from_bytes(clock.random_bytes(8), "big")
            scanner.sieve = Sieve(salt)
            self._naming.seen = scanner.sieve.add
            await self._naming.tables()
            self._sieve_until = clock.monotonic() + SIEVE_SECONDS
        if not scanner.round_over(self._running.seconds):
            await scanner.page(self._running.seconds, self._owner_epoch())
        if scanner.round_over(self._running.seconds):
            await self._judge()

    async def _judge(self) -> None:
        """Finds out which of a round's packs nothing names, and records them with how far the round got."""
        scanner = self._scanner
        candidates = dict(scanner.candidates)
        try:
            unnamed = await self._naming.unnamed({p: found.owner_epoch for p, found in candidates.items()})
        except QsfsError as error:
            self._cannot_judge(error)
            return
        self.problem = ""
        now, backends = self._running.seconds, len(self._context.uploader.members)
        for count, (pack_id, found) in enumerate(candidates.items(), start=1):
            if pack_id in unnamed:
                self.strays.met(pack_id, found.owner_epoch, found.places, now, backends=backends)
            else:
                self.strays.drop(pack_id)
            if not count % _A_STEP:
                await trio.lowlevel.checkpoint()
        for number in scanner.dealt_with():
            self._context.store.layers.put(Table.LOCAL, scan_key(number), scanner.walks[number].encode())
        await self._record()

    def _cannot_judge(self, error: QsfsError) -> None:
        self.problem = f"whether anything names what lies on the backends cannot be told now: {error}"
        self._judge_not_before = self._context.clock.monotonic() + AGAIN_SECONDS
        _log.info("%s", self.problem)

    async def _record(self) -> None:
        """Records with the open group what has become known of strays, in steps."""
        layers, news = self._context.store.layers, self.strays.news
        while news:
            await self._context.committer.room()
            for pack_id in [pack_id for _, pack_id in zip(range(_A_STEP), news, strict=False)]:
                news.discard(pack_id)
                stray = self.strays.get(pack_id)
                if stray is not None:
                    layers.put(Table.LOCAL, stray_key(pack_id), stray.encode())
                else:
                    layers.delete(Table.LOCAL, stray_key(pack_id))
            await trio.lowlevel.checkpoint()

    # deleting

    async def _delete_some(self) -> bool:
        """Whether there was anything to delete."""
        clock = self._context.clock
        if clock.monotonic() < self._judge_not_before:
            return False
        candidates = self.strays.permitted(len(self._not_before) + PACKS_AT_ONCE)
        due = [s for s in candidates if clock.monotonic() >= self._not_before.get(s.pack_id, -math.inf)]
        due = due[:PACKS_AT_ONCE]
        if not due:
            return False
        try:
            unnamed = await self._naming.unnamed({stray.pack_id: stray.owner_epoch for stray in due})
        except QsfsError as error:
            self._cannot_judge(error)
            return False
        self.problem = ""
        epoch = self._owner_epoch()
        for stray in due:
            if stray.pack_id in unnamed and stray.owner_epoch <= epoch:
                await self._delete(stray)
            else:
                _log.info("pack %s was met as named by nothing, and is named now; it stays", stray.pack_id.hex())
                self.strays.drop(stray.pack_id)
        await self._record()
        return True

    async def _delete(self, stray: Stray) -> None:
        """Deletes the shards of one stray where they were met."""
        context = self._context
        fsid, members = context.sealer.keys.fsid, context.uploader.members
        keys: dict[int, list[bytes]] = {}
        for place in stray.places:
            key = shard_key(fsid, stray.owner_epoch, stray.pack_id, place.shard)
            keys.setdefault(place.member, []).append(key)
        missing: set[str] = set()

        async def clear(number: int, wanted: list[bytes]) -> None:
            member = members.by_number(number)
            if member is None:
                # It has left the fleet; should it come back, a scan meets what it holds.
                self.strays.cleared(stray.pack_id, [number])
                return
            gone = await delete_on(member, wanted) if member.identified and member.state is State.UP else None
            if gone is None:
                missing.add(member.name)
            else:
                failpoints.hit("stray.deleted.one")
                sizes = sum(place.size for place in stray.places if place.member == number)
                self._unreclaimed.add(member, sizes * gone // len(wanted))
                self.strays.cleared(stray.pack_id, [number])

        async with trio.open_nursery() as nursery:
            for number, wanted in keys.items():
                nursery.start_soon(clear, number, wanted)
        if missing:
            self._not_before[stray.pack_id] = context.clock.monotonic() + AGAIN_SECONDS
            self._unanswered[stray.pack_id] = frozenset(missing)
        else:
            self._not_before.pop(stray.pack_id, None)
            self._unanswered.pop(stray.pack_id, None)
            _log.debug("pack %s: nothing named it, its shards were deleted", stray.pack_id.hex())

    # telling

    @property
    def waits_for_a_head(self) -> bool:
        """Whether only a head is missing: to begin with at all, or to delete what has waited long enough."""
        return not self._ready() or self.strays.waits_for_a_head(self._running.seconds)

    def report(self) -> dict[str, Any]:
        """What is known of strays, and of each backend when its last scan ended (wall time, ns; 0: not yet)."""
        walks = self._scanner.walks
        scans = []
        for member in self._context.uploader.members:
            walk = walks.get(member.number)
            scans.append(
                {
                    "backend": member.name,
                    "ended_ns": 0 if walk is None else walk.ended_ns,
                    "under_way": walk is not None and walk.under_way,
                }
            )
        return {
            **self.strays.report(self._running.seconds),
            "unanswered": sorted(frozenset().union(*self._unanswered.values())),
            "problem": self.problem,
            "scans": scans,
        }
