"""fsync at class written and `sync --class`, on a virtual clock: what returned is on the backends, nothing else is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trio

from qsfs import failpoints
from qsfs.daemon.syncing import sync_to
from qsfs.daemon.written import LATE_SECONDS, WrittenDurability
from qsfs.errors import BackendFull, Fenced, Unavailable
from qsfs.format.shard import parse_shard_key
from qsfs.remote.flush import Flusher
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.flushing import VirtualClock, flushing, page, until
from tests.remote.harness import World, make_world


class Here:
    """The local disk: a commit makes all of it durable."""

    def __init__(self, machine: FlushMachine) -> None:
        self.machine = machine
        self.durable = 0

    async def sync(self, number: int, data_only: bool) -> None:
        await self.machine.context.committer.commit()
        self.durable += 1

    async def sync_namespace(self) -> None:
        await self.sync(0, False)


def written(machine: FlushMachine, flusher: Flusher, *local: int) -> WrittenDurability:
    return WrittenDurability(
        Here(machine), flusher.publish_all, lambda number: number in local, lambda: "the backends", machine.clock
    )


def cut_off(machine: FlushMachine, down: bool = True) -> None:
    for backend in machine.backends:
        backend.down = down


async def test_an_fsync_returns_once_a_head_has_what_it_covers(world: World, machine: FlushMachine, clock):
    """And it makes the cut itself: the next by the clock would be a day away.  A directory's fsync too."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        durability = written(machine, flusher)
        a = machine.create("a")
        machine.write(a, 0, page("x") * 3)
        await durability.sync(a, False)
        assert restore(world).files == {"a": page("x") * 3}
        machine.create("b")
        await durability.sync_namespace()
        assert set(restore(world).files) == {"a", "b"}


async def test_one_cut_serves_all_who_came_before_it(world: World, machine: FlushMachine, clock):
    """Of fsyncs that come while a generation is under way, none waits for that, and all share the next."""
    async with flushing(machine, cut_seconds=86400, quiet_seconds=3600) as flusher, trio.open_nursery() as nursery:
        durability = written(machine, flusher)
        files = [machine.create(f"f{number}") for number in range(20)]
        done: list[int] = []

        async def commit(number: int) -> None:
            await durability.sync(number, False)
            done.append(number)
            assert restore(world).files[f"f{files.index(number)}"] == page("y")

        def meanwhile() -> None:
            failpoints.disarm("flush.packs.uploaded")
            for number in files:
                machine.write(number, 0, page("y"))
                nursery.start_soon(commit, number)

        failpoints.arm("flush.packs.uploaded", meanwhile)
        first = await flusher.sync()
        assert restore(world).files["f0"] == b""
        await until(lambda: len(done) == len(files))
        assert flusher.status()["generation"] == first.generation + 1


async def test_a_file_that_stays_local_does_not_wait_for_backends(machine: FlushMachine, clock):
    """No generation will ever hold its data."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        a = machine.create("a")
        cut_off(machine)
        durability = written(machine, flusher, a)
        with trio.fail_after(1):
            await durability.sync(a, False)


async def test_backends_that_keep_an_fsync_waiting_are_told_and_it_ends_when_they_are_back(
    world: World, machine: FlushMachine, clock, expect_log
):
    """Local first; visible in the report at once, in the log when it is long, once."""
    expect_log(r"1 fsyncs wait for a published head, .* the backends; .*qsfs unblock", logging.WARNING, count=1)
    async with flushing(machine, cut_seconds=86400) as flusher, trio.open_nursery() as nursery:
        durability = written(machine, flusher)
        a = machine.create("a")
        machine.write(a, 0, page("x"))
        cut_off(machine)
        nursery.start_soon(durability.run)
        nursery.start_soon(durability.sync, a, False)
        await trio.sleep(5 * LATE_SECONDS)
        report = durability.report()
        assert (report["waiting"], report["why"]) == (1, "the backends")
        assert report["oldest_seconds"] >= 4 * LATE_SECONDS
        assert durability._local.durable == 1  # type: ignore[attr-defined]
        cut_off(machine, down=False)
        await until(lambda: not durability.report()["waiting"])
        assert restore(world).files == {"a": page("x")}
        nursery.cancel_scope.cancel()


async def test_unblock_ends_the_waits_of_one_file_or_the_old_ones_or_all(machine: FlushMachine, clock, expect_log):
    """With an error: a caller that gets none may rely on the backends."""
    expect_log(r"1 fsyncs that waited for backends were ended with EIO", logging.WARNING, count=3)
    async with flushing(machine, cut_seconds=86400) as flusher, trio.open_nursery() as nursery:
        durability = written(machine, flusher)
        a, b = machine.create("a"), machine.create("b")
        ends: list[int] = []

        async def sync(number: int) -> None:
            with pytest.raises(Unavailable, match="this machine's disk has it"):
                await durability.sync(number, False)
            ends.append(number)

        cut_off(machine)
        nursery.start_soon(sync, a)
        await trio.sleep(LATE_SECONDS)
        nursery.start_soon(sync, b)
        await trio.sleep(1)
        assert durability.unblock(older_than=LATE_SECONDS) == 1
        await until(lambda: ends == [a])
        assert durability.unblock(a) == 0
        assert durability.unblock(b) == 1
        await until(lambda: ends == [a, b])
        nursery.start_soon(sync, a)
        await trio.sleep(1)
        assert durability.unblock() == 1
        await until(lambda: ends == [a, b, a])
        assert durability.report() == {"waiting": 0, "oldest_seconds": 0.0, "why": "", "ended": 3}


async def test_a_fence_and_a_stop_end_the_waits_with_an_error(machine: FlushMachine, clock, expect_log):
    """What will never be published is never reported as if it were."""
    expect_log(r"another mount owns it", logging.CRITICAL)
    async with flushing(machine, cut_seconds=86400) as flusher, trio.open_nursery() as nursery:
        durability = written(machine, flusher)
        a = machine.create("a")
        ends: list[str] = []

        async def sync() -> None:
            try:
                await durability.sync(a, False)
            except Unavailable as error:
                ends.append(str(error))

        cut_off(machine)
        nursery.start_soon(sync)
        await trio.sleep(5)
        flusher.fence(Fenced("another mount owns it"))
        await until(lambda: ends)
        await sync()
        assert len(ends) == 2 and all("another mount owns it" in end for end in ends)


class Owned:
    """What `sync_to` asks of the flushing of a mount."""

    def __init__(self, flusher: Flusher) -> None:
        self.flusher = flusher
        self.members = flusher.context.uploader.members
        self.full_waits: dict[int, dict[str, Any]] = {}

    async def owned(self) -> Flusher:
        return self.flusher

    def waits(self) -> list[str]:
        return list(self.flusher.status()["waiting"])


async def test_sync_tells_which_class_was_reached_and_what_is_missing(machine: FlushMachine, clock):
    """Local without any backend, written with a write quorum, full only with all shards of what the head names."""
    async with flushing(machine, cut_seconds=86400) as flusher:
        owned, committer = Owned(flusher), machine.context.committer
        machine.write(machine.create("a"), 0, page("x"))
        cut_off(machine)
        found = await sync_to(owned, committer, "local", None)  # type: ignore[arg-type]
        assert found == {"generation": None, "class": "local", "wanted": "local", "reached": True}
        found = await sync_to(owned, committer, "written", 20.0)  # type: ignore[arg-type]
        assert (found["class"], found["reached"]) == ("local", False)
        assert {backend["why"].split(":")[0] for backend in found["missing"]["backends"]} <= {"suspect", "down"}
        cut_off(machine, down=False)

        def refuse(call: str, key: bytes) -> None:
            # 3 of 6 take shards: a pack of 2 + 2 is written with 3, and heads go everywhere.
            if call == "set" and parse_shard_key(key) is not None:
                raise BackendFull("no room")

        for backend in machine.backends[:3]:
            backend.gate = refuse
        found = await sync_to(owned, committer, "full", 60.0)  # type: ignore[arg-type]
        assert (found["class"], found["reached"]) == ("written", False)
        assert found["generation"] > 1 and found["missing"]["packs_not_full"]
        assert [backend["number"] for backend in found["missing"]["backends"] if "full" in backend["why"]]
        for backend in machine.backends[:3]:
            backend.gate = lambda call, key: None
        found = await sync_to(owned, committer, "full", None)  # type: ignore[arg-type]
        assert (found["class"], found["reached"]) == ("full", True)
        assert not flusher.context.ledger.incomplete


async def test_a_sync_that_waits_for_full_packs_is_told_with_what_keeps_them(tmp_path: Path, clock):
    """Where a pack has a shard on every backend, one that is away, or has no room, holds it up for ever."""
    world = await make_world(4, k=2, m=2)
    machine = FlushMachine(world, tmp_path / "cache")
    machine.clock = VirtualClock(clock)
    async with flushing(machine, cut_seconds=86400) as flusher, trio.open_nursery() as nursery:
        owned, committer, away = Owned(flusher), machine.context.committer, machine.backends[3]
        results: list[dict[str, Any]] = []

        async def sync() -> None:
            results.append(await sync_to(owned, committer, "full", None))  # type: ignore[arg-type]

        away.down = True
        machine.write(machine.create("a"), 0, page("x") * 16)
        nursery.start_soon(sync)
        await until(lambda: flusher.context.ledger.incomplete)
        await trio.sleep(60)
        (wait,) = owned.full_waits.values()
        incomplete = flusher.context.ledger.incomplete
        assert (wait["packs"], wait["bytes"]) == (len(incomplete), sum(live for live, _ in incomplete.values()))
        name = next(member.name for member in owned.members if member.number == 4)
        assert wait["why"].startswith(f"backend {name}: ") and "refused" in wait["why"]

        def refuse(call: str, key: bytes) -> None:
            if call == "set" and parse_shard_key(key) is not None:
                raise BackendFull("no room")

        away.down, away.gate = False, refuse
        await until(lambda: "full" in wait["why"])
        for _ in range(100):
            await trio.sleep(1)
            assert wait["why"].startswith(f"backend {name}: "), "it passes for one with room for a while"
        assert not results and flusher.status()["waiting"] == [], "publishing waits for nothing"
        away.gate = lambda call, key: None
        await until(lambda: results)
        assert results[0]["class"] == "full" and not owned.full_waits


async def test_a_fence_ends_a_sync_that_waits_for_full(machine: FlushMachine, clock, expect_log):
    """Shards that nobody will store any more are not waited for in silence."""
    expect_log(r"another mount owns it", logging.CRITICAL)
    async with flushing(machine, cut_seconds=86400) as flusher, trio.open_nursery() as nursery:
        ends: list[str] = []

        async def sync() -> None:
            with pytest.raises(Fenced, match="another mount owns it"):
                await sync_to(Owned(flusher), machine.context.committer, "full", None)  # type: ignore[arg-type]
            ends.append("fenced")

        def refuse(call: str, key: bytes) -> None:
            if call == "set" and parse_shard_key(key) is not None:
                raise BackendFull("no room")

        for backend in machine.backends[:3]:
            backend.gate = refuse
        machine.write(machine.create("a"), 0, page("x"))
        nursery.start_soon(sync)
        await until(lambda: flusher.status()["generation"] > 1)
        await trio.sleep(30)
        assert not ends
        flusher.fence(Fenced("another mount owns it"))
        await until(lambda: ends)


@pytest.mark.parametrize("when", ["before the cut", "within its grace"])
async def test_a_slow_backend_costs_who_waits_little(world: World, machine: FlushMachine, clock, when):
    """A head needs written packs: the grace for full ones is not what an fsync waits for, also not that of others."""
    async with flushing(machine, cut_seconds=86400, quiet_seconds=3600) as flusher, trio.open_nursery() as nursery:
        durability = written(machine, flusher)
        flusher.context.uploader._grace = 600.0
        flusher.context.uploader.hurried = lambda: durability.waiting
        machine.backends[0].delay = lambda call: 50.0 if call == "set" else 0.0
        a = machine.create("a")
        if when == "within its grace":
            nursery.start_soon(flusher.sync)
            await trio.sleep(10)
            machine.write(a, 0, page("x"))
        begin = trio.current_time()
        await durability.sync(a, False)
        assert trio.current_time() - begin < 5
        assert "a" in restore(world).files
        nursery.cancel_scope.cancel()
