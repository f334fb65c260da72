"""Making a new file system on a set of backends.

Nothing is written to stay before every backend has been tried and found free of another file
system.  Then, each step on all backends: identities, superblock, owner record, the packs of the
empty root, its head; and the head is read back as a restore would.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from qsfs import failpoints
from qsfs.backend.contract import Backend
from qsfs.clock import Clock
from qsfs.errors import ConfigError, QsfsError, QuorumUnavailable
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.fleet import Fleet, FleetEntry
from qsfs.format.head import Head, HeadRef, MetadataPack
from qsfs.format.keys import KeyRing
from qsfs.format.owner import Owner, OwnerRecord, seal_owner_record
from qsfs.format.passphrase import KdfCost
from qsfs.format.slots import Secret
from qsfs.format.superblock import SUPERBLOCK_KEY, Superblock, create_superblock, encode_superblock
from qsfs.format.units import DEFAULT_BLOCK, ID_SIZE
from qsfs.remote.control import Reading, Records
from qsfs.remote.fencing import fenced, unclear
from qsfs.remote.format_trial import check_candidates, everywhere, try_backends
from qsfs.remote.identity import write_identity
from qsfs.remote.members import ACTIVE, Candidate, Member, Members
from qsfs.remote.ownership import choose_owner
from qsfs.remote.publish import NotYet, Publisher, StoreBeforeSend
from qsfs.remote.quorum import FleetAssessment, assess, fleet_quorums
from qsfs.remote.quorum_write import QuorumWrite
from qsfs.remote.reasons import listed, summary
from qsfs.remote.survey import Found, Timing, find_newest


@dataclass(frozen=True, slots=True)
class FormatContext:
    """What the preparation of the first generation may use: the members take shards already."""

    superblock: Superblock
    keys: KeyRing
    fleet: Fleet
    members: Members
    owner: Owner


@dataclass(frozen=True, slots=True)
class FirstGeneration:
    """The metadata of the empty root, uploaded and written."""

    snapshot: tuple[MetadataPack, ...]
    counters: Mapping[str, int]
    write_number: int
    schema_version: int


PrepareRoot = Callable[[FormatContext], Awaitable[FirstGeneration]]


@dataclass(frozen=True, slots=True)
class FormatReport:
    """The new file system.  `head` is its first generation, which this machine published."""

    superblock: Superblock
    keys: KeyRing
    fleet: Fleet
    members: Members
    head: Head
    ref: HeadRef
    assessment: FleetAssessment
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


async def format_fs(
    candidates: Sequence[Candidate],
    *,
    secret: Secret,
    cost: KdfCost | None = None,
    code: CodeParams,
    clock: Clock,
    host: str,
    prepare_root: PrepareRoot,
    store_before_send: StoreBeforeSend,
    label: str = "",
    block_size: int = DEFAULT_BLOCK,
    force: bytes | None = None,
    timing: Timing | None = None,
    deadline_seconds: float = 120.0,
) -> FormatReport:
    """Makes a file system that `secret` opens; all `candidates` become its fleet.  `cost` is of a passphrase.

    Their control namespaces exist already.  `force` is the id of the one file system that may be lost.
    `prepare_root` uploads the first generation's packs; `store_before_send` as for every head.

    Raises `ConfigError`, `FormatMismatch` (the code does not decode), `AlreadyFormatted`, the
    backends' errors (every backend must answer), and what the two callbacks raise.  After a failure
    past the trial the same call is repeated with `force`, the id that the next trial names.
    """
    timing = timing or Timing()
    check_candidates(candidates, code.n)
    Code(code).prove(clock.random_bytes(16))
    spaces = [(candidate, candidate.control(candidate.control_namespace)) for candidate in candidates]
    distinct = [space for candidate, control in spaces for space in _distinct(candidate.data, control)]
    trial = await try_backends(distinct, clock, timing.attempt)
    trial.require_free(force)
    failpoints.hit("format.tried")

    superblock, keys = create_superblock(
        secret, code=code, clock=clock, block_size=block_size, label=label, cost=cost
    )
    members = Members(
        Member(_entry(number, candidate, clock), candidate.data, control, clock, identified=True)
        for number, (candidate, control) in enumerate(spaces, start=1)
    )
    fleet = Fleet(1, tuple(member.entry for member in members))
    await _mark(members, superblock, keys, clock, timing)
    failpoints.hit("format.marked")

    forming = _Forming(
        FormatContext(superblock, keys, fleet, members, choose_owner(None, clock)), clock, timing, host
    )
    deadline = trio.current_time() + deadline_seconds
    head, found = await forming.run(prepare_root, store_before_send, deadline)
    assessment = assess(fleet, code)
    warnings = [
        f"{name}: holds keys that qsfs did not write ({count} or more)"
        for name, count in sorted(trial.foreign.items())
    ]
    if force is not None and trial.systems:
        warnings.append(
            f"what file system {force.hex()} has stored still takes room there: a 0-db frees it only when "
            "the namespace is "
            "dropped"
        )
    late = [member.name for member in members if member.number not in found.judgement.counted]
    if late:
        warnings.append(f"did not answer when the new file system was read back: {listed(late)}")
    return FormatReport(
        superblock=superblock,
        keys=keys,
        fleet=fleet,
        members=members,
        head=head,
        ref=found.ref,
        assessment=assessment,
        sentences=(*assessment.sentences(), assessment.may_be_down()),
        warnings=(*assessment.warnings(), *warnings),
    )


def _distinct(data: Backend, control: Backend) -> list[Backend]:
    return [data] if control is data else [data, control]


def _entry(number: int, candidate: Candidate, clock: Clock) -> FleetEntry:
    shared = candidate.control_namespace in ("", candidate.namespace)
    return FleetEntry(
        number=number,
        identity=clock.random_bytes(ID_SIZE),
        address=candidate.address,
        namespace=candidate.namespace,
        control_namespace="" if shared else candidate.control_namespace,
        group=candidate.group,
        node=candidate.node,
        weight=candidate.weight,
        state=ACTIVE,
    )


async def _mark(
    members: Members, superblock: Superblock, keys: KeyRing, clock: Clock, timing: Timing
) -> None:
    """Writes identities and the superblock everywhere; every backend must acknowledge."""
    value = encode_superblock(superblock, keys, clock)
    by_space = {id(member.data): member for member in members}

    async def mark(data: Backend) -> None:
        member = by_space[id(data)]
        await write_identity(member.entry, data, member.control, keys, clock)
        await data.set(SUPERBLOCK_KEY, value)

    await everywhere([member.data for member in members], mark, timing.attempt)


class _Forming:
    """The steps with which the first generation is owned and published."""

    def __init__(self, context: FormatContext, clock: Clock, timing: Timing, host: str) -> None:
        self._context = context
        self._clock = clock
        self._timing = timing
        self._host = host
        self._records = Records(context.keys)

    async def run(
        self, prepare_root: PrepareRoot, store_before_send: StoreBeforeSend, deadline: float
    ) -> tuple[Head, Found]:
        """Owner record, first packs, first head; then all of it is read back."""
        failure: QsfsError | None = None
        head: Head | None = None
        # Late backends are waited for: the nursery ends `timing.grace` after the quorum.
        async with trio.open_nursery() as nursery:
            try:
                head = await self._publish(nursery, prepare_root, store_before_send, deadline)
            except QsfsError as error:
                failure = error
                nursery.cancel_scope.cancel()
        if failure is not None or head is None:
            raise failure or QuorumUnavailable("the format was interrupted")
        found = await find_newest(
            self._context.members,
            Records(self._context.keys),
            self._context.superblock.code,
            self._clock,
            self._timing,
        )
        if found.head != head:
            raise ConfigError(
                "the backends return another head than was just written: another qsfs is formatting them "
                "at this moment"
            )
        return head, found

    async def _publish(
        self,
        nursery: trio.Nursery,
        prepare_root: PrepareRoot,
        store_before_send: StoreBeforeSend,
        deadline: float,
    ) -> Head:
        context, code = self._context, self._context.superblock.code
        await self._announce(nursery, deadline)
        failpoints.hit("format.announced")
        first = await prepare_root(context)
        failpoints.hit("format.prepared")
        publisher = Publisher(
            context.owner,
            None,
            members=context.members,
            records=self._records,
            code=code,
            clock=self._clock,
            nursery=nursery,
            store_before_send=store_before_send,
            timing=self._timing,
        )
        head = Head(
            fsid=context.keys.fsid,
            owner=context.owner,
            generation=1,
            time_ns=self._clock.time_ns(),
            write_number=first.write_number,
            predecessor=None,
            fleets=(context.fleet,),
            kept=(),
            snapshot=first.snapshot,
            deltas=(),
            counters=first.counters,
            block_size=context.superblock.block_size,
            schema_version=first.schema_version,
        )
        result = await publisher.publish(head, deadline_seconds=max(0.0, deadline - trio.current_time()))
        if isinstance(result, NotYet):
            raise QuorumUnavailable(f"the first head was not published: {summary(result.reasons)}")
        return head

    async def _announce(self, nursery: trio.Nursery, deadline: float) -> None:
        context = self._context
        record = OwnerRecord(context.keys.fsid, context.owner, self._clock.time_ns(), self._host)
        key, value = seal_owner_record(record, context.keys, self._clock)
        write = QuorumWrite(
            context.members,
            fleet_quorums((context.fleet,), context.superblock.code),
            key,
            value,
            records=self._records,
            judge=self._allows,
            timing=self._timing,
            clock=self._clock,
        )
        write.start(nursery)
        if not await write.settle(deadline):
            raise QuorumUnavailable(f"the owner record was not stored: {summary(write.reasons())}")

    def _allows(self, reading: Reading) -> str | None:
        owner = self._context.owner
        error = fenced(reading, owner=owner, written=(), published=None, records=self._records)
        if error is not None:
            raise error
        return unclear(reading, owner=owner, written=(), published=None)
