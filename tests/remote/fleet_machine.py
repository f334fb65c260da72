"""A machine whose fleet changes: real ownership and heads on servers of which some have never been used.

    site = await make_site(count=5, spare=2)
    machine = FleetMachine(site, directory, clock)
    async with machine.flushing() as flusher:
        await machine.apply(drain=("host1",))          # the configured servers become the fleet
    files = restore(site.everything).files

Servers are called host1, host2 and so on; `configured` are those that a machine's configuration lists.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio
from trio.testing import MockClock

from qsfs.backend.memory import MemoryStore
from qsfs.config import FlushConfig
from qsfs.daemon.connect import Opened
from qsfs.daemon.owning import local_fleets, own_when_possible
from qsfs.daemon.probing import probe
from qsfs.errors import BackendError, ConfigError, Fenced, NotFound
from qsfs.format.erasure import Code
from qsfs.format.fleet import Fleet
from qsfs.format.head import Owner
from qsfs.format.superblock import SUPERBLOCK_KEY, read_superblock
from qsfs.remote.control import Records
from qsfs.remote.fleet_change import FleetChange, Joining, held_back
from qsfs.remote.fleet_plan import Configured, FleetPlan, Shown, check_plan, plan_change
from qsfs.remote.flush import Flusher
from qsfs.remote.identity import ask_anew, find_members
from qsfs.remote.members import Candidate, State
from qsfs.remote.placement import FreeSpace
from qsfs.remote.restore import restore as real_restore
from qsfs.remote.spool import Spool
from qsfs.remote.survey import Found, find_newest
from qsfs.remote.upload import Uploader
from qsfs.store.store import Store
from tests.remote.flush_machine import LIMITS, Crash, DirectCommitter, DirectReader, FlushMachine
from tests.remote.flushing import VirtualClock
from tests.remote.harness import TIMING, FaultyBackend, World, make_world
from tests.remote.small_fs import SECRET, add_superblock

HEADS = "qsfs-heads"


@dataclass
class Site:
    """All servers.  `world` has those of the first fleet, `everything` all: what `restore` reads from."""

    world: World
    everything: World

    @property
    def names(self) -> list[str]:
        return [store.name.partition(":")[0] for store in self.everything.data]

    def data(self, name: str) -> MemoryStore:
        return self.everything.data[self.names.index(name)]

    def control(self, name: str) -> MemoryStore:
        return self.everything.control[self.names.index(name)]


async def make_site(count: int, spare: int, *, k: int = 2, m: int = 1, shared: bool = False) -> Site:
    """A file system on `count` servers, and `spare` more that nobody has used."""
    world = await make_world(count, k=k, m=m, shared=shared)
    add_superblock(world)
    names = [f"host{number}:9900" for number in range(count + 1, count + spare + 1)]
    data = [MemoryStore(f"{name}/qsfs", clock=world.clock, page_entries=4) for name in names]
    control = data if shared else [MemoryStore(f"{name}/{HEADS}", clock=world.clock, page_entries=4) for name in names]
    everything = dataclasses.replace(world, data=[*world.data, *data], control=[*world.control, *control])
    return Site(world, everything)


class FleetMachine(FlushMachine):
    """One machine of a site.  `down` are servers that do not answer it."""

    def __init__(self, site: Site, directory: Path, clock: MockClock, *, seed: int = 3) -> None:
        super().__init__(site.world, directory, seed=seed)
        self.site = site
        self.virtual = clock
        self.clock = VirtualClock(clock)
        self.clock._random.seed(seed)  # type: ignore[attr-defined]
        self.configured = site.names[: len(site.world.data)]
        self.links = {name: (FaultyBackend(site.data(name)), FaultyBackend(site.control(name))) for name in site.names}
        if site.world.shared:
            self.links = {name: (data, data) for name, (data, _) in self.links.items()}
        self.waits: list[str] = []
        self.fenced: list[Fenced] = []
        self.flusher: Flusher
        self.opened_fs: Opened

    def down(self, *names: str) -> None:
        """Makes exactly these servers unreachable."""
        for name, pair in self.links.items():
            for backend in pair:
                backend.down = name in names

    def candidates(self, names: Iterable[str] | None = None) -> list[Candidate]:
        """The configured backends."""
        control = "" if self.site.world.shared else HEADS
        return [
            Candidate(
                f"{name}:9900",
                "qsfs",
                self.links[name][0],
                lambda _, name=name: self.links[name][1],  # type: ignore[misc]
                control_namespace=control,
            )
            for name in (self.configured if names is None else names)
        ]

    @contextlib.asynccontextmanager
    async def mounted(self) -> AsyncIterator[FleetMachine]:
        """As of `FlushMachine`, with members found as a daemon finds them."""
        self.directory.mkdir(exist_ok=True)
        self.store = Store(self.directory, self.limits, self.clock)
        keys = self.world.keys
        value = self.world.data[0].peek(SUPERBLOCK_KEY)
        assert value is not None
        self.superblock = value
        superblock = read_superblock(value, keys)
        self.opened_fs = Opened(superblock, keys, Code(self.world.code), Records(keys))
        try:
            self.spool = Spool(self.directory / "spool", self.limits.spool_bytes)
            self.committer = DirectCommitter(self.store)
            fleets = local_fleets(self.store, self.opened_fs) or (self.world.fleet,)
            members, _ = await find_members(self.candidates(), keys, self.clock, fleets=fleets)
            self.fleet_members = members
            self.free = FreeSpace(members, self.clock)
            self.uploader = Uploader(members, self.free, self.world.code, keys.fsid, self.clock, full_grace_seconds=2.0)
            with self._unwrapped():
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    await nursery.start(self.uploader.run)
                    nursery.start_soon(probe, members, keys)
                    await self._own()
                    yield self
                    nursery.cancel_scope.cancel()
        finally:
            self.store.close()

    async def _publish_first(self, owner: Owner) -> None:
        owned = await own_when_possible(
            self.store,
            self.spool,
            self.opened_fs,
            self.fleet_members,
            self.clock,
            self.nursery,
            takeover=self.takes_over,
            on_fenced=self.fenced.append,
            waiting=self.waits.append,
        )
        self.takes_over = False
        self.publisher = owned.publisher  # type: ignore[assignment]
        self.first = owned.first
        self.committer.commit_now()

    takes_over = False

    async def _format(self, owner: Owner, sealer: object) -> None:
        await super()._format(owner, sealer)  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def flushing(self, **settings: float) -> AsyncIterator[Flusher]:
        """Mounted, with a flusher at work."""
        config = FlushConfig(**{"cut_seconds": 30.0, "quiet_seconds": 5.0, **settings})  # type: ignore[arg-type]
        with self._unwrapped():
            async with self.mounted(), trio.open_nursery() as nursery:
                self.flusher = Flusher(
                    self.context,
                    config,
                    self.publisher,
                    self.first,
                    DirectReader(self.site.everything),
                    on_fenced=lambda error: None,
                )
                await nursery.start(self.flusher.run)
                yield self.flusher
                nursery.cancel_scope.cancel()

    @property
    def fleets(self) -> tuple[Fleet, ...]:
        """Those that the last published head names."""
        assert self.flusher.generations is not None
        return self.flusher.generations.fleets

    async def settled(self) -> None:
        """Waits until no change of the fleet is under way."""
        while self.flusher.generations is None or len(self.fleets) > 1:
            await self.flusher.publish_all()

    # changing

    async def plan(self, drain: Collection[str] = (), lost: Collection[str] = ()) -> FleetPlan:
        """What `fleet apply` would do, by names of servers."""
        await self.settled()
        fleet = self.fleets[-1]
        configured = [await self._ask(candidate, drain) for candidate in self.candidates()]
        while not self.flusher.knows_packs:
            await self.flusher.progress()
        answering = {m.number for m in self.fleet_members if m.identified and m.state is State.UP}
        plan = plan_change(
            fleet,
            configured,
            lost={entry.number for entry in fleet.entries if entry.address.partition(":")[0] in lost},
            packs_left=await self.flusher.drainer.count(),
            answering=answering,
            held_back=held_back(self.store, self.flusher.generations.kept)  # type: ignore[union-attr]
            or self.flusher.drainer.held_back,
        )
        check_plan(plan, self.world.code, answering)
        return plan

    async def _ask(self, candidate: Candidate, drain: Collection[str]) -> Configured:
        one = Configured(candidate.address, candidate.namespace, drain=candidate.address.partition(":")[0] in drain)
        try:
            identity = await ask_anew(candidate, self.fleet_members, self.world.keys, 5.0)
        except NotFound:
            return dataclasses.replace(one, shown=Shown.NOTHING)
        except BackendError as error:
            return dataclasses.replace(one, shown=Shown.SILENCE, problem=str(error))
        return dataclasses.replace(one, number=identity.number, identity=identity.identity)

    async def apply(self, drain: Collection[str] = (), lost: Collection[str] = ()) -> FleetPlan:
        """Changes the fleet to what is configured."""
        plan = await self.plan(drain, lost)
        if plan.refusals:
            raise ConfigError("; ".join(plan.refusals))
        if plan.changes:
            await self.change(plan)
        return plan

    async def change(self, plan: FleetPlan) -> None:
        """Carries a plan out."""
        by_address = {candidate.address: candidate for candidate in self.candidates()}
        joining = [
            Joining(one, by_address[one.address], by_address[one.address].control_namespace) for one in plan.added
        ]
        generations = self.flusher.generations
        assert generations is not None
        change = FleetChange(self.flusher, generations, self.world.keys, self.superblock, self.clock)
        await change.run(plan, joining)

    # elsewhere

    async def find(self) -> Found:
        """The newest head, as a restore finds it."""
        members, _ = await find_members(self.candidates(), self.world.keys, self.clock)
        return await find_newest(members, Records(self.world.keys), self.world.code, self.clock, TIMING, tries=1)

    async def restore_here(self) -> None:
        """What `restore` does on a machine that has nothing; the next mount is a takeover."""
        self.directory.mkdir(exist_ok=True)
        await real_restore(
            self.candidates(), secret=SECRET, directory=self.directory, limits=LIMITS, clock=self.clock, timing=TIMING
        )
        self.takes_over = True


@contextlib.contextmanager
def dying() -> Iterator[None]:
    """What ends with the machine ends unheard."""
    try:
        yield
    except Crash:
        pass
    except BaseExceptionGroup as group:
        if group.subgroup(Crash) is None:
            raise
