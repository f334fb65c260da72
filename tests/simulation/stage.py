"""The stage of a history: machines, backends, and what is remembered of what they promise.

Commands and daemons are the real ones; what they do to backends, to the disk and to keys is watched.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import trio

from qsfs import failpoints
from qsfs.daemon import restoring, rollback, takeover
from qsfs.daemon.rollback import Order, roll_back
from qsfs.daemon.takeover import take_over
from qsfs.errors import NotFound, QsfsError, SplitHeads
from qsfs.format.head import Head, HeadRef, KeptGeneration
from qsfs.remote.aside import DATA, DIRECTORY
from qsfs.remote.packing import Sealer
from qsfs.remote.publish import NotYet, Published, Publisher
from qsfs.remote.rollback import Rollback
from qsfs.store.limits import Limits
from qsfs.store.schema import PAGE
from tests.remote.small_fs import SECRET
from tests.simulation.cluster import LIMITS, Cluster
from tests.simulation.engine import HOST, Trace, on, thaw
from tests.simulation.files import Applications
from tests.simulation.ledger import Ledger
from tests.simulation.logs import judged
from tests.simulation.machine import Life, Machine
from tests.simulation.sealing import recorded

PACK_PAGES = 8
"""Pages of a pack: so few that little data makes several."""


class Stage:
    """Backends, machines, and the ledger.  `nursery` is where machines live."""

    def __init__(self, seed: int, root: Path, trace: Trace, code: tuple[int, int, int] | None = None) -> None:
        self.chance = random.Random(seed)
        self.trace = trace
        self.root = root
        self.cluster = Cluster(seed, self.chance, trace, code)
        self.cluster.saw_head = self._saw_head
        self.ledger = Ledger()
        self.applications = Applications(self.ledger, self.chance)
        self.machines: list[Machine] = []
        self.retention = 3.0
        self.allowed_log = ""
        self.nursery: trio.Nursery

    @contextlib.contextmanager
    def wired(self) -> Iterator[None]:
        """Commands find the simulated backends, packs are small; what is sealed, published and logged is watched."""
        with ExitStack() as stack:
            self.seals = stack.enter_context(recorded(self.cluster.sealed))
            stack.enter_context(judged(self.trace, self.allowed_log))
            for module in (takeover, rollback, restoring):
                stack.enter_context(mock.patch.object(module, "links", _links))
            stack.enter_context(mock.patch.object(Limits, "of", lambda *_: LIMITS))
            stack.enter_context(mock.patch.object(Sealer, "pack_bytes", PACK_PAGES * PAGE))
            stack.enter_context(mock.patch.object(Publisher, "publish", self._watched(Publisher.publish)))
            stack.enter_context(mock.patch.object(Rollback, "_replace", self._replacing(Rollback._replace)))
            stack.callback(failpoints.disarm_all)
            yield

    def begin(self) -> None:
        head, ref = self.cluster.root
        self.ledger.add(None, {})
        self.ledger.saw_head(head, ref, 1)
        self.ledger.published.append(("format", ref))
        machine = self.new_machine()
        self.cluster.write_formatted(machine.directory)
        self.mount(machine)

    def new_machine(self) -> Machine:
        name = "abcdefghijklmnopqrstuvwxyz"[len(self.machines)]
        machine = Machine(self.cluster, name, self.root, self.chance.getrandbits(40))
        machine.flush = replace(machine.flush, retention_seconds=self.retention)
        return self.known(machine)

    def known(self, machine: Machine) -> Machine:
        machine.opened, machine.refused = self.opened, self._refused
        self.machines.append(machine)
        return machine

    def mount(self, machine: Machine, cut_off: frozenset[int] = frozenset()) -> None:
        """Boots a machine's daemon; a takeover that was cut short is given again."""
        works = (self._taking_over, Life.mount) if machine.takes_over else (Life.mount,)
        Life(machine, cut_off).start(self.nursery, *works)

    async def _taking_over(self, life: Life) -> None:
        machine = life.machine
        taken = await take_over(life.config, machine.clock, self._said(life), secret=SECRET, head=machine.head)
        machine.takes_over, machine.head = False, None
        machine.exactly = self.ledger.version_of[taken.ref]
        self.ledger.counts["taken over"] += 1

    async def wait_for(self, machine: Machine, seconds: float) -> None:
        """Until its mount is ready, or over, or the time is."""
        with trio.move_on_after(seconds):
            while (life := machine.life) is not None and not life.ready:
                await life.news.wait()

    def opened(self, life: Life) -> int:
        """A store was opened: it holds what was durable or later, and after a rollback or restore that alone."""
        version = life.marked()
        machine = life.machine
        assert version in self.ledger.versions, f"{life.name}: version {version} was never written"
        life.version = version
        assert machine.exactly in (None, version), f"{life.name}: version {version}, not {machine.exactly}"
        assert self.ledger.descends(version, machine.durable), (
            f"{life.name}: version {version} does not hold {machine.durable}, which was durable"
        )
        machine.durable, machine.exactly = version, None
        self.applications.check_local(life)
        return version

    def _refused(self, life: Life, error: QsfsError) -> None:
        """A machine that is the only one there ever was is never told that another one was here."""
        # What it was to roll back to may have been let go of by the head with which it came to own.
        let_go = isinstance(error, NotFound) and "is not kept any more" in str(error)
        others = any(machine.lives for machine in self.machines if machine is not life.machine)
        assert let_go or others, f"{life.name}, alone, is refused: {error}"

    def _saw_head(self, host: Life, head: Head, ref: HeadRef) -> None:
        self.cluster.learn(head)
        self.ledger.saw_head(head, ref, host.cuts.get(head.write_number))

    def _watched(self, publish: Callable[..., Awaitable[Published | NotYet]]) -> object:
        history = self

        async def watched(self: Publisher, head: Head, *, deadline_seconds: float) -> Published | NotYet:
            result = await publish(self, head, deadline_seconds=deadline_seconds)
            if isinstance(result, Published):
                host = HOST.get()
                assert isinstance(host, Life)
                history.ledger.publish(host.name, head, result.ref)
                history.trace.note(
                    f"{host.name} published generation {result.ref.generation} of epoch {result.ref.owner.epoch}, "
                    f"version {history.ledger.version_of[result.ref]}"
                )
            return result

        return watched

    async def in_life(self, life: Life, work: Callable[[], Awaitable[None]], seconds: float | None = None) -> None:
        """Starts `work` on a machine, and waits for its end at most so long."""
        done = trio.Event()

        async def until_done() -> None:
            try:
                await work()
            except QsfsError as error:
                self.trace.note(f"{life.name}: {type(error).__name__}: {error}")
            finally:
                done.set()

        with on(life):
            life.nursery.start_soon(until_done)
        with trio.move_on_after(self.chance.choice((0.0, 3.0, 15.0)) if seconds is None else seconds):
            await done.wait()

    def clone(self, machine: Machine) -> Machine:
        """A copy of a machine: its disk as it is now, and the random bytes that it is going to draw."""
        self.ledger.twins += 1
        name = "abcdefghijklmnopqrstuvwxyz"[len(self.machines)]
        self.trace.note(f"{name} is a clone of {machine.name}")
        return self.known(machine.clone(name))

    async def stop_all(self) -> None:
        """Every machine loses power; those that stand still, too."""
        for machine in self.machines:
            if (life := machine.life) is not None:
                if life.frozen:
                    thaw(life)
                life.cut_power()
                await life.ended.wait()

    # commands

    async def sync(self, life: Life, seconds: float | None = None) -> None:
        """Publishes everything, and remembers what that promised."""
        version = life.version

        async def sync() -> None:
            flusher = await life.flushing.owned()
            await flusher.sync()
            assert flusher.generations is not None
            ref = flusher.generations.base.sealed.ref
            self.trace.note(f"{life.name} synced version {version}")
            self.ledger.acknowledge(ref, version)

        await self.in_life(life, sync, seconds)

    async def snapshot(self, life: Life, name: str, seconds: float | None = None) -> None:
        """Pins what there is, and remembers what that promised."""
        version = life.version
        self.ledger.doubtful.add(name)

        async def snapshot() -> None:
            pinning = (await life.flushing.owned()).pinning
            request = await pinning.cut(name)
            await pinning.pinned(request)
            assert request.head is not None
            self.trace.note(f"{life.name} made snapshot {name} of version {version}")
            self.ledger.acknowledge(request.head, version)
            self.ledger.doubtful.discard(name)
            self.ledger.snapshots[name] = request.head

        await self.in_life(life, snapshot, seconds)

    async def fsync(self, life: Life, seconds: float | None = None) -> None:
        """Makes everything durable locally, by the journal or a commit."""
        version = life.version
        names = self.ledger.versions[version].files
        numbers = tuple(self.applications.inode(life, name).number for name in names)

        async def fsync() -> None:
            await life.committer._journal(numbers)
            life.machine.durable = max(life.machine.durable, version)
            self.trace.note(f"{life.name} fsynced version {version}")

        await self.in_life(life, fsync, seconds)

    async def take_over(self, machine: Machine, seconds: float, cut_off: frozenset[int] = frozenset()) -> None:
        """Restores on a machine whose disk is empty, owns and mounts; waits for that at most so long.

        Where two copies of a machine have sent heads, the operator stops all machines and chooses one of the heads.
        """
        machine.head = None
        await self._begin_takeover(machine, seconds, cut_off)
        while isinstance(machine.error, SplitHeads):
            digests = machine.error.digests
            await self.stop_all()
            machine.head = self.chance.choice(digests)
            self.ledger.choose(machine.head, digests)
            self.ledger.counts["chosen for a takeover"] += 1
            self.trace.note(f"{machine.name} goes on from {machine.head[:8]} of {[digest[:8] for digest in digests]}")
            await self._begin_takeover(machine, seconds, cut_off)

    async def _begin_takeover(self, machine: Machine, seconds: float, cut_off: frozenset[int]) -> None:
        machine.error = None
        machine.forget()
        machine.durable, machine.exactly = 1, None
        machine.takes_over = True
        self.trace.note(f"{machine.name} takes over")
        self.mount(machine, cut_off)
        await self.wait_for(machine, seconds)

    async def roll_back(self, life: Life, target: KeptGeneration, seconds: float) -> None:
        """Ends a mount, rolls back, mounts again; waits for that at most so long."""
        machine = life.machine
        life.cut_power()
        await life.ended.wait()
        which = target.pins[0] if target.pins else str(target.head.generation)
        version = self.ledger.version_of[target.head]

        async def work(life: Life) -> None:
            order = Order(which, True, lambda plan: None)
            report = await roll_back(life.config, machine.clock, order, self._said(life), secret=SECRET)
            self.trace.note(f"{life.name} rolled back to version {version}")
            self.ledger.acknowledge(report.base, version)
            self.ledger.counts["rolled back"] += 1
            assert machine.exactly == version

        self.trace.note(f"{machine.name} rolls back to generation {target.head.generation}")
        Life(machine).start(self.nursery, work, Life.mount)
        await self.wait_for(machine, seconds)

    def _replacing(self, replace: Callable[..., None]) -> object:
        """From the moment that another store has taken the place of the old one the disk holds that state alone."""
        ledger = self.ledger

        def watched(self: Rollback, rebuild: object, new: Head, *arguments: object) -> None:
            host = HOST.get()
            assert isinstance(host, Life)
            try:
                replace(self, rebuild, new, *arguments)
            finally:
                if not (self.directory / DIRECTORY / DATA).exists():
                    version = ledger.held_by(new)
                    assert version is not None
                    host.machine.durable = host.machine.exactly = version

        return watched

    def _said(self, life: Life) -> Callable[[str], None]:
        return lambda line: self.trace.event(f"{life.name}: {line}")


def _links(config: object, clock: object) -> object:
    host = HOST.get()
    assert isinstance(host, Life)
    return host.cluster.links(host)
