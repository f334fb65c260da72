"""Publishing heads: sent everywhere, published once a fence quorum of every fleet named counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import trio

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.errors import Fenced, QsfsBug
from qsfs.format.erasure import CodeParams
from qsfs.format.head import Head, HeadRef, Owner, SealedHead, seal_head
from qsfs.remote.control import Reading, Records
from qsfs.remote.fencing import fenced, unclear
from qsfs.remote.members import Members
from qsfs.remote.quorum import fleet_quorums, reached
from qsfs.remote.quorum_write import QuorumWrite
from qsfs.remote.superseded import delete_superseded
from qsfs.remote.survey import Timing, survey

StoreBeforeSend: TypeAlias = Callable[[SealedHead], Awaitable[None]]
"""Stores a sealed head durably in the local spool; the head is sent only once it has returned."""


@dataclass(frozen=True, slots=True)
class Published:
    """The head is published.  `missing`: backends that had not stored it when that was known."""

    ref: HeadRef
    counted: frozenset[int]
    missing: frozenset[int]


@dataclass(frozen=True, slots=True)
class NotYet:
    """The head was sent, and too few backends have counted so far: it may or may not be found by others.

    It is to be published again, or followed by a newer one; its packs must stay.
    """

    ref: HeadRef
    counted: frozenset[int]
    reasons: tuple[str, ...]


class Publisher:
    """Publishes the heads of one owner.

    `published` is its last published head, `last_sent` the last that may have left this machine: the
    next head's predecessor.  `fenced` is set once another owner or a copy of this machine has been
    seen, also by a slow backend after a head was published; `on_fenced` is called then, once.
    Backends that are late go on in `nursery` for `timing.grace` seconds after the quorum.

    A backend that gets a head has got all heads sent since the last published one before it: so
    wherever a head is found its line can be followed, and two lines can be told apart.
    """

    def __init__(
        self,
        owner: Owner,
        found: HeadRef | None,
        *,
        members: Members,
        records: Records,
        code: CodeParams,
        clock: Clock,
        nursery: trio.Nursery,
        store_before_send: StoreBeforeSend,
        timing: Timing,
        on_fenced: Callable[[Fenced], None] = lambda _: None,
    ) -> None:
        self.owner = owner
        self.published: HeadRef | None = None
        self.last_sent = found
        self.fenced: Fenced | None = None
        self._members = members
        self._records = records
        self._code = code
        self._clock = clock
        self._nursery = nursery
        self._store_before_send = store_before_send
        self._timing = timing
        self._on_fenced = on_fenced
        self._written: set[HeadRef] = set()
        self._unpublished: list[SealedHead] = []
        self._pending: tuple[Head, SealedHead, QuorumWrite] | None = None
        self._turn = trio.Lock()

    @property
    def sent(self) -> frozenset[HeadRef]:
        """The last published head, and all that may have left this machine since."""
        return frozenset(ref for ref in self._written if self.published is None or ref >= self.published)

    async def publish(self, head: Head, *, deadline_seconds: float) -> Published | NotYet:
        """Sends `head` to every backend of its fleets and waits until a quorum of each counts.

        `head` names this owner, `last_sent` as its predecessor, and a generation above it (the first may
        repeat the one that was taken over).  The head that was given last may be given again after
        `NotYet`: then the same sealed bytes are sent again and earlier counts hold.

        Raises `Fenced` when another owner or a copy of this machine is seen, now or before, and what
        `store_before_send` raises: then nothing was sent.
        """
        async with self._turn:
            if self.fenced is not None:
                raise self.fenced
            sealed, write = await self._prepare(head)
            deadline = trio.current_time() + deadline_seconds
            failpoints.hit("publish.send")
            write.start(self._nursery)
            try:
                done = await write.settle(deadline)
            except BaseException:
                write.stop()
                raise
            if not done:
                write.stop()
                return NotYet(sealed.ref, frozenset(write.counted), write.reasons())
            failpoints.hit("publish.published")
            self.published = sealed.ref
            self._pending = None
            self._unpublished.clear()
            self._nursery.start_soon(self._clean_up, head, sealed.ref, write)
            return Published(sealed.ref, frozenset(write.counted), write.missing)

    async def as_owner(
        self, sealed: SealedHead, head: Head, work: Callable[[], Awaitable[None]], *, deadline_seconds: float
    ) -> bool:
        """Does `work` once it is shown that this mount owns still; meanwhile it publishes nothing.

        `head`, sealed as `sealed`, must be the last published one: so what it keeps stays kept until `work` is done.
        Returns whether it was done; False if that is another head by now, too few backends count, or the deadline,
        which is of all together, came first.  Raises `Fenced` as `publish`, and what `work` raises.
        """
        async with self._turn:
            if self.fenced is not None:
                raise self.fenced
            deadline = trio.current_time() + deadline_seconds
            if sealed.ref != self.published or not await self._owns_still(sealed, head, deadline):
                return False
            with trio.CancelScope(deadline=deadline) as scope:
                await work()
            return not scope.cancelled_caught

    async def _owns_still(self, sealed: SealedHead, head: Head, deadline: float) -> bool:
        """Shows it as publishing does, with the head that was published last: who has lost it gets it again.

        All are read first, and nothing is written unless a quorum of each fleet allows it.
        """
        write = self._write(head, sealed)
        read = await survey(
            self._members.of(write.numbers),
            self._records,
            self._clock,
            self._timing,
            deadline=deadline,
            tries=1,
            enough=lambda so_far: reached(write.quorums, so_far.readings.keys()),
        )
        allowing = {number for number, reading in read.readings.items() if self._judge(reading) is None}
        if not reached(write.quorums, allowing):
            return False
        write.start(self._nursery)
        try:
            return await write.settle(deadline)
        finally:
            write.stop()

    def _write(self, head: Head, sealed: SealedHead, before: Sequence[SealedHead] = ()) -> QuorumWrite:
        return QuorumWrite(
            self._members,
            fleet_quorums(head.fleets, self._code),
            sealed.key,
            sealed.value,
            records=self._records,
            judge=self._judge,
            timing=self._timing,
            clock=self._clock,
            before=[(earlier.key, earlier.value) for earlier in before],
        )

    async def _prepare(self, head: Head) -> tuple[SealedHead, QuorumWrite]:
        if self._pending is not None and self._pending[0] == head:
            return self._pending[1:]
        self._check(head)
        sealed = seal_head(head, self._records.keys, self._clock)
        failpoints.hit("publish.sealed")
        await self._store_before_send(sealed)
        failpoints.hit("publish.stored")
        self._records.learn(sealed, head)
        self._written.add(sealed.ref)
        self.last_sent = sealed.ref
        write = self._write(head, sealed, self._unpublished)
        self._unpublished.append(sealed)
        self._pending = (head, sealed, write)
        return sealed, write

    async def _clean_up(self, head: Head, ref: HeadRef, write: QuorumWrite) -> None:
        """Forgets what no backend lists any more, and deletes what `head` supersedes."""
        await write.finished.wait()
        readings = list(write.survey.readings.values())
        listed = {claim for reading in readings for claim in reading.listing.heads}
        written = frozenset(self._written)
        recent = {sent for sent in written if sent >= ref}
        if write.numbers <= write.survey.readings.keys():
            # Where a backend was not read, heads of ours may lie that nobody else lists.
            self._written = recent | (written & listed)
        self._records.prune(listed | recent)
        await delete_superseded(self._members, readings, head, ref, written, seconds=self._timing.attempt)

    def _check(self, head: Head) -> None:
        if head.owner != self.owner or head.predecessor != self.last_sent or head.fsid != self._records.fsid:
            raise QsfsBug(
                f"the head of generation {head.generation} does not follow the one that was sent last"
            )
        before = self.last_sent
        if before is not None and not head.generation >= before.generation + (before.owner == self.owner):
            raise QsfsBug(
                f"generation {head.generation} is not above {before.generation}, which was sent last"
            )

    def _judge(self, reading: Reading) -> str | None:
        error = fenced(
            reading, owner=self.owner, written=self._written, published=self.published, records=self._records
        )
        if error is not None:
            if self.fenced is None:
                self.fenced = error
                self._on_fenced(error)
            raise error
        return unclear(reading, owner=self.owner, written=self._written, published=self.published)
