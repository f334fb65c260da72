"""One history: what happens to machines and backends, drawn from a seed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.store.schema import PAGE
from tests.simulation import checks
from tests.simulation.engine import HOST, Trace, thaw
from tests.simulation.fleets import Configuration
from tests.simulation.machine import Life
from tests.simulation.points import POINTS
from tests.simulation.stage import Stage

LENGTHS = (6, 10, 14, 26)
"""Steps of a history.  Most of what breaks does so early, given that there are many."""


class History(Stage):
    """One seed's.  `run` lives through it and checks it; an exception says what is broken."""

    def __init__(self, seed: int, root: Path, trace: Trace, steps: int = 0) -> None:
        super().__init__(seed, root, trace)
        self.steps = steps or self.chance.choice(LENGTHS)
        self.stormy = self.chance.random() < 0.7
        self.crashes = self.chance.random() < 0.8
        self.retention = self.chance.choice((0.0, 3.0, 30.0))
        self.snapshots = 0
        self.configuration = Configuration(self.cluster)

    # running

    async def run(self) -> None:
        """From the formatted file system to the restore at the end."""
        with self.wired():
            async with trio.open_nursery() as self.nursery:
                self.begin()
                await self.wait_for(self.machines[0], 60)
                for _ in range(self.steps):
                    await self._step()
                await self._end()
                self.nursery.cancel_scope.cancel()

    async def _step(self) -> None:
        kinds: dict[Callable[[], Awaitable[None]], float] = {
            self._write: 10,
            self._sync: 3,
            self._read: 2,
            self._evict: 1,
            self._rest: 3,
            self._fsync: 1,
            self._snapshot: 1.5,
            self._unpin: 0.5,
            self._collect: 0.8,
            self._weather: 2 if self.stormy else 0,
            self._crash: 1.2 if self.crashes else 0,
            self._ambush: 1.5 if self.crashes else 0,
            self._freeze: 0.8,
            self._take_over: 0.7,
            self._divide: 0.4,
            self._roll_back: 0.5,
            self._clone: 0.15,
            self._change_fleet: 0.5,
        }
        step = self.chance.choices(list(kinds), list(kinds.values()))[0]
        self.ledger.counts[step.__name__.strip("_")] += 1
        await step()
        await self._revive()

    # machines

    async def _revive(self) -> None:
        """Machines that are down come back, but for those that another has taken over from."""
        for machine in self.machines:
            if machine.life is None and machine.error is None and self.chance.random() < 0.7:
                self.mount(machine)
                if self.chance.random() < 0.8:
                    await self.wait_for(machine, self.chance.choice((1, 30)))

    def _writable(self) -> Life | None:
        lives = [life for machine in self.machines if (life := machine.writable) is not None]
        return self.chance.choice(lives) if lives else None

    # what applications and operators do

    async def _write(self) -> None:
        for _ in range(self.chance.choice((1, 2, 5))):
            life = self._writable()
            if life is None:
                return
            await self.in_life(life, lambda: self.applications.change(life), 35.0)  # noqa: B023 (awaited)

    async def _sync(self) -> None:
        life = self._writable()
        if life is not None:
            await self.sync(life)

    async def _fsync(self) -> None:
        life = self._writable()
        if life is not None:
            await self.fsync(life)

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

        await self.in_life(life, read)

    async def _evict(self) -> None:
        life = self._writable()
        if life is not None:
            self.applications.evict(life)

    async def _rest(self) -> None:
        await trio.sleep(self.chance.choice((0.1, 1.0, 3.0, 15.0)))

    async def _snapshot(self) -> None:
        life = self._writable()
        if life is None:
            return
        self.snapshots += 1
        await self.snapshot(life, f"s{self.snapshots}")

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

        await self.in_life(life, unpin)

    async def _collect(self) -> None:
        """Rewrites and publishes as often as it takes for packs to die and be let go of, then collects."""
        life = self._writable()
        if life is None:
            return

        if self.chance.random() < 0.4:
            await self._snapshot()

        async def collect() -> None:
            flusher = await life.flushing.owned()
            for _ in range(6):
                await self.applications.change(life)
                await flusher.sync()
                await trio.sleep(self.retention / 4)
            report = await life.flushing.collect(dry_run=False)
            if report["deleted_now_packs"]:
                self.trace.note(f"{life.name} deleted {report['deleted_now_packs']} packs")
            self.ledger.counts["packs deleted"] += report["deleted_packs"]

        await self.in_life(life, collect)

    async def _take_over(self) -> None:
        """Another machine becomes the owner; the old one may go on, and learns of it."""
        others = [machine for machine in self.machines if machine.life is None]
        if others and self.chance.random() < 0.4:
            machine = self.chance.choice(others)
        elif len(self.machines) < 6:
            machine = self.new_machine()
        else:
            return
        await self.take_over(machine, self.chance.choice((5, 60)))

    async def _divide(self) -> None:
        """The network falls apart: one machine goes on with about a quorum, another takes over with the rest.

        They have few backends in common, first of all those that lie: these forget what the other one wrote.
        """
        life = self._writable()
        others = [machine for machine in self.machines if machine.life is None]
        if life is None or (not others and len(self.machines) >= 6):
            return
        machine = self.chance.choice(others) if others else self.new_machine()
        if self.chance.random() < 0.7:
            self.cluster.calm()
        liars = sorted(self.cluster.liars)
        honest = [number for number in self.cluster.numbers if number not in liars]
        self.chance.shuffle(honest)
        honest.sort(key=lambda number: number in self.cluster.spares)
        quorum = self.cluster.quorum
        size = quorum.needed - self.chance.choice((0, 1, 1, 1))
        least = 2 * size - quorum.backends + self.chance.choice((0, 0, 1))
        shared = liars + honest[: max(0, least - len(liars))]
        apart = [number for number in honest if number not in shared]
        ours, theirs = frozenset(apart[size - len(shared) :]), frozenset(apart[: size - len(shared)])
        self.trace.note(f"{life.name} does not reach {sorted(ours)}, {machine.name} not {sorted(theirs)}")
        life.cut_off = ours
        for number in liars:
            self.cluster.remember(number)
        if self.chance.random() < 0.3:
            await self._write_and_sync(life)
        await self.take_over(machine, 60, theirs)
        for number in liars:
            self.cluster.go_back(number)
        for each in self.chance.sample([life, machine.life], 2):
            if each is not None:
                await self._write_and_sync(each)
        self.trace.note("the network is whole again")
        for each in (life, machine.life):
            if each is not None:
                each.cut_off = frozenset()

    async def _write_and_sync(self, life: Life) -> None:
        if life.machine.writable is life:
            await self.in_life(life, lambda: self.applications.change(life), 35.0)
        if life.machine.writable is life:
            await self.sync(life)

    async def _roll_back(self) -> None:
        """Back to some kept generation; the mount ends for that."""
        life = self._writable()
        flusher = life.flushing.flusher if life is not None else None
        if life is None or flusher is None or flusher.generations is None:
            return
        kept = flusher.generations.base.head.kept
        if not kept:
            return
        await self.roll_back(life, self.chance.choice(kept), self.chance.choice((5, 60)))

    async def _clone(self) -> None:
        """A machine is copied with its disk and the random bytes that it will draw, and the copy boots."""
        if len(self.machines) >= 6:
            return
        twin = self.clone(self.chance.choice(self.machines))
        self.mount(twin)
        await self.wait_for(twin, 20)

    async def _change_fleet(self) -> None:
        """The configuration changes, and some mount applies it."""
        life = self._writable()
        if life is None:
            return
        if self.chance.random() < 0.8:
            self.trace.note(self.configuration.change())

        async def apply() -> None:
            changed = await self.configuration.apply(life)
            self.trace.note(f"{life.name} changed the fleet: {changed}")
            self.ledger.counts["fleets"] += 1

        await self.in_life(life, apply)

    # what goes wrong

    async def _weather(self) -> None:
        self.trace.note(self.cluster.misbehave())
        for machine in self.machines:
            if (life := machine.life) is not None and self.chance.random() < 0.4:
                some = self.chance.randint(0, len(self.cluster.numbers))
                life.cut_off = frozenset(self.chance.sample(self.cluster.numbers, some))
                self.trace.note(f"{life.name} does not reach {sorted(life.cut_off)}")

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
            if (life := machine.life) is not None:
                life.cut_off = frozenset()
                if life.frozen:
                    thaw(life)
        turn = self.chance.random()
        if turn < 0.4:
            await trio.sleep(self.chance.choice((1, 30)))
            await self._sync()
        elif turn < 0.6:
            await self._go_on_elsewhere()
        await self.stop_all()
        await checks.at_the_end(self)

    async def _go_on_elsewhere(self) -> None:
        """Whatever happened: with the backends back, and the others stopped, a new machine takes over and publishes."""
        await self.stop_all()
        machine = self.new_machine()
        await self.take_over(machine, 600)
        life = machine.writable
        assert life is not None, f"{machine.name} cannot take over: {machine.error}"
        published = len(self.ledger.acknowledged)
        await self.applications.change(life)
        await self.sync(life, 600)
        assert len(self.ledger.acknowledged) > published or life.fenced, f"{machine.name} cannot publish"
