"""What is read at a start is packed together: once, within bounds, and without a byte that changes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Iterable

import pytest
import trio

from qsfs import failpoints
from qsfs.remote import start_packs
from qsfs.remote.flush import Flusher
from qsfs.store.schema import BLOCK_PAGES, PAGE, InodeFlag, PackRow, PackState, Table, u64_pair
from tests.remote.flush_machine import Crash, FlushMachine, crash, restore
from tests.remote.flushing import RowsAStep, flushing, pack_rows, until
from tests.remote.harness import World

PAGES = 640
SCATTERED = range(5, PAGES, 8)
DAY = 60.0
"""What is a day elsewhere: every second of it is worked through."""


@pytest.fixture(autouse=True)
def shorter_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_packs, "AGAIN_SECONDS", DAY)
    monkeypatch.setattr(start_packs, "_RETRY_SECONDS", DAY / 4)


@contextlib.asynccontextmanager
async def started(
    machine: FlushMachine, pages: Iterable[int] = SCATTERED, **settings: float
) -> AsyncIterator[tuple[Flusher, int, bytearray]]:
    """A flushed database of which `pages` were read at its start; the flusher, its inode, its content."""
    machine.opened = lambda: machine.store.start.begin(60.0, 1 << 20)
    async with flushing(machine, **settings) as flusher:
        number = machine.create("a.lmdb", flags=InodeFlag.ATOMIC_SYNC)
        content = bytearray(random.Random(1).randbytes(PAGES * PAGE))
        machine.write(number, 0, bytes(content))
        await flusher.sync()
        await trio.sleep(60)
        read(machine, number, pages)
        yield flusher, number, content


def read(machine: FlushMachine, number: int, pages: Iterable[int]) -> None:
    """An application's start, from its first read to the end of the time that is recorded."""
    start = machine.store.start
    start._opened._words.clear()
    for page in pages:
        start.note(number, page, 1)
    start.end_all()
    start.save(1 << 20)


def in_start_packs(machine: FlushMachine, number: int) -> set[int]:
    """The pages that lie in start packs."""
    rows = pack_rows(machine)
    return {
        page
        for row in machine.store.extents.overlapping(number, 0, PAGES)
        if rows[row.pack].state & PackState.START
        for page in range(row.first, row.first + row.pages)
    }


def packed(flusher: Flusher) -> int:
    """Pages packed so far."""
    return int(flusher.status()["start"]["packed_bytes"]) // PAGE


async def test_scattered_pages_are_packed_together_and_restores_know_it(world: World, machine: FlushMachine, clock):
    async with started(machine) as (flusher, number, content):
        await until(lambda: packed(flusher))
        await flusher.sync()
        assert packed(flusher) == len(SCATTERED), "nothing else is sent again"
        assert in_start_packs(machine, number) == set(SCATTERED)
        assert machine.content(number) == content
        image = restore(world)
        assert image.files["a.lmdb"] == content
        marked = [r for r in map(PackRow.decode, image.rows[Table.PACKS].values()) if r.state & PackState.START]
        assert sum(row.live for row in marked) == len(SCATTERED) * PAGE
        assert all(row.live <= row.body_length <= 2 * row.live for row in marked), "they hold nothing else"


async def test_what_is_packed_is_not_packed_again(world: World, machine: FlushMachine, clock):
    """Neither at the next start nor for a few pages more; once many are scattered, these alone are packed."""
    async with started(machine) as (flusher, number, content):
        await until(lambda: packed(flusher))
        few = range(6, PAGES, 64)
        assert len(few) < start_packs.LEAST_PAGES
        read(machine, number, [*SCATTERED, *few])
        await trio.sleep(2 * DAY)
        assert packed(flusher) == len(SCATTERED)
        more = range(7, PAGES, 16)
        read(machine, number, [*SCATTERED, *few, *more])
        await trio.sleep(2 * DAY)
        assert packed(flusher) == len(SCATTERED) + len(few) + len(more)
        assert in_start_packs(machine, number) == {*SCATTERED, *few, *more}
        assert machine.content(number) == content


async def test_what_costs_a_start_little_is_left_where_it_lies(world: World, machine: FlushMachine, clock):
    """Pages that share a shard with others that are read too."""
    async with started(machine) as (flusher, number, _):
        await until(lambda: packed(flusher))
        near = set(range(320, 348)) - set(SCATTERED)
        read(machine, number, {*SCATTERED, *near})
        await trio.sleep(2 * DAY)
        assert packed(flusher) == len(SCATTERED)


async def test_no_more_than_once_a_day(world: World, machine: FlushMachine, clock):
    """A database that reads other pages at each of many starts costs no more than that."""
    async with started(machine) as (flusher, number, _):
        await until(lambda: packed(flusher))
        begun = trio.current_time()
        read(machine, number, range(9, PAGES, 8))
        await trio.sleep(DAY / 2)
        assert packed(flusher) == len(SCATTERED)
        await until(lambda: packed(flusher) > len(SCATTERED))
        assert trio.current_time() - begun <= DAY + 10


async def test_packs_full_of_such_pages_are_only_marked(world: World, machine: FlushMachine, clock):
    async with started(machine, range(320)) as (flusher, number, _):
        await until(lambda: in_start_packs(machine, number))
        assert in_start_packs(machine, number) == set(range(320))
        await trio.sleep(2 * DAY)
        assert packed(flusher) == 0


@pytest.mark.parametrize("still", [[*SCATTERED[::5], SCATTERED[-1]], []], ids=["some", "none"])
async def test_packs_that_are_read_no_more_lose_the_mark(world: World, machine: FlushMachine, clock, still: list[int]):
    """A start must not fetch for ever what starts once read: neither what it reads little of nor what nothing of."""
    async with started(machine) as (flusher, number, _):
        await until(lambda: packed(flusher))
        old = {n for n, row in pack_rows(machine).items() if row.state & PackState.START}
        later = [*still, *range(9, PAGES, 8)]
        read(machine, number, later)
        await trio.sleep(2 * DAY)
        rows = pack_rows(machine)
        assert not [n for n in old if n in rows and rows[n].state & PackState.START]
        assert in_start_packs(machine, number) == set(later)


async def test_packs_that_lost_their_readers_before_a_mount_lose_the_mark(world: World, machine: FlushMachine, clock):
    async with started(machine) as (flusher, number, _):
        await until(lambda: packed(flusher))
        read(machine, number, range(9, PAGES, 8))
        assert in_start_packs(machine, number) == set(SCATTERED)
        machine.committer.commit_now()
    async with flushing(machine):
        await trio.sleep(2 * DAY)
        assert in_start_packs(machine, number) == set(range(9, PAGES, 8))


async def test_packs_that_another_store_marked_keep_the_mark(
    world: World, machine: FlushMachine, clock, monkeypatch: pytest.MonkeyPatch
):
    """Where a file system was restored nothing is recorded yet: the marks are all that is known of its starts."""
    async with started(machine) as (flusher, number, _):
        await until(lambda: packed(flusher))
        machine.committer.commit_now()
    monkeypatch.setattr(start_packs, "_OWN_KEY", b"of another store")
    async with flushing(machine):
        while not machine.store.start.drop(number, 1):
            pass
        await trio.sleep(2 * DAY)
        assert in_start_packs(machine, number) == set(SCATTERED)


async def test_new_databases_all_the_time_do_not_keep_what_is_recorded_from_being_packed(
    world: World, machine: FlushMachine, clock
):
    """A short while it waits for those that start together with it."""
    async with started(machine, ()) as (flusher, number, _):
        start = machine.store.start
        new = 1 << 20
        start.note(new, 0, 1)
        for page in SCATTERED:
            start.note(number, page, 1)
        recorded_at = None
        begun = trio.current_time()
        while not packed(flusher):
            start.note(new, 0, 1)
            new += 1
            start.end_due(1 << 20)
            if recorded_at is None and start.pages:
                recorded_at = trio.current_time()
            await trio.sleep(5)
            assert start.recording and trio.current_time() - begun < 600
        assert recorded_at is not None
        assert start.seconds < trio.current_time() - recorded_at <= 3 * start.seconds
        assert in_start_packs(machine, number) == set(SCATTERED)


async def test_others_work_between_the_extents_that_are_counted(
    world: World, machine: FlushMachine, clock, monkeypatch: pytest.MonkeyPatch
):
    """A chunk may be thousands of them."""
    monkeypatch.setattr(start_packs, "_EXTENTS_A_STEP", 16)
    async with started(machine) as (flusher, number, _):
        await until(lambda: packed(flusher))
        assert len(list(machine.store.extents.overlapping(number, 0, PAGES))) > 64
        rows = RowsAStep(machine.store, monkeypatch)
        trio.lowlevel.add_instrument(rows)
        plan = await flusher._upkeep.start._plan()
        trio.lowlevel.remove_instrument(rows)
        assert plan.pages.total() == len(SCATTERED)
        assert 0 < rows.most <= 16


async def test_few_pages_are_not_worth_a_pack(world: World, machine: FlushMachine, clock):
    async with started(machine, range(5, PAGES, 64)) as (flusher, _, _):
        await trio.sleep(2 * DAY)
        assert packed(flusher) == 0


async def test_nothing_is_packed_while_too_few_backends_answer(
    world: World, machine: FlushMachine, clock, monkeypatch: pytest.MonkeyPatch
):
    async with started(machine, ()) as (flusher, number, _):
        monkeypatch.setattr(machine.uploader, "enough_backends", lambda: False)
        read(machine, number, SCATTERED)
        await trio.sleep(2 * DAY)
        assert packed(flusher) == 0
        monkeypatch.undo()
        await until(lambda: packed(flusher))


@pytest.mark.parametrize("what", ["write", "write and sync", "truncate", "remove", "evict"])
async def test_what_happens_while_a_pack_is_written_wins(world: World, machine: FlushMachine, clock, what: str):
    """Old pages never come back, to the file or to a generation."""
    async with started(machine) as (flusher, number, content):
        asked: list[str] = []

        def slowly(call: str) -> float:
            asked.append(call)
            return 30.0 if call == "set" else 0.0

        for backend in machine.backends:
            backend.delay = slowly
        await until(lambda: "set" in asked)
        assert not packed(flusher), "a pack is on its way"
        for backend in machine.backends:
            backend.delay = lambda call: 0.0
        if what.startswith("write"):
            for page in SCATTERED:
                machine.write(number, page, content[:PAGE])
                content[page * PAGE : (page + 1) * PAGE] = content[:PAGE]
        elif what == "truncate":
            machine.truncate(number, 10)
            machine.extend(number, PAGES)
            content[10 * PAGE :] = bytes((PAGES - 10) * PAGE)
            machine.store.work_off_truncations(1 << 20)
        elif what == "evict":
            machine.evict(number)
        else:
            machine.unlink("a.lmdb", number)
        if what == "write and sync":
            await flusher.sync()
            machine.evict(number)
        assert not packed(flusher), "it is still on its way"
        await trio.sleep(2 * DAY)
        await flusher.sync()
        if what == "remove":
            assert "a.lmdb" not in restore(world).files
        else:
            machine.evict(number)
            assert machine.content(number) == content
            assert restore(world).files["a.lmdb"] == content


@pytest.mark.parametrize("where", ["start.pack.written", "start.pack.recorded"])
async def test_a_crash_while_packing_changes_nothing(world: World, machine: FlushMachine, clock, where: str):
    content = b""
    with pytest.raises(Crash):
        async with started(machine) as (flusher, number, data):
            content = bytes(data)
            machine.committer.commit_now()
            failpoints.arm(where, crash)
            await until(lambda: packed(flusher) == len(SCATTERED))
    failpoints.disarm_all()
    async with flushing(machine) as flusher:
        number = next(iter(machine.store.start.files))
        assert machine.content(number) == content
        await until(lambda: packed(flusher) or len(in_start_packs(machine, number)) == len(SCATTERED))
        await flusher.sync()
        assert in_start_packs(machine, number) == set(SCATTERED)
        assert machine.content(number) == content
        assert restore(world).files["a.lmdb"] == content


async def test_a_damaged_page_is_left_where_it_lies(world: World, machine: FlushMachine, clock):
    """It is good on the backends, and must not be sealed."""
    async with started(machine, ()) as (flusher, number, content):
        bad = SCATTERED[3]
        key = u64_pair(number, bad // BLOCK_PAGES)
        with machine.store.environment.write() as txn:
            table = machine.store.environment.databases[Table.VALUES]
            value = bytearray(txn.get(key, db=table))
            value[bad % BLOCK_PAGES * PAGE] ^= 1
            txn.put(key, bytes(value), db=table)
        machine.store.layers.renew_view()
        read(machine, number, SCATTERED)
        await until(lambda: packed(flusher))
        await flusher.sync()
        assert in_start_packs(machine, number) == set(SCATTERED) - {bad}
        assert restore(world).files["a.lmdb"] == content


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_meanwhile_every_byte_is_the_right_one(
    world: World, machine: FlushMachine, clock, monkeypatch: pytest.MonkeyPatch, seed: int
):
    """Starts, writes, truncations, evictions and generations while packs are written all the time, slowly."""
    monkeypatch.setattr(start_packs, "LEAST_PAGES", 1)
    monkeypatch.setattr(start_packs, "MOST_FETCHED", 0.0)
    monkeypatch.setattr(start_packs, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(start_packs, "_LEAST_SECONDS", 0.0)
    chosen = random.Random(seed)
    machine.opened = lambda: machine.store.start.begin(60.0, 1 << 20)
    async with flushing(machine, cut_seconds=10.0, quiet_seconds=0.5) as flusher:
        slow, tried = [0.0], []
        packer = flusher._upkeep.start
        pack_blocks = packer._pack_blocks

        async def counted(wanted: list[tuple[int, int, int]]) -> set[int]:
            tried.append(len(wanted))
            return await pack_blocks(wanted)

        monkeypatch.setattr(packer, "_pack_blocks", counted)
        for backend in machine.backends:
            backend.delay = lambda call: chosen.uniform(0, slow[0]) if call == "set" else 0.0
        number = machine.create("a.lmdb", flags=InodeFlag.ATOMIC_SYNC)
        content = bytearray(200 * PAGE)
        machine.extend(number, 200)
        for _ in range(60):
            what = chosen.choice(["write", "write", "write", "start", "start", "truncate", "evict", "commit", "sync"])
            first = chosen.randrange(200)
            if what == "write":
                data = chosen.randbytes(min(chosen.choice([1, 3, 40]), 200 - first) * PAGE)
                machine.write(number, first, data)
                content[first * PAGE : first * PAGE + len(data)] = data
            elif what == "truncate":
                machine.truncate(number, first, later=chosen.random() < 0.5)
                machine.extend(number, 200)
                content[first * PAGE :] = bytes((200 - first) * PAGE)
                if chosen.random() < 0.5:
                    machine.store.work_off_truncations(1 << 20)
            elif what == "start":
                read(machine, number, chosen.sample(range(200), chosen.choice([5, 40, 120])))
                slow[0] = 50.0
                await trio.sleep(1.5)
                slow[0] = 0.0
            elif what == "evict":
                machine.evict(number)
            elif what == "commit":
                await machine.committer.commit()
            else:
                await flusher.sync()
                assert restore(world).files["a.lmdb"] == content
            await trio.sleep(chosen.choice([0, 0.3, 3.0, 10.0]))
            if chosen.random() < 0.3:
                assert machine.content(number) == content
        await flusher.sync()
        machine.evict(number)
        assert machine.content(number) == content
        assert restore(world).files["a.lmdb"] == content
        assert tried, "else this shows nothing"
