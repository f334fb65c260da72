"""Random histories with deletions: no kept generation, and nothing that the own tables need, ever loses a pack.

To the histories of `flush_history` this adds what deletes: dead packs go as soon as they may, without any
retention time, while ranges are read anew, deltas are merged, rows are packed ahead, cuts and heads are under way
and mounts crash.  Generations are pinned and released; a kept one becomes the newest again; another machine
takes over, and the old owner goes on to delete what it had permission for.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qsfs.backend.contract import ScanEntry, ScanPage
from qsfs.errors import BackendUnavailable
from qsfs.format.head import Head, HeadRef, KeptGeneration, Owner, SealedHead, head_key, open_head, seal_head
from qsfs.format.rows import decode_rows
from qsfs.format.shard import parse_shard_key, shard_key
from qsfs.remote.base import PUBLISHED_KEY, encode_local_head
from qsfs.remote.dead_packs import DeadPackCollector
from qsfs.remote.generation import GENERATION
from qsfs.remote.image import packs_of
from qsfs.remote.named import NamedPacks
from qsfs.remote.naming import Naming
from qsfs.remote.rebuild import Rebuild
from qsfs.remote.running import RunningTime
from qsfs.remote.stray_collect import AGAIN_SECONDS, StrayCollector
from qsfs.store.schema import PackRow, Table, read_plain_u64
from qsfs.store.store import NEXT_PACK, Store
from tests.remote.flush_history import FlushHistory, Model
from tests.remote.flush_machine import LIMITS, DirectReader, FlushMachine, newest_head, read_metadata, restore
from tests.remote.flushing import stored_packs
from tests.remote.harness import TIMING, World, make_world, plant

SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 150))]


class CollectingHistory(FlushHistory):
    """A history whose machine deletes, and which moves to another one now and then."""

    def __init__(self, world: World, directory: Path, seed: int) -> None:
        super().__init__(world, directory, seed)
        self.machines = 1
        self.dead: DeadPackCollector
        self.strays: StrayCollector
        self.honest: Callable[..., Awaitable[ScanPage]]
        self.late: set[bytes] = set()
        self.permitted: set[bytes] = set()

    def after_mount(self) -> None:
        machine = self.machine
        last, generations = machine.store.counter(NEXT_PACK), machine.generations
        named = NamedPacks(machine.spool, machine.context.sealer.keys, lambda: generations.base)
        self.dead = DeadPackCollector(
            machine.context,
            DirectReader(self.world),
            retention_seconds=0.0,
            named=named,
            owner_epoch=lambda: machine.publisher.owner.epoch,
        )
        ledger, listed = machine.context.ledger, named()
        left = [n for pack, n in ledger.metadata.items() if n <= last and pack not in listed]
        self.dead.take_over(ledger.emptied, left)
        naming = Naming(
            machine.context, DirectReader(self.world), base=lambda: generations.base, named=named, timing=TIMING
        )
        self.strays = StrayCollector(
            machine.context,
            naming,
            RunningTime(machine.store, machine.clock),
            retention_seconds=0.0,
            owner_epoch=lambda: machine.publisher.owner.epoch,
            ready=lambda: machine.publisher.published == generations.base.sealed.ref,
        )
        self.permitted = set()
        assert generations.renewal is None
        super().after_mount()

    async def step(self) -> None:
        chance = self.random.random()
        if chance < 0.12:
            await self.collect()
        elif chance < 0.2:
            await self.scan()
        elif chance < 0.24:
            self.pin()
        elif chance < 0.34:
            await self.cut()
        elif chance < 0.38:
            await (self.refresh() if self.random.random() < 0.5 else self.merge())
        else:
            await super().step()

    async def cut(self) -> None:
        generations = self.machine.generations
        view, before = self.dead.before_cut(), generations.base.head
        strays = self.strays.before_cut()
        await super().cut()
        if generations.base.head is not before:
            self.dead.published(view, generations.base.sealed.ref, generations.base.head, before)
            self.strays.published(strays)
            if self.random.random() < 0.7:
                await self.dead._settle()
                self.permitted = {dead.pack_id for dead in self.dead.graveyard.permitted(1 << 20)}
                self.permitted |= {stray.pack_id for stray in self.strays.strays.permitted(1 << 20)}
        if self.random.random() < 0.3:
            self.forget_late()

    async def collect(self) -> None:
        self.trace.append("collect")
        await self.dead.finish()
        await self.strays.finish()
        self.check_newest()
        self.check_local()

    async def scan(self) -> None:
        """Some pages of what backends list, some of which fail; perhaps from the begin."""
        self.trace.append("scan")
        self.machine.clock.advance(AGAIN_SECONDS)
        for backend in self.machine.backends:
            backend.gate = self.fail_at_times
        liar = self.random.choice(self.machine.backends)
        self.honest = liar.scan
        liar.scan = self.random.choice((self.scan_nothing, self.scan_others, self.honest))  # type: ignore[method-assign]
        if self.random.random() < 0.5:
            self.strays.scan_now()
        for _ in range(self.random.randrange(60)):
            await self.strays.work()
        liar.scan = self.honest  # type: ignore[method-assign]
        for backend in self.machine.backends:
            backend.gate = lambda call, key: None
        self.check_newest()
        self.check_local()

    async def scan_nothing(self, cursor: bytes | None = None) -> ScanPage:
        """A backend that hides what it holds."""
        await trio.lowlevel.checkpoint()
        return ScanPage(None, ())

    async def scan_others(self, cursor: bytes | None = None) -> ScanPage:
        """A backend that lists what only others hold, and what nobody does."""
        page = await self.honest(cursor)
        keys = [key for store in self.world.data for key in list(store.keys())]
        keys = self.random.sample(keys, min(5, len(keys)))
        keys.append(shard_key(self.world.keys.fsid, 1, self.random.randbytes(16), 0))
        return replace(page, entries=(*page.entries, *(ScanEntry(key, 100, 0) for key in keys)))

    async def settle(self) -> None:
        """A last mount, without crashes or pins: what no row names goes, and no generation lacks anything."""
        async with self.machine.mounted():
            self.after_mount()
            self.machine.generations.pins.clear()
            for _ in range(8):
                self.create()
                await self.cut()
                self.machine.clock.advance(AGAIN_SECONDS)
                self.strays.scan_now()
                while self.strays._ready() and self.strays._scanner.due(self.strays._running.seconds):
                    await self.strays.work()
                await self.collect()
            rows = self.machine.store.scan(Table.PACKS, b"", None)
            left = stored_packs(self.world) - {PackRow.decode(row).pack_id for _, row in rows}
            assert left <= self.machine.spool.named, "strays are left"

    def fail_at_times(self, call: str, key: bytes) -> None:
        if call in ("scan", "get", "delete") and self.random.random() < 0.01:
            raise BackendUnavailable("no answer")

    def pin(self) -> None:
        pins = self.machine.generations.pins
        if pins and self.random.random() < 0.5:
            del pins[self.random.choice(sorted(pins))]
            return
        kept = self.machine.generations.base.head.kept
        if kept:
            self.trace.append("pin")
            pins[self.random.choice(kept).head] = ("pin",)

    def forget_late(self) -> None:
        """The owner of before, which does not know that it is one no more, deletes what it had permission for."""
        for store in self.world.data:
            for key in list(store.keys()):
                named = parse_shard_key(key)
                if named is not None and named.pack_id in self.late:
                    store.lose(key)
        self.late = set()

    def move(self) -> None:
        """Another machine restores the newest generation, and is the owner from its next mount on."""
        self.trace.append("takeover")
        ref, head = self.newest()
        sealed = SealedHead(*self.value_of(ref), ref)
        self._begin_anew(head, sealed, self.cut_of(ref), ours=False)
        self.late = self.permitted

    def roll_back(self) -> None:
        """A kept generation becomes the newest again, as `rollback.Rollback` does it; perhaps with a power cut.

        What may be lost with that is the sending of the last head.
        """
        ref, newest = self.newest()
        if not newest.kept:
            return
        target = self.random.choice(newest.kept)
        self.trace.append(f"rollback to {target.head.generation}")
        store = Store(self.machine.directory, LIMITS, self.machine.clock)
        counters = {k.decode(): read_plain_u64(v) for k, v in store.scan(Table.COUNTERS, b"", None)}
        last = max(store.counter(GENERATION), newest.generation)
        store.close()
        self.machine.epoch = ref.owner.epoch + 1
        owner = Owner(self.machine.epoch, self.world.clock.random_bytes(16))
        kept = (*newest.kept, KeptGeneration(ref, newest.time_ns, ("left",)))
        leaving = replace(newest, owner=owner, generation=last + 1, predecessor=ref, kept=kept)
        left = plant(self.world, leaving)
        old = open_head(*self.value_of(target.head), self.world.keys)
        for known in (leaving.counters, old.counters):
            counters.update({name: max(counters.get(name, 0), value) for name, value in known.items()})
        new = replace(
            old,
            owner=owner,
            generation=last + 2,
            write_number=max(old.write_number, leaving.write_number),
            predecessor=left.ref,
            fleets=leaving.fleets,
            kept=(*leaving.kept, KeptGeneration(left.ref, leaving.time_ns, ())),
            counters=counters,
        )
        self.cuts[owner.epoch, last + 1] = copy.deepcopy(self.cut_of(ref))
        self.cuts[owner.epoch, last + 2] = copy.deepcopy(self.cut_of(target.head))
        sealed = seal_head(new, self.world.keys, self.world.clock)
        self._begin_anew(new, sealed, self.cut_of(target.head), ours=True, published=left)
        if self.random.random() < 0.6:
            for control in self.world.control:
                control.put(sealed.key, sealed.value)

    def _begin_anew(
        self, head: Head, sealed: SealedHead, model: Model, *, ours: bool, published: SealedHead | None = None
    ) -> None:
        """The store that `head` lists, on a machine of its own."""
        self.machines += 1
        old = self.machine
        directory = old.directory.with_name(f"machine {self.machines}")
        directory.mkdir()
        rebuild = Rebuild(directory, LIMITS.map_bytes, old.clock.time_ns())
        for pack, counting in packs_of(head):
            for chunk in read_metadata(self.world, pack):
                rebuild.load(counting.of(decode_rows(chunk)))
        local = {PUBLISHED_KEY: encode_local_head(published, ours=True)} if published is not None else {}
        rebuild.finish(head, sealed, ours=ours, local=local)
        rebuild.close()
        machine = FlushMachine(self.world, directory, seed=self.random.randrange(1 << 30))
        machine.epoch, machine.before_seal, machine.opened = old.epoch, self.remember, self.note_opened
        self.machine = machine
        self.model = copy.deepcopy(model)
        self.model.orphans = {}
        for file in self.model.files.values():
            if file.local_only:
                file.data = bytearray()
        self.commits = {0: copy.deepcopy(self.model)}

    def newest(self) -> tuple[HeadRef, Head]:
        newest = newest_head(self.world)
        assert newest is not None
        return newest

    def value_of(self, ref: HeadRef) -> tuple[bytes, bytes]:
        key = head_key(self.world.keys.fsid, ref)
        value = next(v for store in self.world.control if (v := store.peek(key)) is not None)
        return key, value

    def check_newest(self) -> None:
        super().check_newest()
        for kept in self.newest()[1].kept:
            head = open_head(*self.value_of(kept.head), self.world.keys)
            image = restore(self.world, head)
            assert image.files == self.cut_of(kept.head).visible(), f"kept generation {kept.head.generation}"


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_is_deleted_is_needed_by_nothing(tmp_path: Path, autojump_clock, seed: int):
    world = await make_world(5, k=2, m=2)
    for store in world.data:
        store.page_entries = 40
    history = CollectingHistory(world, tmp_path / "machine 1", seed)
    try:
        for _ in range(3):
            await history.run(mounts=2, steps=60)
            chance = history.random.random()
            if chance < 0.35:
                history.roll_back()
                history.check_newest()
            elif chance < 0.75:
                history.move()
                if history.random.random() < 0.3:
                    history.forget_late()
                history.check_newest()
        await history.settle()
    except BaseException:
        print(f"seed {seed}:", " | ".join(history.trace))
        raise
