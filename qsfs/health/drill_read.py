"""Reading the contents of a restored generation from the backends, verifying each byte of them.

The extents of the restored tables are gone through in their order; those that the plan chooses are
fetched, opened and dropped: an extent that opens is exactly what was sealed for that place of that
file.  Memory holds some extents and a bit for each pack, whatever the size of the file system.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import trio
from xxhash import xxh3_64_intdigest

from qsfs.clock import Clock
from qsfs.errors import Corrupt, DataLost, QsfsError, Unavailable
from qsfs.health.drill_plan import Compared, Plan, Problems, Tally
from qsfs.health.packs import PackDoctor
from qsfs.remote.reader import PackReader
from qsfs.remote.stored import StoredPack, entry_of
from qsfs.store.environment import Environment
from qsfs.store.schema import PAGE, ExtentRow, PackRow, Table, split_u64_pair, u64

AT_ONCE = 16
"""Extents that are fetched at the same time."""
_STEP_ROWS = 2_000
_COMPARED_AT_ONCE = 32
_GIVE_UP_AFTER = 64
"""With so many extents that did not come, the rest is not tried: each costs a deadline."""


@dataclass(frozen=True, slots=True)
class ReadExtent:
    """Pages that were read: `sums` holds the xxh3-64 of each page from `first` on, sealed in `pack` as `ordinal`."""

    inode: int
    first: int
    pack_id: bytes
    ordinal: int
    sums: tuple[int, ...]


Compare = Callable[[Sequence[ReadExtent], Compared], Awaitable[None]]
"""Asks a running mount for the same pages, and adds what it says; raises `QsfsError` if it does not answer."""
Say = Callable[[int, int], None]
"""Called with the extents that were read, and how many are to be."""


class ContentsReader:
    """Reads what a plan chooses of one restored generation; `tally` is what it found."""

    def __init__(
        self,
        environment: Environment,
        reader: PackReader,
        doctor: PackDoctor,
        clock: Clock,
        *,
        deadline_seconds: float,
        name: Callable[[int], str],
        compare: Compare | None = None,
        say: Say = lambda done, total: None,
    ) -> None:
        """`name` gives a path of an inode; an extent that is not here after `deadline_seconds` counts as missing."""
        self.tally = Tally(compared=None if compare is None else Compared())
        self._environment = environment
        self._reader = reader
        self._doctor = doctor
        self._clock = clock
        self._deadline = deadline_seconds
        self._name = name
        self._compare = compare
        self._say = say
        self._total = 0
        self._looked = bytearray()
        self._to_compare: list[ReadExtent] = []

    async def read(self, plan: Plan) -> None:
        """Reads, verifies and compares.  What goes wrong is in the tally; raises nothing for it."""
        tally = self.tally
        began = self._clock.monotonic()
        slots = trio.Semaphore(AT_ONCE)
        view = self._environment.read()
        try:
            chooser = plan.chooser(view.count(Table.EXTENTS))
        finally:
            view.close()
        self._total = chooser.wanted
        for rows in self._steps():
            async with trio.open_nursery() as nursery:
                for inode, row in rows:
                    tally.all_extents += 1
                    tally.all_bytes += row.pages * PAGE
                    if not chooser.next():
                        continue
                    tally.chosen_extents += 1
                    tally.chosen_bytes += row.pages * PAGE
                    if not tally.gave_up:
                        await slots.acquire()
                        nursery.start_soon(self._one, inode, row, slots)
            await self._compare_rest(1)
            await trio.lowlevel.checkpoint()
        tally.seconds = self._clock.monotonic() - began
        tally.downloaded_bytes = self._reader.counts.bytes
        tally.decoded_packs = self._reader.counts.decoded

    def _steps(self) -> Iterator[list[tuple[int, ExtentRow]]]:
        """All extents in their order, some at a time; no read transaction outlives a step."""
        start = b""
        while True:
            rows: list[tuple[int, ExtentRow]] = []
            view = self._environment.read()
            try:
                for key, value in view.scan(Table.EXTENTS, start, None):
                    inode, first = split_u64_pair(key)
                    rows.append((inode, ExtentRow.decode(first, bytes(value))))
                    if len(rows) >= _STEP_ROWS:
                        break
            finally:
                view.close()
            if not rows:
                return
            yield rows
            start = u64(rows[-1][0]) + u64(rows[-1][1].first) + b"\0"

    async def _one(self, inode: int, row: ExtentRow, slots: trio.Semaphore) -> None:
        tally = self.tally
        try:
            pack, data = await self._extent(inode, row)
        except DataLost as error:
            self._add(tally.lost, inode, row, error)
        except Corrupt as error:
            self._add(tally.wrong, inode, row, error)
        except QsfsError as error:
            self._add(tally.missing, inode, row, error)
            tally.gave_up |= tally.missing.count >= _GIVE_UP_AFTER
        else:
            tally.read_extents += 1
            tally.read_bytes += row.pages * PAGE
            self._say(tally.read_extents, self._total)
            await self._look(row.pack, pack)
            if self._compare is not None:
                await self._note(inode, row, pack, data)
        finally:
            slots.release()

    async def _extent(self, inode: int, row: ExtentRow) -> tuple[StoredPack, bytes]:
        pack = self._pack(row.pack)
        entry = entry_of(inode, row)
        if row.skip + row.pages > entry.pages:
            raise Corrupt(f"its extent row names more than pack {pack.name} holds")
        with trio.move_on_after(self._deadline):
            return pack, await self._reader.extent(pack, entry)
        raise Unavailable(f"not here after {self._deadline:.0f} s; {self._reader.explain(pack)}")

    def _pack(self, number: int) -> StoredPack:
        view = self._environment.read()
        try:
            row = view.get(Table.PACKS, u64(number))
            if row is None:
                raise Corrupt(f"its extent lies in pack number {number}, which the generation does not hold")
            return StoredPack.of_row(PackRow.decode(bytes(row)), self._reader.code)
        finally:
            view.close()

    async def _look(self, number: int, pack: StoredPack) -> None:
        """Asks once for each pack which of its shards are listed."""
        index, bit = divmod(number, 8)
        if index >= len(self._looked):
            self._looked.extend(bytes(index + 1 - len(self._looked)))
        if self._looked[index] & 1 << bit:
            return
        self._looked[index] |= 1 << bit
        with trio.move_on_after(self._deadline):
            found = await self._doctor.look(pack, deep=False)
            self.tally.spares[found.had - pack.ref.k] += 1
            self.tally.unlisted += len(found.missing)
            return
        self.tally.not_looked += 1

    # comparing

    async def _note(self, inode: int, row: ExtentRow, pack: StoredPack, data: bytes) -> None:
        view = memoryview(data)
        pages = range(row.skip, row.skip + row.pages)
        sums = tuple(xxh3_64_intdigest(view[page * PAGE : (page + 1) * PAGE]) for page in pages)
        self._to_compare.append(ReadExtent(inode, row.first, pack.ref.pack_id, row.ordinal, sums))
        await self._compare_rest(_COMPARED_AT_ONCE)

    async def _compare_rest(self, least: int) -> None:
        compared = self.tally.compared
        if self._compare is None or compared is None or len(self._to_compare) < least:
            return
        batch, self._to_compare = self._to_compare, []
        try:
            await self._compare(batch, compared)
        except QsfsError as error:
            self._compare = None
            self.tally.compare_failure = str(error)

    def _add(self, problems: Problems, inode: int, row: ExtentRow, error: QsfsError) -> None:
        # To find a path is a search: only for what is shown.
        name = self._name(inode) if problems.wants_names else ""
        problems.add(f"{name}, pages {row.first} to {row.first + row.pages - 1}: {error}")
