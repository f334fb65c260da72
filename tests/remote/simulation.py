"""Random histories of several machines over one fleet, on the virtual clock: one seed, one history.

Machines mount, publish, crash, restart, are cloned (from disk, and from memory while they run) and
taken over from, while backends are slow, cut off, acknowledge without saying so, deliver writes
late, or go back to an older image.  At the end `check` asks what must hold of any history.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from qsfs.backend.memory import MemoryStore
from qsfs.errors import (
    BackendUnavailable,
    Fenced,
    QsfsError,
    QuorumUnavailable,
    SplitHeads,
    StaleCache,
)
from qsfs.format.head import Head, HeadRef, Owner, open_head
from qsfs.remote.control import Records
from qsfs.remote.mount_check import LocalState, accept_for_mount
from qsfs.remote.publish import Published, Publisher
from qsfs.remote.quorum import FenceQuorum, fence_quorum
from qsfs.remote.survey import Found, Timing, find_newest
from tests.remote.harness import FaultyBackend, Machine, World, keys_of, make_head, make_world, plant

HISTORY_SECONDS = 300.0


@dataclass
class Disk:
    """What a machine's disk holds, and so what a clone of it starts from."""

    base: HeadRef | None = None
    published_here: bool = False
    published: HeadRef | None = None
    sent: dict[HeadRef, bytes] = field(default_factory=dict)

    def state(self) -> LocalState:
        return LocalState(self.base, self.published_here, self.published, frozenset(self.sent))

    def record(self, ref: HeadRef) -> None:
        """Records a published head; heads sent before it need not be known any more."""
        self.base = self.published = ref
        self.published_here = True
        self.sent = {sent: value for sent, value in self.sent.items() if sent > ref}

    def copy(self) -> Disk:
        return dataclasses.replace(self, sent=dict(self.sent))


@dataclass
class History:
    """What happened: every head sealed, every head published, in order, and every ownership."""

    seed: int
    world: World
    quorum: FenceQuorum
    stale: frozenset[int] = frozenset()
    heads: dict[HeadRef, Head] = field(default_factory=dict)
    published: list[tuple[str, HeadRef]] = field(default_factory=list)
    owned: list[tuple[str, Owner]] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    def note(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def ancestors(self, ref: HeadRef) -> set[HeadRef]:
        """All heads that `ref` descends from, itself included."""
        found: set[HeadRef] = set()
        step: HeadRef | None = ref
        while step is not None and step not in found:
            found.add(step)
            step = self.heads[step].predecessor if step in self.heads else None
        return found


class Simulation:
    """One history."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.history: History
        self.images: dict[int, MemoryStore] = {}
        self.machines = 0

    async def run(self) -> History:
        """Lives through the history and returns it."""
        count = self.random.choice((3, 3, 4, 5, 6))
        parity = self.random.choice((1, 2)) if count > 3 else 1
        world = await make_world(count, m=parity, seed=self.seed, shared=self.random.random() < 0.3)
        quorum = fence_quorum(count, parity, 1)
        numbers = [entry.number for entry in world.fleet.entries]
        stale = frozenset(self.random.sample(numbers, self.random.randint(0, quorum.may_be_stale)))
        self.history = History(self.seed, world, quorum, stale)
        root = make_head(world, Owner(1, b"r" * 16), 1)
        sealed = plant(world, root)
        self.history.heads[sealed.ref] = root
        self.history.published.append(("format", sealed.ref))
        with trio.move_on_after(HISTORY_SECONDS):
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                nursery.start_soon(self._age_backends)
                first = Disk()
                first.record(sealed.ref)
                nursery.start_soon(self._life, first)
                if self.random.random() < 0.5:
                    nursery.start_soon(self._life, first.copy())
                for _ in range(self.random.randint(0, 2)):
                    nursery.start_soon(self._life, Disk())
        return self.history

    async def _age_backends(self) -> None:
        """Some backends go back to an older image now and then, or lose what they hold."""
        while True:
            await trio.sleep(self.random.expovariate(1 / 20))
            for number in self.history.stale:
                store = self.history.world.control_of(number)
                turn = self.random.random()
                if turn < 0.3 or number not in self.images:
                    self.images[number] = store.copy()
                elif turn < 0.7:
                    store.go_back_to(self.images[number])
                elif turn < 0.8:
                    keys = [key for key in keys_of(store) if not key.startswith(b"qsfs:i:")]
                    for key in self.random.sample(keys, len(keys) // 2):
                        store.rot(key, lambda value: value[:-1] + bytes([value[-1] ^ 1]))

    async def _life(self, disk: Disk) -> None:
        """One machine: mounts again and again until it is told that it is not the newest any more."""
        self.machines += 1
        name = f"m{self.machines}"
        while True:
            await trio.sleep(self.random.expovariate(1 / 10))
            machine = self._boot(name)
            with trio.CancelScope() as power:
                power.deadline = trio.current_time() + self.random.expovariate(1 / 60)
                async with trio.open_nursery() as nursery:
                    alive = await self._mount(machine, disk, nursery)
                    nursery.cancel_scope.cancel()
                if not alive:
                    return
            if self.random.random() < 0.2:
                self.nursery.start_soon(self._life, disk.copy())

    def _boot(self, name: str) -> Machine:
        # Timeouts must only matter for progress: without them a machine may pause at any step.
        patient = self.random.random() < 0.5
        timing = Timing(
            attempt=1e6 if patient else 5.0, retry=0.2, retry_most=5.0, grace=self.random.choice((0.0, 1.0))
        )
        machine = Machine(self.history.world, name, timing, self.random.getrandbits(60))
        slow = self.random.choice((0.05, 1.0, 5.0))
        for number, backend in machine.backends.items():
            backend.delay = self._delays(slow)
            backend.gate = self._faults(backend, self.random.choice((0.0, 0.0, 0.1, 0.3)), number)
        return machine

    def _delays(self, mean: float) -> Callable[[str], float]:
        def delay(call: str) -> float:
            long = self.random.random() < 0.03
            return self.random.expovariate(1 / (mean * 20 if long else mean))

        return delay

    def _faults(self, backend: FaultyBackend, rate: float, number: int) -> Callable[[str, bytes], None]:
        until = 0.0

        def fault(call: str, key: bytes) -> None:
            nonlocal until
            now = trio.current_time()
            if now < until:
                raise BackendUnavailable(f"{number}: cut off")
            if self.random.random() < rate:
                until = now + self.random.expovariate(1 / 5)
                raise BackendUnavailable(f"{number}: connection lost")

        return fault

    async def _mount(self, machine: Machine, disk: Disk, nursery: trio.Nursery) -> bool:
        """Mounts and publishes; False when this machine must not mount again."""
        takeover = disk.base is None or not disk.published_here
        try:
            if takeover:
                await self._restore(machine, disk)
            self._watch(machine, disk)
            accept = accept_for_mount(disk.state, takeover=takeover)
            ownership = await machine.own(nursery, accept=accept, deadline=60.0)
        except QuorumUnavailable as error:
            self.history.note(f"own: {type(error).__name__}")
            return True
        except SplitHeads as error:
            self.history.note("split")
            check_alarm(self.history, error)
            return False
        except (Fenced, StaleCache) as error:
            self.history.note(f"own: {type(error).__name__}")
            alone = self.machines == 1 and not self.history.outcomes.get("twin")
            assert not alone, f"seed {self.seed}: alone, but {error}"
            return takeover and self.random.random() < 0.7
        self.history.owned.append((machine.name, ownership.owner))
        self.history.published.append((machine.name, ownership.first_ref))
        disk.record(ownership.first_ref)
        return await self._publish_on(machine, disk, nursery)

    async def _publish_on(self, machine: Machine, disk: Disk, nursery: trio.Nursery) -> bool:
        assert machine.ownership is not None
        for _ in range(self.random.randint(0, 8)):
            await trio.sleep(self.random.expovariate(1 / 3))
            if self.random.random() < 0.05:
                self.nursery.start_soon(self._twin, machine, disk.copy())
            head = machine.next_head(counters={"by": self.random.getrandbits(32)})
            try:
                for _ in range(self.random.randint(1, 3)):
                    result = await machine.publish(head, deadline=self.random.choice((0.5, 5.0, 60.0)))
                    self.history.note(type(result).__name__)
                    if isinstance(result, Published):
                        self.history.published.append((machine.name, result.ref))
                        disk.record(result.ref)
                        break
            except Fenced:
                self.history.note("publish: Fenced")
                return False
        return True

    async def _twin(self, machine: Machine, disk: Disk) -> None:
        """A copy of the running machine's memory and disk goes on publishing under the same owner."""
        twin = self._boot(machine.name + "'")
        assert machine.ownership is not None
        original = machine.ownership.publisher
        async with trio.open_nursery() as nursery:
            publisher = Publisher(
                original.owner,
                original.last_sent,
                members=twin.members,
                records=twin.records,
                code=self.history.world.code,
                clock=twin.clock,
                nursery=nursery,
                store_before_send=self._keep(disk),
                timing=twin.timing,
            )
            publisher.published = original.published
            publisher._written = set(original._written)
            publisher._unpublished = list(original._unpublished)
            twin.published = list(machine.published)
            twin.ownership = dataclasses.replace(machine.ownership, publisher=publisher)
            self.history.note("twin")
            await self._publish_on(twin, disk, nursery)
            nursery.cancel_scope.cancel()

    async def _restore(self, machine: Machine, disk: Disk) -> None:
        world = self.history.world
        found = await find_newest(
            machine.members,
            Records(world.keys),
            world.code,
            machine.clock,
            machine.timing,
            deadline_seconds=60.0,
        )
        if found.judgement.withstands < 0:
            raise QuorumUnavailable("too few answered for a restore")
        disk.base, disk.published_here, disk.published = found.ref, False, None
        disk.sent.clear()

    def _watch(self, machine: Machine, disk: Disk) -> None:
        machine.store = self._keep(disk)  # type: ignore[method-assign]

    def _keep(self, disk: Disk) -> Callable[..., object]:
        async def store(sealed: object) -> None:
            await trio.sleep(self.random.expovariate(10))
            ref = sealed.ref  # type: ignore[attr-defined]
            head = open_head(sealed.key, sealed.value, self.history.world.keys)  # type: ignore[attr-defined]
            self.history.heads[ref] = head
            disk.sent[ref] = sealed.value  # type: ignore[attr-defined]

        return store


def check_one_line(history: History) -> None:
    """No published head is lost: of any two published heads one descends from the other."""
    newest: HeadRef | None = None
    for _, ref in sorted(history.published, key=lambda event: (event[1].owner, event[1].generation)):
        if newest is not None:
            assert newest in history.ancestors(ref), f"seed {history.seed}: {newest} is lost to {ref}"
        newest = ref


def check_alarm(history: History, alarm: SplitHeads) -> None:
    """Two lines of heads are reported only where a copy ran (or a backend spoilt what it held)."""
    assert history.stale or history.outcomes.get("twin"), f"seed {history.seed}: false alarm: {alarm}"


def check_dead(history: History, found: Found) -> None:
    """What is called dead without asking anybody was never published."""
    for _ in found.judgement.dead:
        history.note("dead")
    dead = {ref for _, ref in history.published}.intersection(found.judgement.dead)
    assert not dead, f"seed {history.seed}: {dead} called dead, and published"


async def check_choices(history: History, machine: Machine, alarm: SplitHeads, latest: HeadRef) -> None:
    """Each head listed can be chosen, nothing asks again then, and what was published lies on one of the lines."""
    world = history.world
    lines: set[HeadRef] = set()
    for digest in alarm.digests:
        found = await find_newest(
            machine.members, machine.records, world.code, machine.clock, machine.timing, tries=1, chosen=digest
        )
        assert found.ref.digest.hex() == digest and not found.judgement.splits
        assert found.rejected.isdisjoint(history.ancestors(found.ref)), f"seed {history.seed}: its own line rejected"
        check_dead(history, found)
        lines |= history.ancestors(found.ref)
        history.note("chosen")
    assert latest in lines or history.stale, f"seed {history.seed}: {latest} is on no line to choose"


async def check_restores(history: History, chance: random.Random) -> None:
    """A restore finds every published head with as many lost backends as it says it withstands."""
    world, quorum = history.world, history.quorum
    latest = max(ref for _, ref in history.published)
    numbers = [entry.number for entry in world.fleet.entries]
    for _ in range(3):
        healthy = [number for number in numbers if number not in history.stale]
        # a - (N - Q + 1) >= 0 must hold also when the stale ones count as lost.
        most = max(0, quorum.needed - 1 - len(history.stale))
        lost = chance.sample(healthy, chance.randint(0, min(most, len(healthy))))
        machine = Machine(world, "restorer", seed=chance.getrandbits(60))
        machine.cut_off(*lost)
        try:
            found = await find_newest(
                machine.members, machine.records, world.code, machine.clock, machine.timing, tries=1
            )
        except SplitHeads as error:
            check_alarm(history, error)
            await check_choices(history, machine, error, latest)
            continue
        check_dead(history, found)
        assert found.judgement.withstands >= 0 or history.stale
        assert latest in history.ancestors(found.ref), (
            f"seed {history.seed}: restore without {lost} missed {latest}"
        )


def repeatable(seed: int) -> None:
    """Makes trio schedule tasks in the same order for the same seed."""
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio._core._run._r.seed(seed)


async def simulate(seed: int) -> History:
    """Runs and checks the history of `seed`."""
    repeatable(seed)
    history = await Simulation(seed).run()
    check_one_line(history)
    await check_restores(history, random.Random(seed))
    return history


__all__ = ["History", "QsfsError", "Simulation", "check_one_line", "check_restores", "simulate"]
