"""Uploading anew what can still be had of packs that have fewer shards than they need.

Backends that lost what they had acknowledged, or more of them than may be lost, leave packs that cannot be made
whole again.  Their pages are not all gone.  Those that the cache holds are marked dirty at once (until the second look
has found a pack whole none of it is evicted), and the next cut or pre-copy has them in another pack.  Then what lies
wholly in shards that are left is fetched and marked too, a bounded part at a time: the code leaves data as they are in
the first k shards.  Of a metadata pack the ranges that need it are read anew from the local tables (`renewal.py`).
Which extents lie in such a pack is found by reading all of them, in steps on a worker thread: it is that rare.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import trio

from qsfs.errors import BackendError, Corrupt, DataLost, FormatMismatch
from qsfs.format.extent import ExtentEntry, PackKind
from qsfs.remote.anew import Anew
from qsfs.remote.context import FlushContext
from qsfs.remote.shards import ShardReader
from qsfs.remote.stored import StoredPack, entry_of
from qsfs.store.packs import pack_row
from qsfs.store.schema import PAGE, ExtentRow, PackRow, Table, split_u64_pair
from qsfs.store.snapshot import CommittedState
from qsfs.values import counted

_log = logging.getLogger(__name__)

_STEP_SECONDS = 0.1
_PAGES_A_ROUND = 1 << 18
"""Pages of the packs of which the extents are in memory together."""
_MARKED_BYTES = 256 << 20
"""Bytes of pages that were fetched and are on their way at a time: they cannot be evicted."""
_LONGEST_SECONDS = 600.0
_READ_SECONDS = 60.0
_RETRY_SECONDS = 60.0


class Salvage:
    """What is done about packs that are `lost`, whose numbers are added there; each once in a mount.

    `local_pages` counts the pages that were marked dirty because the cache had them, `rescued_pages` those that were
    read from shards that are left, `unreadable_pages` those that nobody has.  `metadata` are the ids of metadata packs
    among them, whose rows are all in the local tables.
    """

    def __init__(self, context: FlushContext, reader: ShardReader, *, short_of_room: Callable[[], bool]) -> None:
        self.lost: set[int] = set()
        self.metadata: set[bytes] = set()
        self.local_pages = 0
        self.rescued_pages = 0
        self.unreadable_pages = 0
        self._unreadable_packs = 0
        self._context = context
        self._reader = reader
        self._anew = Anew(context, reader)
        self._short_of_room = short_of_room
        limits = context.store.limits
        self._most_bytes = min(_MARKED_BYTES, (limits.high_bytes - limits.low_bytes) // 2)
        self._done: set[int] = set()
        self._to_read: set[int] = set()
        self._not_before = 0.0
        # Of each pack that is on its way the live bytes at which what was marked of it is elsewhere.
        self._on_its_way: dict[int, int] = {}
        self._marked_bytes = 0

    def report(self) -> dict[str, int]:
        """How many data packs were found lost since the mount began, what became of their bytes, and what is left."""
        return {
            "packs": len(self._done),
            "metadata_packs": len(self.metadata),
            "local_bytes": self.local_pages * PAGE,
            "rescued_bytes": self.rescued_pages * PAGE,
            "unreadable_bytes": self.unreadable_pages * PAGE,
            "unreadable_packs": self._unreadable_packs,
            "packs_to_read": len(self._to_read),
        }

    async def work(self) -> None:
        """Marks what is local of the packs that became known as lost since the last call."""
        extents = self._context.store.extents
        new = (number for number in self.lost - self._done if not extents.in_work(number))
        lost = frozenset(number for number in new if not self._is_metadata(number))
        if not lost:
            return
        # What lies in them may have been recorded just now.
        await self._context.committer.commit()
        found: Counter[int] = Counter()
        position: bytes | None = b""
        while position is not None:
            some, position = await self._context.in_thread(partial(self._extents, position, lost))
            for inode, row in some:
                await self._context.committer.room()
                found[row.pack] += self._anew.mark_local(row.pack, entry_of(inode, row))
                await trio.lowlevel.checkpoint()
        self._done |= lost
        self._to_read |= lost
        self.local_pages += found.total()
        for number in sorted(lost):
            pack = self._row(number)
            if pack is not None:
                _log.warning(
                    "pack %s has fewer shards than it needs: %s of it are local and are uploaded anew; what else "
                    "lives in it is looked for in the shards that are left", pack.pack_id.hex(),
                    counted(found[number], "page"),
                )  # fmt: skip

    async def rescue(self) -> None:
        """Reads some lost packs as far as their shards are left, and has that uploaded anew."""
        context = self._context
        if not self._to_read or context.clock.monotonic() < self._not_before:
            return
        if self._short_of_room() or not context.uploader.enough_backends():
            return
        numbers = self._next()
        extents: defaultdict[int, list[tuple[int, ExtentRow]]] = defaultdict(list)
        position: bytes | None = b""
        while position is not None and numbers:
            some, position = await context.in_thread(partial(self._extents, position, numbers))
            for inode, row in some:
                extents[row.pack].append((inode, row))
        for number in sorted(numbers):
            try:
                await self._read_pack(number, extents[number])
            except (BackendError, trio.TooSlowError) as error:
                _log.info("what is left of a lost pack is not read now, which is tried again: %s", error)
                self._not_before = context.clock.monotonic() + _RETRY_SECONDS
                return
            self._to_read.discard(number)

    def _next(self) -> frozenset[int]:
        """Some packs of which something may be left to read; the others are let go of."""
        chosen: set[int] = set()
        pages = 0
        for number in sorted(self._to_read):
            row = self._row(number)
            if row is None or not row.live:
                self._to_read.discard(number)
                continue
            chosen.add(number)
            pages += row.live // PAGE
            if pages >= _PAGES_A_ROUND:
                break
        return frozenset(chosen)

    async def _read_pack(self, number: int, extents: Iterable[tuple[int, ExtentRow]]) -> None:
        row = self._row(number)
        if row is None:
            return
        try:
            pack = StoredPack.of_row(row, self._context.sealer.code.params)
        except Corrupt as error:
            _log.error("%s", error)
            return
        entries = {found.ordinal: found for found in (entry_of(inode, row) for inode, row in extents)}
        absent = []
        for entry in entries.values():
            if self._anew.absent(number, entry):
                absent.append(entry)
            await trio.lowlevel.checkpoint()
        left = await self._left(pack, {shard for entry in absent for shard in entry.shards(pack.ref)})
        rescued = 0
        for entry in sorted(absent, key=lambda entry: entry.offset):
            if left.issuperset(entry.shards(pack.ref)):
                await self._wait_for_room()
                rescued += await self._mark(number, pack, entry)
        gone = sum(self._anew.absent(number, entry) for entry in absent)
        self.rescued_pages += rescued
        self.unreadable_pages += gone
        self._unreadable_packs += bool(gone)
        if gone:
            _log.error(
                "pack %s: read from the shards that are left, and uploaded anew: %s; %s cannot be read any more, and "
                "'qsfs fsck --deep' names the files", pack.name, counted(rescued, "page"), counted(gone, "page"),
            )  # fmt: skip
        elif absent:
            _log.warning("pack %s: all that lives in it was read from the shards that are left", pack.name)

    async def _left(self, pack: StoredPack, shards: Iterable[int]) -> set[int]:
        """Which of these data shards can be read."""
        left = set()
        for shard in sorted(shards):
            try:
                with trio.fail_after(_READ_SECONDS):
                    await self._reader.shards(pack, (shard,))
            except DataLost:
                continue
            left.add(shard)
        return left

    async def _mark(self, number: int, pack: StoredPack, entry: ExtentEntry) -> int:
        row = self._row(number)
        if row is None:
            return 0
        try:
            with trio.fail_after(_READ_SECONDS):
                marked = await self._anew.mark(number, pack, entry)
        except (DataLost, Corrupt, FormatMismatch) as error:
            _log.error("pack %s, extent %d: %s", pack.name, entry.ordinal, error)
            return 0
        self._on_its_way[number] = self._on_its_way.get(number, row.live) - marked * PAGE
        self._marked_bytes += marked * PAGE
        return marked

    async def _wait_for_room(self) -> None:
        """Waits until what was marked is uploaded, if that is much, and while the cache is short of room."""
        until = self._context.clock.monotonic() + _LONGEST_SECONDS
        while self._short_of_room() or self._marked_bytes >= self._most_bytes:
            rows = ((number, self._row(number)) for number in list(self._on_its_way))
            for number, row in rows:
                if row is None or row.live <= self._on_its_way[number]:
                    del self._on_its_way[number]
            if not self._on_its_way or self._context.clock.monotonic() >= until:
                self._on_its_way.clear()
                self._marked_bytes = 0
            if self._short_of_room() or self._marked_bytes:
                await trio.sleep(1)

    def _row(self, number: int) -> PackRow | None:
        """The row of a pack that somebody needs."""
        row = pack_row(self._context.store, number)
        return None if row is None or row.unnamed_since_ns else row

    def _is_metadata(self, number: int) -> bool:
        row = pack_row(self._context.store, number)
        if row is None or row.kind != PackKind.METADATA:
            return False
        self._done.add(number)
        self.metadata.add(row.pack_id)
        _log.warning(
            "metadata pack %s has fewer shards than it needs: until its rows are written anew, which begins now, "
            "nothing can be restored without this machine", row.pack_id.hex(),
        )  # fmt: skip
        return True

    def _extents(self, start: bytes, lost: frozenset[int]) -> tuple[list[tuple[int, ExtentRow]], bytes | None]:
        """For a worker thread: extents in `lost` packs, as of the last commit, and where to go on."""
        context = self._context
        found = []
        until = context.clock.monotonic() + _STEP_SECONDS
        with CommittedState(context.store.environment, context.clock) as state:
            for key, value in state.view.scan(Table.EXTENTS, start, None):
                encoded = bytes(value)
                if ExtentRow.pages_and_pack(encoded)[1] in lost:
                    inode, first = split_u64_pair(key)
                    found.append((inode, ExtentRow.decode(first, encoded)))
                if context.clock.monotonic() >= until:
                    return found, key + b"\0"
        return found, None
