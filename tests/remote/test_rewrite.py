"""Rewriting thin packs: space comes back, no byte changes, and whatever an application does meanwhile wins."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Collection

import pytest
import trio

from qsfs.backend.limits import RateLimit, with_limits
from qsfs.errors import Unavailable
from qsfs.remote import rewrite, rewrite_choice
from qsfs.remote.flush import Flusher
from qsfs.remote.stored import StoredPack
from qsfs.store.schema import BLOCK_PAGES, PAGE, Table, u64_pair
from tests.remote.flush_machine import DirectReader, FlushMachine, restore
from tests.remote.flushing import flushing, pack_rows, stored_packs, until
from tests.remote.harness import World
from tests.remote.test_dead_packs import RETENTION, generations

PAGES = 160


@contextlib.asynccontextmanager
async def thinned(
    machine: FlushMachine, *, evicted: bool, **settings: float
) -> AsyncIterator[tuple[Flusher, int, bytearray]]:
    """A file of three packs of which one page in four is left; the flusher, its inode, its content."""
    async with flushing(machine, retention_seconds=RETENTION, **settings) as flusher:
        number = machine.create("a")
        content = bytearray(random.Random(1).randbytes(PAGES * PAGE))
        machine.write(number, 0, bytes(content))
        await flusher.sync()
        for page in range(PAGES):
            if page % 4:
                data = random.Random(page).randbytes(PAGE)
                machine.write(number, page, data)
                content[page * PAGE : (page + 1) * PAGE] = data
        await flusher.sync()
        if evicted:
            machine.evict(number)
        yield flusher, number, content


def thin(machine: FlushMachine) -> list[int]:
    return [n for n, row in pack_rows(machine).items() if row.kind == 1 and 0 < 2 * row.live < row.body_length]


def waste(machine: FlushMachine) -> float:
    """Bytes of data packs that anything lives in, to live bytes."""
    rows = [row for row in pack_rows(machine).values() if row.kind == 1 and row.live]
    return sum(row.body_length for row in rows) / sum(row.live for row in rows)


async def pass_time(machine: FlushMachine, flusher: Flusher, rounds: int) -> None:
    for index in range(rounds):
        machine.create(f"{trio.current_time()} {index}")
        await flusher.sync()
        await trio.sleep(RETENTION)


@pytest.mark.parametrize("evicted", [False, True])
async def test_thin_packs_go_and_every_byte_stays(world: World, machine: FlushMachine, clock, evicted: bool):
    async with thinned(machine, evicted=evicted) as (flusher, number, content):
        old = {row.pack_id for n, row in pack_rows(machine).items() if n in thin(machine)}
        assert len(old) >= 2
        before = waste(machine)
        await pass_time(machine, flusher, 30)
        assert thin(machine) == [] and waste(machine) < 1.3 < before
        assert not old & stored_packs(world)
        assert machine.content(number) == content
        assert restore(world).files["a"] == content
        told = flusher.status()["rewrite"]
        assert told["thin_packs"] == 0 and told["rewritten_packs"] == len(old)
        assert told["rewritten_bytes"] == PAGES // 4 * PAGE


async def test_young_packs_are_left_alone(world: World, machine: FlushMachine, clock):
    """What shrinks soon after it was written is likely to die by itself."""
    async with thinned(machine, evicted=False) as (flusher, _, _):
        before = thin(machine)
        await trio.sleep(rewrite_choice.SETTLED_SECONDS / 2)
        assert thin(machine) == before and flusher.status()["rewrite"]["rewritten_packs"] == 0


async def test_rewriting_can_be_switched_off(world: World, machine: FlushMachine, clock):
    async with thinned(machine, evicted=False, rewrite_below=0.0) as (flusher, _, _):
        before = thin(machine)
        await pass_time(machine, flusher, 12)
        assert thin(machine) == before


async def test_packs_that_are_not_thin_enough_do_not_keep_others_from_their_turn(
    world: World, machine: FlushMachine, clock, monkeypatch
):
    """However many there are, and however few are looked at in a second."""
    monkeypatch.setattr(rewrite_choice, "_LOOKED_AT", 1)
    monkeypatch.setattr(rewrite_choice, "PATIENCE_SECONDS", 0)
    async with thinned(machine, evicted=False, rewrite_below=0.2) as (flusher, number, _):
        assert len(thin(machine)) >= 2, "a quarter of each is alive"
        last = max(thin(machine))
        for row in [row for row in machine.store.extents.overlapping(number, 0, PAGES) if row.pack == last][:-2]:
            machine.write(number, row.first, bytes(row.pages * PAGE))
        await flusher.sync()
        await pass_time(machine, flusher, 10)
        assert flusher.status()["rewrite"]["rewritten_packs"] == 1 and last not in thin(machine)


@pytest.mark.parametrize("limit", [0, 8 * 16 * PAGE])
async def test_what_is_on_its_way_stays_far_below_a_limit_to_exposure(
    world: World, machine: FlushMachine, clock, limit: int
):
    """It counts as exposed: else rewriting alone would bring cut after cut, and alarms."""
    async with thinned(machine, evicted=False, exposure_bytes=limit) as (flusher, _, content):
        rewriter = flusher._upkeep.rewriter
        most = 0
        for _ in range(400):
            await trio.sleep(5)
            most = max(most, sum(marked.size for marked in rewriter._marked.values()))
        assert thin(machine) == [] and restore(world).files["a"] == content
        assert most <= limit // 8 if limit else most == PAGES // 4 * PAGE, most


async def test_the_next_mount_finds_what_is_thin(world: World, machine: FlushMachine, clock):
    async with thinned(machine, evicted=False) as (_, number, content):
        assert thin(machine)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await pass_time(machine, flusher, 30)
        assert thin(machine) == []
        assert machine.content(number) == content


async def test_what_is_not_uploaded_yet_is_on_its_way_however_long_that_takes(
    world: World, machine: FlushMachine, clock, monkeypatch
):
    """Else a line that is busy for hours fills the cache with pages that only wait for it."""
    monkeypatch.setattr(rewrite, "MARKED_BYTES", 8 * PAGE)
    limit = RateLimit(1_000_000)
    machine.backends = [with_limits(backend, upload=limit) for backend in machine.backends]  # type: ignore[misc]
    async with thinned(machine, evicted=False) as (flusher, number, content):
        limit.charge(5_000_000_000)
        await until(lambda: flusher.status()["rewrite"]["rewritten_bytes"])
        marked = flusher.status()["rewrite"]["rewritten_bytes"]
        await trio.sleep(1500)
        assert flusher.status()["rewrite"]["rewritten_bytes"] == marked < PAGES // 4 * PAGE
        limit.rate = 0
        await until(lambda: flusher.status()["rewrite"]["rewritten_bytes"] > marked)
        assert machine.content(number) == content


class Gate(DirectReader):
    """Holds up readings of data packs until the gate opens; `waiting` counts them."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.opened = trio.Event()
        self.waiting = 0
        self.fails = False

    async def shards(self, pack: StoredPack, wanted: Collection[int]) -> dict[int, memoryview]:
        self.waiting += 1
        if self.fails:
            raise Unavailable("no answer")
        await self.opened.wait()
        return await super().shards(pack, wanted)


@pytest.mark.parametrize("what", ["write", "truncate", "remove"])
async def test_what_happens_while_a_pack_is_read_wins(world: World, machine: FlushMachine, clock, what: str):
    """Old pages never come back, to the file or to a generation."""
    async with thinned(machine, evicted=True) as (flusher, number, _content):
        gate = flusher._upkeep.rewriter._reader = Gate(world)
        await until(lambda: gate.waiting)
        if what == "write":
            data = random.Random(2).randbytes(PAGES * PAGE)
            machine.write(number, 0, data)
        elif what == "truncate":
            machine.truncate(number, 0)
            machine.extend(number, PAGES)
            data = bytes(PAGES * PAGE)
        else:
            machine.unlink("a", number)
        gate.opened.set()
        await pass_time(machine, flusher, 10)
        files = restore(world).files
        if what == "remove":
            assert "a" not in files
        else:
            assert machine.content(number) == data and files["a"] == data
        generations(world)


async def test_a_pack_that_cannot_be_read_is_left_for_later(world: World, machine: FlushMachine, clock):
    async with thinned(machine, evicted=True) as (flusher, _number, content):
        gate = flusher._upkeep.rewriter._reader = Gate(world)
        gate.fails = True
        await until(lambda: gate.waiting >= 5)
        tried = gate.waiting
        await trio.sleep(rewrite_choice.AGAIN_SECONDS / 2)
        assert gate.waiting <= tried + 10
        gate.fails = False
        gate.opened.set()
        await pass_time(machine, flusher, 45)
        assert thin(machine) == [] and restore(world).files["a"] == content


async def test_a_crash_at_any_time_loses_nothing(world: World, machine: FlushMachine, clock):
    """Marked dirty or not, uploaded or not: the pages are the same."""
    async with thinned(machine, evicted=True) as (_, number, content):
        pass
    for seconds in (3.0, 9.0, 27.0, 61.0):
        async with flushing(machine, retention_seconds=RETENTION) as flusher:
            await trio.sleep(rewrite_choice.SETTLED_SECONDS)
            await machine.committer.commit()
            await trio.sleep(seconds)
            assert machine.content(number) == content
        async with flushing(machine, retention_seconds=RETENTION) as flusher:
            await flusher.sync()
            assert machine.content(number) == content
            assert restore(world).files["a"] == content


async def test_damaged_pages_are_fetched_and_not_marked_dirty_as_they_are(
    world: World, machine: FlushMachine, clock, expect_log
):
    """Dirty, it could neither be fetched nor uploaded: what the backends still have would be an error for ever."""
    expect_log(r"inode \d+, page \d+: its local bytes fail their checksum.* will be fetched", count=2)
    async with thinned(machine, evicted=False) as (flusher, number, content):
        await machine.committer.commit()
        environment = machine.store.environment
        values = environment.databases[Table.VALUES]
        with environment.write() as txn:
            for page in (0, 4):
                key = u64_pair(number, page // BLOCK_PAGES)
                value = bytearray(txn.get(key, db=values))
                value[page % BLOCK_PAGES * PAGE] ^= 1
                txn.put(key, bytes(value), db=values)
        machine.store.layers.renew_view()
        await pass_time(machine, flusher, 30)
        assert thin(machine) == []
        assert machine.content(number) == content
        assert restore(world).files["a"] == content


async def test_pages_of_an_open_file_without_a_name_are_left_alone(world: World, machine: FlushMachine, clock):
    """They are not uploaded, so marked dirty they would only be in the way of eviction."""
    async with thinned(machine, evicted=True) as (flusher, number, content):
        machine.unlink("a", number, still_open=True)
        await pass_time(machine, flusher, 10)
        assert flusher.status()["rewrite"]["rewritten_bytes"] == 0
        assert machine.content(number) == content


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
async def test_pages_that_are_rewritten_for_ever_take_bounded_space(
    world: World, machine: FlushMachine, clock, monkeypatch, seed: int
):
    """As a database does it: each kept generation stays exact, and packs that live hold little that is dead."""
    monkeypatch.setattr(rewrite_choice, "SETTLED_SECONDS", 60.0)
    source = random.Random(seed)
    seen: dict[int, dict[str, bytes]] = {}
    content = bytearray(source.randbytes(PAGES * PAGE))
    number = 0
    for _ in range(2):
        async with flushing(machine, quiet_seconds=1.0, retention_seconds=RETENTION) as flusher:
            if not number:
                number = machine.create("a")
                machine.write(number, 0, bytes(content))
            for _ in range(7):
                for page in source.sample(range(PAGES), 16):
                    content[page * PAGE : (page + 1) * PAGE] = data = source.randbytes(PAGE)
                    machine.write(number, page, data)
                if source.random() < 0.5:
                    machine.evict(number)
                await flusher.sync()
                for ref, files in generations(world).items():
                    assert seen.setdefault(ref.generation, files) == files
                assert restore(world).files == {"a": bytes(content)}
                await trio.sleep(RETENTION)
            assert machine.content(number) == content
            with trio.fail_after(10 * RETENTION):
                await until(lambda: waste(machine) <= 2.2)
