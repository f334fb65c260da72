"""Schedules that once lost or invented data while one rule of flushing was missing; each by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qsfs import failpoints
from qsfs.errors import CacheError
from qsfs.format.shard import parse_shard_key
from qsfs.remote.base import BASE_KEY, local_head
from qsfs.remote.chain import Chain, Refresh, Stretch
from qsfs.remote.collect import AbandonedCollector
from qsfs.remote.cut import NoCut
from qsfs.remote.metadata import RefreshUpload
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import pack_row
from qsfs.store.reading import LocalDamage
from qsfs.store.schema import PAGE, InodeFlag, Table, u64
from qsfs.store.snapshot import CommittedState, Want
from tests.remote.flush_machine import Crash, FlushMachine, crash, newest_head, restore
from tests.remote.harness import World, make_world


@pytest.fixture
async def world() -> World:
    return await make_world(5, k=2, m=2)


@pytest.fixture
def machine(world: World, tmp_path: Path) -> FlushMachine:
    return FlushMachine(world, tmp_path / "cache")


def once(action: Callable[[], None]) -> Callable[[], None]:
    """An action for a failpoint that is hit more than once."""
    left = [action]
    return lambda: left.pop()() if left else None


def page(letter: str) -> bytes:
    return letter.encode() * PAGE


# generations


async def test_cut_head_sent_crash_before_the_record(world: World, machine: FlushMachine, autojump_clock):
    """The mount sees a newer head than the local one, knows it as its own, and loses nothing."""
    failpoints.arm("flush.head.sent", crash)
    with pytest.raises(Crash):
        async with machine.mounted():
            a = machine.create("a")
            machine.write(a, 0, page("x"))
            await machine.cut()
    failpoints.disarm_all()
    assert restore(world).files == {"a": page("x")}
    async with machine.mounted():
        assert machine.content(a) == page("x")
        machine.write(a, 1, page("y"))
        assert await machine.cut()
    assert restore(world).files == {"a": page("x") + page("y")}


async def test_cut_with_page_p_truncated_before_the_record_then_extended(
    world: World, machine: FlushMachine, autojump_clock
):
    """The next cut's delta deletes the extent that only the last generation has: p does not come back."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 3, page("p"))

        def meanwhile() -> None:
            machine.truncate(a, 0)
            machine.committer.commit_now()
            machine.extend(a, 5)

        failpoints.arm("flush.packs.uploaded", once(meanwhile))
        assert await machine.cut()
        assert restore(world).files["a"] == bytes(3 * PAGE) + page("p")
        assert await machine.cut()
        assert restore(world).files["a"] == bytes(5 * PAGE)


async def test_cut_with_page_p_rewritten_as_part_of_another_extent(
    world: World, machine: FlushMachine, autojump_clock
):
    """The extent of the last generation that starts elsewhere is replaced, not overlapped."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 3, page("p"))
        failpoints.arm("flush.head.sent", once(lambda: machine.write(a, 2, page("q") * 2)))
        assert await machine.cut()
        assert await machine.cut()
        assert restore(world).files["a"] == bytes(2 * PAGE) + page("q") * 2


async def test_no_cut_before_the_last_record_is_committed(
    world: World, machine: FlushMachine, autojump_clock
):
    """Otherwise the next generation would build on one that the local store does not know."""
    async with machine.mounted():
        machine.write(machine.create("a"), 0, page("x"))

        def fails() -> None:
            raise CacheError("the disk is gone")

        failpoints.arm("flush.head.sent", lambda: failpoints.arm("commit.before", fails))
        with pytest.raises(CacheError):
            await machine.cut()
        failpoints.disarm_all()
        with pytest.raises(CacheError, match="record of the last generation"):
            machine.generations.next_order(1 << 20)
    async with machine.mounted():
        assert await machine.cut()
        assert restore(world).files == {"a": page("x")}


async def test_a_generation_number_is_never_used_twice(world: World, machine: FlushMachine, autojump_clock):
    """Also when the cut was abandoned by a crash right after its number was taken."""
    numbers = []
    for point in ("flush.cut.sealed", "flush.packs.uploaded", "test.head.stored", "flush.head.sent"):
        failpoints.arm(point, crash)
        with pytest.raises(Crash):
            async with machine.mounted():
                machine.write(machine.create(point), 0, page("x"))
                order = machine.generations.next_order(1 << 20)
                numbers.append(order.generation)
                await machine.committer.commit()
                cut = await machine.generations.seal(order)
                await machine.generations.publish(cut, None)
        failpoints.disarm_all()
    assert len(set(numbers)) == len(numbers)
    assert numbers == sorted(numbers)


async def test_a_number_counts_as_taken_before_it_is_used(machine: FlushMachine, autojump_clock):
    """The number is durable with the commit that makes the cut."""
    async with machine.mounted():
        machine.create("a")
        order = machine.generations.next_order(1 << 20)
        await machine.committer.commit()
        with CommittedState(machine.store.environment, machine.clock) as state:
            assert state.counters()["generation"] == order.generation


async def test_publishing_clears_only_the_marks_that_the_cut_contained(
    world: World, machine: FlushMachine, autojump_clock
):
    """A row that changed after the cut is in the next generation."""
    async with machine.mounted():
        a = machine.create("a")

        def meanwhile() -> None:
            machine.set_xattr(a, b"user.late", b"1")
            machine.committer.commit_now()

        failpoints.arm("flush.packs.uploaded", once(meanwhile))
        assert await machine.cut()
        assert restore(world).xattrs["a"] == {}
        assert await machine.cut()
        assert restore(world).xattrs["a"] == {b"user.late": b"1"}


async def test_a_crash_before_the_head_is_sent_abandons_the_cut_without_harm(
    world: World, machine: FlushMachine, autojump_clock
):
    """The dirty marks stand, the next cut has everything, and the garbage is known."""
    for point in ("flush.cut.pack", "flush.cut.sealed", "flush.packs.uploaded", "spool.head.before"):
        with pytest.raises(Crash):
            async with machine.mounted():
                failpoints.arm(point, crash)
                machine.write(machine.create(point), 0, page("x"))
                await machine.committer.commit()
                await machine.cut()
        failpoints.disarm_all()
    async with machine.mounted():
        assert machine.spool.abandoned
        assert await machine.cut()
    assert set(restore(world).files) == {
        "flush.cut.pack", "flush.cut.sealed", "flush.packs.uploaded", "spool.head.before"
    }  # fmt: skip


async def test_a_head_that_did_not_reach_a_quorum_is_sent_again(
    world: World, machine: FlushMachine, autojump_clock
):
    """The same bytes, until it is published; meanwhile nothing else is."""
    async with machine.mounted():
        machine.write(machine.create("a"), 0, page("x"))
        machine.publisher.reach = 1
        before = len(machine.spool.heads)

        def back() -> None:
            if machine.publisher.attempts > 4:
                machine.publisher.reach = 5

        failpoints.arm("test.head.at-one", back)
        assert await machine.cut()
        assert machine.publisher.attempts > 4
        assert len(machine.spool.heads) <= before
        heads = {key for store in world.control for key in list(store.keys()) if b"qsfs:h:" in key}
        assert len(heads) == 3  # the format's, this mount's first, and the one that was sent again


# truncation and background work


async def test_pre_copy_reads_a_page_that_is_truncated_before_it_is_marked_clean(
    machine: FlushMachine, autojump_clock
):
    """Commit, pre-copy reads a page, truncate to 0 (pending), the mark, extend: zeros."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 0, page("x") * 16)
        await machine.committer.commit()
        failpoints.arm("flush.precopy.written", lambda: machine.truncate(a, 0, later=True))
        await machine.precopy()
        machine.extend(a, 16)
        assert machine.content(a) == bytes(16 * PAGE)
        while not machine.store.work_off_truncations(1):
            pass
        assert machine.content(a) == bytes(16 * PAGE)
        assert machine.inode(a).allocated == 0


async def test_pages_under_a_pending_truncation_are_not_sealed_with_newer_neighbours(
    world: World, machine: FlushMachine, autojump_clock
):
    """An extent has the highest write number of its pages: an old page in it would outlive the truncation."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 0, page("o") * 4)
        await machine.committer.commit()
        machine.truncate(a, 0, later=True)
        machine.write(a, 4, page("n") * 4)
        assert await machine.cut()
        assert restore(world).files["a"] == bytes(4 * PAGE) + page("n") * 4


async def test_a_page_rewritten_while_its_pack_was_uploaded_stays_dirty(
    world: World, machine: FlushMachine, autojump_clock
):
    """A clean mark goes by the write number that was read."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 0, page("x") * 16)
        await machine.committer.commit()
        failpoints.arm("flush.precopy.written", lambda: machine.write(a, 5, page("y")))
        await machine.precopy()
        machine.evict(a)
        await machine.committer.commit()
        wanted = page("x") * 5 + page("y") + page("x") * 10
        assert machine.content(a) == wanted
        assert await machine.cut()
    assert restore(world).files["a"] == wanted


async def test_a_clean_mark_of_a_block_that_is_in_the_overlay(machine: FlushMachine, autojump_clock):
    """Page 3 committed, page 2 of the block in the open group; page 3 is marked clean and evicted."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 3, page("x"))
        await machine.committer.commit()
        machine.write(a, 2, page("y"))
        await machine.precopy()
        machine.evict(a)
        await machine.committer.commit()
        assert machine.content(a) == bytes(2 * PAGE) + page("y") + page("x")


def everything_anew(chain: Chain) -> Refresh:
    """A refresh of all ranges."""
    return Refresh([Stretch(b"", None)], 64, chain.next_number)


# what a generation leaves out


async def test_ranges_read_anew_over_many_commits_are_the_state_of_the_cut(
    world: World, machine: FlushMachine, autojump_clock
):
    """Rows that change while they are read come from the deltas recorded since it began."""
    async with machine.mounted():
        names = [f"f{i}" for i in range(50)]
        numbers = {name: machine.create(name) for name in names}
        for name, number in numbers.items():
            machine.write(number, 0, page(name[-1]))
        assert await machine.cut()
        refresh = machine.generations.renewal = everything_anew(machine.generations.chain)
        await RefreshUpload(machine.context, refresh).run()
        machine.write(numbers["f7"], 0, page("w"))
        machine.unlink("f8", numbers["f8"])
        assert await machine.cut()
        assert machine.generations.renewal is None
        newest = newest_head(world)
        assert newest is not None
        assert len(newest[1].deltas) == 1
        image = restore(world)
        assert image.files["f7"] == page("w")
        assert set(image.files) == set(names) - {"f8"}


async def test_the_generation_leaves_out_orphans_and_what_is_local_only(
    world: World, machine: FlushMachine, autojump_clock
):
    """An orphan has no row there; a `local_only` file is empty, also when it had extents before."""
    async with machine.mounted():
        a, b = machine.create("a"), machine.create("b")
        machine.write(a, 0, page("x") * 16)
        machine.write(b, 0, page("y") * 16)
        assert await machine.cut()
        machine.unlink("a", a, still_open=True)
        with machine.store.change() as change:
            change.patch(b, flags=int(InodeFlag.LOCAL_ONLY))
        machine.write(a, 3, page("z"))
        assert await machine.cut()
        image = restore(world)
        assert image.files == {"b": b""}
        assert a not in image.inodes
        with machine.store.change() as change:
            change.patch(b, flags=0)
        assert await machine.cut()
        assert restore(world).files == {"b": page("y") * 16}


async def test_pages_of_an_unlinked_open_file_leave_under_pressure_only(
    world: World, machine: FlushMachine, autojump_clock
):
    """They may be evicted then; the generation still shows nothing of the file."""
    async with machine.mounted():
        a = machine.create("a")
        machine.unlink("a", a, still_open=True)
        machine.write(a, 0, page("x") * 16)
        await machine.committer.commit()
        await machine.precopy()
        assert machine.store.blocks.state(a, 0).dirty
        await machine.precopy(orphans_too=True)
        assert not machine.store.blocks.state(a, 0).dirty
        assert await machine.cut()
        assert restore(world).files == {}


async def test_nothing_is_published_of_a_state_whose_covered_pages_are_being_moved(
    machine: FlushMachine, autojump_clock
):
    """Pages that were covered out of the spill are not in their file yet: such a commit is no cut."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 0, page("x"))
        machine.store.layers.put(Table.SPILL_COVERED, u64(a), u64(1))
        order = machine.generations.next_order(1 << 20)
        await machine.committer.commit()
        assert await machine.generations.seal(order) is NoCut.MOVING
        assert not list((machine.directory / "spool").glob("*.pack"))


async def test_an_idle_file_system_makes_no_generations(world: World, machine: FlushMachine, autojump_clock):
    """The record of a generation, looks and counters are nothing new; else each would bring the next."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 0, page("x") * 20)
        await machine.committer.commit()
        await machine.precopy()
        assert await machine.cut()
        assert not await machine.cut()
        assert machine.store.layers.view.count(Table.DIRTY) == 0


async def test_a_damaged_page_stops_generations_and_is_never_uploaded(
    world: World, machine: FlushMachine, expect_log, autojump_clock
):
    """Wrong bytes leave for nowhere: pre-copy goes round them, a cut says so."""
    expect_log(r"inode \d+, page 1: its local bytes fail their checksum")
    async with machine.mounted():
        a, b = machine.create("a"), machine.create("b")
        machine.write(a, 0, page("x") * 16)
        machine.write(b, 0, page("y") * 16)
        await machine.committer.commit()
        with machine.store.environment.write() as txn:
            values = machine.store.environment.databases[Table.VALUES]
            key = u64(a) + u64(0)
            value = txn.get(key, db=values)
            txn.put(key, value[:PAGE] + b"?" + value[PAGE + 1 :], db=values)
        machine.store.layers.renew_view()
        await machine.precopy()
        await machine.precopy()
        assert not machine.store.blocks.state(b, 0).dirty
        assert machine.store.blocks.state(a, 0).dirty
        with pytest.raises(LocalDamage):
            await machine.cut()
        assert restore(world).files == {}


# abandoned packs


async def test_shards_of_an_abandoned_cut_are_deleted_after_the_next_publication(
    world: World, machine: FlushMachine, autojump_clock
):
    """And only those: everything that a head names stays."""
    failpoints.arm("flush.packs.uploaded", crash)
    with pytest.raises(Crash):
        async with machine.mounted():
            machine.write(machine.create("a"), 0, page("x"))
            await machine.committer.commit()
            await machine.cut()
    failpoints.disarm_all()
    async with machine.mounted():
        garbage = frozenset(pack.pack_id for pack in machine.spool.abandoned)
        assert garbage
        assert await machine.cut()
        named = frozenset(p.ref.pack_id for p in machine.generations.chain.all_packs())
        collector = AbandonedCollector(machine.context)
        assert await collector.collect(garbage, named, machine.epoch)
        assert collector.deleted >= len(garbage) * machine.world.code.write_quorum
        assert machine.spool.abandoned == []
        stored = {k.pack_id for s in world.data for key in list(s.keys()) if (k := parse_shard_key(key))}
        assert not stored & garbage
        assert restore(world).files["a"] == page("x")


async def test_a_pack_that_the_tables_name_is_never_collected(
    world: World, machine: FlushMachine, autojump_clock
):
    """Whatever the spool says."""
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 0, page("x") * 16)
        assert await machine.cut()
        numbers = [int.from_bytes(k, "big") for k, _ in machine.store.scan(Table.PACKS, b"", None)]
        refs = [pack_row(machine.store, n) for n in numbers]
        packs = [StoredPack.of_row(row, world.code).ref for row in refs if row is not None]
        machine.spool.add_abandoned(packs)
        collector = AbandonedCollector(machine.context)
        ids = frozenset(ref.pack_id for ref in packs)
        assert await collector.collect(ids, frozenset(), machine.epoch)
        assert collector.deleted == 0
        assert restore(world).files["a"] == page("x") * 16


async def test_packs_of_a_published_generation_never_look_abandoned(
    world: World, machine: FlushMachine, autojump_clock
):
    """A crash while the spool is cleared leaves packs; their head goes only after them."""
    failpoints.arm("flush.recorded", crash)
    with pytest.raises(Crash):
        async with machine.mounted():
            machine.write(machine.create("a"), 0, page("x"))
            await machine.cut()
    failpoints.disarm_all()
    async with machine.mounted():
        assert machine.spool.abandoned == []
        base = local_head(machine.store, BASE_KEY, world.keys)
        assert base is not None
        assert base.ours


async def test_reading_dirty_pages_can_be_resumed_anywhere(machine: FlushMachine, autojump_clock):
    """Parts put together are what one reading gives."""
    async with machine.mounted():
        for name in ("a", "b", "c"):
            number = machine.create(name)
            machine.write(number, 0, b"".join(page(c) for c in "abcdefg"))
            machine.write(number, 63, page("h") * 3)
        await machine.committer.commit()
        with CommittedState(machine.store.environment, machine.clock) as state:
            whole = state.dirty(b"", Want(1 << 30))
        assert whole.resume is None
        parts = []
        start: bytes | None = b""
        while start is not None:
            with CommittedState(machine.store.environment, machine.clock) as state:
                part = state.dirty(start, Want(1))
            parts += part.runs
            start = part.resume
        assert tuple(parts) == whole.runs
        assert [(r.first, len(r.writes)) for r in whole.runs] == [(0, 7), (63, 1), (64, 2)] * 3
