"""Deleting dead packs from the backends, once `graveyard.Graveyard` permits it.

Before anything is deleted a pack is looked at again: its row says that nothing lives in it, no head lists it,
and its own index is compared with the extent rows, so that a wrong count of live bytes costs space and never data.
Its row goes last, so what a crash interrupts is done again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import trio

from qsfs.errors import BackendError, Corrupt, DataLost, FormatMismatch
from qsfs.format.extent import ExtentEntry, PackKind
from qsfs.format.head import Head, HeadRef, KeptGeneration, head_key, open_head
from qsfs.format.keys import KeyRing
from qsfs.format.pack import TRAILER_SIZE, index_offset, open_index
from qsfs.format.shard import OVERHEAD
from qsfs.remote.chain import listed_ids
from qsfs.remote.collect import delete_on
from qsfs.remote.context import FlushContext
from qsfs.remote.deaths import DEATH_PREFIX, Death, death_key, read_deaths
from qsfs.remote.graveyard import CutView, DeadPack, Graveyard, KeptFacts
from qsfs.remote.members import Member, Members, State
from qsfs.remote.running import RunningTime
from qsfs.remote.shards import ShardReader
from qsfs.remote.stored import StoredPack
from qsfs.remote.unreclaimed import Unreclaimed
from qsfs.store.packs import pack_row
from qsfs.store.schema import PackRow, Table, u64
from qsfs.store.store import NEXT_PACK

_log = logging.getLogger(__name__)

PACKS_AT_ONCE = 16
AGAIN_SECONDS = 60.0
"""When packs are tried again that some backend did not answer for."""
_A_STEP = 1000
_READ_SECONDS = 60.0
_FACTS_REMEMBERED = 4096


class KeptHeads:
    """What kept generations name, read from their heads once."""

    def __init__(self, members: Members, keys: KeyRing) -> None:
        self._members = members
        self._keys = keys
        self._known: dict[HeadRef, KeptFacts] = {}

    def learn(self, ref: HeadRef, head: Head) -> KeptFacts:
        """Remembers what a head names."""
        facts = KeptFacts(head.generation, head.counters.get(NEXT_PACK.decode()), listed_ids(head))
        if len(self._known) >= _FACTS_REMEMBERED:
            self._known.clear()
        self._known[ref] = facts
        return facts

    async def facts(self, kept: Iterable[KeptGeneration], below: int) -> list[KeptFacts]:
        """Of each kept generation; what one names that is not older than `below` is not asked for."""
        found = []
        for generation in kept:
            ref = generation.head
            facts = self._known.get(ref)
            if facts is None and ref.generation < below:
                facts = await self._read(ref)
            found.append(facts or KeptFacts(ref.generation))
        return found

    async def _read(self, ref: HeadRef) -> KeptFacts | None:
        key = head_key(self._keys.fsid, ref)
        for member in self._members:
            if not member.identified or member.state is not State.UP:
                continue
            try:
                value = await member.control.get(key)
                if value is not None:
                    return self.learn(ref, open_head(key, value, self._keys))
            except BackendError as error:
                member.failed(error)
            except (Corrupt, FormatMismatch) as error:
                _log.debug("backend %s: %s", member.name, error)
        return None


class DeadPackCollector:
    """Sees packs die, asks the graveyard what may go, and deletes that.

    `named` gives the ids of the metadata packs that the base or a head that may have been sent lists; `running`
    is what the retention time is counted by (default: by this mount alone).
    """

    def __init__(
        self,
        context: FlushContext,
        reader: ShardReader,
        *,
        retention_seconds: float,
        named: Callable[[], frozenset[bytes]],
        owner_epoch: Callable[[], int],
        running: RunningTime | None = None,
    ) -> None:
        self.graveyard = Graveyard(retention_seconds)
        self._running = running or RunningTime(context.store, context.clock)
        self._deaths: dict[int, Death] = {}
        self._unanswered: dict[int, frozenset[str]] = {}
        self._unreclaimed = Unreclaimed(context.store)
        self._context = context
        self._reader = reader
        self._named = named
        self._owner_epoch = owner_epoch
        self._heads = KeptHeads(context.uploader.members, context.sealer.keys)
        self._published: list[tuple[CutView, Head, frozenset[bytes]]] = []
        self._kept: tuple[KeptGeneration, ...] = ()
        self._cleared: dict[int, set[int]] = {}
        self._not_before: dict[int, float] = {}
        self._turn = trio.Lock()

    # what dies

    async def recall(self, *, goes_on: bool) -> None:
        """Reads what earlier mounts have recorded of dead packs; unless their time `goes_on`, forgets it.

        To be called before `take_over`, and before anything dies.
        """
        context = self._context
        position: bytes | None = DEATH_PREFIX
        while position is not None:
            start = position
            read = await context.in_thread(
                lambda: read_deaths(context.store.environment, context.clock, start)  # noqa: B023 (awaited at once)
            )
            for number, death in read.found:
                if goes_on and death is not None:
                    self._deaths[number] = death
                else:
                    self.graveyard.news.add(number)
            position = read.resume

    def take_over(self, emptied: Iterable[int], left_behind: Iterable[int]) -> None:
        """Takes in what is dead when a mount begins: data packs without live bytes, metadata packs no head lists."""
        for number in (*emptied, *left_behind):
            self._died(number)
        # Packs that are gone, or that were not dead after all.
        self.graveyard.news.update(self._deaths)
        self._deaths.clear()

    def look(self) -> None:
        """Takes in the data packs that lost their last live bytes with the groups sealed since the last look."""
        emptied = self._context.store.extents.emptied
        for number in list(emptied):
            self._died(number)
        emptied.clear()

    def _died(self, number: int) -> None:
        row = pack_row(self._context.store, number)
        if row is None or (row.kind == PackKind.DATA and row.live) or self._context.store.extents.in_work(number):
            return
        n, k = self._context.sealer.code.params.n, self._context.sealer.code.params.k
        stored = row.body_length * n // k
        self._context.ledger.forget(number)
        dead = DeadPack(number, row.pack_id, row.kind == PackKind.DATA, stored)
        death = self._deaths.pop(number, None)
        if death is not None and death.pack_id == row.pack_id:
            self.graveyard.remember(dead, death)
        else:
            self.graveyard.died(dead)

    # cuts and heads

    def before_cut(self) -> CutView:
        """To be called before the commit of a cut begins."""
        self.look()
        return self.graveyard.before_cut(self._running.seconds)

    def published(self, view: CutView, ref: HeadRef, head: Head, before: Head) -> None:
        """A head was published and recorded; `view` is of before its cut, `before` was the base until then."""
        self._heads.learn(ref, head)
        self._published.append((view, head, listed_ids(before) - listed_ids(head)))

    async def _settle(self) -> None:
        """Works off what was published, in steps."""
        while self._published:
            view, head, left_behind = self._published.pop(0)
            self.graveyard.published(view, head.generation)
            self._kept = head.kept
            for pack_id in left_behind:
                number = self._context.ledger.metadata.get(pack_id)
                if number is not None:
                    self._died(number)
            waiting = self.graveyard.waiting
            if not waiting:
                continue
            newest = max(self.graveyard.without_of(number) or 0 for number in waiting)
            kept = await self._heads.facts(self._kept, newest)
            for start in range(0, len(waiting), _A_STEP):
                self.graveyard.release(waiting[start : start + _A_STEP], kept, self._running.seconds)
                await trio.lowlevel.checkpoint()
        await self._record()

    async def _record(self) -> None:
        """Records with the open group what has become known of dead packs, in steps."""
        store, news = self._context.store, self.graveyard.news
        while news:
            await self._context.committer.room()
            for number in [number for _, number in zip(range(_A_STEP), news, strict=False)]:
                news.discard(number)
                death, key = self.graveyard.death(number), death_key(number)
                if death is not None:
                    store.layers.put(Table.LOCAL, key, death.encode())
                elif store.get(Table.LOCAL, key) is not None:
                    store.layers.delete(Table.LOCAL, key)
            await trio.lowlevel.checkpoint()

    @property
    def waits_for_a_head(self) -> bool:
        """Whether heads alone would bring any dead pack further; see `Graveyard.waits_for_a_head`."""
        return self.graveyard.waits_for_a_head(self._running.seconds)

    # deleting

    def report(self) -> dict[str, Any]:
        """How many dead packs there are, and what they wait for; bytes are those that their shards take."""
        waits_for = sorted(frozenset().union(*self._unanswered.values()))
        return {**self.graveyard.report(self._running.seconds), "unanswered": waits_for}

    async def work(self) -> None:
        """One step: settles what was published, deletes some of what may go."""
        async with self._turn:
            await self._step()

    async def finish(self) -> None:
        """Deletes all that may go now; what some backend does not answer for stays for later."""
        async with self._turn:
            while await self._step():
                pass

    async def _step(self) -> bool:
        """Whether there was anything to delete."""
        self.look()
        await self._settle()
        now = self._context.clock.monotonic()
        candidates = self.graveyard.permitted(len(self._not_before) + PACKS_AT_ONCE)
        due = [dead for dead in candidates if now >= self._not_before.get(dead.number, -math.inf)]
        marked = [dead for dead in due[:PACKS_AT_ONCE] if await self._mark(dead)]
        if marked:
            # Who meets the row later, after a crash too, shall know why shards of the pack are missing.
            await self._context.committer.commit()
        for dead in marked:
            await self._collect(dead)
        return bool(due)

    async def _mark(self, dead: DeadPack) -> bool:
        """Looks at a pack again, and marks its row if it may go; whether it is marked."""
        row = self._row(dead)
        if row is not None and row.unnamed_since_ns:
            return True
        if row is not None and dead.data:
            try:
                with trio.fail_after(_READ_SECONDS):
                    pack = StoredPack.of_row(row, self._context.sealer.code.params)
                    entries = await read_index(self._reader, pack, self._context.sealer.keys)
            except (trio.TooSlowError, BackendError):
                self._later(dead, {f"too many of the backends of pack {dead.pack_id.hex()}"})
                return False
            except DataLost as error:
                # Nobody can read it any more, so nobody needs it: the count of its live bytes must do.
                _log.info("pack %s: is dead, and its index cannot be read (%s)", dead.pack_id.hex(), error)
                entries = ()
            except (Corrupt, FormatMismatch) as error:
                # The row may be what is damaged, and with it the count of live bytes.
                _log.error(
                    "pack %s: its row says that nothing lives in it, and does not fit the pack (%s); it stays; "
                    "unmount, and run 'qsfs fsck --deep'",
                    dead.pack_id.hex(),
                    error,
                )
                self._forget(dead)
                return False
            row = self._row(dead) if self._nothing_lives_in(dead, entries) else None
        if row is None:
            self._forget(dead)
            return False
        mark = replace(row, live=0, unnamed_since_ns=self._context.clock.time_ns())
        self._context.store.layers.put(Table.PACKS, u64(dead.number), mark.encode())
        return True

    async def _collect(self, dead: DeadPack) -> None:
        """Deletes one marked pack, and its row once every backend has answered."""
        row = pack_row(self._context.store, dead.number)
        missing = set() if row is None else await self._delete(dead, row)
        if missing:
            self._later(dead, missing)
            return
        self._context.store.layers.delete(Table.PACKS, u64(dead.number))
        self._context.ledger.metadata.pop(dead.pack_id, None)
        self._let_go(dead)
        self.graveyard.gone(dead)
        _log.debug("pack %s: was dead, its shards were deleted", dead.pack_id.hex())

    def _later(self, dead: DeadPack, missing: Iterable[str]) -> None:
        self._unanswered[dead.number] = frozenset(missing)
        self._not_before[dead.number] = self._context.clock.monotonic() + AGAIN_SECONDS

    def _forget(self, dead: DeadPack) -> None:
        """Leaves a pack alone until the next mount."""
        self._let_go(dead)
        self.graveyard.forget(dead.number)

    def _let_go(self, dead: DeadPack) -> None:
        for known in (self._not_before, self._cleared, self._unanswered):
            known.pop(dead.number, None)

    def _nothing_lives_in(self, dead: DeadPack, entries: Iterable[ExtentEntry]) -> bool:
        """Compares a pack's own index with the extent rows; says so in the log where they contradict its row."""
        for entry in entries:
            stop = entry.first_page + entry.pages
            rows = self._context.store.extents.overlapping(entry.inode, entry.first_page, stop)
            if any(row.pack == dead.number for row in rows):
                _log.error(
                    "pack %s: its row says that nothing lives in it, but inode %d has pages of it; it stays; "
                    "unmount, and run 'qsfs fsck --repair'",
                    dead.pack_id.hex(),
                    entry.inode,
                )
                return False
        return True

    def _row(self, dead: DeadPack) -> PackRow | None:
        row = pack_row(self._context.store, dead.number)
        if row is None or row.pack_id != dead.pack_id or row.owner_epoch > self._owner_epoch():
            return None
        alive = bool(row.live) if dead.data else dead.pack_id in self._named()
        return None if alive else row

    async def _delete(self, dead: DeadPack, row: PackRow) -> set[str]:
        """Deletes every shard where it was placed; returns the backends that did not answer."""
        pack = StoredPack.of_row(row, self._context.sealer.code.params)
        cleared = self._cleared.setdefault(dead.number, set())
        keys = shards_by_member(pack, self._context.sealer.keys.fsid)
        members = self._context.uploader.members
        missing: set[str] = set()

        async def clear(member: Member, shards: Sequence[bytes]) -> None:
            gone = await delete_on(member, shards)
            if gone is None:
                missing.add(member.name)
            else:
                self._unreclaimed.add(member, gone * (pack.ref.shard_size + OVERHEAD))
                cleared.add(member.number)

        async with trio.open_nursery() as nursery:
            for place, shards in keys.items():
                member = members.by_number(place)
                if place in cleared:
                    continue
                if member is None or not member.identified or member.state is not State.UP:
                    missing.add(f"entry {place} of the fleet" if member is None else member.name)
                else:
                    nursery.start_soon(clear, member, shards)
        return missing


def shards_by_member(pack: StoredPack, fsid: bytes) -> dict[int, list[bytes]]:
    """The keys of the shards of a pack, by the number of the fleet entry where each was placed."""
    found: dict[int, list[bytes]] = {}
    for number, place in enumerate(pack.placement):
        if place >= 0:
            found.setdefault(place, []).append(pack.key(fsid, number))
    return found


async def read_index(reader: ShardReader, pack: StoredPack, keys: KeyRing) -> tuple[ExtentEntry, ...]:
    """What a pack itself says that it holds, from the data shards at its end.

    Raises `DataLost`, `Unavailable`, and `Corrupt` if the index does not authenticate.
    """
    ref = pack.ref
    first = (ref.body_length - TRAILER_SIZE) // ref.shard_size
    shards = await reader.shards(pack, range(first, ref.k))
    tail = b"".join(shards[number] for number in range(first, ref.k))
    start = index_offset(keys, ref, tail)
    if start < first * ref.shard_size:
        earlier = range(start // ref.shard_size, first)
        shards = await reader.shards(pack, earlier)
        tail = b"".join([*(shards[number] for number in earlier), tail])
    return open_index(keys, ref, tail)
