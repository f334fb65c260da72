"""One generation from its sealed cut to its record: upload, head, publication, record.

A failure before the head is stored abandons the cut; from then on the same head is sent until it is
published.  The record makes it the base, with the packs, extents and clean marks of the cut, and
settles the change marks, which go by the tables as the recording group commits them: pages that
changed since the cut stay marked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from qsfs import failpoints
from qsfs.errors import BackendError, CacheError, Corrupt, FormatMismatch, QsfsBug, QsfsError
from qsfs.format.extent import PackRef
from qsfs.format.fleet import Fleet
from qsfs.format.head import Head, HeadRef, KeptGeneration, MetadataPack, Owner, SealedHead
from qsfs.format.pack import Pack
from qsfs.remote.base import LocalHead, record_base
from qsfs.remote.chain import Chain, ListedPack, Packs, Renewal, Touched
from qsfs.remote.context import FlushContext
from qsfs.remote.cut import CutOrder, NoCut, SealedCut, SealedData, seal_cut, seal_rest
from qsfs.remote.kept import kept_with
from qsfs.remote.packing import row_of, state_of
from qsfs.remote.publish import NotYet, Published
from qsfs.remote.reasons import summary
from qsfs.remote.snapshots import pins_of
from qsfs.remote.spool import SpoolFull
from qsfs.remote.upload import Upload
from qsfs.store.group import Publication
from qsfs.store.packs import pack_row, record_run, reserve_numbers, steps
from qsfs.store.schema import BLOCK_SIZE, SCHEMA_VERSION, PackRow

_log = logging.getLogger(__name__)

GENERATION = b"generation"
"""The counter of generation numbers."""
PUBLISH_SECONDS = 30.0
_FIRST_PAUSE = 0.5
_LAST_PAUSE = 15.0


class HeadPublisher(Protocol):
    """Who publishes the heads of this mount; see `publish.Publisher`."""

    owner: Owner
    published: HeadRef | None
    last_sent: HeadRef | None

    async def publish(self, head: Head, *, deadline_seconds: float) -> Published | NotYet:
        """Sends `head`, stored in the spool before, until a quorum counts or the deadline comes."""
        ...


@dataclass(frozen=True, slots=True)
class _Written:
    """A generation whose packs are all written."""

    cut: SealedCut
    data: Mapping[int, Upload]
    metadata: list[tuple[ListedPack, Upload]]
    chain: Chain
    renewed: Renewal | None


class Generations:
    """Makes generations, one at a time.

    `base` is the last one that the local store has recorded and `chain` what it lists; `pins` maps
    generations to the names that the next head shall pin them by.  `fleets` are those that the last published
    head names, `next_fleets` those that the next one will: of a change that is under way only the new one.
    `pre_delta` holds rows of the next delta that were packed ahead of its cut, with the commit up to
    which they are complete; `renewal` the ranges that are being read anew, or deltas that are being merged.
    """

    def __init__(
        self, context: FlushContext, publisher: HeadPublisher, base: LocalHead, first: Head
    ) -> None:
        """`first` is the head with which this mount became the owner."""
        if publisher.published is None:
            raise QsfsBug("generations cannot be made before this mount has published its first head")
        self.publisher = publisher
        self.base = base
        self.fleets: tuple[Fleet, ...] = first.fleets
        self.next_fleets: tuple[Fleet, ...] = first.fleets[-1:]
        self.pins: dict[HeadRef, tuple[str, ...]] = {k.head: k.pins for k in first.kept if k.pins}
        self.waiting = ""
        self.cut: SealedCut | None = None
        self.pre_delta: tuple[int, Packs] | None = None
        self.renewal: Renewal | None = None
        self._recording = False
        self._context = context
        self._chain: Chain | None = None
        self._kept = first.kept
        self._behind = base.head.generation > first.generation
        self._published = [KeptGeneration(publisher.published, first.time_ns, ())]

    def take_chain(self) -> None:
        """Looks up the packs that the base lists, once the ledger is complete: one that it lacks gets a row."""
        self._chain = Chain.of_head(self.base.head, self._number_of)

    @property
    def chain(self) -> Chain:
        """What the base lists."""
        if self._chain is None:
            raise QsfsBug("the packs of the base generation are not known yet")
        return self._chain

    @property
    def kept(self) -> tuple[KeptGeneration, ...]:
        """What the last published head keeps: the pins in it hold."""
        return self._kept

    @property
    def head_due(self) -> bool:
        """Whether a head is due also if no row has changed.

        Because other pins shall hold than the last published head carries, because it names other fleets, or
        because the base has never been seen on the backends: a rollback ended after it had replaced the local state.
        """
        known = {generation.head for generation in (*self._kept, *self._published)}
        wanted = {ref: names for ref, names in self.pins.items() if ref in known}
        return self._behind or self.next_fleets != self.fleets or wanted != pins_of(self._kept)

    def change_fleet(self, fleet: Fleet) -> None:
        """Has the next head name the present fleet and `fleet`, and the one after it only `fleet`.

        Nothing happens before the next cut; a mount that dies after the first head was sent, or whoever finds
        it as the newest, goes on with the second.  `QsfsBug` while another change is under way.
        """
        if len(self.fleets) > 1 or self.next_fleets != self.fleets:
            raise QsfsBug("the fleet cannot be changed while another change of it is under way")
        self.next_fleets = (*self.fleets, fleet)

    # sealing

    def next_order(self, most_bytes: int, *, forced: bool = False) -> CutOrder:
        """Takes a generation number and pack numbers; durable with the next commit.

        `forced`: a cut is sealed also if nothing has changed.

        Raises `CacheError` if the record of the last generation could not be committed.
        """
        if self._recording:
            raise CacheError("the record of the last generation is not committed; no other is made before")
        store = self._context.store
        sent = self.publisher.last_sent
        last = max(
            store.counter(GENERATION), self.base.head.generation, sent.generation if sent is not None else 0
        )
        store.set_counter(GENERATION, last + 1)
        numbers = reserve_numbers(store, most_bytes // self._context.sealer.pack_bytes + 2)
        floor = self.pre_delta[0] if self.pre_delta is not None else 0
        starts = self.chain.starts if self._chain is not None else (b"",)
        return CutOrder(last + 1, numbers, most_bytes, floor, starts, forced)

    async def seal(self, order: CutOrder) -> SealedCut | NoCut:
        """Seals the last commit.  Of what is no cut, or failed, nothing stays in the spool."""
        context = self._context
        spool = context.spool
        try:
            cut = await context.in_thread(
                lambda: seal_cut(context.store.environment, spool, context.sealer, context.clock, order)
            )
        except QsfsError:
            await context.in_thread(lambda: spool.drop_packs(order.generation))
            raise
        if isinstance(cut, NoCut):
            await context.in_thread(lambda: spool.drop_packs(order.generation))
        else:
            self.cut = cut
        return cut

    # publishing

    @property
    def renewed(self) -> Renewal | None:
        """The renewal, if it is done: the head of a cut taken from now on may list it."""
        return self.renewal if self.renewal is not None and self.renewal.done else None

    async def publish(self, cut: SealedCut, renewed: Renewal | None) -> LocalHead:
        """Uploads a sealed cut, publishes its head and records it; returns the new base.

        `renewed` was written before the cut was taken.  Waits for backends for
        as long as it takes; `waiting` says what for.  Raises `Fenced`, and what the local disk raises:
        if no head was stored by then the cut is abandoned.
        """
        self.cut = cut
        try:
            try:
                written = await self._upload(cut, renewed)
                failpoints.hit("flush.packs.uploaded")
                head = self._head(written)
                sealed = await self._send(head)
            except QsfsError:
                await self._give_up(cut)
                raise
            failpoints.hit("flush.head.sent")
            return await self._record(written, head, sealed)
        finally:
            self.cut = None
            self.waiting = ""

    async def _give_up(self, cut: SealedCut) -> None:
        """Frees the spool of a cut.  A head that was stored may have been sent: it stays, and so do its shards."""
        spool, owner = self._context.spool, self.publisher.owner
        stored = any(ref.owner == owner and ref.generation == cut.generation for ref in spool.heads)
        free = spool.drop_packs if stored else spool.abandon
        try:
            await self._context.in_thread(lambda: free(cut.generation))
        except CacheError as error:
            _log.warning("generation %d was given up: %s", cut.generation, error)

    async def _upload(self, cut: SealedCut, renewed: Renewal | None) -> _Written:
        context = self._context
        uploads: dict[int, Upload] = {}
        packs = [(p.ordinal, p.ref) for p in cut.data] + [(p.ordinal, p.ref) for p in cut.metadata]
        await self._upload_all(packs, cut, uploads)
        now = context.clock.time_ns()
        for pack in cut.data:
            row = row_of(pack.ref, uploads[pack.ordinal].placement, now)
            cut.own[pack.number] = replace(row, live=cut.own[pack.number].live)
        done = len(cut.metadata)
        try:
            await context.in_thread(lambda: seal_rest(cut, context.spool, context.sealer))
        except SpoolFull as error:
            raise CacheError(f"{error}; give [flush] spool_size more room") from error
        await self._upload_all([(p.ordinal, p.ref) for p in cut.metadata[done:]], cut, uploads)
        numbers = reserve_numbers(context.store, len(cut.metadata))
        metadata = [
            (ListedPack(number, pack.ref, pack.chunks), uploads[pack.ordinal])
            for number, pack in zip(numbers, cut.metadata, strict=True)
        ]
        before = self.pre_delta[1] if self.pre_delta is not None else ()
        touched = Touched.everything() if before else cut.touched
        delta = (*before, *(listed for listed, _ in metadata))
        chain = self.chain if renewed is None else self.chain.renewed(renewed)
        chain = chain.followed_by(delta, touched)
        data = {pack.number: uploads[pack.ordinal] for pack in cut.data}
        return _Written(cut, data, metadata, chain, renewed)

    async def _upload_all(
        self, packs: list[tuple[int, PackRef]], cut: SealedCut, uploads: dict[int, Upload]
    ) -> None:
        failures: list[QsfsError] = []
        async with trio.open_nursery() as nursery:

            async def one(ordinal: int, ref: PackRef) -> None:
                context = self._context
                try:
                    shards = await context.in_thread(lambda: self._shards(cut, ordinal, ref))
                    uploads[ordinal] = await context.uploader.upload(ref, shards)
                except QsfsError as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()
                finally:
                    context.packs.release()

            for ordinal, ref in packs:
                await self._context.packs.acquire()
                nursery.start_soon(one, ordinal, ref)
        if failures:
            raise failures[0]

    def _shards(self, cut: SealedCut, ordinal: int, ref: PackRef) -> list[bytes]:
        body = self._context.spool.read_pack(cut.generation, ordinal)
        return self._context.sealer.shards(Pack(ref, body, ()))

    def _head(self, written: _Written) -> Head:
        base, cut = self.base.head, written.cut
        uploads = {listed.number: upload for listed, upload in written.metadata}

        def listed(packs: Packs) -> tuple[MetadataPack, ...]:
            return tuple(self._metadata_pack(pack, uploads.get(pack.number)) for pack in packs)

        return Head(
            fsid=base.fsid,
            owner=self.publisher.owner,
            generation=cut.generation,
            time_ns=cut.time_ns,
            write_number=cut.write_number,
            predecessor=self.publisher.last_sent,
            fleets=self.next_fleets,
            kept=kept_with(self._kept, self._published, self.pins),
            snapshot=tuple(pack for part in written.chain.ranges for pack in listed(part.packs)),
            deltas=tuple(listed(delta.packs) for delta in written.chain.deltas),
            counters=cut.counters,
            block_size=BLOCK_SIZE,
            schema_version=SCHEMA_VERSION,
            ranges=written.chain.heads_ranges(),
        )

    def _metadata_pack(self, pack: ListedPack, upload: Upload | None) -> MetadataPack:
        if upload is not None:
            return MetadataPack(pack.ref, tuple(upload.placement), pack.chunks)
        row = pack_row(self._context.store, pack.number)
        if row is None:
            raise QsfsBug(f"metadata pack {pack.ref.pack_id.hex()} has no row")
        return MetadataPack(pack.ref, row.placement, pack.chunks)

    async def _send(self, head: Head) -> SealedHead:
        """Sends the head again and again until it is published."""
        pause = _FIRST_PAUSE
        while True:
            try:
                result = await self.publisher.publish(head, deadline_seconds=PUBLISH_SECONDS)
            except (BackendError, Corrupt, FormatMismatch) as error:
                # Not another head: this one may have been sent.
                self.waiting = str(error)
            else:
                if isinstance(result, Published):
                    self.waiting = ""
                    return self._context.spool.heads[result.ref]
                self.waiting = summary(result.reasons)
            jitter = int.from_bytes(self._context.clock.random_bytes(2), "big") / 65536
            await trio.sleep(pause * (0.5 + jitter / 2))
            pause = min(_LAST_PAUSE, 2 * pause)

    # recording

    async def _record(self, written: _Written, head: Head, sealed: SealedHead) -> LocalHead:
        context, cut = self._context, written.cut
        store = context.store
        await context.committer.room()
        self._recording = True
        for pack in cut.data:
            with store.extents.recording(pack.number):
                await self._record_data(pack, cut.own[pack.number], written.data[pack.number])
        now = context.clock.time_ns()
        for listed, upload in written.metadata:
            row = row_of(listed.ref, upload.placement, now, live=listed.ref.body_length)
            context.add_pack(listed.number, row, upload)
        store.layers.open.published = Publication(cut.commit_number, cut.image)
        record_base(store, sealed, ours=True)
        await context.committer.commit()
        self._recording = False
        failpoints.hit("flush.recorded")
        self._became_base(written, head, sealed)
        try:
            await context.in_thread(lambda: self._clear_spool(cut.generation, sealed.ref))
        except CacheError as error:
            _log.warning(
                "generation %d is published and recorded; what is left of it in the spool goes with a later one or "
                "with the next mount: %s", head.generation, error,
            )  # fmt: skip
        failpoints.hit("flush.spool.cleared")
        return self.base

    async def _record_data(self, pack: SealedData, row: PackRow, upload: Upload) -> None:
        """In steps, of which each may be in another group: the row of the pack comes with its first extent.

        Before that it would be one in which nothing lives.
        """
        context = self._context
        added = False

        def add() -> None:
            placement = tuple(upload.placement)
            context.add_pack(
                pack.number, replace(row, live=0, placement=placement, state=state_of(placement)), upload
            )

        for runs in steps(pack.runs):
            if sum(record_run(context.store, run) for run in runs) and not added:
                add()
                added = True
            failpoints.hit("flush.record.step")
            await trio.lowlevel.checkpoint()
        if not added:
            add()

    def _became_base(self, written: _Written, head: Head, sealed: SealedHead) -> None:
        if written.renewed is not None and written.renewed is self.renewal:
            self.renewal = None
        self._chain = written.chain
        self.pre_delta = None
        self.base = LocalHead(sealed, head, True)
        self._kept = head.kept
        self._behind = False
        if head.fleets != self.fleets:
            self._context.uploader.members.adopt(head.fleets)
            self.fleets = head.fleets
        if len(head.fleets) > 1:
            self.next_fleets = head.fleets[-1:]
        self._published = [*self._published[-2:], KeptGeneration(sealed.ref, head.time_ns, ())]

    def _clear_spool(self, generation: int, ref: HeadRef) -> None:
        self._context.spool.drop_packs(generation)
        self._context.spool.drop_heads(ref)

    def _number_of(self, pack: MetadataPack) -> int:
        """The number of a metadata pack that the base lists; one that the table lacks is added."""
        context = self._context
        number = context.ledger.metadata.get(pack.ref.pack_id)
        if number is None:
            number = reserve_numbers(context.store, 1)[0]
            row = row_of(pack.ref, pack.placement, context.clock.time_ns(), live=pack.ref.body_length)
            context.add_pack(number, row, None)
        return number
