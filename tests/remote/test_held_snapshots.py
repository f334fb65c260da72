"""Snapshots for held applications: only a command that lived to say that they were held gets one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from qsfs import failpoints
from qsfs.daemon.snapshots import Snapshots
from qsfs.errors import CacheError, ConfigError, DeadlineExceeded, NotFound, QsfsError
from qsfs.remote.flush import Flusher
from qsfs.remote.pinning import CONFIRM_SECONDS
from qsfs.remote.snapshots import snapshots_of
from tests.remote.flush_machine import FlushMachine, newest_head
from tests.remote.flushing import flushing, page
from tests.remote.harness import World
from tests.remote.test_snapshot_pins import create, pinned


def snapshots(machine: FlushMachine, flusher: Flusher) -> Snapshots:
    """What the daemon answers by, on a machine without files of atomic sync."""
    contents: Any = SimpleNamespace(uncovered=list)
    return Snapshots(machine.store, contents, machine.committer, flusher.pinning)


def names(world: World) -> list[str]:
    newest = newest_head(world)
    assert newest is not None
    return [snapshot.name for snapshot in snapshots_of(newest[1].kept)]


def set_down(machine: FlushMachine, down: bool) -> None:
    for backend in machine.backends:
        backend.down = down


async def publish_more(
    world: World, machine: FlushMachine, flusher: Flusher, present: Collection[str], absent: str
) -> None:
    """Publishes a handful of generations: in all of their heads some names are, and one is not."""
    for letter in "uvwxyz":
        machine.write(machine.create(f"{absent}-{letter}"), 0, page(letter))
        await flusher.sync()
        found = names(world)
        assert absent not in found and set(present) <= set(found)


@pytest.mark.parametrize("pause", [0, 1, CONFIRM_SECONDS / 2, 100])
@pytest.mark.parametrize("late", [False, True], ids=["published", "sealed"])
async def test_a_command_that_dies_between_cut_and_confirmation_leaves_none(
    world: World, machine: FlushMachine, clock: MockClock, late: bool, pause: float
):
    """Whether its cut is published before or after it should have been confirmed, and whatever is after that."""
    async with flushing(machine, quiet_seconds=3600) as flusher:
        held = snapshots(machine, flusher)
        await create(flusher, "before")
        machine.write(machine.create("a"), 0, page("a"))
        set_down(machine, late)
        await held.cut("dead", 30, "ticket")
        if late:
            await trio.sleep(2 * CONFIRM_SECONDS)
            set_down(machine, False)
        await trio.sleep(pause)
        await publish_more(world, machine, flusher, ["before"], "dead")
        with pytest.raises(NotFound, match="not confirmed"):
            await held.hold("ticket")
        await publish_more(world, machine, flusher, ["before"], "dead-again")
        assert "dead" not in names(world)
        await create(flusher, "dead")
        assert names(world) == ["before", "dead"], "the name is free"
    async with flushing(machine) as flusher:
        assert [snapshot.name for snapshot in flusher.pinning.snapshots] == ["before", "dead"]


@pytest.mark.parametrize("pause", [0, 1, CONFIRM_SECONDS - 1])
@pytest.mark.parametrize("late", [False, True], ids=["published", "sealed"])
async def test_one_that_is_confirmed_holds(
    world: World, machine: FlushMachine, clock: MockClock, late: bool, pause: float
):
    """It is that moment, in every later head, whether its cut is published by then and whatever else is flushed."""
    async with flushing(machine, quiet_seconds=3600) as flusher, trio.open_nursery() as nursery:
        held = snapshots(machine, flusher)
        a = machine.create("a")
        machine.write(a, 0, page("a"))
        set_down(machine, late)
        await held.cut("held", 30, "ticket")
        machine.write(a, 0, page("b"))
        if not late:
            for _ in range(4):
                nursery.start_soon(flusher.sync)
        await trio.sleep(pause)
        if late:
            nursery.start_soon(held.hold, "ticket")
            await trio.sleep(2 * CONFIRM_SECONDS)
            set_down(machine, False)
        else:
            assert (await held.hold("ticket"))["name"] == "held"
    async with flushing(machine, quiet_seconds=3600) as flusher:
        await publish_more(world, machine, flusher, ["held"], "other")
        assert pinned(world)["held"].files == {"a": page("a")}
        with pytest.raises(ConfigError, match="already"):
            await snapshots(machine, flusher).cut("held", 30, "another")


async def test_other_heads_wait_for_a_confirmation_no_longer_than_it_may_take(machine: FlushMachine, clock: MockClock):
    """A dead command costs those who sync that much once, and the one that its own cut serves nothing."""
    async with flushing(machine, quiet_seconds=3600) as flusher:
        await flusher.sync()
        began = trio.current_time()
        await snapshots(machine, flusher).cut("dead", 30, "ticket")
        machine.write(machine.create("b"), 0, page("b"))
        await flusher.sync()
        assert CONFIRM_SECONDS - 1 < trio.current_time() - began < CONFIRM_SECONDS + 5
        began = trio.current_time()
        machine.write(machine.create("c"), 0, page("c"))
        await flusher.sync()
        assert trio.current_time() - began < 5


async def test_a_cut_that_is_abandoned_while_it_is_waited_for_ends(
    world: World, machine: FlushMachine, clock: MockClock
):
    """An interrupted command frees the name at once, also while the daemon has not sealed anything yet."""
    errors = []

    async def cut(held: Snapshots) -> None:
        try:
            await held.cut("name", 500, "ticket")
        except DeadlineExceeded as error:
            errors.append(str(error))

    async with flushing(machine, quiet_seconds=3600) as flusher, trio.open_nursery() as nursery:
        held = snapshots(machine, flusher)
        set_down(machine, True)
        machine.write(machine.create("a"), 0, page("a"))
        with trio.move_on_after(50):
            await flusher.sync()  # a cut is under way, and waits
        nursery.start_soon(cut, held)
        await trio.sleep(1)
        with pytest.raises(QsfsError, match="not sealed"):
            await held.hold("ticket")
        await held.abandon("another ticket")
        assert [request.name for request in flusher.pinning.waiting] == ["name"]
        await held.abandon("ticket")
        await trio.sleep(1)
        assert errors == ['snapshot "name" was given up'] and not flusher.pinning.waiting
        await held.abandon("ticket")
        set_down(machine, False)
        await publish_more(world, machine, flusher, [], "name")
        await create(flusher, "name")


@pytest.mark.parametrize("seconds", [0, 1, 100])
async def test_what_was_confirmed_can_be_abandoned(
    world: World, machine: FlushMachine, clock: MockClock, seconds: float
):
    """Its name is in no head that is begun after that, whether one had it already."""
    async with flushing(machine, quiet_seconds=3600) as flusher:
        await create(flusher, "before")
        request = await flusher.pinning.cut("name", held_seconds=30)
        flusher.pinning.confirm(request)
        await trio.sleep(seconds)
        flusher.pinning.abandon(request)
        with pytest.raises(DeadlineExceeded, match="given up"):
            await flusher.pinning.pinned(request)
        await flusher.sync()
        await publish_more(world, machine, flusher, ["before"], "name")
        again = await create(flusher, "name")
        flusher.pinning.abandon(request)
        await flusher.sync()
        assert again in flusher.pinning.snapshots, "what has the name now is another one"


async def test_a_cut_that_fails_cannot_be_confirmed(
    world: World, machine: FlushMachine, clock: MockClock, expect_log: Callable[..., None]
):
    """Nothing stays of one that was sealed and became no generation."""

    def fail() -> None:
        failpoints.disarm("spool.head.before")
        raise CacheError("the disk hiccuped")

    expect_log("the disk hiccuped")
    async with flushing(machine) as flusher:
        held = snapshots(machine, flusher)
        machine.write(machine.create("a"), 0, page("a"))
        failpoints.arm("spool.head.before", fail)
        await held.cut("name", 100, "ticket")
        await flusher.sync()
        with pytest.raises(NotFound):
            await held.hold("ticket")
        await create(flusher, "name")
