"""A fleet of memory backends with faults, and machines that own and publish on it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import trio

from qsfs.backend.contract import BackendInfo, Buffer, ScanPage, Session
from qsfs.backend.memory import MemoryBackend, MemoryStore
from qsfs.clock import Clock, FixedClock
from qsfs.errors import BackendUnavailable
from qsfs.format.erasure import CodeParams
from qsfs.format.head import Fleet, FleetEntry, Head, HeadRef, KeptGeneration, Owner, SealedHead, seal_head
from qsfs.format.keys import KeyRing, MasterKey
from qsfs.remote.base import LocalHead
from qsfs.remote.control import Records
from qsfs.remote.identity import write_identity
from qsfs.remote.kept import kept_with
from qsfs.remote.members import ACTIVE, Member, Members
from qsfs.remote.newest import Judgement
from qsfs.remote.ownership import Ownership, own
from qsfs.remote.publish import NotYet, Published
from qsfs.remote.survey import Timing

FSID = bytes(range(16))
TIMING = Timing(attempt=5.0, retry=0.1, retry_most=1.0, grace=0.5)


def keys_of(store: MemoryStore) -> list[bytes]:
    """What the store holds."""
    return store.keys()


Gate = Callable[[str, bytes], None]
"""Called before each call with its name and key; raises to make the call fail."""


class FaultySession:
    """A session on which a gate decides before every call, and may wait."""

    def __init__(self, inner: Session, backend: FaultyBackend) -> None:
        self._inner = inner
        self._backend = backend

    @property
    def name(self) -> str:
        return self._inner.name

    async def get(self, key: bytes) -> bytes | None:
        await self._backend.pass_gate("get", key)
        return await self._inner.get(key)

    async def set(self, key: bytes, value: Buffer) -> None:
        await self._backend.pass_gate("set", key)
        await self._inner.set(key, value)

    async def exists(self, key: bytes) -> bool:
        await self._backend.pass_gate("exists", key)
        return await self._inner.exists(key)

    async def check(self, key: bytes) -> bool | None:
        await self._backend.pass_gate("check", key)
        return await self._inner.check(key)

    async def delete(self, key: bytes) -> bool:
        await self._backend.pass_gate("delete", key)
        return await self._inner.delete(key)

    async def scan(self, cursor: bytes | None = None) -> ScanPage:
        await self._backend.pass_gate("scan", b"")
        return await self._inner.scan(cursor)

    async def rscan(self, cursor: bytes | None = None) -> ScanPage:
        await self._backend.pass_gate("rscan", b"")
        return await self._inner.rscan(cursor)

    async def info(self) -> BackendInfo:
        await self._backend.pass_gate("info", b"")
        return await self._inner.info()


class FaultyBackend(FaultySession):
    """A client of a store that can be cut off, slowed down, or made to fail at chosen calls.

    `down` refuses every call.  `gate` may raise at a call.  `delay` gives the seconds before it.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.memory = MemoryBackend(store)
        super().__init__(self.memory, self)
        self.down = False
        self.gate: Gate = lambda call, key: None
        self.delay: Callable[[str], float] = lambda call: 0.0
        self.calls: list[tuple[str, bytes]] = []

    @property
    def store(self) -> MemoryStore:
        return self.memory.store

    async def pass_gate(self, call: str, key: bytes) -> None:
        await trio.sleep(self.delay(call))
        if self.down:
            raise BackendUnavailable(f"backend {self.name}: connection refused")
        self.gate(call, key)
        self.calls.append((call, key))

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        await self.pass_gate("connect", b"")
        async with self.memory.session() as inner:
            yield FaultySession(inner, self)

    def expect(self, key: bytes, value: bytes | None) -> None:
        self.memory.expect(key, value)

    async def aclose(self) -> None:
        await self.memory.aclose()


class TrioClock(FixedClock):
    """Running time is trio's (virtual) clock; wall time follows it; random bytes are seeded."""

    def time_ns(self) -> int:
        return super().time_ns() + int(trio.current_time() * 1e9)

    def monotonic(self) -> float:
        return trio.current_time()


@dataclass
class World:
    """The servers, which all machines share: one store each for heads, and one head to start from."""

    code: CodeParams
    clock: Clock
    keys: KeyRing
    fleet: Fleet
    data: list[MemoryStore]
    control: list[MemoryStore]
    shared: bool

    def backends(self) -> dict[int, FaultyBackend]:
        """New connections of one machine to the heads of every backend, by number."""
        return {entry.number: FaultyBackend(self.control[i]) for i, entry in enumerate(self.fleet.entries)}

    def control_of(self, number: int) -> MemoryStore:
        return self.control[number - 1]


async def make_world(
    count: int, *, k: int = 2, m: int = 1, seed: int = 0, shared: bool = False, groups: tuple[str, ...] = ()
) -> World:
    """`count` backends with identities and no head."""
    clock = TrioClock(seed)
    keys = KeyRing(FSID, [MasterKey(1, clock.random_bytes(32))])
    entries = tuple(
        FleetEntry(
            number=number,
            identity=clock.random_bytes(16),
            address=f"host{number}:9900",
            namespace="qsfs",
            control_namespace="" if shared else "qsfs-heads",
            group=groups[number - 1] if groups else "",
            node="",
            weight=1,
            state=ACTIVE,
        )
        for number in range(1, count + 1)
    )
    data = [MemoryStore(f"host{entry.number}:9900/qsfs", clock=clock, page_entries=4) for entry in entries]
    control = (
        data
        if shared
        else [
            MemoryStore(f"host{entry.number}:9900/qsfs-heads", clock=clock, page_entries=4)
            for entry in entries
        ]
    )
    for entry, data_store, control_store in zip(entries, data, control, strict=True):
        one = MemoryBackend(data_store)
        other = one if shared else MemoryBackend(control_store)
        await write_identity(entry, one, other, keys, clock)
    return World(CodeParams(k, k + m), clock, keys, Fleet(1, entries), data, control, shared)


def make_head(
    world: World, owner: Owner, generation: int, predecessor: HeadRef | None = None, **fields: object
) -> Head:
    """A head of the world's fleet that names nothing else."""
    head = Head(
        fsid=FSID,
        owner=owner,
        generation=generation,
        time_ns=world.clock.time_ns(),
        write_number=generation,
        predecessor=predecessor,
        fleets=(world.fleet,),
        kept=(),
        snapshot=(),
        deltas=(),
    )
    return dataclasses.replace(head, **fields)  # type: ignore[arg-type]


def plant(world: World, head: Head, numbers: tuple[int, ...] = ()) -> SealedHead:
    """Seals a head and puts it on the given backends (default all) without any of our code."""
    sealed = seal_head(head, world.keys, world.clock)
    for number in numbers or tuple(entry.number for entry in head.fleets[-1].entries):
        world.control_of(number).put(sealed.key, sealed.value)
    return sealed


@dataclass
class Machine:
    """One machine: its connections, its spool, and the mount that may run on it."""

    world: World
    name: str = "alpha"
    timing: Timing = TIMING
    seed: int = 1
    spool: list[SealedHead] = field(default_factory=list)
    ownership: Ownership | None = None
    published: list[KeptGeneration] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = TrioClock(self.seed)
        self.backends = self.world.backends()
        self.records = Records(self.world.keys)
        self.members = Members(
            Member(entry, backend, _control(backend, self.world), self.clock, identified=True)
            for entry, backend in zip(self.world.fleet.entries, self.backends.values(), strict=True)
        )

    async def store(self, sealed: SealedHead) -> None:
        """Stores a head in the spool."""
        await trio.lowlevel.checkpoint()
        self.spool.append(sealed)

    async def own(
        self,
        nursery: trio.Nursery,
        *,
        accept: Callable[[Head, Judgement], None] = lambda head, judgement: None,
        restored: LocalHead | None = None,
        rejected: frozenset[HeadRef] = frozenset(),
        deadline: float = 30.0,
    ) -> Ownership:
        """Owns; every newest head is accepted unless told otherwise."""
        self.ownership = await own(
            self.members,
            records=self.records,
            code=self.world.code,
            clock=self.clock,
            nursery=nursery,
            host=self.name,
            accept=accept,
            store_before_send=self.store,
            fleets=(self.world.fleet,),
            restored=restored,
            rejected=rejected,
            timing=self.timing,
            deadline_seconds=deadline,
        )
        self.published = [KeptGeneration(self.ownership.first_ref, 0, ())]
        return self.ownership

    def next_head(self, **fields: object) -> Head:
        """The head that follows the one sent last."""
        assert self.ownership is not None
        publisher = self.ownership.publisher
        assert publisher.last_sent is not None and publisher.published is not None
        published = self.published or [KeptGeneration(publisher.published, 0, ())]
        kept = kept_with(self.ownership.first.kept, published, {})
        return make_head(
            self.world,
            publisher.owner,
            publisher.last_sent.generation + 1,
            publisher.last_sent,
            kept=kept,
            **fields,
        )

    async def publish(self, head: Head | None = None, *, deadline: float = 20.0) -> Published | NotYet:
        """Publishes `head`, or the next one."""
        assert self.ownership is not None
        result = await self.ownership.publisher.publish(head or self.next_head(), deadline_seconds=deadline)
        if isinstance(result, Published):
            self.published.append(KeptGeneration(result.ref, 0, ()))
        return result

    def cut_off(self, *numbers: int) -> None:
        """Makes exactly these backends unreachable from this machine."""
        for number, backend in self.backends.items():
            backend.down = number in numbers


def _control(backend: FaultyBackend, world: World) -> FaultyBackend:
    # In the harness data calls are never made, so the control client may stand for both; the
    # listing must go by cursor only where the world says that the namespace is shared.
    return backend if world.shared else FaultyAlias(backend)


class FaultyAlias(FaultyBackend):
    """Another object for the same connections: a control namespace apart from the data's."""

    def __init__(self, backend: FaultyBackend) -> None:
        super().__init__(backend.store)
        self._twin = backend

    async def pass_gate(self, call: str, key: bytes) -> None:
        await self._twin.pass_gate(call, key)
