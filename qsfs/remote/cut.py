"""Sealing a cut: one committed state becomes the packs and rows of a generation.

All of it is read in one LMDB transaction, on a worker thread: pages that are still dirty go into
data packs in the spool; the metadata delta is what has changed since the last generation, with the
extents of those data packs laid over it as if they had been recorded already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.format.extent import PackRef
from qsfs.remote.chain import Touched
from qsfs.remote.packing import RowPacker, Sealer, row_of, sealed_runs
from qsfs.remote.spool import Spool, SpoolFull
from qsfs.store.environment import Environment
from qsfs.store.extents import Extents
from qsfs.store.packs import SealedRun
from qsfs.store.schema import PackRow, Table, u64
from qsfs.store.snapshot import CommittedState, DirtyRun, ImageRows, Want
from qsfs.store.versions import PageVersions

MOST_EXTENTS = 32_768
"""Extents that one cut may seal: they are held in memory until it is recorded."""


class NoCut(Enum):
    """Why a committed state was not sealed."""

    MOVING = "pages of atomic-sync files that were covered are still on their way to their files"
    UNCHANGED = "nothing has changed since the last generation"
    TOO_MUCH = "more is dirty than a cut may seal; it is uploaded first"
    TOO_SCATTERED = "what is dirty is in more pieces, or changes more rows, than a cut may seal; some is uploaded first"


@dataclass(frozen=True, slots=True)
class CutOrder:
    """What a cut is to be: its generation, the pack numbers that it may use, its bound on dirty bytes.

    `floor`: rows changed by commits up to this one are in packs already (0: none are).  `starts`: where
    the ranges of the snapshot start.  `forced`: a generation is wanted also if nothing has changed.
    """

    generation: int
    numbers: range
    most_bytes: int
    floor: int = 0
    starts: tuple[bytes, ...] = (b"",)
    forced: bool = False


@dataclass(frozen=True, slots=True)
class SealedData:
    """A data pack in the spool, and what is recorded of it once its generation is published."""

    ordinal: int
    number: int
    ref: PackRef
    runs: tuple[SealedRun, ...]


@dataclass(frozen=True, slots=True)
class SealedMetadata:
    """A metadata pack in the spool."""

    ordinal: int
    ref: PackRef
    chunks: int


@dataclass(slots=True)
class SealedCut:
    """A sealed cut: durable in the spool but for `rest`, rows that are packed once placements are known.

    `image` holds the rows that the generation has for pages which were dirty, as `Publication` wants
    them; `own` the rows of its data packs, whose placement is to be filled in; `touched` the ranges of the
    snapshot in which its rows stand.
    """

    generation: int
    commit_number: int
    write_number: int
    time_ns: int
    counters: dict[str, int]
    data: list[SealedData] = field(default_factory=list)
    metadata: list[SealedMetadata] = field(default_factory=list)
    rest: RowPacker = field(default_factory=lambda: RowPacker(0))
    image: dict[tuple[Table, bytes], bytes | None] = field(default_factory=dict)
    own: dict[int, PackRow] = field(default_factory=dict)
    ordinals: int = 0
    bytes: int = 0
    pages: PageVersions = field(default_factory=PageVersions)
    touched: Touched = field(default_factory=Touched)

    def taken(self, block: int, writes: Sequence[int]) -> int:
        """Which pages of a block (bits) this cut has sealed with these write numbers."""
        return self.pages.held(block, writes)


def seal_cut(
    environment: Environment, spool: Spool, sealer: Sealer, clock: Clock, order: CutOrder
) -> SealedCut | NoCut:
    """Seals the last committed state into the spool; durable there when it returns.

    For a worker thread.  Raises `LocalDamage`, `Corrupt`, `CacheError`: then the caller abandons what
    the spool holds of this generation.
    """
    with CommittedState(environment, clock) as state:
        if state.moving:
            return NoCut.MOVING
        if not order.forced and not state.something_changed():
            return NoCut.UNCHANGED
        if state.dirty_bytes(order.most_bytes, Want(1)) > order.most_bytes:
            return NoCut.TOO_MUCH
        cut = SealedCut(order.generation, state.commit_number, state.write_number, clock.time_ns(), state.counters())
        cut.touched = Touched(order.starts)
        cut.rest = RowPacker(sealer.pack_bytes, cut.touched.note)
        try:
            image = _seal_data(state, spool, sealer, clock, order, cut)
            if image is None:
                return NoCut.TOO_SCATTERED
            _seal_rows(state, image, spool, sealer, order, cut)
        except SpoolFull:
            return NoCut.TOO_SCATTERED
    spool.sync()
    failpoints.hit("flush.cut.sealed")
    return cut


def seal_rest(cut: SealedCut, spool: Spool, sealer: Sealer) -> None:
    """Packs the rows that are left, with those of the data packs, into the spool; durable on return.

    For a worker thread.  Raises `SpoolFull`, `CacheError`.
    """
    for number, row in sorted(cut.own.items()):
        key, value = u64(number), row.encode()
        cut.image[Table.PACKS, key] = value
        for chunks in cut.rest.add([(Table.PACKS, key, value)]):
            _spool_rows(chunks, spool, sealer, cut)
    if not cut.rest.empty:
        _spool_rows(cut.rest.rest(), spool, sealer, cut)
    spool.sync()


def _seal_data(
    state: CommittedState, spool: Spool, sealer: Sealer, clock: Clock, order: CutOrder, cut: SealedCut
) -> ImageRows | None:
    """Seals every dirty page; the tables as the generation has them, or None if that is too much."""
    image = ImageRows(state)
    extents = Extents(image)
    numbers = iter(order.numbers)
    nowhere = (-1,) * sealer.code.params.n
    count = 0
    start: bytes | None = b""
    while start is not None:
        part = state.dirty(start, Want(sealer.pack_bytes))
        start = part.resume
        if not part.runs:
            break
        number = next(numbers, None)
        count += len(part.runs)
        if number is None or count > MOST_EXTENTS:
            return None
        sealed = _spool_data(part.runs, number, spool, sealer, cut)
        image.put(Table.PACKS, u64(number), row_of(sealed.ref, nowhere, clock.time_ns()).encode())
        for run in sealed.runs:
            extents.insert(run.inode, run.extent)
        failpoints.hit("flush.cut.pack")
    extents.write_back()
    return image


def _spool_data(runs: tuple[DirtyRun, ...], number: int, spool: Spool, sealer: Sealer, cut: SealedCut) -> SealedData:
    pack = sealer.data_pack(runs)
    spool.write_pack(cut.generation, cut.ordinals, pack.ref, pack.body)
    sealed = SealedData(cut.ordinals, number, pack.ref, tuple(sealed_runs(pack, runs, number)))
    cut.ordinals += 1
    cut.data.append(sealed)
    for run in runs:
        cut.bytes += len(run.data)
        cut.pages.add(run.inode, run.first, run.writes)
    return sealed


def _seal_rows(
    state: CommittedState, image: ImageRows, spool: Spool, sealer: Sealer, order: CutOrder, cut: SealedCut
) -> None:
    """Packs the changed rows, with those of the image in the place of the tables' own."""
    start: bytes | None = b""
    while start is not None:
        part = state.changed(start, order.floor, sealer.pack_bytes)
        start = part.resume
        rows = (row for row in part.rows if row[1] not in image.rows.get(Table(row[0]), ()))
        for chunks in cut.rest.add(rows):
            _spool_rows(chunks, spool, sealer, cut)
    mine = {u64(data.number): data.number for data in cut.data}
    for table, overlay in image.rows.items():
        for key, value in overlay.items():
            if table == Table.PACKS and key in mine:
                cut.own[mine[key]] = PackRow.decode(value)
                continue
            cut.image[table, key] = value
            for chunks in cut.rest.add([(table, key, value)]):
                _spool_rows(chunks, spool, sealer, cut)


def _spool_rows(chunks: list[bytes], spool: Spool, sealer: Sealer, cut: SealedCut) -> None:
    pack = sealer.metadata_pack(chunks)
    spool.write_pack(cut.generation, cut.ordinals, pack.ref, pack.body)
    cut.metadata.append(SealedMetadata(cut.ordinals, pack.ref, len(chunks)))
    cut.ordinals += 1
