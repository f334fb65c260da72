"""Which of some packs nothing names: no row, no pack on its way, no generation that may be read.

For shards that were met on backends.  A pack counts as unnamed only if each place that could name it was read
and does not: what cannot be read raises, and then nothing is known.

- *Packs on their way*: sealed by this mount and without a row since, in the spool, given up, listed as metadata.
- *The tables*, in one commit that is made after the packs on their way were asked: a pack that got its row
  before that is in it.
- *The generations*: the base, those that it keeps, heads that may have been sent since.  Neither the local tables nor
  the numbers of packs say what one of those holds that another store has cut, or that was sent and not
  recorded.  So their own metadata are read: every row of the table of packs, whether it still counts or not, of
  ranges and deltas.  A generation cannot name packs of a later owner than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import trio

from qsfs.errors import Corrupt, Unavailable
from qsfs.format.head import Head, HeadRef, MetadataPack, open_head
from qsfs.format.pack import open_body
from qsfs.format.rows import decode_rows
from qsfs.remote.base import LocalHead
from qsfs.remote.chain import listed_ids
from qsfs.remote.context import FlushContext
from qsfs.remote.image import Counting, packs_of
from qsfs.remote.readable import read_head
from qsfs.remote.shards import ShardReader
from qsfs.remote.stored import StoredPack
from qsfs.remote.survey import Timing
from qsfs.store.positions import PREFIXES
from qsfs.store.schema import PackRow, Table
from qsfs.store.snapshot import CommittedState

_STEP_SECONDS = 0.1
_READ_SECONDS = 120.0
_START = PREFIXES[Table.PACKS]
_STOP = bytes((_START[0] + 1,))


class Naming:
    """Asks all that may name a pack.

    `base` is the generation that the tables descend from, `named` the ids of the metadata packs that it or
    a head that may have been sent lists.  `seen` is told of packs that are named, of whichever it meets.
    """

    def __init__(
        self,
        context: FlushContext,
        reader: ShardReader,
        *,
        base: Callable[[], LocalHead],
        named: Callable[[], frozenset[bytes]],
        timing: Timing | None = None,
    ) -> None:
        self.seen: Callable[[bytes], None] = lambda pack_id: None
        self._context = context
        self._reader = reader
        self._base = base
        self._named = named
        self._timing = timing or Timing()

    async def unnamed(self, packs: Mapping[bytes, int]) -> set[bytes]:
        """Those of `packs` (id to owner epoch) that nothing names.

        Raises what backends and their damage raise: then nothing is known of any of them.
        """
        left = set(packs) - self._on_their_way()
        if left:
            await self._context.committer.commit()
            left -= await self._in_tables(left)
        heads = await self._heads() if left else []
        for head in heads:
            left -= listed_ids(head)
        read: set[bytes] = set()
        for head in heads:
            if left and head.owner.epoch >= min(packs[pack_id] for pack_id in left):
                left -= await self._in_generation(head, left, read)
        return left

    def _on_their_way(self) -> set[bytes]:
        context = self._context
        return {
            *context.uploader.unrecorded,
            *context.spool.named,
            *context.ledger.metadata,
            *self._named(),
        }

    # the tables

    async def tables(self) -> None:
        """Shows `seen` every pack that has a row in the last commit."""
        await self._in_tables(set())

    async def _in_tables(self, wanted: set[bytes]) -> set[bytes]:
        found: set[bytes] = set()
        position: bytes | None = b""
        while position is not None:
            start = position
            some, position = await self._context.in_thread(lambda: self._some_rows(start, wanted))  # noqa: B023
            found |= some
        return found

    def _some_rows(self, start: bytes, wanted: set[bytes]) -> tuple[set[bytes], bytes | None]:
        context = self._context
        found: set[bytes] = set()
        until = context.clock.monotonic() + _STEP_SECONDS
        with CommittedState(context.store.environment, context.clock) as state:
            for key, row in state.view.scan(Table.PACKS, start, None):
                found |= self._note((PackRow.decode(bytes(row)).pack_id,), wanted)
                if context.clock.monotonic() >= until:
                    return found, key + b"\0"
        return found, None

    # generations

    async def _heads(self) -> list[Head]:
        """The base, what it keeps, and what may have been sent since."""
        context, base = self._context, self._base()
        keys, members = context.sealer.keys, context.uploader.members
        sent = [sealed for ref, sealed in dict(context.spool.heads).items() if ref != base.sealed.ref]
        heads = [base.head, *(open_head(sealed.key, sealed.value, keys) for sealed in sent)]
        known = {base.sealed.ref, *(sealed.ref for sealed in sent)}
        wanted: list[HeadRef] = []
        for head in heads:
            wanted += [kept.head for kept in head.kept if kept.head not in known]
            known.update(wanted)
        for ref in wanted:
            _, head = await read_head(members, ref, keys, self._timing)
            heads.append(head)
        return heads

    async def _in_generation(self, head: Head, wanted: set[bytes], read: set[bytes]) -> set[bytes]:
        """Those of `wanted` that have a row in a generation; packs in `read` were read before, and are not again."""
        found: set[bytes] = set()
        for pack, counting in packs_of(head):
            if pack.ref.pack_id not in read and _may_hold_packs(counting):
                found |= await self._rows(pack, wanted)
                read.add(pack.ref.pack_id)
        return found

    async def _rows(self, pack: MetadataPack, wanted: set[bytes]) -> set[bytes]:
        """Those of `wanted` that are in rows of packs of a metadata pack."""
        context = self._context
        params = context.sealer.code.params
        stored = StoredPack.of_metadata(pack, params)
        with trio.move_on_after(_READ_SECONDS):
            payloads = await self._reader.shards(stored, range(params.k))
            body = b"".join(payloads[number] for number in range(params.k))
            return await context.in_thread(lambda: self._note(self._ids(pack, body), wanted))
        raise Unavailable(f"metadata pack {stored.name} did not come within {_READ_SECONDS:g} s")

    def _ids(self, pack: MetadataPack, body: bytes) -> Iterator[bytes]:
        chunks = [data for _, data in open_body(self._context.sealer.keys, pack.ref, body)]
        if len(chunks) != pack.chunks:
            raise Corrupt(f"metadata pack {pack.ref.pack_id.hex()}: holds {len(chunks)} chunks, not {pack.chunks}")
        for chunk in chunks:
            for table, _, row in decode_rows(chunk):
                if table == Table.PACKS and row is not None:
                    yield PackRow.decode(row).pack_id

    def _note(self, ids: Iterable[bytes], wanted: set[bytes]) -> set[bytes]:
        """Those of `ids` that are wanted; on a worker thread, which one judgement at a time has."""
        found = set()
        for pack_id in ids:
            self.seen(pack_id)
            if pack_id in wanted:
                found.add(pack_id)
        return found


def _may_hold_packs(counting: Counting) -> bool:
    """Whether a row of the table of packs may count where these rows count."""
    stops = (*counting.starts[1:], None)
    return any(
        wanted and start < _STOP and (stop is None or stop > _START)
        for start, stop, wanted in zip(counting.starts, stops, counting.wanted, strict=True)
    )
