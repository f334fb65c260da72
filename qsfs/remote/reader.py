"""Reading packs from the backends: one gathering a pack, shared by all who want something of it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple, Unpack

import trio

from qsfs.errors import Corrupt, Unavailable
from qsfs.format.erasure import Code
from qsfs.format.extent import ExtentEntry
from qsfs.format.keys import KeyRing
from qsfs.format.pack import open_extent, verify_body
from qsfs.remote.ask import Answer, Finding
from qsfs.remote.gather import Gathering
from qsfs.remote.latency import Latencies
from qsfs.remote.members import Members
from qsfs.remote.slots import Slots
from qsfs.remote.stored import StoredPack
from qsfs.remote.watch import Watch

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

RECENT_BYTES = 32 << 20
"""Payloads kept in memory after they were read: neighbours in a pack are often read next."""
GETS_PER_BACKEND = 16
DECODING_AT_ONCE = 16
WORTH_A_THREAD = 64 << 10
"""Bytes from which on opening an extent leaves the event loop's thread."""
_DECRYPTED_AT_ONCE = 8
"""Bytes that are decrypted in the time of one that is decompressed; 256 KiB take less time than the hop."""
_THREADS = 2
_DAMAGE_REMEMBERED = 10_000


@dataclass(slots=True)
class ReadCounts:
    """What was read since the start: GETs, their bytes, packs decoded from parity, bad answers."""

    gets: int = 0
    bytes: int = 0
    decoded: int = 0
    absent: int = 0
    corrupt: int = 0


class PackReader:
    """Reads shards, extents and whole packs.  `run` must be running.

    Nothing here has a deadline: callers use trio's cancel scopes, and `explain` says what a wait
    is for.  Every payload that is handed out has been authenticated.
    """

    def __init__(
        self,
        members: Members,
        keys: KeyRing,
        code: Code,
        *,
        damaged: Callable[[StoredPack, Answer], None] | None = None,
        worth_a_thread: int = WORTH_A_THREAD,
    ) -> None:
        """`damaged` hears of each shard that is positively absent where it was placed, or corrupt anywhere.

        Opening and decoding of more than `worth_a_thread` bytes leave the thread of the event loop.
        """
        self.members = members
        self.keys = keys
        self.coder = code
        self.code = code.params
        self.latencies = Latencies()
        self.slots = Slots(DECODING_AT_ONCE)
        self.watch = Watch(members)
        self.counts = ReadCounts()
        self._damaged = damaged
        self._worth_a_thread = worth_a_thread
        self._limits: dict[int, trio.CapacityLimiter] = {}
        self._threads = trio.CapacityLimiter(_THREADS)
        self._gatherings: dict[bytes, Gathering] = {}
        self._recent: OrderedDict[tuple[bytes, int], memoryview] = OrderedDict()
        self._recent_bytes = 0
        self._nursery: trio.Nursery | None = None
        self._named: OrderedDict[tuple[bytes, int, int], None] = OrderedDict()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; whoever waits then gets `Unavailable`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self.watch.run)
                task_status.started()
        finally:
            self._nursery = None
            for gathering in list(self._gatherings.values()):
                gathering.end(
                    Unavailable(f"pack {gathering.pack.name}: reading ended because the daemon stops")
                )
            self._gatherings.clear()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[PackReader]:
        """Serves for the time of an `async with` block: for commands without a daemon."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.run)
            try:
                yield self
            finally:
                nursery.cancel_scope.cancel()

    # reading

    async def shards(self, pack: StoredPack, wanted: Collection[int]) -> dict[int, memoryview]:
        """The payloads of these data shards of `pack`, read or decoded.  Waits as long as it takes.

        Raises `DataLost` if every backend has answered and too few shards are left.
        """
        ready = {number: found for number in wanted if (found := self._kept(pack, number)) is not None}
        if len(ready) == len(wanted):
            return ready
        return await self._gathering(pack).payloads(wanted)

    async def extent(self, pack: StoredPack, entry: ExtentEntry) -> bytes:
        """The plain bytes of one extent.

        Raises `DataLost` as `shards`, and `Corrupt` if the pack does not hold what `entry` says.
        """
        ref = pack.ref
        if entry.offset + entry.sealed_length > ref.body_length:
            raise Corrupt(f"pack {pack.name}: extent {entry.ordinal} ends behind the pack; run 'qsfs fsck'")
        numbers = entry.shards(ref)
        payloads = await self.shards(pack, numbers)
        if len(numbers) == 1:
            start = entry.offset - numbers[0] * ref.shard_size
            sealed: bytes | memoryview = payloads[numbers[0]][start : start + entry.sealed_length]
        else:
            start = entry.offset - numbers[0] * ref.shard_size
            sealed = b"".join(payloads[number] for number in numbers)[start : start + entry.sealed_length]
        work = entry.plain_length if entry.codec else entry.plain_length // _DECRYPTED_AT_ONCE
        return await self.compute(work, open_extent, self.keys, ref, entry, sealed)

    async def body(self, pack: StoredPack) -> bytes:
        """The whole body of a pack, every extent and its digest verified."""
        payloads = await self.shards(pack, range(pack.ref.k))
        body = b"".join(payloads[number] for number in range(pack.ref.k))
        await self.compute(len(body), verify_body, self.keys, pack.ref, body)
        return body

    def explain(self, pack: StoredPack) -> str:
        """What a reader of `pack` is waiting for."""
        gathering = self._gatherings.get(pack.ref.pack_id)
        return f"pack {pack.name}: not being read" if gathering is None else gathering.explain()

    def asleep(self, pack: StoredPack) -> bool:
        """Whether reading `pack` waits for backends to come back."""
        gathering = self._gatherings.get(pack.ref.pack_id)
        return gathering is not None and gathering.asleep

    def held_up(self, pack: StoredPack) -> bool:
        """Whether reading `pack` waits for its turn by the download rate, and for no backend."""
        gathering = self._gatherings.get(pack.ref.pack_id)
        return gathering is not None and gathering.held_up

    # for gatherings

    def start(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Starts a task that outlives whoever asked for it."""
        if self._nursery is None:
            raise Unavailable("the backends are not being read: the daemon starts or stops")
        self._nursery.start_soon(task, *arguments)

    def limit(self, member: int) -> trio.CapacityLimiter:
        """Bounds the questions to one backend: what hangs there must not hold more."""
        limiter = self._limits.get(member)
        if limiter is None:
            limiter = self._limits[member] = trio.CapacityLimiter(GETS_PER_BACKEND)
        return limiter

    async def decode(self, have: Mapping[int, memoryview]) -> list[bytes]:
        """The k data shards."""
        return await self.compute(sum(map(len, have.values())), self.coder.decode, have)

    async def received(self, pack: StoredPack, answer: Answer) -> None:
        """Counts an answer, keeps what is good, reports what is not."""
        self.counts.gets += 1
        if answer.payload is not None:
            self.counts.bytes += len(answer.payload)
            if answer.number < pack.ref.k:
                self._keep(pack, answer.number, answer.payload)
            return
        if answer.finding is Finding.CORRUPT:
            self.counts.corrupt += 1
        elif answer.finding is Finding.ABSENT:
            self.counts.absent += 1
        if answer.finding is Finding.UNKNOWN or (
            answer.finding is Finding.ABSENT and pack.placement[answer.number] != answer.member
        ):
            return
        if self._first_time((pack.ref.pack_id, answer.number, answer.member)):
            log.warning("pack %s, shard %d: %s; it is read from others", pack.name, answer.number, answer.why)
        if self._damaged is not None:
            self._damaged(pack, answer)

    def _gathering(self, pack: StoredPack) -> Gathering:
        gathering = self._gatherings.get(pack.ref.pack_id)
        if gathering is not None and not gathering.finished and gathering.pack.ref == pack.ref:
            return gathering
        gathering = Gathering(self, pack)
        self.start(self._run_gathering, gathering)
        self._gatherings[pack.ref.pack_id] = gathering
        return gathering

    async def _run_gathering(self, gathering: Gathering) -> None:
        try:
            await gathering.run()
        finally:
            if self._gatherings.get(gathering.pack.ref.pack_id) is gathering:
                del self._gatherings[gathering.pack.ref.pack_id]
            for number in gathering.wanted & gathering.found.keys():
                self._keep(gathering.pack, number, gathering.found[number])

    def _kept(self, pack: StoredPack, number: int) -> memoryview | None:
        payload = self._recent.get((pack.ref.pack_id, number))
        if payload is not None:
            self._recent.move_to_end((pack.ref.pack_id, number))
        return payload

    def _keep(self, pack: StoredPack, number: int, payload: memoryview) -> None:
        key = (pack.ref.pack_id, number)
        if key in self._recent:
            return
        self._recent[key] = payload
        self._recent_bytes += len(payload)
        while self._recent_bytes > RECENT_BYTES and len(self._recent) > 1:
            _, old = self._recent.popitem(last=False)
            self._recent_bytes -= len(old)

    def _first_time(self, key: tuple[bytes, int, int]) -> bool:
        if key in self._named:
            return False
        self._named[key] = None
        if len(self._named) > _DAMAGE_REMEMBERED:
            self._named.popitem(last=False)
        return True

    async def compute(self, size: int, function: Callable[[Unpack[_Ts]], _T], *arguments: *_Ts) -> _T:
        """Calls `function`, in a thread if that is worth the hop for `size` bytes."""
        if size <= self._worth_a_thread:
            await trio.lowlevel.checkpoint()
            return function(*arguments)
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)
