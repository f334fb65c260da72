"""Strays: shards that nothing names go, and whatever a row or a kept generation names stays wherever it lies."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import trio
from trio.testing import MockClock

from qsfs import failpoints
from qsfs.backend.contract import ScanEntry, ScanPage
from qsfs.backend.memory import MemoryStore
from qsfs.errors import BackendUnavailable
from qsfs.format.head import HeadRef, head_key, open_head
from qsfs.format.shard import OVERHEAD, parse_shard_key, shard_key
from qsfs.format.units import MAX_SHARD
from qsfs.remote import naming as naming_module
from qsfs.remote import scanning, strays, upkeep
from qsfs.remote.base import BASE_KEY, encode_local_head
from qsfs.remote.flush import Flusher
from qsfs.remote.scanning import SCAN_PREFIX, Walk, scan_key
from qsfs.remote.spool import AbandonedPack
from qsfs.remote.strays import STRAY_PREFIX, Place, Stray, Strays, stray_key
from qsfs.store.schema import PAGE, Table, u64
from tests.remote.flush_machine import Crash, FlushMachine, crash, restore
from tests.remote.flushing import flushing, pack_rows, stored_packs, until
from tests.remote.harness import World, keys_of

RETENTION = 100.0


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends are walked anew after twenty seconds."""
    monkeypatch.setattr(scanning, "AGAIN_SECONDS", 20.0)
    monkeypatch.setattr("qsfs.remote.stray_collect.SIEVE_SECONDS", 20.0)


def plant_stray(world: World, name: int, *, epoch: int = 1, fsid: bytes | None = None, shards: int = 4) -> bytes:
    """A pack that nothing names, on as many backends as it has shards; returns its id."""
    pack_id = bytes([name]) * 16
    for number in range(shards):
        key = shard_key(fsid or world.keys.fsid, epoch, pack_id, number)
        world.data[number].put(key, b"left by a crash" * 10)
    return pack_id


def packs_on(store: MemoryStore) -> set[bytes]:
    return {named.pack_id for key in keys_of(store) if (named := parse_shard_key(key)) is not None}


async def go_on(machine: FlushMachine, flusher: Flusher, times: int = 3, pause: float = RETENTION) -> None:
    """Heads, and time after each."""
    for _ in range(times):
        machine.create(f"at {trio.current_time()}")
        await flusher.sync()
        await trio.sleep(pause)


def told(flusher: Flusher) -> dict[str, object]:
    found: dict[str, object] = flusher.dead_packs()["strays"]
    return found


def rows(machine: FlushMachine) -> list[bytes]:
    return [key for key, _ in machine.store.scan(Table.LOCAL, STRAY_PREFIX, b"stray;")]


async def crashed(machine: FlushMachine, point: str) -> set[bytes]:
    """A mount that dies at a failpoint while it flushes a new file; returns the packs that it left behind."""
    quiet = 5.0 if "precopy" in point else 1e6
    before = stored_packs(machine.world)
    with contextlib.suppress(Crash):
        try:
            async with flushing(machine, retention_seconds=RETENTION, quiet_seconds=quiet) as flusher:
                await flusher.sync()
                failpoints.arm(point, crash)
                machine.write(machine.create(f"before {point}"), 0, b"c" * PAGE * 40)
                await machine.committer.commit()
                await trio.sleep(60)
        except BaseExceptionGroup as group:
            if not group.split(Crash)[0]:
                raise
        finally:
            failpoints.disarm_all()
    return stored_packs(machine.world) - before


async def test_a_stray_goes_after_its_retention_time_and_everything_else_stays(
    world: World, machine: FlushMachine, clock: MockClock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        machine.write(machine.create("a"), 0, b"x" * PAGE * 40)
        await flusher.sync()
        named = stored_packs(world)
        stray = plant_stray(world, 1)
        other = plant_stray(world, 2, fsid=bytes(16))
        above = plant_stray(world, 3, epoch=machine.publisher.owner.epoch + 1)
        await go_on(machine, flusher, 1, RETENTION - 20)
        report = told(flusher)
        assert (report["packs"], report["bytes"], report["in_retention"]) == (1, 600, 1)
        assert stray in stored_packs(world)
        await go_on(machine, flusher)
        assert stray not in stored_packs(world)
        assert named | {above} <= stored_packs(world)
        assert other in packs_on(world.data[0])
        report = told(flusher)
        assert (report["packs"], report["deleted_packs"], report["deleted_bytes"]) == (0, 1, 600)
        assert all(scan["ended_ns"] for scan in report["scans"])
        assert rows(machine) == []
        assert {entry["backend"]: entry["bytes"] for entry in flusher.dead_packs()["unreclaimed"]} == {
            machine.backends[number].name: 150 for number in range(4)
        }


@pytest.mark.parametrize("point", ["flush.precopy.written", "flush.packs.uploaded"])
async def test_what_a_crash_left_before_any_row_named_it_goes(
    world: World, machine: FlushMachine, clock: MockClock, point: str
):
    left = await crashed(machine, point)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        content = restore(world).files
        await go_on(machine, flusher, 5)
        rows_now = {row.pack_id for row in pack_rows(machine).values()}
        assert not (left - rows_now) & stored_packs(world)
        assert restore(world).files.keys() >= content.keys()


async def test_a_copy_of_a_named_pack_stays_wherever_it_lies(
    world: World, machine: FlushMachine, clock: MockClock, expect_log
):
    """Its row says other places; it may be the only copy when those are lost."""
    expect_log(r"acknowledged it and has lost it; it is made again")
    expect_log(r"fewer shards than it needs", optional=True)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        machine.write(machine.create("a"), 0, b"x" * PAGE * 40)
        await flusher.sync()
        row = next(row for row in pack_rows(machine).values() if row.kind == 1)
        for shard, place in enumerate(row.placement):
            key = shard_key(world.keys.fsid, row.owner_epoch, row.pack_id, shard)
            value = world.data[place - 1].peek(key)
            for store in world.data:
                store.put(key, value)
            world.data[place - 1].lose(key)
        await go_on(machine, flusher, 5)
        assert restore(world).files["a"] == b"x" * PAGE * 40
        assert all(row.pack_id in packs_on(store) for store in world.data)


async def test_a_pack_that_is_on_its_way_for_long_stays(world: World, machine: FlushMachine, clock: MockClock):
    """Too few backends take shards for longer than the retention time; those that are stored by then count."""
    async with flushing(machine, retention_seconds=RETENTION, cut_seconds=1e6) as flusher:
        await go_on(machine, flusher, 1, 30)

        def only_two(call: str, key: bytes) -> None:
            if call == "set":
                raise BackendUnavailable("no answer")

        number = machine.create("a")
        machine.write(number, 0, b"x" * PAGE * 40)
        for backend in machine.backends[2:]:
            backend.gate = only_two
        before = stored_packs(world)
        await machine.committer.commit()
        await until(lambda: stored_packs(world) - before)
        (on_its_way, *_) = stored_packs(world) - before
        assert on_its_way not in machine.spool.named
        flusher._upkeep.strays.strays._retention = 0.0
        for _ in range(3):
            await trio.sleep(60)
            flusher._upkeep.strays.published(flusher._upkeep.strays.before_cut())
        assert on_its_way in stored_packs(world) and told(flusher)["packs"] == 0
        for backend in machine.backends:
            backend.gate = lambda call, key: None
        await flusher.sync()
        assert restore(world).files["a"] == b"x" * PAGE * 40


async def test_a_generation_that_was_sent_and_never_recorded_keeps_what_it_names_while_it_is_pinned(
    world: World, machine: FlushMachine, clock: MockClock
):
    """No table has ever had a row of its packs: only its own metadata know them."""
    left = await crashed(machine, "flush.head.sent")
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        left -= {row.pack_id for row in pack_rows(machine).values()}
        assert left
        await trio.sleep(25)
        assert told(flusher)["packs"] == 0, "only the head that this mount took over knows them yet"
        sent = machine.first.predecessor
        flusher.generations.pins[sent] = ("sent",)
        content = restore(world).files
        await go_on(machine, flusher, 6)
        assert left <= stored_packs(world)
        key, value = await head_of(machine, sent)
        assert restore(world, open_head(key, value, world.keys)).files == content
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 6)
        assert restore(world, open_head(key, value, world.keys)).files == content
        await flusher.pinning.unpin(["sent"])
        await go_on(machine, flusher, 9)
        assert not left & stored_packs(world)


async def head_of(machine: FlushMachine, ref: HeadRef) -> tuple[bytes, bytes]:
    key = head_key(machine.world.keys.fsid, ref)
    return key, next(value for store in machine.world.control if (value := store.peek(key)) is not None)


@pytest.mark.parametrize("what", ["the head", "its metadata", "its metadata, which do not come"])
async def test_nothing_goes_while_a_kept_generation_cannot_be_read(
    world: World, machine: FlushMachine, clock: MockClock, what: str, monkeypatch: pytest.MonkeyPatch
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 3, 5)
        stray = plant_stray(world, 1)
        reader, naming = flusher._upkeep.strays._naming._reader, flusher._upkeep.strays._naming
        if what == "the head":
            for member in machine.fleet_members:
                member.control.gate = no_heads
        else:
            monkeypatch.setattr(naming_module, "_READ_SECONDS", 20.0)
            monkeypatch.setattr(naming, "_reader", Silent(math.inf if what.endswith("come") else 0.0))
        await go_on(machine, flusher, 4)
        assert stray in stored_packs(world)
        assert "cannot be told now" in told(flusher)["problem"]
        for member in machine.fleet_members:
            member.control.gate = lambda call, key: None
        monkeypatch.setattr(naming, "_reader", reader)
        await go_on(machine, flusher, 4)
        assert stray not in stored_packs(world) and told(flusher)["problem"] == ""


def no_heads(call: str, key: bytes) -> None:
    if call == "get":
        raise BackendUnavailable("no answer")


class Silent:
    """A reader that gets no data, and says so after some time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def shards(self, pack: object, wanted: object) -> dict[int, memoryview]:
        await trio.sleep(self._seconds)
        raise BackendUnavailable("no answer")


async def test_without_another_head_no_stray_goes(world: World, machine: FlushMachine, clock: MockClock):
    """A mount that was taken over, or cloned, meanwhile publishes none."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        stray = plant_stray(world, 1)
        await trio.sleep(60 + RETENTION)
        assert told(flusher)["packs"] == 1
        machine.publisher.reach = 1
        machine.create("never published")
        await trio.sleep(10 * RETENTION)
        assert stray in stored_packs(world)


async def test_the_time_of_a_stray_goes_on_over_restarts(world: World, machine: FlushMachine, clock: MockClock):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        stray = plant_stray(world, 1)
        await trio.sleep(50)
        await flusher.stop(60)
    await trio.sleep(50 * RETENTION)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        report = told(flusher)
        await go_on(machine, flusher, 2, 5)
        assert stray in stored_packs(world)
        assert told(flusher)["packs"] == 1 and 30 < told(flusher)["oldest_seconds"] < RETENTION
        await go_on(machine, flusher, 3, 40)
        assert stray not in stored_packs(world), report


async def test_a_store_that_another_machine_published_begins_anew(
    world: World, machine: FlushMachine, clock: MockClock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        stray = plant_stray(world, 1)
        await trio.sleep(RETENTION - 20)
        machine.store.set_local(BASE_KEY, encode_local_head(flusher.generations.base.sealed, ours=False))
        await flusher.stop(60)
        base = flusher.generations.base
        machine.store.set_local(BASE_KEY, encode_local_head(base.sealed, ours=False))
        machine.committer.commit_now()
        assert rows(machine)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 3, 20)
        assert stray in stored_packs(world)
        assert told(flusher)["oldest_seconds"] < 70


async def test_a_backend_that_does_not_answer_keeps_its_shard_until_it_does(
    world: World, machine: FlushMachine, clock: MockClock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        stray = plant_stray(world, 1)
        await trio.sleep(60)

        def no_deletes(call: str, key: bytes) -> None:
            if call == "delete":
                raise BackendUnavailable("no answer")

        machine.backends[1].gate = no_deletes
        await go_on(machine, flusher, 3)
        assert [number for number, store in enumerate(world.data) if stray in packs_on(store)] == [1]
        assert told(flusher)["unanswered"] == [machine.backends[1].name]
        machine.backends[1].gate = lambda call, key: None
        await trio.sleep(100)
        assert stray not in stored_packs(world) and told(flusher)["unanswered"] == []


async def test_a_crash_amid_a_deletion_is_made_good(world: World, machine: FlushMachine, clock: MockClock):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        stray = plant_stray(world, 1)
        await trio.sleep(60)
        await flusher.stop(60)
    failpoints.arm("stray.deleted.one", crash)
    with contextlib.suppress(Crash):
        try:
            async with flushing(machine, retention_seconds=RETENTION) as flusher:
                await go_on(machine, flusher, 5)
        except BaseExceptionGroup as group:
            if not group.split(Crash)[0]:
                raise
        finally:
            failpoints.disarm_all()
    assert stray in stored_packs(world)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 4)
        assert stray not in stored_packs(world) and rows(machine) == []


async def test_many_strays_go_in_rounds_and_a_backend_that_lists_what_it_has_not_fills_its_share_only(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(strays, "MOST_STRAYS", 12)
    for store in world.data:
        store.page_entries = 64
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        planted = {plant_stray(world, name) for name in range(20, 60)}
        made_up = iter(range(1, 1 << 30))
        honest = machine.backends[5].scan

        async def lie(cursor: bytes | None = None) -> ScanPage:
            page = await honest(cursor)
            keys = [shard_key(world.keys.fsid, 1, next(made_up).to_bytes(16, "big"), 0) for _ in range(10)]
            return dataclasses.replace(page, entries=(*page.entries, *(ScanEntry(key, 9, 0) for key in keys)))

        machine.backends[5].scan = lie  # type: ignore[method-assign]
        most = 0
        for _ in range(60):
            await go_on(machine, flusher, 1, RETENTION / 2)
            most = max(most, told(flusher)["packs"], len(rows(machine)))
            if not planted & stored_packs(world):
                break
        assert not planted & stored_packs(world)
        assert most <= 12


async def test_a_scan_goes_on_after_a_restart_and_begins_anew_where_its_backend_is_another(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch, expect_log
):
    expect_log(r"acknowledged it and has lost it; it is made again")
    monkeypatch.setattr(scanning, "ROUND_SECONDS", 3.0)
    monkeypatch.setattr(scanning, "AGAIN_SECONDS", 1e6)
    for name in range(100):
        world.data[0].put(b"somebody else's %d" % name, b"x")
    asked: list[bytes | None] = []
    honest = machine.backends[0].scan

    async def scan(cursor: bytes | None = None) -> ScanPage:
        asked.append(cursor)
        return await honest(cursor)

    machine.backends[0].scan = scan  # type: ignore[method-assign]
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        await until(lambda: len(asked) >= 5)
        await flusher.stop(60)
    asked.clear()
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await go_on(machine, flusher, 1, 5)
        assert asked[0] is not None
        world.data[0].go_back_to(MemoryStore("as it was before anything", clock=machine.clock))
        asked.clear()
        await trio.sleep(300)
        assert None in asked and told(flusher)["scans"][0]["ended_ns"]


async def test_a_file_system_at_rest_gets_the_heads_that_deletions_need_and_no_more(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(upkeep, "HEAD_SECONDS", 40.0)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        machine.write(machine.create("a"), 0, b"x" * PAGE * 40)
        await flusher.sync()
        old = {row.pack_id for row in pack_rows(machine).values() if row.kind == 1}
        stray = plant_stray(world, 1)
        number = next(n for n in range(2, 9) if machine.store.inode(n) is not None)
        machine.unlink("a", number)
        await flusher.sync()
        await trio.sleep(800)
        assert not (old | {stray}) & stored_packs(world)
        before = flusher.generations.base.head.generation
        await trio.sleep(800)
        assert flusher.generations.base.head.generation == before


@pytest.mark.parametrize("asked", [False, True], ids=["by itself", "qsfs collect"])
async def test_a_mount_that_finds_nothing_to_write_deletes_strays_too(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch, asked: bool
):
    """An archive that is only read: the head without which nothing is scanned comes though nothing has changed."""
    monkeypatch.setattr(upkeep, "HEAD_SECONDS", 40.0 if not asked else 1e9)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        machine.write(machine.create("a"), 0, b"x" * PAGE * 40)
        await flusher.sync()
    stray = plant_stray(world, 1)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        for _ in range(4):
            await trio.sleep(2 * RETENTION + 100)
            if asked:
                await flusher.collect()
        assert stray not in stored_packs(world)


async def test_a_backend_that_lies_about_sizes_costs_nothing_but_a_wrong_figure(
    world: World, machine: FlushMachine, clock: MockClock
):
    """Neither flushing nor what is told of other backends ends by it."""
    liar = machine.backends[0]
    honest = liar.scan

    async def scan(cursor: bytes | None = None) -> ScanPage:
        page = await honest(cursor)
        sizes = (2**70, -5)
        entries = [dataclasses.replace(entry, size=sizes[n % 2]) for n, entry in enumerate(page.entries)]
        return ScanPage(page.cursor, tuple(entries))

    liar.scan = scan  # type: ignore[method-assign]
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await flusher.sync()
        planted = {plant_stray(world, number) for number in range(1, 9)}
        await go_on(machine, flusher, 8)
        await flusher.collect()
        await go_on(machine, flusher, 3)
        assert not planted & stored_packs(world)
        told_of = {entry["backend"]: entry["bytes"] for entry in flusher.dead_packs()["unreclaimed"]}
        assert 0 < told_of[liar.name] <= 8 * (MAX_SHARD + OVERHEAD)
        await flusher.sync()


async def test_what_was_met_by_mistake_is_looked_at_again_before_anything_is_deleted(
    world: World, machine: FlushMachine, clock: MockClock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        machine.write(machine.create("a"), 0, b"x" * PAGE * 40)
        await flusher.sync()
        known = flusher._upkeep.strays.strays
        for row in pack_rows(machine).values():
            placed = [Place(place, shard, 9) for shard, place in enumerate(row.placement)]
            known.met(row.pack_id, row.owner_epoch, placed, -2 * RETENTION, backends=1)
        before = stored_packs(world)
        await go_on(machine, flusher, 3, 5)
        assert before <= stored_packs(world) and told(flusher)["packs"] == 0


@pytest.mark.parametrize("where", ["the tables", "a commit to come", "the newest generation", "the spool"])
async def test_each_place_that_names_a_pack_is_asked(world: World, machine: FlushMachine, clock: MockClock, where: str):
    """Whatever else has lost it: a row, a generation, or the list of packs that were given up."""
    async with flushing(machine, retention_seconds=RETENTION, quiet_seconds=1e6) as flusher:
        machine.write(machine.create("a"), 0, b"x" * PAGE * 40)
        await flusher.sync()
        naming = flusher._upkeep.strays._naming
        number, row = next((n, r) for n, r in pack_rows(machine).items() if r.kind == 1)
        if where == "the newest generation":
            machine.store.layers.delete(Table.PACKS, u64(number))
            await machine.committer.commit()
        elif where == "the spool":
            row = dataclasses.replace(row, pack_id=b"given up........")
            machine.spool.abandoned.append(AbandonedPack(row.pack_id, row.owner_epoch))
        else:
            row = dataclasses.replace(row, pack_id=b"only a row......")
            machine.store.layers.put(Table.PACKS, u64(1 << 40), row.encode())
            if where == "the tables":
                await machine.committer.commit()
        nothing = b"nowhere........."
        found = await naming.unnamed({row.pack_id: row.owner_epoch, nothing: row.owner_epoch})
        assert found == {nothing}


async def test_what_was_deleted_is_counted_for_each_backend_over_restarts_and_not_for_its_successor(
    world: World, machine: FlushMachine, clock: MockClock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        number = machine.create("a")
        for byte in range(1, 8):
            stored = sum(len(store.peek(key) or b"") for store in world.data for key in keys_of(store))
            machine.write(number, 0, bytes([byte]) * PAGE * 40)
            await go_on(machine, flusher, 1)
        counted = flusher.dead_packs()["unreclaimed"]
        assert stored > sum(entry["bytes"] for entry in counted) > 0
        await flusher.stop(60)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        assert flusher.dead_packs()["unreclaimed"] == counted
        member = machine.fleet_members.by_number(1)
        member.entry = dataclasses.replace(member.entry, identity=bytes(16))
        left = [entry["backend"] for entry in flusher.dead_packs()["unreclaimed"]]
        assert left == [entry["backend"] for entry in counted if entry["backend"] != member.name]


# the register


def places(member: int, *shards: int) -> list[Place]:
    return [Place(member, shard, 100) for shard in shards]


def test_time_begins_with_the_first_meeting_and_is_not_moved_by_later_ones():
    known = Strays(60.0)
    known.met(b"a" * 16, 3, places(1, 0), 10.0, backends=4)
    known.met(b"a" * 16, 3, places(2, 1), 50.0, backends=4)
    assert known.before_cut(69.0).ripe == () and known.before_cut(70.0).ripe == (b"a" * 16,)
    assert known.get(b"a" * 16) == Stray(b"a" * 16, 3, 10.0, (Place(1, 0, 100), Place(2, 1, 100)))


def test_only_the_head_of_a_cut_that_began_afterwards_permits():
    known = Strays(60.0)
    known.met(b"a" * 16, 3, places(1, 0), 0.0, backends=4)
    early = known.before_cut(59.0)
    known.published(early)
    assert known.permitted(9) == []
    known.published(known.before_cut(60.0))
    assert [stray.pack_id for stray in known.permitted(9)] == [b"a" * 16]


def test_what_is_named_after_all_is_dropped_and_begins_anew():
    known = Strays(0.0)
    known.met(b"a" * 16, 3, places(1, 0), 0.0, backends=4)
    view = known.before_cut(1.0)
    known.drop(b"a" * 16)
    known.met(b"a" * 16, 3, places(1, 0), 5.0, backends=4)
    known.published(view)
    assert known.permitted(9) == []


def test_the_rows_keep_their_form():
    stray = Stray(bytes(range(16)), 7, 1.5, (Place(2, 3, 400),))
    assert stray.encode() == b"\x94\x01\x07\xce\x59\x68\x2f\x00\x91\x93\x02\x03\xcd\x01\x90"
    assert Stray.decode(stray_key(stray.pack_id), stray.encode()) == stray
    assert Stray.decode(stray_key(stray.pack_id), b"\x94\x02") is None
    assert Stray.decode(b"stray:short", stray.encode()) is None
    walk = Walk(b"i" * 16, b"cursor", True, 5, 2.0)
    assert walk.encode() == b"\x96\x01\xc4\x10" + b"i" * 16 + b"\xc4\x06cursor\x01\x05\xce\x77\x35\x94\x00"
    assert Walk.decode(walk.encode()) == walk and Walk.decode(Walk(b"i").encode()) == Walk(b"i")
    assert Walk.decode(b"junk") is None
    assert scan_key(258) == SCAN_PREFIX + b"\x00\x00\x01\x02"
