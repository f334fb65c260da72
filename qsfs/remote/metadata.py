"""Uploading metadata rows: ranges read anew, rows packed ahead of a cut, and a file system's first rows.

Rows are read in short transactions while the store goes on changing.  That is right because of what
follows: whatever changes after the first transaction is in a later delta (`chain` says why that is enough).
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from qsfs import failpoints
from qsfs.format.extent import PackRef
from qsfs.format.head import MetadataPack
from qsfs.format.rows import Row, encode_rows
from qsfs.format.units import MAX_EXTENT
from qsfs.remote.chain import ListedPack, Packs, Refresh
from qsfs.remote.context import FlushContext
from qsfs.remote.packing import ROW_BYTES, RowPacker, Sealer, row_of
from qsfs.remote.upload import Uploader
from qsfs.store.packs import reserve_numbers
from qsfs.store.snapshot import CommittedState, RowsPart
from qsfs.store.stretch import read_stretch

STEP_SECONDS = 0.1


class MetadataUpload:
    """Uploads all rows that commits above `floor` changed, ahead of a cut that would hold too many.

    Once the first were read, `complete_to` is the number of the commit as of which what was read is complete, but
    for what changes later.
    """

    def __init__(self, context: FlushContext, floor: int) -> None:
        self.complete_to = -1
        self._context = context
        self._floor = floor

    async def run(self) -> Packs:
        """Reads everything; returns the packs, all of them written, in order."""
        packer = RowPacker(self._context.sealer.pack_bytes)
        packs: list[ListedPack] = []
        position: bytes | None = b""
        while position is not None:
            part = await self._read(position)
            for chunks in packer.add(part.rows):
                packs.append(await upload_chunks(self._context, chunks))
            position = part.resume
            await trio.lowlevel.checkpoint()
        if not packer.empty:
            packs.append(await upload_chunks(self._context, packer.rest()))
        return tuple(packs)

    async def _read(self, position: bytes) -> RowsPart:
        return await self._context.in_thread(lambda: self._read_part(position))

    def _read_part(self, position: bytes) -> RowsPart:
        context = self._context
        with CommittedState(context.store.environment, context.clock) as state:
            if self.complete_to < 0:
                self.complete_to = state.commit_number
            until = context.clock.monotonic() + STEP_SECONDS
            return state.changed(position, self._floor, context.sealer.pack_bytes, until)


def range_bytes(sealer: Sealer) -> int:
    """Bytes of rows in a range: more than in other packs, as they compress well and every head lists all ranges."""
    return 2 * sealer.pack_bytes


class RefreshUpload:
    """Reads the stretches of a refresh from the local tables and uploads them, a pack at a time."""

    def __init__(self, context: FlushContext, refresh: Refresh) -> None:
        self.pack_bytes = range_bytes(context.sealer)
        self._context = context
        self._refresh = refresh

    async def run(self) -> None:
        """Fills `refresh` in.  What fails leaves it undone: nothing may list it then."""
        refresh = self._refresh
        for stretch in refresh.stretches:
            at: bytes | None = stretch.start
            while at is not None and at != stretch.stop and len(refresh.packs) < refresh.most_packs:
                begin = at
                chunks, at = await self._next_pack(begin, stretch.stop)
                at = stretch.stop if at is None else at
                packs = (await upload_chunks(self._context, chunks),) if chunks else ()
                stretch.pieces.append((begin, packs))
                stretch.reached = at
        refresh.done = True

    async def _next_pack(self, start: bytes, stop: bytes | None) -> tuple[list[bytes], bytes | None]:
        """The chunks of one pack's worth of rows from `start` on, and where the next ones begin."""
        most = self.pack_bytes
        rows: list[Row] = []
        position: bytes | None = start
        size = 0
        while position is not None and size < most:
            part = await self._read(position, stop, most - size)
            rows += part.rows
            size += sum(len(key) + len(value or b"") + ROW_BYTES for _, key, value in part.rows)
            position = part.resume
            await trio.lowlevel.checkpoint()
        return await self._context.in_thread(lambda: list(encode_rows(rows, MAX_EXTENT))), position

    async def _read(self, start: bytes, stop: bytes | None, most: int) -> RowsPart:
        return await self._context.in_thread(lambda: self._read_part(start, stop, most))

    def _read_part(self, start: bytes, stop: bytes | None, most: int) -> RowsPart:
        context = self._context
        with CommittedState(context.store.environment, context.clock) as state:
            until = context.clock.monotonic() + STEP_SECONDS
            return read_stretch(state, context.clock, start, stop, most, until)


async def upload_chunks(context: FlushContext, chunks: list[bytes]) -> ListedPack:
    """Uploads chunks as a metadata pack that no head lists yet; returns it once it is written."""
    async with context.packs:
        ref, shards = await context.in_thread(lambda: _seal(context.sealer, chunks))
        upload = await context.uploader.upload(ref, shards)
    failpoints.hit("flush.metadata.uploaded")
    number = reserve_numbers(context.store, 1)[0]
    row = row_of(ref, upload.placement, context.clock.time_ns(), live=ref.body_length)
    context.add_pack(number, row, upload)
    return ListedPack(number, ref, len(chunks))


async def upload_rows(
    rows: Iterable[Row], *, sealer: Sealer, uploader: Uploader
) -> tuple[MetadataPack, ...]:
    """Uploads rows as metadata packs without a local store: for a new file system."""
    packer = RowPacker(sealer.pack_bytes)
    chunks = [*packer.add(rows)]
    if not packer.empty:
        chunks.append(packer.rest())
    packs = []
    for part in chunks:
        ref, shards = _seal(sealer, part)
        upload = await uploader.upload(ref, shards)
        packs.append(MetadataPack(ref, tuple(upload.placement), len(part)))
    return tuple(packs)


def _seal(sealer: Sealer, chunks: list[bytes]) -> tuple[PackRef, list[bytes]]:
    pack = sealer.metadata_pack(chunks)
    return pack.ref, sealer.shards(pack)
