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
from collections.abc import Callable, Iterable, Set
from functools import partial

import trio

from qsfs.errors import BackendError, CacheError, Corrupt, DataLost, FormatMismatch, QsfsError
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
_READ_SECONDS = 20.0
_NAMED = 3
_RETRY_SECONDS = 60.0
_PAUSE_SECONDS = 300.0
_LOST_RETRY_SECONDS = 3600.0
"""After which what nobody has is looked for again: a backend may have come back with an old copy."""


class Salvage:
    """What is done about packs that the ledger knows as lost.

    `local_pages` counts the pages that were marked dirty because the cache had them, `rescued_pages` those that were
    read from shards that are left.  `metadata` are the ids of metadata packs among them, whose rows are all in the
    local tables.
    """

    def __init__(self, context: FlushContext, reader: ShardReader, *, short_of_room: Callable[[], bool]) -> None:
        self.metadata: set[bytes] = set()
        self.local_pages = 0
        self.rescued_pages = 0
        self._context = context
        self._reader = reader
        self._anew = Anew(context, reader)
        self._short_of_room = short_of_room
        limits = context.store.limits
        self._most_bytes = min(_MARKED_BYTES, (limits.high_bytes - limits.low_bytes) // 2)
        # Packs that `work` has dealt with; of data packs when to read what is left, and the pages that nobody has.
        self._done: set[int] = set()
        self._to_read: dict[int, float] = {}
        self._gone: dict[int, int] = {}
        # Of each pack that is on its way the live bytes at which what was marked of it is elsewhere.
        self._on_its_way: dict[int, int] = {}
        self._marked_bytes = 0

    def report(self) -> dict[str, int]:
        """How many data packs are lost, what became of their bytes since the mount began, and what is left to read."""
        return {
            "packs": len(self._to_read.keys() | self._gone.keys()),
            "metadata_packs": len(self.metadata),
            "local_bytes": self.local_pages * PAGE,
            "rescued_bytes": self.rescued_pages * PAGE,
            "unreadable_bytes": sum(self._gone.values()) * PAGE,
            "unreadable_packs": sum(pages > 0 for pages in self._gone.values()),
            "packs_to_read": len(self._to_read.keys() - self._gone.keys()),
        }

    @property
    def unreadable(self) -> frozenset[int]:
        """The numbers of packs of which nobody has all that lives in them."""
        return frozenset(number for number, pages in self._gone.items() if pages)

    async def work(self) -> None:
        """Marks what is local of the packs that became known as lost since the last call."""
        context = self._context
        self._let_go()
        self.take_metadata()
        extents = context.store.extents
        lost = frozenset(number for number in context.ledger.lost - self._done if not extents.in_work(number))
        if not lost:
            return
        # What lies in them may have been recorded just now.
        await context.committer.commit()
        found: Counter[int] = Counter()
        position: bytes | None = b""
        while position is not None:
            some, position = await context.in_thread(partial(self._extents, position, lost))
            for inode, row in some:
                await context.committer.room()
                found[row.pack] += self._anew.mark_local(row.pack, entry_of(inode, row))
                await trio.lowlevel.checkpoint()
        self._done |= lost
        self.local_pages += found.total()
        names = []
        for index, number in enumerate(sorted(lost)):
            if not index % 64:
                await trio.lowlevel.checkpoint()
            pack = self._row(number)
            if pack is not None and pack.kind != PackKind.METADATA and (pack.live or found[number]):
                self._to_read[number] = 0.0
                names.append(pack.pack_id.hex())
        if names:
            _log.warning(
                "%s has fewer shards than it needs: %s are local and are uploaded anew; what else lives there is "
                "looked for in the shards that are left", _each_of(names), counted(found.total(), "page"),
            )  # fmt: skip

    def _let_go(self) -> None:
        """Forgets packs that are gone, or have come back."""
        if gone := self._done - self._context.ledger.lost:
            self._done -= gone
            for number in gone:
                self._to_read.pop(number, None)
                self._gone.pop(number, None)

    # metadata

    def take_metadata(self) -> None:
        """Takes in the metadata packs that the ledger knows as lost."""
        for number in self._context.ledger.lost_metadata - self._done:
            self._done.add(number)
            row = pack_row(self._context.store, number)
            if row is not None:
                self._lost_metadata(row)

    async def look_at_metadata(self, named: Set[bytes]) -> None:
        """Takes in those metadata packs, given by their ids, of which too few shards are on backends of the fleet.

        Nobody is asked: writing one anew that could still be read costs an upload.
        """
        ledger, members = self._context.ledger, self._context.uploader.members
        there = {member.number for member in members}
        self.metadata -= {pack_id for pack_id in self.metadata if self._is_back(pack_id, there)}
        for index, pack_id in enumerate(sorted(named - self.metadata)):
            row = self._row(ledger.metadata.get(pack_id, 0))
            if row is not None and not row.readable_on(there):
                self._lost_metadata(row)
            if not index % 64:
                await trio.lowlevel.checkpoint()

    def _is_back(self, pack_id: bytes, there: Set[int]) -> bool:
        number = self._context.ledger.metadata.get(pack_id, 0)
        row = None if number in self._context.ledger.lost else self._row(number)
        return row is not None and row.readable_on(there)

    def _lost_metadata(self, row: PackRow) -> None:
        if row.pack_id not in self.metadata:
            self.metadata.add(row.pack_id)
            _log.warning(
                "metadata pack %s has fewer shards than it needs: if the newest generation needs it, nothing can be "
                "restored without this machine until its rows are written anew, which begins now", row.pack_id.hex(),
            )  # fmt: skip

    # what is left on the backends

    async def rescue(self) -> None:
        """Reads some lost packs as far as their shards are left, and has that uploaded anew.

        What applications have read of them meanwhile is uploaded too, also where there is no room for more.
        """
        context = self._context
        numbers = self._next()
        if not numbers:
            return
        extents: defaultdict[int, list[tuple[int, ExtentRow]]] = defaultdict(list)
        position: bytes | None = b""
        while position is not None:
            some, position = await context.in_thread(partial(self._extents, position, numbers))
            for inode, row in some:
                extents[row.pack].append((inode, row))
        rescued, names = self.rescued_pages, []
        for number in sorted(numbers):
            before = self._gone.get(number, 0)
            again = _RETRY_SECONDS
            try:
                again = await self._read_pack(number, extents.pop(number, []))
            except CacheError:
                raise
            except QsfsError as error:
                _log.error("pack number %d, which lost shards, is not read, which is tried again: %s", number, error)
            # Behind all others: what is not known yet of some holds up nothing.
            self._to_read.pop(number, None)
            self._to_read[number] = context.clock.monotonic() + again
            pack = self._row(number)
            if pack is not None and self._gone.get(number, 0) > before:
                names.append(pack.pack_id.hex())
        if rescued != self.rescued_pages:
            size = counted(self.rescued_pages - rescued, "page")
            _log.warning("read from the shards that are left of packs that lost some, and uploaded anew: %s", size)
        if names:
            _log.error("%s has pages that cannot be read any more: 'qsfs fsck --deep' names the files", _each_of(names))

    def _next(self) -> frozenset[int]:
        """Some packs of which something may be left to read now; those that need it no more are let go of."""
        chosen: set[int] = set()
        pages, now = 0, self._context.clock.monotonic()
        for number, due in list(self._to_read.items()):
            if due > now:
                continue
            row = self._row(number)
            if row is None or not row.live or number not in self._context.ledger.lost:
                del self._to_read[number]
                self._gone.pop(number, None)
                continue
            chosen.add(number)
            pages += row.live // PAGE
            if pages >= _PAGES_A_ROUND:
                break
        return frozenset(chosen)

    async def _read_pack(self, number: int, extents: Iterable[tuple[int, ExtentRow]]) -> float:
        """Marks those of these extents of a pack that can be read; after how many seconds to try the others again."""
        row = self._row(number)
        if row is None:
            return _PAUSE_SECONDS
        pack = StoredPack.of_row(row, self._context.sealer.code.params)
        entries = {found.ordinal: found for found in (entry_of(inode, row) for inode, row in extents)}
        for entry in entries.values():
            await self._context.committer.room()
            self.local_pages += self._anew.mark_local(number, entry)
            await trio.lowlevel.checkpoint()
        if self._short_of_room() or not self._context.uploader.enough_backends():
            return _PAUSE_SECONDS
        absent = await self._absent(number, entries.values())
        left, unknown = await self._left(pack, {shard for entry in absent for shard in entry.shards(pack.ref)})
        for entry in sorted(absent, key=lambda entry: entry.offset):
            if left.issuperset(entry.shards(pack.ref)):
                if not await self._wait_for_room():
                    # What fills the cache may be what was read of other lost packs, and has to be marked first.
                    return _PAUSE_SECONDS
                try:
                    await self._mark(number, pack, entry)
                except (BackendError, trio.TooSlowError):
                    unknown = True
                except (DataLost, Corrupt, FormatMismatch) as error:
                    _log.error("pack %s, extent %d: %s", pack.name, entry.ordinal, error)
        if unknown:
            return _RETRY_SECONDS
        gone = sum((await self._absent(number, absent)).values())
        self._gone[number] = gone
        return _LOST_RETRY_SECONDS if gone else _PAUSE_SECONDS

    async def _absent(self, number: int, entries: Iterable[ExtentEntry]) -> dict[ExtentEntry, int]:
        """The extents of which pages are not here, with how many."""
        found = {}
        for entry in entries:
            if pages := self._anew.absent(number, entry):
                found[entry] = pages
            await trio.lowlevel.checkpoint()
        return found

    async def _left(self, pack: StoredPack, shards: Iterable[int]) -> tuple[set[int], bool]:
        """Which of these data shards can be read, and whether that is not known of some."""
        left, unknown = set(), False

        async def ask(shard: int) -> None:
            nonlocal unknown
            try:
                with trio.fail_after(_READ_SECONDS):
                    await self._reader.shards(pack, (shard,))
            except DataLost:
                return
            except (QsfsError, trio.TooSlowError) as error:
                _log.debug("pack %s, shard %d: not known whether it is left: %s", pack.name, shard, error)
                unknown = True
            else:
                left.add(shard)

        async with trio.open_nursery() as nursery:
            for shard in shards:
                nursery.start_soon(ask, shard)
        return left, unknown

    async def _mark(self, number: int, pack: StoredPack, entry: ExtentEntry) -> None:
        row = self._row(number)
        if row is None:
            return
        with trio.fail_after(_READ_SECONDS):
            marked = await self._anew.mark(number, pack, entry)
        self._on_its_way[number] = self._on_its_way.get(number, row.live) - marked * PAGE
        self._marked_bytes += marked * PAGE
        self.rescued_pages += marked

    async def _wait_for_room(self) -> bool:
        """Waits until what was marked is uploaded, if that is much; False if the cache stays short of room."""
        until = self._context.clock.monotonic() + _LONGEST_SECONDS
        while (short := self._short_of_room()) or self._marked_bytes >= self._most_bytes:
            for number in list(self._on_its_way):
                row = self._row(number)
                if row is None or row.live <= self._on_its_way[number]:
                    del self._on_its_way[number]
            late = self._context.clock.monotonic() >= until
            if late or not self._on_its_way:
                self._on_its_way.clear()
                self._marked_bytes = 0
            if late and short:
                return False
            if short or self._marked_bytes:
                await trio.sleep(1)
        return True

    def _row(self, number: int) -> PackRow | None:
        """The row of a pack that somebody needs."""
        row = pack_row(self._context.store, number)
        return None if row is None or row.unnamed_since_ns else row

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


def _each_of(names: list[str]) -> str:
    """Packs as the subject of a sentence, some of them by name."""
    if len(names) == 1:
        return f"pack {names[0]}"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"each of {counted(len(names), 'pack')} ({', '.join(names[:_NAMED])}{more})"
