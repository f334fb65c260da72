"""Moving to another generation by what differs: every image is the one that a restore makes, row by row.

Nothing is assumed of what lies between two generations: the histories merge deltas, read ranges anew, crash, are
taken over and rolled back, and the follower looks now and then.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from trio.testing import MockClock

from qsfs import failpoints
from qsfs.daemon.image import build
from qsfs.errors import CacheError, Unavailable
from qsfs.format.head import Head, HeadRef, MetadataPack, SealedHead, head_key, open_head
from qsfs.format.rows import decode_rows
from qsfs.remote import template as module
from qsfs.remote.advance import Advance, NotAdvanced
from qsfs.remote.chain import Merge, Refresh
from qsfs.remote.difference import difference
from qsfs.remote.image import packs_of
from qsfs.remote.merge import MergeUpload
from qsfs.remote.metadata import RefreshUpload
from qsfs.remote.rebuild import Rebuild
from qsfs.remote.source import Source
from qsfs.remote.template import Template
from qsfs.store.environment import Environment
from qsfs.store.schema import ROOT_INODE, Entry, ExtentRow, Inode, Table, u64, u64_pair
from tests.remote.flush_history import File
from tests.remote.flush_machine import LIMITS, DirectReader, FlushMachine, newest_head, read_metadata
from tests.remote.flushing import page
from tests.remote.harness import World, make_world
from tests.remote.test_collect_history import CollectingHistory

FOREVER = 1e12
Everything = dict[Table, dict[bytes, bytes]]


def source_at(machine: FlushMachine, ref: HeadRef) -> Source:
    """A generation on the backends of a machine, as a reader finds it."""
    world = machine.world
    key = head_key(world.keys.fsid, ref)
    value = next(v for store in world.control if (v := store.peek(key)) is not None)
    head = open_head(key, value, world.keys)
    return cast(
        "Source",
        SimpleNamespace(
            members=machine.members(),
            keys=world.keys,
            superblock=SimpleNamespace(code=world.code),
            found=SimpleNamespace(head=head, ref=ref),
            sealed=SealedHead(key, value, ref),
        ),
    )


def newest(machine: FlushMachine) -> Source:
    found = newest_head(machine.world)
    assert found is not None
    return source_at(machine, found[0])


def restored(world: World, source: Source, directory: Path) -> Path:
    """The image of a generation as a restore makes it."""
    directory.mkdir()
    rebuild = Rebuild(directory, LIMITS.map_bytes, 1)
    rebuild.exact = True
    for pack, counting in packs_of(source.found.head):
        for chunk in read_metadata(world, pack):
            rebuild.load(counting.of(decode_rows(chunk)))
    rebuild.finish(source.found.head, source.sealed)
    rebuild.close()
    return directory


def rows_in(directory: Path) -> Everything:
    environment = Environment(directory, LIMITS.map_bytes, readonly=True)
    view = environment.read()
    try:
        return {t: {key: bytes(value) for key, value in view.scan(t, b"", None)} for t in Table}
    finally:
        view.close()
        environment.close()


class Follower:
    """Keeps a template at the newest generation; each time it must be what a restore makes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.template = Template(directory / "template", LIMITS.map_bytes)
        self.moves = self.restores = 0
        directory.mkdir()

    async def follow(self, machine: FlushMachine) -> None:
        source = newest(machine)
        number = self.moves + self.restores
        image = restored(machine.world, source, self.directory / f"restored {number}")
        copy = self.directory / f"copied {number}"
        copy.mkdir()
        try:
            await self.template.move(source, deadline_seconds=FOREVER)
            self.moves += 1
        except NotAdvanced:
            self.template.take(image, source.found.head)
            self.restores += 1
        self.template.copy_to(copy)
        found, expected = rows_in(copy), rows_in(image)
        for table in Table:
            assert found[table] == expected[table], f"{table.name} differs at generation {source.found.ref.generation}"


class FollowedHistory(CollectingHistory):
    """A history that is followed.  Nothing is deleted: what a reader may still need is another test's."""

    def __init__(self, world: World, directory: Path, seed: int) -> None:
        super().__init__(world, directory, seed)
        self.follower = Follower(directory.with_name("reader"))

    async def cut(self) -> None:
        await super().cut()
        if self.random.random() < 0.6:
            self.trace.append("follow")
            await self.follower.follow(self.machine)

    async def collect(self) -> None:
        """Not here."""

    def forget_late(self) -> None:
        """Not here."""

    def xattr(self, name: str, file: File) -> None:
        if self.random.random() < 0.5:
            super().xattr(name, file)
        else:
            self.rename(name, file)

    def rename(self, name: str, file: File) -> None:
        """To a name that is new or that another file had; the entry may keep its cookie."""
        machine, r = self.machine, self.random
        new = f"f{r.randrange(1, self.names + 2)}"
        if new in self.model.files:
            return
        self.trace.append(f"rename {name} {new}")
        root = machine.inode(ROOT_INODE)
        key = u64(ROOT_INODE) + name.encode()
        row = machine.store.get(Table.ENTRIES, key)
        assert row is not None
        entry = Entry.decode(row)
        with machine.store.change() as change:
            change.delete(Table.ENTRIES, key)
            change.delete(Table.COOKIES, u64_pair(ROOT_INODE, entry.cookie))
            if r.random() < 0.5:
                entry = dataclasses.replace(entry, cookie=root.next_cookie)
                change.patch(ROOT_INODE, next_cookie=root.next_cookie + 1)
            change.put(Table.ENTRIES, u64(ROOT_INODE) + new.encode(), entry.encode())
            change.put(Table.COOKIES, u64_pair(ROOT_INODE, entry.cookie), new.encode())
        self.model.files[new] = self.model.files.pop(name)
        self.names += 1


SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 150))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_image_is_the_one_that_a_restore_makes(
    tmp_path: Path, autojump_clock, monkeypatch, seed: int
) -> None:
    monkeypatch.setattr(module, "_check_worth", lambda found, head: None)
    history = FollowedHistory(await make_world(5, k=2, m=2), tmp_path / "machine 1", seed)
    try:
        for _ in range(3):
            await history.run(mounts=2, steps=60)
            chance = history.random.random()
            if chance < 0.35:
                history.roll_back()
            elif chance < 0.75:
                history.move()
    except BaseException:
        print(f"seed {seed}:", " | ".join(history.trace))
        raise
    assert history.follower.moves >= history.follower.restores - 1, "hardly anything was by what differs"


class Writer:
    """A machine that writes, whose metadata lie in several ranges, and a template of its newest generation."""

    def __init__(self, machine: FlushMachine, directory: Path) -> None:
        self.machine = machine
        self.template = Template(directory / "template", LIMITS.map_bytes)
        self.directory = directory
        self.files: list[int] = []

    async def begin(self) -> None:
        for number in range(60):
            self.files.append(self.machine.create(f"file {number}"))
            self.machine.write(self.files[-1], 0, page("a"))
        await self.machine.cut()
        await self.refresh(0, None)
        await self.publish(0)
        self.template.take(self.restored(), newest(self.machine).found.head)

    def restored(self) -> Path:
        return restored(self.machine.world, newest(self.machine), self.directory / f"image {os.urandom(4).hex()}")

    async def refresh(self, first: int, last: int | None) -> None:
        """Reads some ranges anew; the next head lists that."""
        generations = self.machine.generations
        chain = generations.chain
        indexes = range(len(chain.ranges))[first:last]
        refresh = generations.renewal = Refresh(chain._stretches(indexes), 1000, chain.next_number)
        upload = RefreshUpload(self.machine.context, refresh)
        upload.pack_bytes = 2000
        await upload.run()

    async def publish(self, index: int) -> None:
        """One more generation, in which one file has other bytes."""
        self.machine.write(self.files[index], 0, page("b"))
        assert await self.machine.cut()

    async def move(self) -> None:
        await self.template.move(newest(self.machine), deadline_seconds=5.0)

    def check(self) -> None:
        """It is what a restore makes of the newest generation."""
        assert self.template.head == newest(self.machine).found.head
        copy = self.directory / f"copy {os.urandom(4).hex()}"
        copy.mkdir()
        self.template.copy_to(copy)
        assert rows_in(copy) == rows_in(self.restored())


@pytest.fixture
async def writer(tmp_path: Path, autojump_clock: MockClock) -> AsyncIterator[Writer]:
    machine = FlushMachine(await make_world(5, k=2, m=2), tmp_path / "machine")
    async with machine.mounted():
        made = Writer(machine, tmp_path)
        await made.begin()
        yield made


def read(old: Head, new: Head) -> set[bytes]:
    return {pack.ref.pack_id for pack, _ in difference(old, new).listed}


def ids(packs: Iterable[MetadataPack]) -> set[bytes]:
    return {pack.ref.pack_id for pack in packs}


async def test_only_what_is_new_is_read(writer: Writer) -> None:
    """A delta; a range that was read anew; merged deltas, with those that they replace. Nothing of the rest."""
    first = newest(writer.machine).found.head
    assert len(first.snapshot) > 5 and not read(first, first)
    for index in range(1, 4):
        await writer.publish(index)
    after = newest(writer.machine).found.head
    deltas = [ids(delta) for delta in after.deltas]
    assert read(first, after) == set().union(*deltas[len(first.deltas) :])

    generations = writer.machine.generations
    chain = generations.chain
    merge = generations.renewal = Merge(chain.deltas, chain.starts, tuple(part.since for part in chain.ranges))
    await MergeUpload(writer.machine.context, merge, DirectReader(writer.machine.world)).run()
    await writer.publish(4)
    merged = newest(writer.machine).found.head
    assert read(after, merged) == set().union(*deltas, *(ids(delta) for delta in merged.deltas))

    await writer.refresh(1, 2)
    await writer.publish(5)
    renewed = newest(writer.machine).found.head
    new = read(merged, renewed)
    assert ids(renewed.snapshot) - ids(merged.snapshot) < new and not new & ids(merged.snapshot)


async def test_of_a_range_that_was_read_anew_nothing_else_is_left(writer: Writer, monkeypatch) -> None:
    """What was deleted since is in no delta any more that the newest head lists."""
    monkeypatch.setattr(module, "_check_worth", lambda found, head: None)
    machine = writer.machine
    for index in (3, 4, 5, 40):
        machine.unlink(f"file {index}", writer.files[index])
    machine.truncate(writer.files[10], 0)
    assert await machine.cut()
    await writer.refresh(0, None)
    await writer.publish(20)
    old, new = writer.template.head, newest(machine).found.head
    assert old is not None and not ids(old.snapshot) & ids(new.snapshot) and len(new.deltas) == 1
    await writer.move()
    writer.check()


async def test_pages_of_a_file_that_is_there_again_are_counted(writer: Writer) -> None:
    """Its extents may have been there all the time: they are worked off later, and a rollback brings it back."""
    assert writer.template.head is not None
    environment = Environment(writer.directory / "template", LIMITS.map_bytes)
    number = writer.files[0]
    try:
        with environment.write() as txn:
            row = txn.get(u64(number), db=environment.databases[Table.INODES])
            before = rows_of_extents(environment, txn, number)
            advance = Advance(environment, txn)
            advance.put(Table.INODES, u64(number), None)
            advance.finish({})
            again = Advance(environment, txn)
            again.put(Table.INODES, u64(number), dataclasses.replace(Inode.decode(number, row), allocated=0).encode())
            again.finish({})
            found = Inode.decode(number, txn.get(u64(number), db=environment.databases[Table.INODES]))
            assert found.allocated == before == 1
    finally:
        environment.close()


def rows_of_extents(environment: Environment, txn: Any, number: int) -> int:
    """The pages that the extents of an inode have."""
    with txn.cursor(environment.databases[Table.EXTENTS]) as cursor:
        cursor.set_range(u64(number))
        return sum(ExtentRow.pages_and_pack(row)[0] for key, row in cursor.iternext() if key[:8] == u64(number))


async def test_a_difference_that_is_half_of_everything_is_a_restore(writer: Writer) -> None:
    """It would read no less, and hold it in memory."""
    await writer.refresh(0, None)
    await writer.publish(1)
    before = writer.template.head
    with pytest.raises(NotAdvanced, match="bytes differ"):
        await writer.move()
    assert writer.template.head is before


async def test_what_does_not_come_leaves_it_as_it_was(writer: Writer) -> None:
    before = writer.template.head
    await writer.publish(1)
    for backend in writer.machine.backends:
        backend.down = True
    with pytest.raises(Unavailable):
        await writer.move()
    assert writer.template.head is before
    for backend in writer.machine.backends:
        backend.down = False
    await writer.move()
    writer.check()


async def test_a_file_system_that_copies_nothing_by_itself_has_the_same_images(writer: Writer, monkeypatch) -> None:
    def copy(*_: object) -> int:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", copy)
    writer.check()
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    writer.check()


@pytest.mark.parametrize("point", ["template.applied", "template.copied"])
async def test_what_fails_half_way_is_no_image_and_no_template(writer: Writer, point: str) -> None:
    """An error of the disk while rows change: it is restored whole instead.  While it is copied: nothing is there."""

    def fail() -> None:
        failpoints.disarm(point)
        raise CacheError("no space left on device")

    await writer.publish(1)
    place = writer.directory / "place"
    make = partial(build, place, newest(writer.machine), LIMITS, writer.machine.clock, template=writer.template)
    failpoints.arm(point, fail)
    if point == "template.copied":
        with pytest.raises(CacheError):
            await make(deadline_seconds=5.0)
        assert not (place / "data.mdb").exists()
    await make(deadline_seconds=5.0)
    assert rows_in(place) == rows_in(writer.restored())
    writer.check()


async def test_what_a_restore_has_to_mend_is_left_to_restores(tmp_path: Path, writer: Writer) -> None:
    """Two entries with one cookie: neither a template nor moved to, and what there was stays as it was."""
    source = newest(writer.machine)
    (tmp_path / "mended").mkdir()
    rebuild = Rebuild(tmp_path / "mended", LIMITS.map_bytes, 1)
    rebuild.exact = True
    for pack, counting in packs_of(source.found.head):
        for chunk in read_metadata(writer.machine.world, pack):
            rebuild.load(counting.of(decode_rows(chunk)))
    rebuild.load([(Table.ENTRIES, u64(ROOT_INODE) + b"twin", Entry(writer.files[0], 3, 8).encode())])
    rebuild.finish(source.found.head, source.sealed)
    rebuild.close()
    other = Template(tmp_path / "other", LIMITS.map_bytes)
    other.take(tmp_path / "mended", source.found.head)
    assert other.head is None and not (tmp_path / "other").exists()

    store = writer.machine.store
    with store.change() as change:
        change.put(Table.ENTRIES, u64(ROOT_INODE) + b"twin", Entry(writer.files[0], 3, 8).encode())
    before = rows_in(tmp_path / "template")
    assert await writer.machine.cut()
    with pytest.raises(NotAdvanced, match="one cookie"):
        await writer.move()
    assert rows_in(tmp_path / "template") == before
