"""Uploading metadata rows: full snapshots, rows packed ahead of a cut, and a file system's first rows.

Rows are read in short transactions while the store goes on changing.  That is right because of what
follows: whatever changes after the first transaction is in a later delta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from qsfs import failpoints
from qsfs.format.extent import PackRef
from qsfs.format.head import MetadataPack
from qsfs.remote.chain import ListedPack, Packs
from qsfs.remote.context import FlushContext
from qsfs.remote.packing import RowPacker, Sealer, row_of
from qsfs.remote.upload import Uploader
from qsfs.store.packs import reserve_numbers
from qsfs.store.snapshot import CommittedState, Row, RowsPart

STEP_SECONDS = 0.1

ReadRows = Callable[[CommittedState, bytes, float], RowsPart]
"""Reads rows from a position on until the clock says so."""


class MetadataUpload:
    """Reads rows in short transactions, and uploads them as metadata packs.

    `read` gives the rows.  `floor`, once the first were read, is the number of the commit as of which
    what was read is complete, but for what changes later.
    """

    def __init__(self, context: FlushContext, read: ReadRows) -> None:
        self.floor = -1
        self._context = context
        self._read_rows = read

    async def run(self) -> Packs:
        """Reads everything; returns the packs, all of them written, in order."""
        context = self._context
        packer = RowPacker(context.sealer.pack_bytes)
        packs: list[ListedPack] = []
        position: bytes | None = b""
        while position is not None:
            part = await self._read(position)
            for chunks in packer.add(part.rows):
                packs.append(await self._upload(chunks))
            position = part.resume
            await trio.lowlevel.checkpoint()
        if not packer.empty:
            packs.append(await self._upload(packer.rest()))
        return tuple(packs)

    async def _read(self, position: bytes) -> RowsPart:
        return await self._context.in_thread(lambda: self._read_part(position))

    def _read_part(self, position: bytes) -> RowsPart:
        context = self._context
        with CommittedState(context.store.environment, context.clock) as state:
            if self.floor < 0:
                self.floor = state.commit_number
            return self._read_rows(state, position, context.clock.monotonic() + STEP_SECONDS)

    async def _upload(self, chunks: list[bytes]) -> ListedPack:
        context = self._context
        async with context.packs:
            ref, shards = await context.in_thread(lambda: _seal(context.sealer, chunks))
            upload = await context.uploader.upload(ref, shards)
        failpoints.hit("flush.metadata.uploaded")
        number = reserve_numbers(context.store, 1)[0]
        row = row_of(ref, upload.placement, context.clock.time_ns(), live=ref.body_length)
        context.add_pack(number, row, upload)
        return ListedPack(number, ref, len(chunks))


def full_snapshot(context: FlushContext) -> MetadataUpload:
    """An upload of all rows."""
    most = context.sealer.pack_bytes
    return MetadataUpload(context, lambda state, start, until: state.everything(start, most, until))


def early_delta(context: FlushContext, floor: int) -> MetadataUpload:
    """An upload of all rows that commits above `floor` changed, ahead of a cut that would hold too many."""
    most = context.sealer.pack_bytes
    return MetadataUpload(context, lambda state, start, until: state.changed(start, floor, most, until))


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
