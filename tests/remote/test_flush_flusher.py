"""The flusher as a whole: sync, stop, outages, fences, looks and completion, on a virtual clock."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qsfs import failpoints
from qsfs.config import FlushConfig
from qsfs.errors import CacheError, DataLost, Fenced, FormatMismatch
from qsfs.format.head import Head, Owner
from qsfs.format.shard import open_shard, parse_shard_key, shard_key
from qsfs.remote import flush, named
from qsfs.remote.base import BASE_KEY, PUBLISHED_KEY, local_head
from qsfs.remote.context import FlushContext
from qsfs.remote.control import Records
from qsfs.remote.exposure import ROW_BYTES
from qsfs.remote.flush import Flusher
from qsfs.remote.ledger import Ledger
from qsfs.remote.mount_check import LocalState, accept_for_mount
from qsfs.remote.ownership import own
from qsfs.remote.publish import NotYet, Published
from qsfs.remote.stored import StoredPack
from qsfs.store.schema import PAGE, PackRow, PackState, Table
from tests.remote.flush_machine import Crash, DirectReader, FlushMachine, crash, restore
from tests.remote.flushing import flushing, pack_rows, page, until
from tests.remote.harness import TIMING, World


async def test_sync_returns_when_everything_before_it_is_published(
    world: World, machine: FlushMachine, clock
):
    """The generation that it names holds what was accepted before the call, with every shard stored."""
    # Pre-copy stays out: an extent that it records after a cut would be something new for the next one.
    async with flushing(machine, quiet_seconds=3600.0) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x") * 40)
        done = await flusher.sync()
        image = restore(world)
        assert image.files == {"a": page("x") * 40}
        assert (image.head.generation, done.durability) == (done.generation, "full")
        again = await flusher.sync()
        assert again.generation == done.generation, "nothing was new"


async def test_sync_joins_a_cut_that_is_taken_after_it(world: World, machine: FlushMachine, clock):
    """A cut under way when sync is called does not count: what came after its commit is not in it."""
    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        a = machine.create("a")
        results = []

        async def sync() -> None:
            results.append(await flusher.sync())

        def late() -> None:
            failpoints.disarm("flush.packs.uploaded")
            machine.write(a, 0, page("l"))
            nursery.start_soon(sync)

        failpoints.arm("flush.packs.uploaded", late)
        first = await flusher.sync()
        await until(lambda: results)
        assert results[0].generation > first.generation
        assert restore(world).files["a"] == page("l")


async def test_a_cut_is_taken_by_itself_when_something_changed(world: World, machine: FlushMachine, clock):
    """Within `cut_seconds` and the time that it takes; without a change none is."""
    async with flushing(machine, cut_seconds=30) as flusher:
        await trio.sleep(100)
        assert flusher.status()["generation"] == 1
        machine.write(machine.create("a"), 0, page("x"))
        await until(lambda: flusher.status()["generation"] > 1)
        generation = flusher.status()["generation"]
        assert restore(world).files == {"a": page("x")}
        await trio.sleep(300)
        assert flusher.status()["generation"] == generation


async def test_quiet_pages_leave_before_any_cut(machine: FlushMachine, clock):
    """Pre-copy uploads what was not rewritten for a while; it counts as exposed until a head names it."""
    async with flushing(machine, cut_seconds=86400, quiet_seconds=5) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x") * 64)
        await machine.committer.commit()

        def nothing_dirty() -> bool:
            if machine.store.dirty and machine.store.layers.committing is None:
                machine.committer.commit_now()
            return machine.store.layers.view.count(Table.DIRTY) == 0

        await until(nothing_dirty)
        assert flusher.status()["generation"] == 1
        exposure = flusher.status()["exposure"]["written"]
        assert exposure["bytes"] - exposure["rows"] * ROW_BYTES == 64 * PAGE
        await flusher.sync()
        assert flusher.status()["exposure"]["written"]["bytes"] == 0


async def test_what_was_uploaded_ahead_is_not_uploaded_again_before_that_is_committed(machine: FlushMachine, clock):
    """Backends may never free what lies there for nothing, so a group that takes its time costs nothing."""
    async with flushing(machine, quiet_seconds=1, cut_seconds=3600) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x") * 40)
        await machine.context.committer.commit()
        await until(lambda: flusher.uploaded_ahead)
        stored = sum(call == "set" for backend in machine.backends for call, _ in backend.calls)
        assert stored and not machine.store.layers.open.empty
        await trio.sleep(60)
        assert not machine.store.layers.open.empty
        machine.write(a, 0, page("y"))
        await machine.context.committer.commit()
        await trio.sleep(60)
        assert sum(call == "set" for backend in machine.backends for call, _ in backend.calls) == stored
        assert flusher.uploaded_ahead == 40 * PAGE
        machine.write(a, 0, page("z") * 40)
        await machine.context.committer.commit()
        await until(lambda: flusher.uploaded_ahead == 80 * PAGE)


async def test_a_cut_waits_for_packs_that_are_on_their_way_and_does_not_send_their_pages_again(
    world: World, machine: FlushMachine, clock
):
    async with flushing(machine, quiet_seconds=1.0, cut_seconds=3600) as flusher:
        for backend in machine.backends:
            # None ends in the moment in which the test looks.
            backend.delay = lambda call: 1.4 if call == "set" else 0.0
            backend.calls.clear()
        content = b"".join(page(letter) for letter in "abcdefghijklmnop" * 3)
        machine.write(machine.create("a"), 0, content)
        await machine.committer.commit()
        await until(lambda: any(call == "set" for backend in machine.backends for call, _ in backend.calls))
        await flusher.sync()
        rows = [row for row in pack_rows(machine).values() if row.kind == 1]
        assert sum(row.live for row in rows) == len(content) and all(row.live for row in rows)
        assert flusher.uploaded_ahead > 0 and not flusher._precopier.garbage
        assert restore(world).files == {"a": content}


async def test_what_was_uploaded_while_a_cut_waited_for_it_is_exposed_no_more_once_its_head_is_published(
    machine: FlushMachine, clock
):
    """A mount that is idle afterwards shows nothing that is not safe."""
    async with flushing(machine, quiet_seconds=1.0, cut_seconds=3600) as flusher:
        begun: list[str] = []

        def delay(call: str) -> float:
            # Longer than the test takes to look again.
            if call == "set":
                begun.append(call)
            return 1.4 if call == "set" else 0.0

        for backend in machine.backends:
            backend.delay = delay
        machine.write(machine.create("a"), 0, page("x") * 16)
        await machine.committer.commit()
        await until(lambda: begun)
        assert not flusher.uploaded_ahead
        await flusher.sync()
        assert flusher.uploaded_ahead
        assert flusher.status()["exposure"]["written"]["bytes"] == 0


async def test_what_was_recorded_while_a_cut_was_committed_is_exposed_no_more_when_nothing_is_new(
    machine: FlushMachine, clock
):
    """The cut has it in; how much was uploaded then is not known any more when its head is published."""
    async with flushing(machine, quiet_seconds=1.0, cut_seconds=60) as flusher:
        machine.write(machine.create("a"), 0, page("x") * 48)
        await machine.committer.commit()
        await until(lambda: flusher.uploaded_ahead)
        recorded, flusher._precopier.bytes_recorded = flusher.uploaded_ahead, 0

        def record(_: int) -> None:
            flusher._precopier.bytes_recorded = recorded

        machine.committer.before_seal = record
        await flusher.sync()
        assert flusher.status()["exposure"]["written"]["bytes"] == recorded
        await until(lambda: not flusher.status()["exposure"]["written"]["bytes"])


async def test_what_an_earlier_mount_uploaded_ahead_is_exposed_until_a_head_names_it(
    machine: FlushMachine, clock
):
    """Nothing is dirty then, and all of it would be lost with the machine."""
    async with flushing(machine, cut_seconds=86400, quiet_seconds=5) as flusher:
        machine.write(machine.create("a"), 0, page("x") * 64)
        await machine.committer.commit()
        await until(lambda: flusher.uploaded_ahead)
        await machine.committer.commit()
        assert machine.store.layers.view.count(Table.DIRTY) == 0
    async with flushing(machine, cut_seconds=86400) as flusher:
        exposure = flusher.status()["exposure"]["written"]
        assert exposure["bytes"] >= 64 * PAGE + ROW_BYTES
        await flusher.sync()
        assert flusher.status()["exposure"]["written"] == {"bytes": 0, "age": 0.0, "rows": 0}
    async with flushing(machine, cut_seconds=86400) as flusher:
        assert flusher.status()["exposure"]["written"]["bytes"] == 0


async def test_what_is_written_right_after_a_mount_is_not_as_old_as_the_last_generation(
    machine: FlushMachine, clock
):
    """Where nothing was exposed when the mount began, nothing is older than the mount."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        await flusher.sync()
    await trio.sleep(5000)
    async with flushing(machine, cut_seconds=86400) as flusher:
        machine.create("a")
        exposure = flusher.status()["exposure"]["written"]
        assert exposure["bytes"] > 0 and exposure["age"] < 100


async def test_what_no_commit_has_is_exposed_at_home_with_its_age(machine: FlushMachine, clock):
    """A power cut takes what no fsync covered; a commit makes it durable, names and data alike."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        await flusher.sync()
        assert flusher.status()["exposure"]["local"] == {"bytes": 0, "age": 0.0}
        await trio.sleep(5000)
        machine.store.idle()
        machine.write(machine.create("a"), 0, page("x") * 4)
        await trio.sleep(3)
        local = flusher.status()["exposure"]["local"]
        assert local["bytes"] >= 4 * PAGE + ROW_BYTES and 3 <= local["age"] < 4
        await machine.committer.commit()
        assert flusher.status()["exposure"]["local"] == {"bytes": 0, "age": 0.0}


async def test_a_group_that_commits_is_not_durable_yet(machine: FlushMachine, clock):
    """Its age counts on, from its own beginning, until the commit has ended."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        await flusher.sync()
        machine.store.idle()
        machine.create("a")
        await trio.sleep(2)
        group = machine.store.seal()
        await trio.sleep(2)
        local = flusher.status()["exposure"]["local"]
        assert local["bytes"] >= ROW_BYTES and 4 <= local["age"] < 5
        machine.store.commit(group)
        machine.store.committed(group)
        assert flusher.status()["exposure"]["local"] == {"bytes": 0, "age": 0.0}


async def test_what_a_database_has_not_synced_yet_is_exposed(machine: FlushMachine, clock):
    """Uncovered writes of an atomic-sync file are in no group, and lost with the power."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        await flusher.sync()
        machine.store.promised_bytes = lambda: 16384
        now = machine.clock.monotonic()
        machine.store.promised_since = lambda: now
        await trio.sleep(60)
        exposure = flusher.status()["exposure"]
        assert exposure["local"]["bytes"] == 16384 and 60 <= exposure["local"]["age"] < 61
        assert exposure["written"]["bytes"] == 16384


async def test_names_alone_are_exposed_too(machine: FlushMachine, clock):
    """Also those in the open group; their age counts from when there was nothing, not from the last cut."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        await flusher.sync()
        await trio.sleep(5000)
        assert flusher.status()["exposure"]["written"]["bytes"] == 0
        machine.create("a")
        assert flusher.status()["exposure"]["written"]["bytes"] > 0
        await machine.committer.commit()
        await trio.sleep(100)
        exposure = flusher.status()["exposure"]["written"]
        assert exposure["bytes"] > 0 and exposure["rows"] > 0
        assert 100 <= exposure["age"] < 110
        await flusher.sync()
        assert flusher.status()["exposure"]["written"]["bytes"] == 0


async def test_an_outage_is_waited_out_visibly(world: World, machine: FlushMachine, clock):
    """With too few backends nothing fails; `status` says what is waited for; it goes on by itself."""
    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        for backend in machine.backends[:4]:
            backend.down = True
        machine.write(machine.create("a"), 0, page("x"))
        results = []

        async def sync() -> None:
            results.append(await flusher.sync())

        nursery.start_soon(sync)
        await trio.sleep(200)
        assert not results
        await until(lambda: flusher.status()["waiting"])
        assert "shards that a pack needs" in flusher.status()["waiting"][0]
        assert flusher.status()["exposure"]["written"]["age"] >= 150
        for backend in machine.backends:
            backend.down = False
        await until(lambda: results)
        assert restore(world).files == {"a": page("x")}
        assert flusher.status()["waiting"] == []


async def test_a_missing_fence_quorum_is_waited_out_visibly(world: World, machine: FlushMachine, clock):
    """The head is sent again until it counts."""
    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        machine.write(machine.create("a"), 0, page("x"))
        machine.publisher.reach = 1
        results = []

        async def sync() -> None:
            results.append(await flusher.sync())

        nursery.start_soon(sync)
        await until(lambda: flusher.status()["waiting"] == ["too few backends answered"])
        assert not results
        machine.publisher.reach = 6
        await until(lambda: results)
        assert restore(world).files == {"a": page("x")}


async def test_a_fence_ends_flushing_and_is_told(machine: FlushMachine, expect_log, clock):
    """Waiters get it, the callback hears of it once, and nothing else is published."""
    expect_log("another mount owns")

    async def fenced(head: object, *, deadline_seconds: float) -> None:
        await trio.lowlevel.checkpoint()
        raise Fenced("another mount owns the file system")

    async with flushing(machine) as flusher:
        machine.publisher.publish = fenced  # type: ignore[assignment,method-assign]
        machine.create("a")
        with pytest.raises(Fenced):
            await flusher.sync()
        await until(lambda: flusher.status()["phase"] == "fenced")
        assert len(machine.fenced) == 1  # type: ignore[attr-defined]


def spooled(machine: FlushMachine, suffix: str) -> list[str]:
    return sorted(path.name for path in machine.spool.directory.iterdir() if path.suffix == suffix)


async def test_a_head_that_cannot_be_published_for_good_leaves_itself_in_the_spool_and_no_packs(
    world: World, machine: FlushMachine, expect_log, clock
):
    """The head may have been sent: the next mount must know it as its own.  Its packs are all written."""
    expect_log("another mount owns")
    async with flushing(machine) as flusher:
        before = spooled(machine, ".head")
        publish = machine.publisher.publish
        machine.publisher.reach = 1

        async def fenced(head: Head, *, deadline_seconds: float) -> NotYet:
            result = await publish(head, deadline_seconds=deadline_seconds)
            assert isinstance(result, NotYet) and spooled(machine, ".pack")
            raise Fenced("another mount owns the file system")

        machine.publisher.publish = fenced  # type: ignore[assignment,method-assign]
        machine.write(machine.create("a"), 0, page("x") * 40)
        with pytest.raises(Fenced):
            await flusher.sync()
        await until(lambda: flusher.status()["phase"] == "fenced")
        assert spooled(machine, ".pack") == [] and len(spooled(machine, ".head")) == len(before) + 1
        assert machine.spool.abandoned == [], "a head that may have been sent names them"
    assert restore(world).files == {"a": page("x") * 40}, "it is the newest, wherever it was sent"


async def test_one_head_is_sent_again_and_again_not_one_for_each_failure(
    world: World, machine: FlushMachine, clock
):
    """Also where what lies there is of a newer version: each head that is sent has to be kept."""
    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        before = spooled(machine, ".head")
        publish = machine.publisher.publish
        machine.publisher.reach = 1
        attempts = 0

        async def failing(head: Head, *, deadline_seconds: float) -> Published | NotYet:
            nonlocal attempts
            attempts += 1
            result = await publish(head, deadline_seconds=deadline_seconds)
            if isinstance(result, NotYet):
                raise FormatMismatch("a head of a newer version")
            return result

        machine.publisher.publish = failing  # type: ignore[method-assign]
        machine.write(machine.create("a"), 0, page("x"))
        nursery.start_soon(flusher.sync)
        await until(lambda: attempts > 5)
        assert flusher.status()["waiting"] == ["a head of a newer version"]
        assert len(spooled(machine, ".head")) == len(before) + 1
        machine.publisher.reach = 6
        await flusher.sync()
        assert spooled(machine, ".head") == spooled(machine, ".pack") == []
    assert restore(world).files == {"a": page("x")}


async def test_a_fence_that_is_seen_between_two_cuts_ends_uploads_at_once(
    machine: FlushMachine, expect_log, clock
):
    """A slow backend shows the other owner after a head was published: nothing more is sent to any."""
    expect_log("another mount owns", count=1)
    async with flushing(machine, cut_seconds=3600.0, quiet_seconds=1.0) as flusher:
        a = machine.create("a")
        for backend in machine.backends:
            backend.delay = lambda call: 0.5 if call == "set" else 0.0
        machine.write(a, 0, page("x") * 600)
        await machine.committer.commit()
        await until(lambda: machine.context.packs.value < 3)
        error = Fenced("another mount owns the file system")
        flusher.fence(error)
        flusher.fence(error)
        await until(lambda: flusher.status()["phase"] == "fenced")

        def stored() -> int:
            return sum(call == "set" for backend in machine.backends for call, _ in backend.calls)

        before = stored()
        await trio.sleep(120)
        assert stored() == before
        assert machine.fenced == [error]  # type: ignore[attr-defined]
        with pytest.raises(Fenced):
            await flusher.sync()


async def test_a_fence_while_flushing_begins_ends_it(machine: FlushMachine, expect_log, clock):
    expect_log("another mount owns", count=1)
    error = Fenced("another mount owns the file system")
    async with machine.mounted(), trio.open_nursery() as nursery:
        flusher = Flusher(
            machine.context, FlushConfig(), machine.publisher, machine.first, DirectReader(machine.world)
        )
        flusher.fence(error)
        await nursery.start(flusher.run)
        with pytest.raises(Fenced):
            await flusher.sync()


async def test_stop_publishes_what_is_left_or_gives_up_at_its_deadline(
    world: World, machine: FlushMachine, clock
):
    """The local commit suffices; nothing of the backends can hold up the end."""
    async with flushing(machine) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x"))
        assert await flusher.stop(60)
        assert restore(world).files == {"a": page("x")}
    async with flushing(machine) as flusher:
        for backend in machine.backends:
            backend.down = True
        machine.write(a, 0, page("y"))
        assert not await flusher.stop(60)
    async with flushing(machine) as flusher:
        for backend in machine.backends:
            backend.down = False
        assert machine.content(a) == page("y")
        await flusher.sync()
    assert restore(world).files == {"a": page("y")}


async def test_a_start_and_an_idle_stop_do_not_wait_for_the_rows_of_all_packs(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock
):
    """They are as many as the file system is large; a generation waits, and says of packs what is so."""
    async with flushing(machine) as flusher:
        await flusher.sync()
    read = flush.read_rows
    go_on = threading.Event()
    monkeypatch.setattr(flush, "read_rows", lambda *arguments: go_on.wait() and read(*arguments))
    async with flushing(machine) as flusher:
        phase = flusher.status()["phase"]
        stopped = await flusher.stop(60.0)
        # The thread that reads cannot be cancelled.
        go_on.set()
    assert (phase, stopped) == ("reading pack rows", True)
    go_on.clear()
    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        machine.write(machine.create("new"), 0, page("n"))
        nursery.start_soon(flusher.sync)
        for _ in range(100):
            # By hand: time stands still while the thread is at work.
            clock.jump(1)
            await wait_all_tasks_blocked()
        waits = bool(nursery.child_tasks)
        go_on.set()
    assert waits


async def test_a_start_gives_no_pack_a_second_row(machine: FlushMachine):
    """The packs that the base lists have theirs, which a daemon has not read yet when it begins to flush."""
    async with flushing(machine) as flusher:
        machine.write(machine.create("a"), 0, page("a"))
        await flusher.sync()
    for _ in range(3):
        async with flushing(machine, as_a_daemon) as flusher:
            await flusher.sync()
            machine.committer.commit_now()
            packs = [PackRow.decode(bytes(row)).pack_id for _, row in machine.store.scan(Table.PACKS, b"", None)]
            assert len(packs) == len(set(packs)) > 1


def as_a_daemon(machine: FlushMachine) -> FlushContext:
    """What it begins with: the rows of packs are not read."""
    return dataclasses.replace(machine.context, ledger=Ledger(machine.clock, machine.look_seconds))


async def test_shards_that_nobody_took_are_completed_when_backends_return(
    world: World, machine: FlushMachine, clock
):
    """A pack is written with k + ceil(m/2) shards, says so, and becomes full later."""
    async with flushing(machine) as flusher:
        for backend in machine.backends[:3]:
            backend.down = True
        machine.write(machine.create("a"), 0, page("x") * 16)
        done = await flusher.sync()
        assert done.durability == "written"
        status = flusher.status()
        assert status["packs_not_full"] > 0
        assert status["exposure"]["full"]["bytes"] > 0
        for backend in machine.backends:
            backend.down = False
        await until(lambda: not flusher.status()["packs_not_full"])
        for row in pack_rows(machine).values():
            assert row.state & PackState.FULL
            check_stored(world, row)
        assert flusher.status()["exposure"]["full"]["bytes"] == 0


async def test_a_pack_whose_shards_cannot_be_had_holds_up_no_other(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock
):
    """To complete it waits for backends; second looks, by which room is made, and uploads go on meanwhile."""

    async def hang(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(DirectReader, "shards", hang)
    async with flushing(machine) as flusher:
        for backend in machine.backends[:3]:
            backend.down = True
        machine.write(machine.create("a"), 0, page("x") * 16)
        await flusher.sync()
        for backend in machine.backends:
            backend.down = False
        before = pack_rows(machine).keys()
        machine.write(machine.create("b"), 0, page("y") * 16)
        await flusher.sync()
        begin = trio.current_time()
        await until(lambda: all(row.state == 3 for n, row in pack_rows(machine).items() if n not in before))
        assert trio.current_time() - begin < machine.look_seconds + 60
        assert flusher.status()["packs_not_full"] > 0


async def test_a_head_may_be_stored_while_those_that_are_there_are_read(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock
):
    """A worker thread stores it: that must not end flushing."""
    async with flushing(machine) as flusher:
        await flusher.sync()
        heads = machine.spool.heads
        sealed = local_head(machine.store, PUBLISHED_KEY, machine.world.keys).sealed
        heads[sealed.ref] = sealed
        opened = named.open_head

        def store_another(*arguments: object) -> Head:
            other = dataclasses.replace(sealed.ref, generation=sealed.ref.generation + 100 + len(heads))
            heads[other] = sealed
            return opened(*arguments)

        monkeypatch.setattr(named, "open_head", store_another)
        assert flusher._named()
        assert len(heads) > 1


async def test_a_pack_is_not_forgotten_before_its_extents_are_committed(
    world: World, machine: FlushMachine, clock
):
    """Its row shows no live bytes yet when it is looked at or completed: it lives all the same."""
    machine.look_seconds = 0
    async with flushing(machine, cut_seconds=3600, quiet_seconds=1) as flusher:
        for backend in machine.backends[:3]:
            backend.down = True
        machine.write(machine.create("a"), 0, page("x") * 16)
        await machine.context.committer.commit()
        await until(lambda: flusher.status()["packs_not_full"])
        assert not machine.store.layers.open.empty
        await trio.sleep(20)
        assert flusher.status()["packs_not_full"] == 1
        assert flusher.status()["packs_not_looked_at"] >= 1
        for backend in machine.backends:
            backend.down = False
        await until(lambda: all(row.state == 3 for row in pack_rows(machine).values()))


def check_stored(world: World, row: PackRow) -> None:
    """Every shard lies, authentic, where the row says, each on a backend of its own."""
    assert len(set(row.placement)) == len(row.placement)
    for number, place in enumerate(row.placement):
        key = shard_key(world.keys.fsid, row.owner_epoch, row.pack_id, number)
        value = world.data[place - 1].peek(key)
        assert value is not None
        assert open_shard(value, world.keys, key=key).number == number


async def test_pages_may_go_only_after_the_second_look(machine: FlushMachine, clock):
    """Not sooner than its time after the write; then every pack is marked as looked at."""
    async with flushing(machine) as flusher:
        machine.write(machine.create("a"), 0, page("x") * 16)
        await flusher.sync()
        await until(lambda: all(row.state & PackState.LOOKED for row in pack_rows(machine).values()))
        for row in pack_rows(machine).values():
            assert row.verified_at_ns - row.written_at_ns >= 119e9


async def test_a_shard_that_its_backend_lost_is_made_again(
    world: World, machine: FlushMachine, expect_log, clock
):
    """An acknowledgement may have been a page cache: what the look misses is rebuilt, and looked at again."""
    expect_log(r"acknowledged it and has lost it")
    async with flushing(machine) as flusher:
        machine.write(machine.create("a"), 0, page("x") * 16)
        await flusher.sync()
        number, row = next((n, r) for n, r in pack_rows(machine).items() if r.live == 16 * PAGE)
        lost = world.data[row.placement[1] - 1]
        for key in [k for k in lost.keys() if (p := parse_shard_key(k)) and p.pack_id == row.pack_id]:  # noqa: SIM118
            lost.lose(key)
        await until(lambda: pack_rows(machine)[number].state & PackState.LOOKED)
        now = pack_rows(machine)[number]
        assert now.state & PackState.FULL
        check_stored(world, now)
        assert flusher.status()["shards_found_missing"] == 1


async def test_a_backend_that_does_not_answer_the_look_is_asked_again(machine: FlushMachine, clock):
    """Unknown is not absent: nothing is made again, and the pack is not marked."""
    machine.look_seconds = 600
    async with flushing(machine) as flusher:
        machine.write(machine.create("a"), 0, page("x") * 16)
        await flusher.sync()
        number, row = next((n, r) for n, r in pack_rows(machine).items() if r.live == 16 * PAGE)
        machine.backends[row.placement[0] - 1].down = True
        await trio.sleep(800)
        assert pack_rows(machine)[number] == row
        machine.backends[row.placement[0] - 1].down = False
        await until(lambda: pack_rows(machine)[number].state & PackState.LOOKED)
        assert pack_rows(machine)[number].placement == row.placement


async def test_written_packs_do_after_the_look_when_the_cache_is_short_of_room(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, expect_log, clock
):
    """Packs that cannot become full are looked at then, so that their pages may go, with an alarm."""
    expect_log("packs are not full: pages may be evicted")
    async with flushing(machine) as flusher:
        for backend in machine.backends[:3]:
            backend.down = True
        machine.write(machine.create("a"), 0, page("x") * 16)
        await flusher.sync()
        await trio.sleep(300)
        number = next(n for n, r in pack_rows(machine).items() if r.live == 16 * PAGE)
        assert not pack_rows(machine)[number].state & PackState.LOOKED
        monkeypatch.setattr(Flusher, "short_of_room", property(lambda self: True))
        await until(lambda: pack_rows(machine)[number].state & PackState.LOOKED)
        row = pack_rows(machine)[number]
        assert not row.state & PackState.FULL
        await trio.sleep(2)


async def test_more_dirty_than_a_cut_may_seal_is_uploaded_first(world: World, machine: FlushMachine, clock):
    """The cut comes once little enough is left; the generation has everything."""
    async with flushing(machine, cut_bytes=64 * PAGE, quiet_seconds=3600) as flusher:
        flusher._pace.most_bytes = 64 * PAGE
        a = machine.create("a")
        content = b"".join(page(c) for c in "abcdefghijklmnopqrstuvwxyz") * 20
        machine.write(a, 0, content)
        await flusher.sync()
        assert restore(world).files["a"] == content


async def test_what_is_written_while_a_cut_presses_is_uploaded_without_delay(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock
):
    """However long pages rest before they are pre-copied: that is for times without pressure."""
    async with flushing(machine, cut_bytes=64 * PAGE, quiet_seconds=3600, cut_seconds=3600) as flusher:
        flusher._pace.most_bytes = 64 * PAGE
        a = machine.create("a")
        machine.write(a, 0, page("x") * 200)
        one_pass = flusher._precopier._pass
        more: list[float] = []

        async def then_write(into: trio.Nursery) -> bool:
            some = await one_pass(into)
            if flusher._precopier.pressed and not some and not more:
                more.append(trio.current_time())
                machine.write(a, 300, page("y") * 200)
            return some

        monkeypatch.setattr(flusher._precopier, "_pass", then_write)
        await flusher.sync()
        assert more, "nothing was written meanwhile"
        assert trio.current_time() - more[0] < 60


async def test_a_disk_that_fails_to_clear_the_spool_gives_up_no_generation(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """The head is published and recorded: whoever waits is told so, and what is left goes later."""
    async with flushing(machine) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x"))
        drop_packs = machine.spool.drop_packs
        failed: list[int] = []

        def fail_once(generation: int) -> None:
            if not failed:
                failed.append(generation)
                raise CacheError("input/output error")
            drop_packs(generation)

        monkeypatch.setattr(machine.spool, "drop_packs", fail_once)
        expect_log("what is left of it in the spool")
        done = await flusher.sync()
        assert failed == [done.generation]
        assert restore(world).files["a"] == page("x")
        assert flusher.exposure.report(0, packs_known=True)["written"]["bytes"] == 0
        assert not flusher.status()["last_error"]
        assert any(key[0] == done.generation for key in machine.spool._packs)
        machine.write(a, 0, page("y"))
        assert (await flusher.sync()).generation > done.generation
        assert not machine.spool._packs, "the next mount would take them for given up"


async def test_many_changed_rows_are_uploaded_ahead_of_the_cut(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock
):
    """What a cut reads in one transaction stays small; the generation has every row as of its cut."""
    monkeypatch.setattr(flush, "EARLY_DELTA_MARKS", 10)
    async with flushing(machine) as flusher:
        numbers = [machine.create(f"f{i}") for i in range(40)]
        await machine.committer.commit()

        def meanwhile() -> None:
            failpoints.disarm("flush.metadata.uploaded")
            machine.unlink("f3", numbers[3])
            machine.set_xattr(numbers[5], b"user.x", b"1")

        failpoints.arm("flush.metadata.uploaded", meanwhile)
        await flusher.sync()
        image = restore(world)
        assert set(image.files) == {f"f{i}" for i in range(40)} - {"f3"}
        assert image.xattrs["f5"] == {b"user.x": b"1"}


async def test_deltas_are_merged_so_that_heads_stay_short(world: World, machine: FlushMachine, clock):
    """Small generations one after the other; the image is that of the last cut, also after a remount."""
    async with flushing(machine) as flusher:
        for i in range(30):
            machine.write(machine.create(f"f{i}"), 0, page("x"))
            await flusher.sync()
            await trio.sleep(2)
    async with flushing(machine) as flusher:
        for i in range(30, 50):
            machine.write(machine.create(f"f{i}"), 0, page("x"))
            await flusher.sync()
            await trio.sleep(2)
    image = restore(world)
    assert image.files == {f"f{i}": page("x") for i in range(50)}
    assert len(image.head.deltas) < 25


async def test_ranges_are_written_anew_when_deltas_are_too_many_and_cannot_be_read(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """A merge that fails holds nothing up; the head's lists stay short, and the image is the same."""
    monkeypatch.setattr("qsfs.remote.chain.LEAST_DELTAS", 12)

    async def lost(reader: DirectReader, pack: StoredPack, wanted: Collection[int]) -> dict[int, memoryview]:
        raise DataLost("no shard is left")

    monkeypatch.setattr(DirectReader, "shards", lost)
    async with flushing(machine) as flusher:
        for i in range(30):
            machine.write(machine.create(f"f{i}"), 0, page("x"))
            await flusher.sync()
            await trio.sleep(2)
        image = restore(world)
        assert len(image.files) == 30
        assert len(image.head.deltas) < 20
    expect_log("metadata were not written anew, which is tried again: no shard is left")


async def test_what_a_crash_left_unfinished_is_taken_up_by_the_next_mount(
    world: World, machine: FlushMachine, clock
):
    """Packs that are not full are known again after a mount."""
    async with flushing(machine) as flusher:
        for backend in machine.backends[:3]:
            backend.down = True
        machine.write(machine.create("a"), 0, page("x") * 16)
        await flusher.sync()
    for backend in machine.backends:
        backend.down = False
    async with flushing(machine) as flusher:
        assert machine.context.ledger.incomplete
        await until(lambda: flusher.status()["packs_not_full"] == 0)
    assert restore(world).files["a"] == page("x") * 16


async def test_a_crash_after_missing_shards_were_stored_has_them_stored_again(
    world: World, machine: FlushMachine, clock
):
    """What is stored and not recorded is only not known; the next mount completes the pack."""
    with pytest.raises(Crash):
        async with flushing(machine) as flusher:
            for backend in machine.backends[:3]:
                backend.down = True
            machine.write(machine.create("a"), 0, page("x") * 16)
            await flusher.sync()
            failpoints.arm("flush.complete.stored", crash)
            for backend in machine.backends:
                backend.down = False
            await until(lambda: not flusher.status()["packs_not_full"])
    failpoints.disarm_all()
    async with flushing(machine) as flusher:
        assert machine.context.ledger.incomplete
        await until(lambda: flusher.status()["packs_not_full"] == 0)
        for row in pack_rows(machine).values():
            assert row.state & PackState.FULL
            check_stored(world, row)
    assert restore(world).files["a"] == page("x") * 16


# with the real publisher


class OwningMachine(FlushMachine):
    """Owns and publishes as the daemon does."""

    async def _publish_first(self, owner: Owner) -> None:
        def local() -> LocalState:
            base, published = (local_head(self.store, k, self.world.keys) for k in (BASE_KEY, PUBLISHED_KEY))
            assert base is not None
            return LocalState(
                base.sealed.ref, base.ours, published and published.sealed.ref, frozenset(self.spool.heads)
            )

        owned = await own(
            self.fleet_members,
            records=Records(self.world.keys),
            code=self.world.code,
            clock=self.clock,
            nursery=self.nursery,
            host="alpha",
            accept=accept_for_mount(local),
            store_before_send=self.spool.store_head,
            timing=TIMING,
        )
        self.publisher = owned.publisher  # type: ignore[assignment]
        self.first = owned.first


@pytest.mark.parametrize(
    "point", ["flush.packs.uploaded", "publish.stored", "publish.send", "flush.head.sent"]
)
async def test_mounts_that_crash_and_own_again_lose_nothing(
    world: World, machine: FlushMachine, tmp_path: Path, clock, point
):
    """With the real ownership and publisher: the next mount owns, and its generations are right."""
    real = OwningMachine(world, tmp_path / "real")
    real.clock = machine.clock
    content: dict[str, bytes] = {}
    for letter in "abc":
        with pytest.raises(BaseExceptionGroup) as caught:
            async with flushing(real) as flusher:
                number = real.create(letter)
                real.write(number, 0, page(letter) * 20)
                content[letter] = page(letter) * 20
                await real.committer.commit()
                failpoints.arm(point, crash)
                await flusher.sync()
        assert caught.group_contains(Crash)
        failpoints.disarm_all()
    async with flushing(real) as flusher:
        done = await flusher.sync()
        assert restore(world).files == content
        assert real.generations.publisher.published is not None
        assert done.generation == restore(world).head.generation


@pytest.mark.parametrize("want", ["sync", "cut", "pinned", "unpin"])
async def test_who_waits_is_told_that_the_local_disk_failed(machine: FlushMachine, expect_log, clock, want: str):
    """No generation will be made any more: nobody waits for ever, whoever asked before or asks after."""
    expect_log("no generation could be made")
    async with flushing(machine, cut_seconds=86400) as flusher:
        pinning = flusher.pinning
        await pinning.pinned(await pinning.cut("old"))
        reach, machine.publisher.reach = machine.publisher.reach, 0
        machine.write(machine.create("a"), 0, page("x"))
        request = await pinning.cut("first")
        await until(lambda: flusher.phase == "publishing")
        wants: dict[str, Callable[[], Awaitable[Any]]] = {
            "sync": flusher.sync,
            "cut": lambda: pinning.cut("second"),
            "pinned": lambda: pinning.pinned(request),
            "unpin": lambda: pinning.unpin(["old"]),
        }

        async def ask() -> None:
            with pytest.raises(CacheError, match="the disk is gone"):
                await wants[want]()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await wait_all_tasks_blocked()
                machine.committer.fail(CacheError("the disk is gone"))
            await ask()
        machine.publisher.reach = reach
        await until(lambda: "the disk is gone" in flusher.last_error)
        with trio.fail_after(60):
            await ask()
