"""The backends that all machines share, their faults, and the file system that every history starts from."""

from __future__ import annotations

import dataclasses
import functools
import random
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trio
from trio.testing import MockClock

from qsfs.backend.contract import Backend
from qsfs.backend.faults import Faults, _Injector, _Seen
from qsfs.backend.limits import RateLimit
from qsfs.backend.memory import MemoryBackend, MemoryStore
from qsfs.backend.wrapper import Call, WrappedBackend
from qsfs.daemon.connect import SUPERBLOCK_ROW, Links
from qsfs.errors import BackendUnavailable
from qsfs.format.head import Head, HeadRef, open_head, parse_head_key
from qsfs.format.identity import identity_key
from qsfs.format.shard import parse_shard_key
from qsfs.format.superblock import SUPERBLOCK_KEY
from qsfs.remote.members import Candidate
from qsfs.remote.quorum import fence_quorum
from qsfs.store.group import Publication
from qsfs.store.limits import Limits
from qsfs.store.schema import ROOT_INODE, SCHEMA_VERSION, Inode
from qsfs.store.store import FSID_KEY, NEXT_INODE
from tests.remote.harness import World, make_world
from tests.remote.small_fs import SmallFs, add_superblock
from tests.simulation.engine import Trace
from tests.simulation.sealing import recorded
from tests.support.scratch import scratch_directory

T = TypeVar("T")

LIMITS = Limits(
    map_bytes=24 << 20,
    journal_bytes=256 << 10,
    spool_bytes=4 << 20,
    group_bytes=1 << 20,
    uncovered_bytes=256 << 10,
    largest_append=64 << 10,
    high_bytes=14 << 20,
    low_bytes=12 << 20,
    full_bytes=18 << 20,
)
MARKER = b"user.version"
MARK = b"which no backend may ever learn"
"""Part of what is written, and of the names of files."""
HEADS = "qsfs-heads"
FAULTS = ("down", "full", "flap", "slow", "hang", "fail", "fail_after", "lose", "old", "flip", "truncate")
CODES = ((2, 1, 4), (2, 1, 5), (2, 2, 6), (3, 2, 7))
"""(k, m, backends) of the file systems that histories are lived on."""


@functools.cache
def _template(k: int, m: int, count: int, shared: bool) -> tuple[World, dict[str, bytes], dict[bytes, bytes]]:
    """A formatted, empty file system: its backends, the files of the local store of who formatted it, and its seals."""

    async def make(directory: Path) -> World:
        world = await make_world(count, k=k, m=m, seed=1, shared=shared)
        add_superblock(world)
        fs = SmallFs(world, directory, LIMITS)
        fs.store.set_local(FSID_KEY, fs.keys.fsid)
        with fs.store.change() as change:
            change.create(Inode(ROOT_INODE, stat.S_IFDIR | 0o755, nlink=2, parent=ROOT_INODE, next_cookie=3))
        fs.store.set_counter(NEXT_INODE, 1)
        fs.store.set_local(SUPERBLOCK_ROW, world.data[0].peek(SUPERBLOCK_KEY) or b"")
        fs.commit()
        fs.publish(1, schema_version=SCHEMA_VERSION)
        fs.store.layers.open.published = Publication(fs.store.layers.committed_number, {})
        fs.record_base()
        fs.close()
        return world

    with scratch_directory("format") as directory, recorded() as seals:
        world = trio.run(make, directory, clock=MockClock())
        return world, {path.name: path.read_bytes() for path in directory.iterdir()}, seals.uses


async def at_once(number: int, call: Call) -> None:
    """What tests put in the way of calls to the backend with this number; here nothing."""


def prepare() -> None:
    """Formats what histories start from; once in a process, and not within a run."""
    for code in CODES:
        for shared in (False, True):
            _template(*code, shared)


class Cluster:
    """The backends of one history.

    `liars` may lose, forget and distort what they acknowledged, as many as nothing may be lost for; any backend
    may be slow, cut off or full for a while.  `deleted` are the packs of which somebody deleted shards.
    `sealed` is what the format sealed under which key and nonce.
    """

    def __init__(
        self, seed: int, chance: random.Random, trace: Trace, code: tuple[int, int, int] | None = None
    ) -> None:
        """`code`: k, m and backends; default as the seed says."""
        self.chance = chance
        self.trace = trace
        self.k, self.m, count = code or chance.choice(CODES)
        shared = chance.random() < 0.3
        template, self._files, self.sealed = _template(self.k, self.m, count, shared)
        self.world = self._copy(template)
        self.server_of = {entry.number: entry.number for entry in self.world.fleet.entries}
        self.spare = 2
        self._add_spare()
        self.numbers = list(range(1, count + self.spare + 1))
        self.spares = frozenset(self.numbers[count:])
        self.quorum = fence_quorum(count, self.m, 1)
        tolerated = min(-(-self.m // 2), self.quorum.may_be_stale)
        self.liars = frozenset(chance.sample(self.numbers[:count], chance.randint(0, tolerated)))
        self.faulty = set(self.liars)
        self.faults = {number: Faults(seed=seed * 100 + number) for number in self.numbers}
        self.saw_head: Callable[[Any, Head, HeadRef], None] = lambda host, head, ref: None
        self.before: Callable[[int, Call], Awaitable[None]] = at_once
        self.deleted: set[bytes] = set()
        self.deleted_by: dict[str, set[bytes]] = {}
        self.pace = chance.choice((0.0, 0.01, 0.3))
        self._images: dict[int, tuple[MemoryStore, MemoryStore]] = {}

    def _add_spare(self) -> None:
        """Servers that no fleet has yet."""
        world = self.world
        for number in range(len(world.data) + 1, len(world.data) + self.spare + 1):
            store = MemoryStore(f"host{number}:9900/qsfs", clock=world.clock, page_entries=4)
            world.data.append(store)
            if not world.shared:
                heads = MemoryStore(f"host{number}:9900/{HEADS}", clock=world.clock, page_entries=4)
                world.control.append(heads)

    def learn(self, head: Head) -> None:
        """Takes note of which entries of a fleet are which servers."""
        for fleet in head.fleets:
            for entry in fleet.entries:
                self.server_of[entry.number] = int(entry.address.partition(":")[0].removeprefix("host"))

    def server(self, entry: int) -> MemoryStore:
        """The data namespace of an entry of a fleet."""
        return self.world.data[self.server_of[entry] - 1]

    @staticmethod
    def _copy(template: World) -> World:
        data = [store.copy() for store in template.data]
        control = data if template.shared else [store.copy() for store in template.control]
        return dataclasses.replace(template, data=data, control=control)

    def write_formatted(self, directory: Path) -> None:
        """Makes the cache directory of the machine that formatted the file system."""
        directory.mkdir()
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    @property
    def root(self) -> tuple[Head, HeadRef]:
        """The head that the format published."""
        for key in list(self.world.control[0].keys()):
            named = parse_head_key(key)
            if named is not None:
                return open_head(key, self.world.control[0].peek(key) or b"", self.world.keys), named.ref
        raise AssertionError("the template has no head")

    # connections

    def links(self, host: Any) -> Links:
        """New connections of one machine to all backends; its `cut_off` says which of them it does not reach."""
        candidates = []
        for number in self.numbers:
            data, control = self._stores(number)
            connect = functools.partial(self._connect, host, number)
            candidates.append(
                Candidate(
                    f"host{number}:9900",
                    "qsfs",
                    connect(data),
                    lambda _, connect=connect, control=control: connect(control),
                    control_namespace="" if self.world.shared else HEADS,
                )
            )
        return Links(candidates, [], {}, RateLimit(), RateLimit())

    def _connect(self, host: Any, number: int, store: MemoryStore) -> Backend:
        backend = MemoryBackend(store, self._latency)
        seen = _Seen()
        return WrappedBackend(
            backend,
            _Wire(self, host, number, store, _Injector(self.faults[number], store.name, seen, breaks=False)),
            lambda: _Wire(self, host, number, store, _Injector(self.faults[number], store.name, seen, breaks=True)),
        )

    def _latency(self, call: str, size: int) -> float:
        turn = self.chance.random()
        return 0.0 if turn < 0.5 else self.pace * (20 if turn > 0.98 else turn)

    # faults

    def misbehave(self) -> str:
        """Gives some backends other faults than they had; says what is wrong now."""
        chance = self.chance
        for number, faults in self.faults.items():
            if chance.random() < 0.5:
                self._heal(number)
            if chance.random() < 0.3:
                kind = chance.choice(("down", "down", "flap", "slow", "hang", "fail", "fail_after", "full"))
                if kind in ("down", "full"):
                    setattr(faults, kind, True)
                elif kind == "flap":
                    faults.flap = (chance.uniform(0.5, 20), chance.uniform(0.5, 20))
                elif kind == "slow":
                    faults.slow = chance.choice((0.3, 3.0, 40.0))
                else:
                    setattr(faults, kind, chance.choice((0.1, 0.5)))
            self._note(number)
        for number in self.liars:
            self.lie(number)
        return self.describe()

    def _note(self, number: int) -> None:
        """Calls to backends without any fault take the short way."""
        faults = self.faults[number]
        wrong = number in self.liars or any(getattr(faults, name) for name in FAULTS)
        (self.faulty.add if wrong else self.faulty.discard)(number)

    def lie(self, number: int) -> None:
        """A backend forgets, distorts, or goes back to what it once was."""
        chance, faults = self.chance, self.faults[number]
        turn = chance.random()
        for name in ("lose", "old", "flip", "truncate"):
            setattr(faults, name, chance.choice((0.0, 0.0, 0.3, 1.0)))
        stores = self._stores(number)
        if turn < 0.3 or number not in self._images:
            self.remember(number)
        elif turn < 0.55:
            self.go_back(number)
        elif turn < 0.8:
            for store in set(stores):
                keys = [key for key in sorted(store.keys()) if not key.startswith(b"qsfs:i:")]
                for key in chance.sample(keys, len(keys) // 2):
                    if chance.random() < 0.5:
                        store.lose(key)
                    else:
                        store.rot(key, lambda value: value[:-1] + bytes([value[-1] ^ 1]))

    def remember(self, number: int) -> None:
        """What a backend that lies may go back to."""
        data, control = self._stores(number)
        self._images[number] = (data.copy(), control.copy())

    def go_back(self, number: int) -> None:
        """A backend is again as it was once."""
        for store, image in zip(self._stores(number), self._images[number], strict=True):
            store.go_back_to(image)

    def _stores(self, number: int) -> tuple[MemoryStore, MemoryStore]:
        return self.world.data[number - 1], self.world.control[number - 1]

    def _heal(self, number: int) -> None:
        faults = self.faults[number]
        faults.down = faults.full = False
        faults.flap = None
        faults.slow = faults.hang = faults.fail = faults.fail_after = 0.0

    def calm(self) -> None:
        """Every backend answers again; those that lie go on with that."""
        for number in self.numbers:
            self._heal(number)
            self._note(number)

    def heal(self) -> None:
        """Every backend answers again; what liars lost stays lost."""
        for number, faults in self.faults.items():
            self._heal(number)
            faults.lose = faults.old = faults.flip = faults.truncate = 0.0
            self._note(number)

    def describe(self) -> str:
        """The faults that there are now, for people."""
        found = []
        for number, faults in self.faults.items():
            what = [f"{name}={getattr(faults, name)}" for name in FAULTS if getattr(faults, name)]
            if what:
                found.append(f"{number}: {' '.join(what)}")
        return ", ".join(found) or "all backends are well"


class _Wire:
    """What lies between one machine and one backend."""

    def __init__(self, cluster: Cluster, host: Any, number: int, store: MemoryStore, injector: _Injector) -> None:
        self._cluster = cluster
        self._host = host
        self._number = number
        self._store = store
        self._injector = injector

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        host, cluster = self._host, self._cluster
        if host.dead or self._number in host.cut_off:
            await trio.lowlevel.checkpoint()
            raise BackendUnavailable(f"backend {self._number}: no route")
        if call.kind == "set":
            named = parse_head_key(call.key)
            if named is not None:
                head = open_head(call.key, bytes(call.value or b""), cluster.world.keys)
                cluster.saw_head(host, head, named.ref)
        cluster.trace.event(f"{host.name} {self._number} {call.kind} {call.key[-12:].hex()}")
        await cluster.before(self._number, call)
        if call.kind == "delete" and (shard := parse_shard_key(call.key)) is not None:
            cluster.deleted.add(shard.pack_id)
            cluster.deleted_by.setdefault(host.name, set()).add(shard.pack_id)
        assert MARK not in call.key and MARK not in bytes(call.value or b""), f"{host.name} sends it in the clear"
        if call.kind == "set":
            self._refuse_overwriting(call)
        if self._number in cluster.faulty:
            return await self._injector.around(call, run)
        return await run()

    def _refuse_overwriting(self, call: Call) -> None:
        """What one machine has stored no other overwrites: each value has a key of its own.

        But for the superblock, whose revisions follow one another, and for the identity of a backend that is joining,
        which is read right before it is written: to stand still in between is all that a machine needs to write late.
        """
        cluster, stored = self._cluster, self._store.peek(call.key)
        if stored is None or stored == bytes(call.value or b"") or self._number in cluster.liars:
            return
        assert call.key in (SUPERBLOCK_KEY, identity_key(cluster.world.keys.fsid)), (
            f"{self._host.name} overwrites {call.key!r} on backend {self._number}"
        )
