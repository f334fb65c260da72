"""Following without a mount: one switch between two requests, tags, and which images stay."""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pyfuse3
import pytest
import trio

from qsfs.config import Config
from qsfs.daemon import following
from qsfs.daemon.following import MOST_IMAGES, SHARES, Follower
from qsfs.daemon.image import Image, build
from qsfs.daemon.sightings import Sightings
from qsfs.errors import GenerationExpired, Unavailable
from qsfs.format.head import KeptGeneration
from qsfs.fuse.generations import TAG_SHIFT
from qsfs.remote.control import Records
from qsfs.remote.images import image_directory, remove_others, template_directory
from qsfs.remote.inherit import Donor
from qsfs.remote.readable import Published
from qsfs.remote.source import find_source
from qsfs.remote.survey import Timing
from qsfs.remote.template import Template
from qsfs.store.schema import PAGE, PackRow, Table
from tests.remote.small_fs import LIMITS, SECRET, SmallFs, noise

TIMING = Timing(attempt=2.0, retry=0.01, retry_most=0.02, grace=0.2)
CONFIG = Config(Path("/nowhere/qsfs.toml"))
ROOT = pyfuse3.InodeT(pyfuse3.ROOT_INODE)


class Machines:
    """A writer, and a follower of it whose steps the test makes."""

    def __init__(self, fs: SmallFs, directory: Path) -> None:
        self.fs = fs
        self.directory = directory
        self.generation = 0
        self.kept: list[KeptGeneration] = []

    def publish(self) -> None:
        """One more generation, which keeps the two before it."""
        self.generation += 1
        self.fs.publish(self.generation, kept=tuple(self.kept[-2:]))
        self.kept.append(KeptGeneration(self.fs.sealed.ref, self.generation, ()))

    async def begin(self) -> None:
        remove_others(self.directory, ())
        source = await find_source(self.fs.candidates(), secret=SECRET, clock=self.fs.clock, timing=TIMING)
        self.sightings = Sightings(
            source.members,
            Records(source.keys),
            source.superblock.code,
            self.fs.clock,
            TIMING,
            Published(source.found.ref, source.found.head),
        )

        def make(place, of, tag):
            return Image(
                place, of, LIMITS, CONFIG, self.fs.clock, self.fs.reader(), lambda name: 0, self.sightings.expired, tag
            )

        place = image_directory(self.directory, source.found.ref, LIMITS.map_bytes)
        await build(place, source, LIMITS, self.fs.clock, deadline_seconds=5.0)
        template = Template(template_directory(self.directory), LIMITS.map_bytes)
        self.follower = Follower(
            make(place, source, 1), source, self.directory, LIMITS, self.fs.clock, self.sightings, TIMING, make,
            template, xattr=False, deadline_seconds=5.0,
        )  # fmt: skip
        self.operations = self.follower.operations

    async def step(self, nursery: trio.Nursery) -> int:
        """Looks, lets the follower make a step, and returns the generation shown."""
        await self.sightings.look()
        await self.follower.step(nursery)
        return self.follower.current.ref.generation

    async def open(self, name: bytes) -> tuple[int, pyfuse3.FileHandleT]:
        """Walks to a file at the root and opens it: its inode, as the kernel knows it, and the handle."""
        found = (await self.operations.lookup(ROOT, name, None)).st_ino
        return found, (await self.operations.open(found, 0, None)).fh


@pytest.fixture
def machines(scratch, monkeypatch):
    @asynccontextmanager
    async def made():
        monkeypatch.setattr(following, "_REST", 0.0)
        fs = await SmallFs.make(scratch / "fs")
        fs.add_superblock()
        (scratch / "reader").mkdir()
        both = Machines(fs, scratch / "reader")
        both.number = fs.remote_file("a", noise(4 * PAGE))
        both.publish()
        await both.begin()
        async with trio.open_nursery() as nursery:
            await nursery.start(both.follower.serve, both.follower.current)
            both.nursery = nursery
            yield both
            nursery.cancel_scope.cancel()
        for one in (*both.follower.images, *both.follower.donors):
            one.store.close()
        fs.close()

    return made


def rewrite(both: Machines) -> bytes:
    """Other bytes for the file, in one more generation."""
    data = noise(4 * PAGE)[::-1][: 3 * PAGE] + bytes((both.generation,)) * PAGE
    both.fs.overwrite(both.number, 0, data)
    both.fs.commit()
    both.fs.upload(both.number)
    both.fs.evict(both.number)
    both.publish()
    return data


async def test_a_walk_after_a_move_sees_the_new_generation_and_a_handle_the_old(machines):
    async with machines() as both:
        old_inode, handle = await both.open(b"a")
        new = rewrite(both)
        assert await both.step(both.nursery) == 2
        new_inode, fresh = await both.open(b"a")
        assert (old_inode >> TAG_SHIFT, new_inode >> TAG_SHIFT) == (1, 2), "the kernel keeps nothing of the old"
        assert await both.operations.read(fresh, 0, 4 * PAGE) == new
        # It was not read before: its bytes come from the backends now.
        assert await both.operations.read(handle, 0, 4 * PAGE) == noise(4 * PAGE)
        assert (await both.operations.getattr(old_inode, None)).st_ino == old_inode


async def test_the_kernel_asks_for_what_hangs_at_the_root_each_time_and_keeps_the_rest(machines):
    """Without the first a walk would see an old generation for an hour; without the second it would be slow."""
    async with machines() as both:
        entry = await both.operations.lookup(ROOT, b"a", None)
        assert entry.entry_timeout == 0 and entry.attr_timeout > 1000
        assert (await both.operations.lookup(ROOT, b"none", None)).entry_timeout == 0
        root = await both.operations.getattr(ROOT, None)
        assert (root.st_ino, root.attr_timeout) == (pyfuse3.ROOT_INODE, 0)
        directory = both.fs.create("d", mode=0o040755)
        both.fs.create("inside", parent=directory)
        both.fs.commit()
        both.publish()
        await both.step(both.nursery)
        inner = (await both.operations.lookup(ROOT, b"d", None)).st_ino
        below = await both.operations.lookup(inner, b"inside", None)
        assert below.entry_timeout > 1000 and below.attr_timeout > 1000 and below.st_ino >> TAG_SHIFT == 2
        assert (await both.operations.lookup(inner, b"none", None)).entry_timeout > 1000


async def test_an_older_image_goes_with_its_last_handle_and_lookup(machines):
    async with machines() as both:
        inode, handle = await both.open(b"a")
        first = both.follower.current.directory
        rewrite(both)
        await both.step(both.nursery)
        await both.operations.forget([(inode, 1)])
        await both.step(both.nursery)
        assert len(both.follower.images) == 2 and first.exists(), "it is open"
        await both.operations.release(handle)
        await both.step(both.nursery)
        assert len(both.follower.images) == len(both.follower.donors) == 1
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await both.operations.getattr(inode, None)
        assert caught.value.errno == errno.ESTALE
        # The kernel's word for it may come as late as it likes.
        await both.operations.forget([(inode, 1)])
        for _ in range(MOST_IMAGES):
            rewrite(both)
            await both.step(both.nursery)
        assert not first.exists(), "others needed the room"
        assert len(both.follower.images) + len(both.follower.donors) == MOST_IMAGES


async def read(both: Machines, name: bytes, size: int) -> bytes:
    """Opens, reads and closes a file in the generation that is shown."""
    inode, handle = await both.open(name)
    found = await both.operations.read(handle, 0, size)
    await both.operations.release(handle)
    await both.operations.forget([(inode, 1)])
    return found


async def test_what_was_read_before_a_move_and_is_the_same_is_not_fetched_again(machines):
    """Also two generations later; what changed is, and of a file that changed in part the rest is not."""
    async with machines() as both:
        both.fs.remote_file("same", noise(70 * PAGE))
        both.publish()
        await both.step(both.nursery)
        assert await read(both, b"same", 70 * PAGE) == noise(70 * PAGE)
        assert await read(both, b"a", 4 * PAGE) == noise(4 * PAGE)
        for _ in range(2):
            new = rewrite(both)
            await both.step(both.nursery)
            await both.step(both.nursery)
        fetcher, inheritance = both.follower.current.fetcher, both.follower.current.inheritance
        gets = fetcher.reader.counts.gets
        assert await read(both, b"same", 70 * PAGE) == noise(70 * PAGE)
        assert (fetcher.fetched_pages, fetcher.reader.counts.gets) == (0, gets)
        assert inheritance.pages == 70
        assert await read(both, b"a", 4 * PAGE) == new
        assert fetcher.fetched_pages == 4


async def test_what_is_fetched_ahead_of_a_reader_is_taken_over_too(machines):
    """A stream that meets what changed does not fetch again what did not."""
    async with machines() as both:
        number = both.fs.remote_file("long", noise(1024 * PAGE))
        both.publish()
        await both.step(both.nursery)
        assert await read(both, b"long", 1024 * PAGE) == noise(1024 * PAGE)
        for page in range(0, 1024, 256):
            both.fs.overwrite(number, page, b"n" * PAGE)
        both.fs.commit()
        both.fs.upload(number)
        both.publish()
        await both.step(both.nursery)
        _, handle = await both.open(b"long")
        for page in range(0, 1024, 32):
            found = await both.operations.read(handle, page * PAGE, 32 * PAGE)
            wanted = bytearray(noise(1024 * PAGE)[page * PAGE : (page + 32) * PAGE])
            if not page % 256:
                wanted[:PAGE] = b"n" * PAGE
            assert found == wanted
        await both.operations.release(handle)
        assert both.follower.current.fetcher.fetched_pages == 4


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("parts", [(0, 28), (28, 64), (0, 64)])
async def test_the_parts_of_an_extent_that_was_split_each_have_their_own_bytes(machines, monkeypatch, full, parts):
    """A page in its middle was overwritten; an older image has one part of it, or both, and there may be no room."""
    async with machines() as both:
        number = both.fs.remote_file("split", noise(64 * PAGE))
        both.publish()
        await both.step(both.nursery)
        assert await read(both, b"split", 64 * PAGE) == noise(64 * PAGE)
        older = both.follower.current
        inode = older.store.inode(number)
        for block in range(16):
            if not parts[0] <= 4 * block < parts[1]:
                older.store.blocks.evict(inode, block, 15)
        both.fs.overwrite(number, 28, b"n" * PAGE)
        both.fs.commit()
        both.fs.upload(number)
        both.publish()
        await both.step(both.nursery)
        current = both.follower.current
        assert [row.pages for row in current.store.extents.overlapping(number, 24, 32)] == [4, 1, 3]
        if full:
            monkeypatch.setattr(current.store, "expected_bytes", lambda: 1 << 40)
        wanted = noise(64 * PAGE)[: 28 * PAGE] + b"n" * PAGE + noise(64 * PAGE)[29 * PAGE :]
        _, handle = await both.open(b"split")
        found: dict[int, bytes] = {}

        async def some(first: int, count: int) -> None:
            found[first] = await both.operations.read(handle, first * PAGE, count * PAGE)

        async with trio.open_nursery() as readers:
            for first, count in ((29, 3), (0, 64), (20, 30), (25, 2)):
                readers.start_soon(some, first, count)
        for first, data in found.items():
            assert data == wanted[first * PAGE : first * PAGE + len(data)] and data
        assert len(found[0]) == 64 * PAGE
        await both.operations.release(handle)


async def test_an_extent_of_another_pack_under_the_same_number_is_not_taken(machines):
    """Two lines of a file system count packs alike: what says which pack it is, is its id."""
    async with machines() as both:
        assert await read(both, b"a", 4 * PAGE) == noise(4 * PAGE)
        both.fs.create("b")
        both.fs.commit()
        both.publish()
        await both.step(both.nursery)
        store = (both.follower.images + both.follower.donors)[0].store
        assert store is not both.follower.current.store
        ((key, row),) = store.scan(Table.PACKS, b"", None)
        store.layers.put(Table.PACKS, key, replace(PackRow.decode(row), pack_id=b"another pack's..").encode())
        fetcher = both.follower.current.fetcher
        assert await read(both, b"a", 4 * PAGE) == noise(4 * PAGE)
        assert fetcher.fetched_pages == 4 and not both.follower.current.inheritance.pages


async def test_what_an_earlier_mount_left_of_the_very_next_generation_is_opened_as_it_is(machines):
    """It had shown it already, and the backends that held its head were silent at the start."""
    async with machines() as both:
        rewrite(both)
        assert await both.step(both.nursery) == 2
        newer = both.follower.images.pop()
        scope, ended = both.follower._scopes.pop(newer)
        scope.cancel()
        await ended.wait()
        both.follower.donors.append(Donor(newer.store, newer.directory, 0))
        assert await both.step(both.nursery) == 2
        assert both.follower.current.directory == newer.directory and not both.follower.donors


async def test_what_is_damaged_in_an_older_image_is_fetched(machines):
    """Its checksums are asked as for any read."""
    async with machines() as both:
        assert await read(both, b"a", 4 * PAGE) == noise(4 * PAGE)
        older = both.follower.current
        await older.commit()
        both.fs.create("b")
        both.fs.commit()
        both.publish()
        await both.step(both.nursery)
        values = older.store.environment.databases[Table.VALUES]
        with older.store.environment.write() as txn:
            (key, value), *_ = list(txn.cursor(values))
            txn.put(bytes(key), bytes([value[0] ^ 1]) + bytes(value)[1:], db=values)
        older.store.layers.renew_view()
        assert await read(both, b"a", 4 * PAGE) == noise(4 * PAGE)
        assert both.follower.current.fetcher.fetched_pages == 4


async def test_what_is_only_known_makes_room_and_what_is_open_does_not(machines, expect_log):
    """The bound holds whatever is open; an open file never loses its generation."""
    expect_log("stays at generation")
    async with machines() as both:
        handles = []
        for generation in range(1, MOST_IMAGES + 1):
            handles.append(await both.open(b"a"))
            rewrite(both)
            moved = await both.step(both.nursery)
            assert moved == min(generation + 1, MOST_IMAGES)
        assert "open files of older generations (1, 2, 3)" in both.follower.held
        assert len(list((both.directory / "readers").iterdir())) == SHARES
        inode, handle = handles[0]
        assert len(await both.operations.read(handle, 0, PAGE)) == PAGE
        await both.operations.release(handle)
        # The kernel still knows names in it, and that is no reason to stay.
        assert await both.step(both.nursery) == MOST_IMAGES + 1
        assert not both.follower.held and len(both.follower.images) == MOST_IMAGES
        with pytest.raises(pyfuse3.FUSEError):
            await both.operations.getattr(inode, None)


async def test_a_move_that_fails_leaves_all_as_it_was_and_is_tried_again(machines, monkeypatch, expect_log):
    expect_log("cannot move to generation 2")
    async with machines() as both:
        rewrite(both)

        async def no_build(*_: object, **__: object) -> None:
            raise Unavailable("metadata do not come")

        with monkeypatch.context() as broken:
            broken.setattr(following, "build", no_build)
            assert await both.step(both.nursery) == 1
        assert both.follower.error == "metadata do not come"
        assert len(list((both.directory / "readers").iterdir())) == 1
        assert await both.step(both.nursery) == 2 and not both.follower.error


async def test_sightings_outlast_silence_and_tell_what_is_not_kept(machines):
    async with machines() as both:
        first = both.follower.current.ref
        for _ in range(3):
            rewrite(both)
        await both.sightings.look()
        assert both.sightings.newest.ref.generation == 4
        assert both.sightings.gone_since(first) is not None
        told = await both.sightings.expired(first)
        assert isinstance(told, GenerationExpired)
        assert str(told).startswith("generation 1 expired: generation 4 is published")
        assert await both.sightings.expired(both.kept[1].head) is None
        for connection in both.fs.connections.values():
            connection.down = True
        for member in both.follower._source.members:
            member.control.down = True
        await both.sightings.look()
        assert both.sightings.error and both.sightings.newest.ref.generation == 4
