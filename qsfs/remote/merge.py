"""Merging deltas: several that follow each other become one with the rows that they come to.

A head names every delta on every backend, so many small ones cost more than what is in them, and
read anew one by one they would cost a restore its time.  Deltas of about one size are merged as in a
log-structured merge tree, so each row is written again a few times at most.  Their packs are read back
from the backends: what a delta holds is not in the local tables any more.

The merged delta leaves out what ranges that were read anew since do not need, so it applies to
every range that one of its parts applied to.  It is nothing until a head lists it.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

from qsfs.errors import Corrupt, QsfsBug, Unavailable
from qsfs.format.pack import open_body
from qsfs.format.rows import Row, decode_rows, encode_rows
from qsfs.format.units import MAX_EXTENT
from qsfs.remote.chain import ListedPack, Merge
from qsfs.remote.context import FlushContext
from qsfs.remote.image import Counting
from qsfs.remote.metadata import upload_chunks
from qsfs.remote.shards import ShardReader
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import pack_row

READ_SECONDS = 120.0
"""How long a pack may take to come."""


class MergeUpload:
    """Reads the deltas of a merge, oldest first, and uploads what they come to."""

    def __init__(self, context: FlushContext, merge: Merge, reader: ShardReader) -> None:
        self._context = context
        self._merge = merge
        self._reader = reader

    async def run(self) -> None:
        """Fills `merge` in.  Raises what backends and their damage raise: nothing may list it then."""
        context, merge = self._context, self._merge
        rows: dict[tuple[int, bytes], bytes | None] = {}
        for delta in merge.deltas:
            counting = Counting(merge.starts, tuple(since <= delta.number for since in merge.since))
            for pack in delta.packs:
                body = await self._read(pack)
                await context.in_thread(lambda: _take(rows, context, pack, body, counting))  # noqa: B023
        chunks = await context.in_thread(lambda: _chunks(rows))
        merge.packs = (await upload_chunks(context, chunks),) if chunks else ()
        merge.done = True

    async def _read(self, pack: ListedPack) -> bytes:
        context = self._context
        row = pack_row(context.store, pack.number)
        if row is None:
            raise QsfsBug(f"metadata pack {pack.ref.pack_id.hex()} has no row")
        params = context.sealer.code.params
        stored = StoredPack.of_row(row, params)
        with trio.move_on_after(READ_SECONDS):
            payloads = await self._reader.shards(stored, range(params.k))
            return b"".join(payloads[number] for number in range(params.k))
        raise Unavailable(f"metadata pack {stored.name} did not come within {READ_SECONDS:g} s")


def _take(
    rows: dict[tuple[int, bytes], bytes | None],
    context: FlushContext,
    pack: ListedPack,
    body: bytes,
    counting: Counting,
) -> None:
    """Lays the rows of a pack that count over those of older ones."""
    plain = [data for _, data in open_body(context.sealer.keys, pack.ref, body)]
    if len(plain) != pack.chunks:
        raise Corrupt(f"metadata pack {pack.ref.pack_id.hex()}: holds {len(plain)} chunks, not {pack.chunks}")
    for chunk in plain:
        for table, key, value in counting.of(decode_rows(chunk)):
            rows[table, key] = value


def _chunks(rows: Mapping[tuple[int, bytes], bytes | None]) -> list[bytes]:
    ordered: list[Row] = [(table, key, value) for (table, key), value in sorted(rows.items(), key=lambda row: row[0])]
    return list(encode_rows(ordered, MAX_EXTENT))
