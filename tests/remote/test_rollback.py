"""Rollback: the snapshot's image exactly, as the newest generation; whoever dies has the old state or the new.

The machine that flushes, and the restore that shares no code with the store, are those of `flush_machine`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from qsfs import failpoints
from qsfs.daemon.rollback import refuse_to_lose
from qsfs.errors import BackendError, CacheError, Corrupt, FormatMismatch, QsfsError, Unavailable
from qsfs.format.erasure import Code
from qsfs.format.head import Head, HeadRef, Owner, SealedHead, head_key, open_head, parse_head_key
from qsfs.remote import rollback as rollback_module
from qsfs.remote.base import record_published
from qsfs.remote.kept import kept_of_first
from qsfs.remote.ownership import Ownership
from qsfs.remote.rollback import HeadGate, Rollback, RollbackReport, Unpublished, unpublished
from qsfs.remote.snapshots import find_kept
from qsfs.remote.spool import Spool
from qsfs.store.schema import PAGE, InodeFlag, Table, read_plain_u64
from qsfs.store.store import Store
from tests.remote.flush_machine import LIMITS, FlushMachine, Image, SimplePublisher, crash, newest_head, restore
from tests.remote.flushing import flushing, page
from tests.remote.harness import TIMING, World
from tests.remote.test_snapshot_pins import create, pinned

OLD = {"a": page("x") * 4, "b": page("y")}
NEW = {"a": page("x") + page("z") * 2 + page("x"), "c": page("c") * 20}

# Where it dies, at which hit, and what it leaves.
DEATHS = (
    ("spool.head.before", 2, NEW),
    ("spool.head.stored", 2, NEW),
    ("test.head.stored", 2, NEW),
    ("test.head.at-one", 7, NEW),
    ("rollback.left", 1, NEW),
    ("restore.rows", 1, NEW),
    ("rollback.loaded", 1, NEW),
    ("spool.head.before", 3, NEW),
    ("spool.head.stored", 3, NEW),
    ("rollback.stored", 1, NEW),
    ("restore.derived", 1, NEW),
    ("rollback.built", 1, NEW),
    ("restore.renamed", 1, OLD),
    ("rollback.replaced", 1, OLD),
    ("test.head.stored", 3, OLD),
    ("test.head.at-one", 13, OLD),
    ("rollback.published", 1, OLD),
)


class Gated:
    """The spool as a publisher sees it: heads go through the gate."""

    def __init__(self, spool: Spool, gate: HeadGate) -> None:
        self._spool, self._gate = spool, gate

    @property
    def heads(self) -> dict[HeadRef, SealedHead]:
        return self._spool.heads

    async def store_head(self, sealed: SealedHead) -> None:
        await self._gate.store(sealed)


async def roll_back(
    machine: FlushMachine, which: str, left: str = "left", aside: Path | None = None
) -> RollbackReport:
    """What the command does, with a publisher that leaves ownership to other tests."""
    world, clock = machine.world, machine.clock
    store = Store(machine.directory, LIMITS, clock)
    try:
        spool = Spool(machine.directory / "spool", LIMITS.spool_bytes)
        gate = HeadGate(spool)
        newest = newest_head(world)
        assert newest is not None
        machine.epoch = max(machine.epoch, newest[0].owner.epoch) + 1
        owner = Owner(machine.epoch, clock.random_bytes(16))
        publisher = SimplePublisher(world, owner, cast("Spool", Gated(spool, gate)), newest[0])
        first = dataclasses.replace(
            newest[1], owner=owner, predecessor=newest[0], kept=kept_of_first(newest[1], newest[0])
        )
        await publisher.publish(first, deadline_seconds=1)
        assert publisher.published is not None
        record_published(store, spool.heads[publisher.published])
        last = max(store.counter(b"generation"), first.generation)
        store.set_counter(b"generation", last + 2)
        group = store.seal()
        store.commit(group)
        store.committed(group)
        counters = {key.decode(): read_plain_u64(row) for key, row in store.scan(Table.COUNTERS, b"", None)}
    finally:
        store.close()
    rollback = Rollback(
        owned=Ownership(cast("Any", publisher), newest[1], newest[0], first, publisher.published),
        gate=gate,
        spool=spool,
        members=machine.members(),
        keys=world.keys,
        code=Code(world.code),
        directory=machine.directory,
        limits=LIMITS,
        clock=clock,
        counters=counters,
        last=last,
        local={},
        aside=aside,
        say=lambda progress: None,
        waiting=lambda what: None,
        timing=TIMING,
    )
    return await rollback.run(find_kept(first.kept, which), left)


async def two_states(machine: FlushMachine) -> None:
    """A snapshot `first` of OLD, and after it NEW, all published."""
    async with flushing(machine, quiet_seconds=3600) as flusher:
        a = machine.create("a")
        machine.write(a, 0, page("x") * 4)
        b = machine.create("b")
        machine.write(b, 0, page("y"))
        await create(flusher, "first")
        machine.write(a, 1, page("z") * 2)
        machine.write(machine.create("c"), 0, page("c") * 20)
        machine.unlink("b", b)
        await flusher.sync()


def local_files(machine: FlushMachine) -> dict[str, bytes]:
    """What an application on the machine would read."""
    rows = restore(machine.world).rows
    names = {key[8:].decode(): int.from_bytes(row[:8], "little") for key, row in rows[Table.ENTRIES].items()}
    return {name: machine.content(number) for name, number in names.items()}


def positions(world: World) -> list[tuple[Owner, int]]:
    """Owner and generation of every head on the backends, but those of the mount that formatted."""
    keys = {key for store in world.control for key in list(store.keys())}
    named = [named.ref for key in keys if (named := parse_head_key(key))]
    return [(ref.owner, ref.generation) for ref in named if ref.owner.epoch > 1]


async def test_the_newest_generation_is_exactly_the_snapshot(world: World, machine: FlushMachine, clock: MockClock):
    """Row by row; under a number above all others; what was left is a snapshot that holds all of it."""
    await two_states(machine)
    snapshot = pinned(world)["first"]
    before = restore(world)
    report = await roll_back(machine, "first")
    after = restore(world)
    assert after.rows == snapshot.rows and after.files == OLD
    assert after.head.generation == report.base.generation > before.head.generation
    for head in (before.head, snapshot.head):
        assert all(after.head.counters[name] >= value for name, value in head.counters.items())
    assert {name: image.files for name, image in pinned(world).items()} == {"first": OLD, "left": NEW}
    store = Store(machine.directory, LIMITS, machine.clock)
    assert store.write_number > before.head.write_number
    assert not unpublished(store.environment, machine.clock)
    store.close()
    assert not (machine.directory / "restoring").exists()


async def test_what_is_written_after_it_lies_on_the_snapshot_alone(
    world: World, machine: FlushMachine, clock: MockClock
):
    """No page, name or size of what was left comes back, here or elsewhere."""
    await two_states(machine)
    await roll_back(machine, "first")
    async with flushing(machine, quiet_seconds=3600) as flusher:
        assert local_files(machine) == OLD
        a = machine.inode(2).number
        machine.write(a, 2, page("n"))
        d = machine.create("d")
        machine.write(d, 19, page("d"))
        await flusher.sync()
        expected = {**OLD, "a": page("x") * 2 + page("n") + page("x"), "d": bytes(19 * PAGE) + page("d")}
        assert restore(world).files == local_files(machine) == expected
        assert pinned(world)["left"].files == NEW
    await roll_back(machine, "left", "again")
    assert restore(world).files == NEW
    assert pinned(world)["again"].files == expected


@pytest.mark.parametrize(("point", "turn", "left"), DEATHS, ids=[f"{point}-{turn}" for point, turn, _ in DEATHS])
async def test_whoever_dies_has_the_old_state_or_the_new_and_can_do_it_again(
    world: World, machine: FlushMachine, clock: MockClock, point: str, turn: int, left: dict[str, bytes]
):
    """The next mount has one of them whole, on the backends as well as here, and every snapshot; again, it succeeds."""
    await two_states(machine)
    hits = 0

    def die() -> None:
        nonlocal hits
        hits += 1
        if hits == turn:
            crash()

    failpoints.arm(point, die)
    with pytest.raises(BaseException):  # noqa: B017 - a crash, however it is wrapped
        await roll_back(machine, "first")
    failpoints.disarm_all()
    assert hits >= turn

    async with flushing(machine, quiet_seconds=3600) as flusher:
        await trio.sleep(60)
        assert restore(world).files == local_files(machine) == left
        machine.write(machine.create("d"), 0, page("d"))
        await flusher.sync()
        assert restore(world).files == left | {"d": page("d")}
        kept = {name: image.files for name, image in pinned(world).items()}
        assert kept["first"] == OLD
        assert kept.get("left", left) == NEW, "what is left is kept before it is left"
    await roll_back(machine, "first", "once more")
    async with flushing(machine) as flusher:
        await flusher.sync()
        assert restore(world).files == local_files(machine) == OLD
        assert pinned(world)["once more"].files == left | {"d": page("d")}
    assert len(set(positions(world))) == len(positions(world)), "a generation's number was used twice"


@pytest.mark.parametrize("point", ["rollback.replaced", "rollback.left"])
async def test_it_can_be_repeated_without_a_mount(world: World, machine: FlushMachine, clock: MockClock, point: str):
    """The command alone, again and again, comes to its end."""
    await two_states(machine)
    failpoints.arm(point, crash)
    for turn in range(2):
        with pytest.raises(BaseException):  # noqa: B017
            await roll_back(machine, "first", f"left{turn}")
    failpoints.disarm_all()
    store = Store(machine.directory, LIMITS, machine.clock)
    assert not unpublished(store.environment, machine.clock), "so the command does not refuse"
    store.close()
    await roll_back(machine, "first", "last")
    assert restore(world).files == OLD
    assert pinned(world)["left0"].files == NEW


async def test_a_generation_that_no_pin_holds_stays_until_it_is_the_newest(
    world: World, machine: FlushMachine, clock: MockClock
):
    """The head that pins what is left does not let go of what is gone back to."""
    await two_states(machine)
    newest = newest_head(world)
    assert newest is not None
    unpinned = [kept for kept in newest[1].kept if not kept.pins]
    number = str(unpinned[-1].head.generation)
    expected = _image(world, unpinned[-1].head)
    failpoints.arm("rollback.left", crash)
    with pytest.raises(BaseException):  # noqa: B017
        await roll_back(machine, number)
    failpoints.disarm_all()
    await roll_back(machine, number, "again")
    assert restore(world).rows == expected.rows


async def test_the_local_state_is_kept_aside_where_that_is_wanted(
    world: World, machine: FlushMachine, clock: MockClock
):
    """What was never published is all there, as it was, beside the cache."""
    await two_states(machine)
    async with flushing(machine, quiet_seconds=3600) as flusher:
        await flusher.sync()
        only_here = machine.create("here")
        machine.write(only_here, 0, page("h"))
        machine.committer.commit_now()
    aside = machine.directory.with_name("aside")
    report = await roll_back(machine, "first", aside=aside)
    assert report.aside == aside
    store = Store(aside, LIMITS, machine.clock)
    assert bytes(store.blocks.pages(only_here, 0, 1)[0] or b"") == page("h")
    store.close()
    assert restore(world).files == OLD


async def test_no_second_name_of_a_store_stays_that_was_not_replaced(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """What lies aside is durable before the store goes, and gone where it does not go."""
    aside = machine.directory.with_name("aside")
    flushed: list[Path] = []
    flush = rollback_module.flush_directory
    monkeypatch.setattr(rollback_module, "flush_directory", lambda path: flushed.append(path) or flush(path))

    def fail(building: Path, directory: Path) -> None:
        assert (aside / "data.mdb").samefile(directory / "data.mdb")
        assert flushed == [aside, aside.parent]
        raise CacheError("the store cannot be put in place")

    await two_states(machine)
    with monkeypatch.context() as patch:
        patch.setattr(rollback_module, "put_in_place", fail)
        with pytest.raises(CacheError, match="put in place"):
            await roll_back(machine, "first", aside=aside)
    assert not aside.exists()
    await roll_back(machine, "first", "again", aside=aside)
    assert (aside / "data.mdb").exists() and restore(world).files == OLD


@pytest.mark.parametrize("error", [BackendError("gone"), Corrupt("a head is damaged"), FormatMismatch("newer")])
async def test_what_a_backend_answers_ends_no_rollback(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch, error: QsfsError
):
    """The same head is sent again: it may be on some backend already."""
    publish = SimplePublisher.publish
    calls = 0

    async def publish_at_the_second_try(self: SimplePublisher, head: Head, *, deadline_seconds: float) -> Any:
        nonlocal calls
        calls += 1
        result = await publish(self, head, deadline_seconds=deadline_seconds)
        if calls in (2, 4):
            raise error
        return result

    await two_states(machine)
    monkeypatch.setattr(SimplePublisher, "publish", publish_at_the_second_try)
    await roll_back(machine, "first")
    assert calls == 5 and restore(world).files == OLD
    assert len(set(positions(world))) == len(positions(world))


async def test_a_store_that_cannot_be_built_ends_it_before_the_head_is_sent(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """That is no answer of a backend: sent without its store, the head would leave this machine behind it."""

    def fail(*_: Any, **__: Any) -> None:
        raise Corrupt("no root directory")

    await two_states(machine)
    with monkeypatch.context() as patch:
        patch.setattr(rollback_module.Rebuild, "finish", fail)
        with pytest.raises(Corrupt):
            await roll_back(machine, "first")
    assert restore(world).files == NEW


async def test_a_full_disk_changes_nothing(world: World, machine: FlushMachine, clock: MockClock):
    """An error while the new store is made leaves the old one, and the head that was not sent is never missed."""

    def fail() -> None:
        raise CacheError("no space left on device")

    await two_states(machine)
    failpoints.arm("restore.derived", fail)
    with pytest.raises(CacheError):
        await roll_back(machine, "first")
    failpoints.disarm_all()
    async with flushing(machine) as flusher:
        await flusher.sync()
        assert restore(world).files == local_files(machine) == NEW
    assert not (machine.directory / "restoring").exists(), "it would take room from the cache"


async def test_metadata_that_cannot_be_read_change_nothing(world: World, machine: FlushMachine, clock: MockClock):
    """Not even a snapshot is made: it can be tried as often as one likes."""
    await two_states(machine)
    for backend in machine.backends[:5]:
        backend.down = True
    with pytest.raises(Unavailable, match="try again"):
        await roll_back(machine, "first")
    assert set(pinned(world)) == {"first"}
    for backend in machine.backends:
        backend.down = False
    await roll_back(machine, "first")
    assert restore(world).files == OLD


async def test_what_is_not_published_is_counted(machine: FlushMachine, clock: MockClock):
    """Contents and names; nothing after a generation of them, and what cannot be uploaded is not waited for."""

    def count() -> Unpublished:
        return unpublished(machine.store.environment, machine.clock)

    async with flushing(machine, quiet_seconds=3600) as flusher:
        await flusher.sync()
        assert not count()
        machine.write(machine.create("a"), 0, page("x") * 3)
        machine.committer.commit_now()
        assert count().bytes == 3 * PAGE and count().changes >= 2
        await flusher.sync()
        assert not count()
        machine.create("b", flags=int(InodeFlag.LOCAL_ONLY))
        machine.committer.commit_now()
        assert count().bytes == 0 and count().changes


async def test_what_is_never_uploaded_is_lost_only_where_it_is_little_or_that_is_wanted(
    machine: FlushMachine, clock: MockClock
):
    """No generation can ever hold it: a sync changes nothing.  Lock files are no reason to refuse."""

    def count() -> Unpublished:
        return unpublished(machine.store.environment, machine.clock)

    async with flushing(machine, quiet_seconds=3600) as flusher:
        machine.create("empty", flags=int(InodeFlag.LOCAL_ONLY))
        await flusher.sync()
        assert not count()
        number = machine.create("b", flags=int(InodeFlag.LOCAL_ONLY))
        machine.write(number, 0, page("l") * 2)
        await flusher.sync()
        assert count() == Unpublished(0, 0, 1, 2 * PAGE) and count()
        refuse_to_lose(machine.directory, count())
        for step in range(16):
            machine.write(number, 2 + step * 16, page("l") * 16)
        await flusher.sync()
        assert count() == Unpublished(0, 0, 1, 258 * PAGE)
        with pytest.raises(CacheError, match=r"1\.0 MiB in 1 file with the policy local_only.*--set-aside"):
            refuse_to_lose(machine.directory, count())


def _image(world: World, ref: HeadRef) -> Image:
    key = head_key(world.keys.fsid, ref)
    value = next(value for store in world.control if (value := store.peek(key)))
    return restore(world, open_head(key, value, world.keys))
