"""From dirty runs and metadata rows to packs, and from packs to shards.

Pure work on bytes, for worker threads.  A pack is closed at about k x 256 KiB of plain bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qsfs.clock import Clock
from qsfs.format.erasure import Code
from qsfs.format.extent import PackKind, PackRef, PlainExtent
from qsfs.format.keys import KeyRing
from qsfs.format.pack import Pack, build_pack
from qsfs.format.rows import Row, encode_rows
from qsfs.format.shard import encode_shards
from qsfs.format.units import MAX_EXTENT, PACK_TARGET_PER_SHARD, PAGE
from qsfs.store.packs import SealedRun
from qsfs.store.positions import position_of
from qsfs.store.schema import ExtentRow, PackRow, PackState
from qsfs.store.snapshot import DirtyRun

MAX_PACK = 8 << 20
"""Plain bytes at which a pack is closed however many shards it has: packs are held in memory whole."""
ROW_BYTES = 12
"""What a row takes in a chunk besides its key and value."""


@dataclass(frozen=True, slots=True)
class Sealer:
    """What sealing needs: keys, code, the owner's epoch, the clock's random bytes, zstd's level."""

    keys: KeyRing
    code: Code
    owner_epoch: int
    clock: Clock
    level: int = 1

    @property
    def pack_bytes(self) -> int:
        """Plain bytes at which a pack is closed."""
        return min(self.code.params.k * PACK_TARGET_PER_SHARD, MAX_PACK)

    def data_pack(self, runs: Sequence[DirtyRun]) -> Pack:
        """A pack with one extent for each run, in order.  A run has at most 64 pages."""
        extents = (
            PlainExtent(run.inode, run.first, len(run.writes), max(run.writes), run.data) for run in runs
        )
        return self._build(PackKind.DATA, extents)

    def metadata_pack(self, chunks: Sequence[bytes]) -> Pack:
        """A pack of chunks of rows, numbered from 0."""
        extents = (PlainExtent(0, number, 0, 0, chunk) for number, chunk in enumerate(chunks))
        return self._build(PackKind.METADATA, extents)

    def shards(self, pack: Pack) -> list[bytes]:
        """The n values of a pack."""
        return encode_shards(pack, self.code, self.keys)

    def _build(self, kind: PackKind, extents: Iterable[PlainExtent]) -> Pack:
        return build_pack(
            kind,
            extents,
            keys=self.keys,
            code=self.code.params,
            owner_epoch=self.owner_epoch,
            clock=self.clock,
            level=self.level,
        )


def sealed_runs(pack: Pack, runs: Sequence[DirtyRun], number: int) -> Iterator[SealedRun]:
    """What the local store records of each run once the pack with this number is written."""
    for run, entry in zip(runs, pack.entries, strict=True):
        extent = ExtentRow(
            first=run.first,
            write_number=entry.write_number,
            pages=entry.pages,
            skip=0,
            pack=number,
            ordinal=entry.ordinal,
            offset=entry.offset,
            sealed_length=entry.sealed_length,
            plain_length=entry.plain_length,
            codec=entry.codec,
        )
        yield SealedRun(run.inode, run.writes, extent)


class PackSealing:
    """A data pack being sealed; its plain bytes go as soon as they are."""

    def __init__(self, sealer: Sealer, runs: tuple[DirtyRun, ...], number: int) -> None:
        self._sealer = sealer
        self._plain = runs
        self._number = number
        self.runs: list[SealedRun] = []
        self.shards: list[bytes] = []
        self.ref: PackRef

    def seal(self) -> None:
        """Seals and encodes; for a worker thread."""
        pack = self._sealer.data_pack(self._plain)
        self.runs = list(sealed_runs(pack, self._plain, self._number))
        self._plain = ()
        self.ref = pack.ref
        self.shards = self._sealer.shards(pack)


def row_of(ref: PackRef, placement: Sequence[int], now_ns: int, *, live: int = 0) -> PackRow:
    """The row of a pack that has just been written."""
    return PackRow(
        pack_id=ref.pack_id,
        digest=ref.digest,
        kind=int(ref.kind),
        key_number=ref.key_number,
        owner_epoch=ref.owner_epoch,
        body_length=ref.body_length,
        shard_size=ref.shard_size,
        live=live,
        written_at_ns=now_ns,
        verified_at_ns=0,
        unnamed_since_ns=0,
        state=state_of(placement),
        placement=tuple(placement),
    )


def state_of(placement: Sequence[int]) -> int:
    """The state of a pack that was not looked at yet: full if every shard has a place."""
    return 0 if -1 in placement else int(PackState.FULL)


class RowPacker:
    """Collects metadata rows and gives them out as the chunks of whole packs.

    `note`, if given, hears the position of each row.
    """

    def __init__(self, pack_bytes: int, note: Callable[[bytes], None] | None = None) -> None:
        self._pack_bytes = pack_bytes
        self._note = note
        self._rows: list[Row] = []
        self._size = 0

    @property
    def empty(self) -> bool:
        """Whether no rows are waiting."""
        return not self._rows

    def add(self, rows: Iterable[Row]) -> Iterator[list[bytes]]:
        """Takes rows; yields the chunks of each pack that they fill."""
        for row in rows:
            self._rows.append(row)
            if self._note is not None:
                self._note(position_of(row[0], row[1]))
            self._size += len(row[1]) + len(row[2] or b"") + ROW_BYTES
            if self._size >= self._pack_bytes:
                yield self.rest()

    def rest(self) -> list[bytes]:
        """The chunks of what is left."""
        chunks = list(encode_rows(self._rows, MAX_EXTENT))
        self._rows, self._size = [], 0
        return chunks


assert PAGE * 64 == MAX_EXTENT, "runs of 64 pages must fit an extent"
