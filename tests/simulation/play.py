"""One fixed story that comes by every named step, in which one machine dies at one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import trio

from qsfs import failpoints
from tests.simulation import checks, engine
from tests.simulation.cluster import prepare
from tests.simulation.engine import HOST, Trace
from tests.simulation.fleets import Configuration
from tests.simulation.machine import Life, Machine
from tests.simulation.points import POINTS
from tests.simulation.stage import Stage

Where = tuple[str, int]
"""A named step, and which time that a machine comes there."""


class Play(Stage):
    """The story.  `hits` counts how often it comes by each step, `died` says whether somebody died."""

    def __init__(self, root: Path, where: Where | None) -> None:
        super().__init__(3, root, Trace(), (2, 2, 6))
        self.cluster.liars = frozenset()
        # A rollback brings rows of packs back that died and were deleted since; nobody needs them.
        self.allowed_log = "lacks shards and could not be completed"
        self.hits: Counter[str] = Counter()
        self.died = False
        self._where = where

    async def run(self) -> None:
        """Lives through it, restores, goes on, and restores again."""
        with self.wired():
            async with trio.open_nursery() as self.nursery:
                for name in POINTS:
                    failpoints.arm(name, lambda name=name: self._came_by(name))  # type: ignore[misc]
                self.begin()
                first, second = self.machines[0], self.new_machine()
                scenes = (
                    self._flush,
                    self._complete,
                    self._go_on_after_a_power_cut,
                    self._renew,
                    self._change_fleet,
                    self._go_back,
                )
                for scene in scenes:
                    if not self.died:
                        await scene(first)
                if not self.died:
                    await self._move(second)
                failpoints.disarm_all()
                await self.stop_all()
                await checks.at_the_end(self, "restorer")
                await self._publish(second if second.lives else first)
                await self.stop_all()
                await checks.at_the_end(self, "another")
                self.nursery.cancel_scope.cancel()

    def _came_by(self, name: str) -> None:
        host = HOST.get()
        if not isinstance(host, Life) or host.dead:
            return
        self.hits[name] += 1
        if self._where == (name, self.hits[name]):
            self.died = True
            self.trace.note(f"{host.name} dies at {name}")
            host.die()

    async def _up(self, machine: Machine) -> Life:
        """The machine's mount; one that died, also while it came up, is booted again."""
        for _ in range(3):
            if machine.life is not None and machine.life.dead:
                await machine.life.ended.wait()
            if machine.life is None:
                self.mount(machine)
            await self.wait_for(machine, 300)
            if machine.writable is not None:
                return machine.writable
        raise AssertionError(f"{machine.name} does not come up: {machine.error}")

    async def _write(self, machine: Machine, changes: int) -> None:
        for _ in range(changes):
            await self.applications.change(await self._up(machine))

    async def _publish(self, machine: Machine) -> None:
        """A sync that holds, if need be the second time."""
        for _ in range(2):
            before = len(self.ledger.acknowledged)
            await self.sync(await self._up(machine), 120)
            if len(self.ledger.acknowledged) > before:
                return
        raise AssertionError(f"{machine.name} cannot publish")

    async def _flush(self, machine: Machine) -> None:
        """Pages that leave ahead of the cut, and those that the cut seals."""
        await self._write(machine, 8)
        life = await self._up(machine)
        await self.applications.create(life, "ahead")
        await self.applications.write(life, "ahead", 0, b"ahead of a cut. " * 256 * 24)
        await trio.sleep(12)
        await self._write(machine, 6)
        await self._publish(machine)

    async def _complete(self, machine: Machine) -> None:
        """Packs that are written and not full, until they are; then the second look at them."""
        for number in (1, 2, 3):
            self.cluster.faults[number].down = True
            self.cluster.faulty.add(number)
        await self._write(machine, 5)
        life = await self._up(machine)
        await self.sync(life, 1)
        for number in (1, 2):
            self.cluster.faults[number].down = False
        await trio.sleep(25)
        self.cluster.heal()
        await self._publish(machine)
        await trio.sleep(25)

    async def _go_on_after_a_power_cut(self, machine: Machine) -> None:
        """What the journal has is replayed."""
        life = await self._up(machine)
        await life.committer.commit()
        await self.applications.create(life, "journaled")
        await self.fsync(life, 10)
        life.cut_power()
        await life.ended.wait()
        await self._write(machine, 2)

    async def _renew(self, machine: Machine) -> None:
        """So many generations that metadata are read anew; reads of what is only remote."""
        for _ in range(8):
            await self._write(machine, 1)
            await self._publish(machine)
        life = await self._up(machine)
        self.applications.evict(life)
        await life.committer.commit()
        files = self.ledger.versions[life.version].files
        for name, content in files.items():
            if machine.writable is life:
                await self._read(life, name, len(content))

    async def _read(self, life: Life, name: str, size: int) -> None:
        async def read() -> None:
            await self.applications.read(life, name, 0, size)

        await self.in_life(life, read, 60)

    async def _change_fleet(self, machine: Machine) -> None:
        """A server joins, one is emptied, one is lost."""
        configuration = Configuration(self.cluster)
        configuration.listed += self.cluster.numbers[-self.cluster.spare :]
        await self._apply(machine, configuration)
        await self._write(machine, 3)
        await self._publish(machine)
        configuration.drained.add(1)
        await self._apply(machine, configuration)
        await trio.sleep(30)
        configuration.listed.remove(2)
        self.cluster.faults[2].down = True
        self.cluster.faulty.add(2)
        await trio.sleep(30)
        await self._apply(machine, configuration, 2)
        await trio.sleep(30)
        self.cluster.heal()
        await self._publish(machine)

    async def _apply(self, machine: Machine, configuration: Configuration, lost: int = 0) -> None:
        """Once, and again where the machine died meanwhile."""
        for _ in range(2):
            if not self.died or machine.writable is None:
                life = await self._up(machine)
                await self.in_life(life, lambda: self._applied(configuration, life, lost), 300)  # noqa: B023

    async def _applied(self, configuration: Configuration, life: Life, lost: int) -> None:
        self.trace.note(await configuration.apply(life, lost))

    async def _go_back(self, machine: Machine) -> None:
        """A rollback to a generation that is kept."""
        life = await self._up(machine)
        flusher = life.flushing.flusher
        assert flusher is not None and flusher.generations is not None
        await self.roll_back(life, flusher.generations.base.head.kept[0], 300)
        await self._write(machine, 2)
        await self._publish(machine)

    async def _move(self, machine: Machine) -> None:
        """Another machine takes over."""
        await self.take_over(machine, 300)
        await self._write(machine, 2)
        await self._publish(machine)


def live(root: Path, where: Where | None = None) -> Play:
    """Lives through the story; raises what is broken."""
    prepare()
    plays: list[Play] = []

    async def main() -> None:
        plays.append(Play(root, where))
        await plays[0].run()

    engine.run(3, main)
    return plays[0]
