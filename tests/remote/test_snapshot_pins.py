"""Snapshots of a flushing machine: they hold once reported, whatever dies; and hold exactly their moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from qsfs import failpoints
from qsfs.errors import CacheError, ConfigError, DeadlineExceeded, NotFound
from qsfs.format.head import head_key, open_head
from qsfs.remote.flush import Flusher
from qsfs.remote.snapshots import Snapshot, snapshots_of
from tests.remote.flush_machine import Crash, FlushMachine, Image, crash, newest_head, restore
from tests.remote.flushing import flushing, page, until
from tests.remote.harness import World

POINTS = (
    "flush.cut.sealed",
    "flush.packs.uploaded",
    "spool.head.before",
    "spool.head.stored",
    "test.head.stored",
    "test.head.at-one",
    "flush.head.sent",
    "flush.recorded",
    "flush.spool.cleared",
)


async def create(flusher: Flusher, name: str) -> Snapshot:
    return await flusher.pinning.pinned(await flusher.pinning.cut(name))


def pinned(world: World) -> dict[str, Image]:
    """What each snapshot restores to, by the newest head alone."""
    newest = newest_head(world)
    assert newest is not None
    found = {}
    for snapshot in snapshots_of(newest[1].kept):
        key = head_key(world.keys.fsid, snapshot.head)
        value = next(value for store in world.control if (value := store.peek(key)))
        found[snapshot.name] = restore(world, open_head(key, value, world.keys))
    return found


async def test_a_snapshot_holds_exactly_what_was_there(world: World, machine: FlushMachine, clock: MockClock):
    """What is written, removed and published later never shows in it, and it never goes by itself."""
    async with flushing(machine) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x") * 40)
        made = await create(flusher, "first")
        assert made.name == "first" and made.generation == pinned(world)["first"].head.generation
        for letter in "yzuvw":
            machine.write(a, 3, page(letter) * 5)
            machine.write(machine.create(letter), 0, page(letter))
            await flusher.sync()
        machine.unlink("a", a)
        await flusher.sync()
        assert pinned(world)["first"].files == {"a": page("x") * 40}
        assert "a" not in restore(world).files
        assert flusher.pinning.snapshots == [made]


async def test_a_snapshot_of_a_file_system_at_rest_is_made(world: World, machine: FlushMachine, clock: MockClock):
    """It needs no change before it, and none after it; afterwards the file system is at rest again."""
    async with flushing(machine, cut_seconds=30) as flusher:
        await flusher.sync()
        before = flusher.status()["generation"]
        made = await create(flusher, "idle")
        assert made.generation == before + 1
        generation = flusher.status()["generation"]
        await trio.sleep(1000)
        assert flusher.status()["generation"] == generation, "no pin is published again and again"
        await create(flusher, "again")
        assert [s.name for s in flusher.pinning.snapshots] == ["idle", "again"]
    async with flushing(machine, cut_seconds=30) as flusher:
        bases = set()
        for _ in range(60):
            await trio.sleep(100)
            bases.add(flusher.generations.base.sealed.ref)
        assert len(bases) == 2, "a mount alone publishes no pins: the one head is for strays"


async def test_a_name_is_taken_while_its_snapshot_is_made_and_until_it_is_gone(machine: FlushMachine, clock: MockClock):
    """Two people who choose one name at one time get one snapshot and one refusal."""
    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        nursery.start_soon(create, flusher, "one")
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        with pytest.raises(ConfigError, match="already"):
            await flusher.pinning.cut("one")
        await until(lambda: flusher.pinning.snapshots)
        with pytest.raises(ConfigError, match="already"):
            await flusher.pinning.cut("one")
        await flusher.pinning.unpin(["one"])
        await create(flusher, "one")


async def test_a_deleted_snapshot_is_in_no_later_head(world: World, machine: FlushMachine, clock: MockClock):
    """The others stay; what is not there is said, with nothing changed."""
    async with flushing(machine) as flusher:
        for name in ("a", "b", "c"):
            await create(flusher, name)
        with pytest.raises(NotFound, match="there are: c, b, a"):
            await flusher.pinning.unpin(["b", "d"])
        assert len(flusher.pinning.snapshots) == 3
        await flusher.pinning.unpin(["b"])
        assert set(pinned(world)) == {"a", "c"}
    async with flushing(machine) as flusher:
        await flusher.sync()
        assert [s.name for s in flusher.pinning.snapshots] == ["a", "c"]


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_takes_no_snapshot_that_was_reported(
    world: World, machine: FlushMachine, clock: MockClock, point: str, turn: int
):
    """The machine dies while a second one is made, at its cut or at the head that carries its pin.

    The first is there after that, also when more generations have been published.  If the second one is
    there, it holds what was written before it, and nothing that was written after.
    """
    hits = 0

    def die() -> None:
        nonlocal hits
        hits += 1
        if hits == turn:
            crash()

    with pytest.raises(BaseException) as ended:
        async with flushing(machine, quiet_seconds=3600) as flusher:
            a = machine.create("a")
            machine.write(a, 0, page("x") * 4)
            await create(flusher, "first")
            machine.write(a, 0, page("y"))
            failpoints.arm(point, die)
            await flusher.pinning.cut("second")
            machine.write(a, 0, page("z"))
            await trio.sleep(1000)
    failpoints.disarm_all()
    assert ended.group_contains(Crash) if isinstance(ended.value, BaseExceptionGroup) else ended.type is Crash

    async with flushing(machine, quiet_seconds=3600) as flusher:
        for letter in "uvw":
            machine.write(machine.create(letter), 0, page(letter))
            await flusher.sync()
        images = pinned(world)
        assert images["first"].files == {"a": page("x") * 4}
        if "second" in images:
            assert images["second"].files == {"a": page("y") + page("x") * 3}
        else:
            await create(flusher, "second")
        assert set(pinned(world)) == {"first", "second"}


@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_while_one_is_deleted_takes_no_other(
    world: World, machine: FlushMachine, clock: MockClock, point: str
):
    """It is there or gone, as a whole, and can be deleted then if it is there."""
    with pytest.raises(BaseException):  # noqa: B017
        async with flushing(machine, quiet_seconds=3600) as flusher:
            machine.write(machine.create("a"), 0, page("x"))
            await create(flusher, "first")
            await create(flusher, "second")
            failpoints.arm(point, crash)
            await flusher.pinning.unpin(["second"])
    failpoints.disarm_all()
    async with flushing(machine, quiet_seconds=3600) as flusher:
        await trio.sleep(100)
        if len(flusher.pinning.snapshots) == 2:
            await flusher.pinning.unpin(["second"])
        assert {name: image.files for name, image in pinned(world).items()} == {"first": {"a": page("x")}}


async def test_a_held_snapshot_is_given_up_at_its_deadline(world: World, machine: FlushMachine, clock: MockClock):
    """Nobody is held still for longer; the name is free again, and no later cut becomes that snapshot."""
    async with flushing(machine) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x"))
        await flusher.sync()
        for backend in machine.backends:
            backend.down = True
        machine.write(a, 0, page("y"))
        await machine.committer.commit()
        with trio.move_on_after(50):
            await flusher.sync()  # a cut is under way, and waits
        began = trio.current_time()
        with pytest.raises(DeadlineExceeded, match="given up"):
            await flusher.pinning.cut("held", held_seconds=10)
        assert trio.current_time() - began < 11
        for backend in machine.backends:
            backend.down = False
        await flusher.sync()
        machine.write(a, 0, page("z"))
        await flusher.sync()
        assert flusher.pinning.snapshots == []
        await create(flusher, "held")
        assert pinned(world)["held"].files == {"a": page("z")}


@pytest.mark.parametrize("held", [True, False])
async def test_a_cut_that_is_given_up_is_no_snapshot(
    world: World, machine: FlushMachine, clock: MockClock, held: bool, expect_log: Callable[..., None]
):
    """With applications held for it, it fails, since only that moment would do; else the next cut is taken."""

    def fail() -> None:
        failpoints.disarm("spool.head.before")
        raise CacheError("the disk hiccuped")

    expect_log("the disk hiccuped")
    async with flushing(machine) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x"))
        failpoints.arm("spool.head.before", fail)
        request = await flusher.pinning.cut("name", held_seconds=100 if held else None)
        machine.write(a, 0, page("y"))
        if held:
            with pytest.raises(CacheError, match="hiccuped"):
                await flusher.pinning.pinned(request)
            await flusher.sync()
            assert pinned(world) == {}
        else:
            await flusher.pinning.pinned(request)
            assert pinned(world)["name"].files == {"a": page("y")}


async def test_one_that_waits_ends_when_flushing_ends(machine: FlushMachine, clock: MockClock):
    """A command never hangs on a daemon that stops; what was not reported may be missing."""
    errors = []

    async with flushing(machine) as flusher, trio.open_nursery() as nursery:
        for backend in machine.backends:
            backend.down = True
        machine.write(machine.create("a"), 0, page("x"))

        async def make(name: str) -> None:
            try:
                await create(flusher, name)
            except DeadlineExceeded as error:
                errors.append(error)

        nursery.start_soon(make, "one")
        await trio.sleep(50)
        nursery.start_soon(make, "two")
        await trio.sleep(50)
        await flusher.stop(5)
        await until(lambda: len(errors) == 2)
