"""One history: what happens to machines and backends, drawn from a seed."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import trio

from qsfs import failpoints
from qsfs.daemon import restoring, rollback, takeover
from qsfs.daemon.rollback import Order, roll_back
from qsfs.daemon.takeover import take_over
from qsfs.errors import QsfsError
from qsfs.format.head import Head, HeadRef
from qsfs.remote.packing import Sealer
from qsfs.remote.publish import NotYet, Published, Publisher
from qsfs.store.limits import Limits
from qsfs.store.schema import PAGE
from tests.remote.small_fs import SECRET
from tests.simulation import checks
from tests.simulation.cluster import LIMITS, Cluster
from tests.simulation.engine import HOST, Trace, on, thaw
from tests.simulation.files import Applications
from tests.simulation.ledger import Ledger
from tests.simulation.logs import judged
from tests.simulation.machine import Life, Machine
from tests.simulation.points import POINTS
from tests.simulation.sealing import recorded

PACK_PAGES = 8
"""Pages of a pack: so few that little data makes several."""


class History:
    """One seed's.  `run` lives through it and checks it; an exception says what is broken."""

    def __init__(self, seed: int, root: Path, trace: Trace, steps: int) -> None:
        self.chance = random.Random(seed)
        self.trace = trace
        self.steps = steps
        self.root = root
        self.cluster = Cluster(seed, self.chance, trace)
        self.cluster.saw_head = self._saw_head
        self.ledger = Ledger()
        self.applications = Applications(self.ledger, self.chance)
        self.machines: list[Machine] = []
        self.snapshots = 0
        self.nursery: trio.Nursery
        self.stormy = self.chance.random() < 0.7
        self.crashes = self.chance.random() < 0.8
        self.retention = self.chance.choice((0.0, 3.0, 30.0))

    # running

    async def run(self) -> None:
        """From the formatted file system to the restore at the end."""
        with ExitStack() as stack:
            self.seals = stack.enter_context(recorded())
            stack.enter_context(judged(self.trace))
            for module in (takeover, rollback, restoring):
                stack.enter_context(mock.patch.object(module, "links", _links))
            stack.enter_context(mock.patch.object(rollback, "read_secret", lambda config: SECRET))
            stack.enter_context(mock.patch.object(Limits, "of", lambda *_: LIMITS))
            stack.enter_context(mock.patch.object(Sealer, "pack_bytes", PACK_PAGES * PAGE))
            stack.enter_context(mock.patch.object(Publisher, "publish", self._watched(Publisher.publish)))
            stack.callback(failpoints.disarm_all)
            async with trio.open_nursery() as self.nursery:
                self._begin()
                await self._wait_for(self.machines[0], 60)
                for _ in range(self.steps):
                    await self._step()
                await self._end()
                self.nursery.cancel_scope.cancel()

    def _begin(self) -> None:
        head, ref = self.cluster.root
        self.ledger.add(None, {})
        self.ledger.saw_head(head, ref, 1)
        self.ledger.published.append(("format", ref))
        machine = self._machine()
        machine.directory = self.cluster.formatted
        machine.save()
        self.mount(machine)

    def _machine(self) -> Machine:
        name = "abcdefghijklmnopqrstuvwxyz"[len(self.machines)]
        machine = Machine(self.cluster, name, self.root, self.chance.getrandbits(40))
        machine.flush = replace(machine.flush, retention_seconds=self.retention)
        return self._known(machine)

    def _known(self, machine: Machine) -> Machine:
        machine.opened = self._opened
        self.machines.append(machine)
        return machine

    async def _step(self) -> None:
        kinds: dict[Callable[[], Awaitable[None]], float] = {
            self._write: 10,
            self._sync: 4,
            self._read: 2,
            self._evict: 1,
            self._rest: 3,
            self._fsync: 1,
            self._snapshot: 1.5,
            self._unpin: 0.5,
            self._collect: 1,
            self._weather: 2 if self.stormy else 0,
            self._crash: 1.2 if self.crashes else 0,
            self._ambush: 1.5 if self.crashes else 0,
            self._freeze: 0.8,
            self._take_over: 0.7,
            self._roll_back: 0.5,
            self._clone: 0.15,
        }
        step = self.chance.choices(list(kinds), list(kinds.values()))[0]
        self.ledger.counts[step.__name__.strip("_")] += 1
        await step()
        await self._revive()

    # machines

    def mount(self, machine: Machine) -> None:
        """Boots a machine's daemon; a takeover that was cut short is given again."""
        works = (self._taking_over, Life.mount) if machine.takes_over else (Life.mount,)
        Life(machine).start(self.nursery, *works)

    async def _taking_over(self, life: Life) -> None:
        machine = life.machine
        await take_over(life.config, machine.clock, self._said(life), secret=SECRET)
        machine.takes_over = False
        self.ledger.counts["taken over"] += 1

    async def _wait_for(self, machine: Machine, seconds: float) -> None:
        """Until its mount is ready, or over, or the time is."""
        with trio.move_on_after(seconds):
            while (life := machine.life) is not None and not life.ready:
                await life.news.wait()

    async def _revive(self) -> None:
        """Machines that are down come back, but for those that another has taken over from."""
        for machine in self.machines:
            if machine.life is None and machine.error is None and self.chance.random() < 0.7:
                self.mount(machine)
                if self.chance.random() < 0.8:
                    await self._wait_for(machine, self.chance.choice((1, 30)))

    def _writable(self) -> Life | None:
        lives = [life for machine in self.machines if (life := machine.writable) is not None]
        return self.chance.choice(lives) if lives else None

    def _opened(self, life: Life) -> int:
        """A store was opened: it holds what was durable, or what was about to be."""
        version = life.marked()
        machine = life.machine
        assert version in self.ledger.versions, f"{life.name}: version {version} was never written"
        life.version = version
        assert self.ledger.descends(version, machine.durable), (
            f"{life.name}: version {version} does not hold {machine.durable}, which was durable"
        )
        machine.durable = version
        self.applications.check_local(life)
        return version

    def _saw_head(self, host: Life, head: Head, ref: HeadRef) -> None:
        self.ledger.saw_head(head, ref, host.cuts.get(head.write_number))

    def _watched(self, publish: Callable[..., Awaitable[Published | NotYet]]) -> object:
        history = self

        async def watched(self: Publisher, head: Head, *, deadline_seconds: float) -> Published | NotYet:
            result = await publish(self, head, deadline_seconds=deadline_seconds)
            if isinstance(result, Published):
                host = HOST.get()
                assert isinstance(host, Life)
                history.ledger.published.append((host.name, result.ref))
                history.trace.note(
                    f"{host.name} published generation {result.ref.generation} of epoch {result.ref.owner.epoch}, "
                    f"version {history.ledger.version_of[result.ref]}"
                )
            return result

        return watched

    async def _in_life(self, life: Life, work: Callable[[], Awaitable[None]], seconds: float | None = None) -> None:
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
        with trio.move_on_after(self.chance.choice((0.0, 3.0, 40.0)) if seconds is None else seconds):
            await done.wait()

    # what applications and operators do

    async def _write(self) -> None:
        for _ in range(self.chance.choice((1, 2, 5))):
            life = self._writable()
            if life is None:
                return
            await self._in_life(life, lambda: self.applications.change(life), 35.0)  # noqa: B023 (awaited)

    async def _sync(self) -> None:
        life = self._writable()
        if life is None:
            return
        version = life.version

        async def sync() -> None:
            flusher = await life.flushing.owned()
            await flusher.sync()
            assert flusher.generations is not None
            ref = flusher.generations.base.sealed.ref
            self.trace.note(f"{life.name} synced version {version}")
            self.ledger.acknowledge(ref, version)

        await self._in_life(life, sync)

    async def _fsync(self) -> None:
        """Makes everything durable locally, by the journal or a commit."""
        life = self._writable()
        if life is None:
            return
        version = life.version
        names = self.ledger.versions[version].files
        numbers = tuple(self.applications.inode(life, name).number for name in names)

        async def fsync() -> None:
            await life.committer._journal(numbers)
            life.machine.durable = max(life.machine.durable, version)
            self.trace.note(f"{life.name} fsynced version {version}")

        await self._in_life(life, fsync)

    async def _read(self) -> None:
        life = self._writable()
        files = self.ledger.versions[life.version].files if life is not None else {}
        if life is None or not files:
            return
        name = self.chance.choice(sorted(files))
        offset = self.chance.randrange(len(files[name]) + 1)
        size = self.chance.choice((1, PAGE, 30 * PAGE))

        async def read() -> None:
            await self.applications.read(life, name, offset, size)

        await self._in_life(life, read)

    async def _evict(self) -> None:
        life = self._writable()
        if life is not None:
            self.applications.evict(life)

    async def _rest(self) -> None:
        await trio.sleep(self.chance.choice((0.1, 1.0, 5.0, 25.0)))

    async def _snapshot(self) -> None:
        life = self._writable()
        if life is None:
            return
        self.snapshots += 1
        name, version = f"s{self.snapshots}", life.version
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

        await self._in_life(life, snapshot)

    async def _unpin(self) -> None:
        life = self._writable()
        flusher = life.flushing.flusher if life is not None else None
        if life is None or flusher is None or not flusher.pinning.snapshots:
            return
        name = self.chance.choice(flusher.pinning.snapshots).name
        self.trace.note(f"{life.name} deletes snapshot {name}")
        self.ledger.snapshots.pop(name, None)
        self.ledger.doubtful.add(name)

        async def unpin() -> None:
            await flusher.pinning.unpin([name])

        await self._in_life(life, unpin)

    async def _collect(self) -> None:
        for _ in range(self.chance.choice((0, 1, 3))):
            await self._write()
            await self._sync()
        life = self._writable()
        if life is None:
            return

        async def collect() -> None:
            report = await life.flushing.collect(dry_run=False)
            self.ledger.counts["packs deleted"] += report["deleted_now_packs"]

        await self._in_life(life, collect)

    async def _take_over(self) -> None:
        """Another machine becomes the owner; the old one may go on, and learns of it."""
        others = [machine for machine in self.machines if machine.life is None]
        if others and self.chance.random() < 0.4:
            machine = self.chance.choice(others)
            machine.error = None
        elif len(self.machines) < 6:
            machine = self._machine()
        else:
            return
        machine.forget()
        machine.durable = 1
        machine.takes_over = True
        self.trace.note(f"{machine.name} takes over")
        self.mount(machine)
        await self._wait_for(machine, self.chance.choice((5, 60)))

    async def _roll_back(self) -> None:
        """Back to some kept generation; the mount ends for that."""
        life = self._writable()
        flusher = life.flushing.flusher if life is not None else None
        if life is None or flusher is None or flusher.generations is None:
            return
        kept = flusher.generations.base.head.kept
        if not kept:
            return
        target, machine = self.chance.choice(kept), life.machine
        life.cut_power()
        await life.ended.wait()
        which = target.pins[0] if target.pins else str(target.head.generation)
        version = self.ledger.version_of[target.head]

        async def work(life: Life) -> None:
            order = Order(which, True, lambda plan: self._may_change(machine, version))
            report = await roll_back(life.config, machine.clock, order, self._said(life))
            self.trace.note(f"{life.name} rolled back to version {version}")
            self.ledger.acknowledge(report.base, version)
            self.ledger.counts["rolled back"] += 1
            machine.durable = version

        self.trace.note(f"{machine.name} rolls back to generation {target.head.generation}")
        Life(machine).start(self.nursery, work, Life.mount)
        await self._wait_for(machine, self.chance.choice((5, 60)))

    def _may_change(self, machine: Machine, version: int) -> None:
        """Until a rollback has ended the disk may hold the old state or the new."""
        machine.durable = 1

    def _said(self, life: Life) -> Callable[[str], None]:
        return lambda line: self.trace.event(f"{life.name}: {line}")

    async def _clone(self) -> None:
        """A machine is copied with its disk and the random bytes that it will draw, and the copy boots."""
        if len(self.machines) >= 6:
            return
        machine = self.chance.choice(self.machines)
        self.ledger.twins += 1
        name = "abcdefghijklmnopqrstuvwxyz"[len(self.machines)]
        self.trace.note(f"{name} is a clone of {machine.name}")
        twin = self._known(machine.clone(name))
        self.mount(twin)
        await self._wait_for(twin, 20)

    # what goes wrong

    async def _weather(self) -> None:
        self.trace.note(self.cluster.misbehave())

    async def _crash(self) -> None:
        lives = [machine.life for machine in self.machines if machine.life is not None]
        if lives:
            life = self.chance.choice(lives)
            await trio.sleep(self.chance.choice((0.0, 0.01, 0.3)))
            self.trace.note(f"{life.name} loses power")
            life.cut_power()
            await life.ended.wait()

    async def _ambush(self) -> None:
        """Some machine dies at a named step, the next times that it comes there."""
        name, left = self.chance.choice(POINTS), self.chance.choice((1, 1, 2, 5))

        def act() -> None:
            nonlocal left
            host = HOST.get()
            if not isinstance(host, Life) or host.dead:
                return
            left -= 1
            if left <= 0:
                failpoints.disarm(name)
                self.trace.note(f"{host.name} dies at {name}")
                self.ledger.counts[name] += 1
                host.die()

        failpoints.arm(name, act)

    async def _freeze(self) -> None:
        """A machine stands still, for longer than anything waits, and then goes on as if nothing had been."""
        lives = [m.life for m in self.machines if m.life is not None and not m.life.frozen]
        if not lives:
            return
        life = self.chance.choice(lives)
        await trio.sleep(self.chance.choice((0.0, 0.005, 0.2)))
        if life.dead or life.ended.is_set():
            return
        alone = len(lives) == 1 and self.chance.random() < 0.5
        life.frozen = True
        seconds = self.chance.choice((1, 20, 90))
        self.trace.note(f"{life.name} is frozen")

        async def later() -> None:
            await trio.sleep(seconds)
            if life.frozen:
                self.trace.note(f"{life.name} goes on")
                thaw(life)

        if alone:
            seconds = self.chance.choice((20, 4 * 3600))
            await later()
        else:
            self.nursery.start_soon(later)

    # the end

    async def _end(self) -> None:
        failpoints.disarm_all()
        self.cluster.heal()
        for machine in self.machines:
            if machine.life is not None and machine.life.frozen:
                thaw(machine.life)
        if self.chance.random() < 0.5:
            await trio.sleep(self.chance.choice((1, 30)))
            self.trace.note("all is well")
            await self._sync()
        for machine in self.machines:
            if (life := machine.life) is not None:
                life.cut_power()
                await life.ended.wait()
        await checks.at_the_end(self)


def _links(config: object, clock: object) -> object:
    host = HOST.get()
    assert isinstance(host, Life)
    return host.cluster.links(host)


logging.getLogger("qsfs").setLevel(logging.WARNING)
