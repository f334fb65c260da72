"""A full cache: writers wait, nothing is refused, nothing grows without bound, nobody waits for ever."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from qsfs.clock import FixedClock
from qsfs.config import CacheConfig
from qsfs.daemon.committer import Committer
from qsfs.daemon.keeper import Keeper
from qsfs.daemon.space import DaemonSpace
from qsfs.errors import CacheError
from qsfs.filesystem.needs import NeedPages, NeedRoom
from qsfs.format.erasure import CodeParams
from qsfs.remote.ledger import Ledger
from qsfs.remote.members import Members
from qsfs.remote.pressure import room_may_come
from qsfs.store.environment import Environment, StoreFull
from qsfs.store.group import Group, Publication
from qsfs.store.limits import Limits
from qsfs.store.packs import add_pack
from qsfs.store.schema import BLOCK_PAGES, BLOCK_SIZE, PAGE, ExtentRow, PackRow, PackState, Table, split_u64_pair, u64
from qsfs.store.snapshot import CommittedState
from qsfs.store.store import NEXT_INODE, NEXT_PACK
from tests.core.machine import Machine, page
from tests.support.virtual_time import virtual_time


class TrioClock(FixedClock):
    """Running time is trio's, which may be virtual."""

    def monotonic(self) -> float:
        return trio.current_time()


SMALLEST = Limits.of(CacheConfig(size_bytes=32 << 20), 8 << 20)


@pytest.fixture
def clock() -> Iterator[MockClock]:
    """Time that runs ahead only while nothing is at work."""
    with virtual_time() as clock:
        yield clock


class Running:
    """A store with committer, keeper and, if wanted, backends that take what is dirty."""

    def __init__(self, machine: Machine, *, group_seconds: float = 5.0) -> None:
        self.machine = machine
        self.store = machine.store
        self.committer = Committer(machine.store, machine.contents, group_seconds)
        self.keeper = Keeper(machine.store, machine.contents, self.committer, TrioClock())
        self.most_open = 0
        self.most_used = 0

    async def write(self, number: int, first: int, data: bytes) -> None:
        """A WRITE as the handlers do it."""
        while True:
            try:
                self.machine.write(number, first, data)
            except NeedRoom:
                if self.committer.failed is not None:
                    raise self.committer.failed from None
                await self.keeper.room()
                continue
            except NeedPages as need:
                await self.fetch(need)
                continue
            self.most_open = max(self.most_open, self.store.layers.open.bytes)
            self.most_used = max(self.most_used, self.store.used_bytes)
            return

    async def read(self, number: int) -> bytes:
        parts = []
        size = self.machine.contents.stat(self.machine.inode(number)).size
        for offset in range(0, size, 64 * PAGE):
            while True:
                try:
                    parts.append(self.machine.contents.read(self.machine.inode(number), offset, 64 * PAGE))
                    break
                except NeedPages as need:
                    await self.fetch(need)
        return b"".join(parts)

    async def fetch(self, need: NeedPages) -> None:
        blocks = self.store.blocks
        for index in range(need.first, need.first + need.count):
            extent = blocks.remote_extent(need.inode, index)
            if extent is None:
                continue
            offset = (extent.skip + index - extent.first) * PAGE
            data = self.machine.remote[extent.pack][offset : offset + PAGE]
            if self.store.expected_bytes() < self.store.limits.full_bytes:
                blocks.install(self.machine.inode(need.inode), index, data, extent)
            else:
                self.machine.contents.transient.put(need.inode, index, data, extent)

    def stuck(self) -> bool:
        """Whether a writer waits for room that no commit and no eviction can make."""
        settled = self.store.layers.committing is None and not self.store.dirty
        full = self.store.expected_bytes() >= self.store.limits.full_bytes
        return settled and full and self.keeper.futile and self.keeper.waiting > 0

    async def upload(self) -> None:
        """Backends: what is dirty in the last commit becomes clean, for ever."""
        while True:
            if self.store.layers.view.count(Table.DIRTY):
                self._upload_some(256)
                await self.committer.commit()
            else:
                await trio.sleep(1)

    def _upload_some(self, most: int) -> None:
        store = self.store
        pack = store.next_number(NEXT_PACK)
        add_pack(store, pack, PackRow(bytes(16), bytes(32), 1, 1, 1, 0, 0, 0, 0, 0, 0, int(SAFE), ()))
        parts: list[bytes] = []
        for key, _ in list(itertools.islice(store.layers.view.scan(Table.DIRTY, b"", None), most)):
            number, block = split_u64_pair(key)
            inode, state = store.inode(number), store.blocks.state(number, block)
            if inode is None or state is None:
                continue
            for i in range(BLOCK_PAGES):
                index = block * BLOCK_PAGES + i
                if not state.dirty & 1 << i:
                    continue
                (data,) = store.blocks.pages(number, index, 1)
                assert data is not None
                write_number = state.writes[i]
                parts.append(bytes(data))
                assert store.blocks.clean(inode, index, (write_number,))
                row = ExtentRow(index, write_number, 1, len(parts) - 1, pack, 0, 0, 0, 0, 0)
                store.extents.insert(number, row)
        self.machine.remote[pack] = b"".join(parts)


SAFE = PackState.FULL | PackState.LOOKED


@asynccontextmanager
async def running(
    directory: Path, limits: Limits = SMALLEST, *, backends: bool = True, group_seconds: float = 5.0
) -> AsyncIterator[Running]:
    machine = Machine(directory, limits)
    live = Running(machine, group_seconds=group_seconds)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.committer.run)
        nursery.start_soon(live.keeper.run)
        if backends:
            nursery.start_soon(live.upload)
        yield live
        nursery.cancel_scope.cancel()
    machine.close()


async def test_a_full_group_is_sealed_at_once_and_bounds_memory(tmp_path: Path) -> None:
    """Writers fill group after group without an age in between; none grows past its bound by more than a write."""
    limits = replace(SMALLEST, map_bytes=64 << 20, full_bytes=48 << 20)
    async with running(tmp_path, limits, backends=False, group_seconds=10_000) as live:
        file = live.machine.create("a")
        before = live.committer.commits
        for turn in range(40):
            await live.write(file, turn * 64, page("a") * 64)
        assert live.most_open < limits.group_bytes + 64 * PAGE
        assert live.committer.commits - before >= 40 * 64 * PAGE // limits.group_bytes - 2


async def test_more_than_the_cache_holds_passes_through_it(tmp_path: Path, clock: MockClock) -> None:
    """Several writers write five times the cache's size; every byte is there, and LMDB never outgrew its map."""
    source = random.Random(3)
    async with running(tmp_path) as live:
        files = {live.machine.create(f"f{i}"): bytearray() for i in range(3)}
        total = 0
        while total < 5 * SMALLEST.full_bytes:
            number = source.choice(list(files))
            content = files[number]
            first = source.randrange(0, 1500)
            data = source.randbytes(PAGE * source.randrange(1, 60))
            await live.write(number, first, data)
            if len(content) < first * PAGE:
                content.extend(bytes(first * PAGE - len(content)))
            content[first * PAGE : first * PAGE + len(data)] = data
            total += len(data)
            if source.random() < 0.05:
                await live.committer.sync(number)
        for number, content in files.items():
            assert await live.read(number) == content
        assert live.keeper.evicted_bytes > SMALLEST.full_bytes
        assert live.most_used < SMALLEST.full_bytes + 3 * SMALLEST.group_bytes
        assert (tmp_path / "data.mdb").stat().st_size <= SMALLEST.map_bytes


async def test_writes_wait_while_nothing_is_granted_and_nothing_is_evicted_for_it(
    tmp_path: Path, clock: MockClock
) -> None:
    """Room is not what they wait for; each goes on with the first grant, and all once they are let go."""
    written: list[int] = []
    async with running(tmp_path) as live, trio.open_nursery() as nursery:
        number, allowance = live.machine.create("f"), live.store.allowance

        async def write() -> None:
            for first in range(4):
                await live.write(number, first, page("x"))
                written.append(first)

        allowance.hold_back()
        nursery.start_soon(write)
        await trio.sleep(600)
        assert not written
        assert not live.keeper.waiting
        allowance.grant(1, PAGE)
        await trio.sleep(600)
        assert written == [0], "it overdraws what was granted"
        allowance.grant(PAGE, PAGE)
        await trio.sleep(600)
        assert written == [0, 1]
        allowance.let_go()
        await trio.sleep(600)
        assert written == [0, 1, 2, 3]


async def test_what_is_read_at_a_start_stays_while_anything_else_can_go(tmp_path: Path, clock: MockClock) -> None:
    """Twice the cache's size is written and read beside it; what was not recorded of the same database goes."""
    async with running(tmp_path) as live:
        live.store.start.begin(60.0, 1000)
        database = live.machine.create("a.lmdb", atomic=True, opened=False)
        for first in range(0, 256, 64):
            await live.write(database, first, random.Random(first).randbytes(64 * PAGE))
        await live.committer.commit()
        recorded = list(range(1, 256, 20))
        for index in recorded:
            live.machine.page(database, index)
        stream = live.machine.create("stream")
        while live.keeper.evicted_bytes < 2 * SMALLEST.full_bytes:
            for first in range(0, 4096, 64):
                await live.write(stream, first, random.Random(first).randbytes(64 * PAGE))
                live.machine.contents.read(live.machine.inode(stream), first * PAGE, 64 * PAGE)
        is_resident = live.store.blocks.reader.is_resident
        assert all(is_resident(database, index) for index in recorded)
        assert sum(is_resident(database, index) for index in range(256)) <= len(recorded) * BLOCK_PAGES
        live.machine.clock.advance(60)
        await trio.sleep(2)
        await live.committer.commit()
        rows = [bytes(row) for _, row in live.store.scan(Table.START, b"", None)]
        assert rows == [sum(1 << index for index in recorded).to_bytes(-(-recorded[-1] // 8), "little")]


async def test_writers_wait_while_backends_are_away_and_go_on_when_they_return(
    tmp_path: Path, clock: MockClock
) -> None:
    """A cache full of dirty data: a WRITE waits, reads and fsyncs do not, and nothing is dropped."""
    async with running(tmp_path, backends=False) as live:
        file = live.machine.create("a")
        written = 0

        async def fill() -> None:
            nonlocal written
            for first in range(0, 6000, 60):
                await live.write(file, first, page("a") * 60)
                written += 60

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            while not live.stuck():
                await trio.sleep(0.3)
            stuck = written
            assert written < 6000
            await live.committer.sync(file)
            assert live.machine.page(file, 0) == page("a")
            assert (written, live.keeper.waiting) == (stuck, 1)
            with trio.CancelScope() as uploads:

                async def until_done() -> None:
                    while written < 6000:
                        await trio.sleep(1)
                    uploads.cancel()

                nursery.start_soon(until_done)
                await live.upload()
        assert await live.read(file) == page("a") * 6000


async def test_a_copy_larger_than_the_cache_onto_an_atomic_name_joins_with_an_alarm(
    tmp_path: Path, clock: MockClock, expect_log: Callable[..., None]
) -> None:
    """cp of a database larger than the cache: its sync could never come, so it is covered, and says so."""
    expect_log(r"the cache is full of what inode \d+ wrote since its last sync")
    async with running(tmp_path) as live:
        small = live.machine.create("small", atomic=True)
        await live.write(small, 0, page("s") * 30)
        copy = live.machine.create("copy", atomic=True)
        pages = 2 * SMALLEST.full_bytes // PAGE
        for first in range(0, pages, 64):
            await live.write(copy, first, bytes([1 + first // 64 % 250]) * (64 * PAGE))
        assert live.keeper.joined >= 1
        assert live.machine.contents.has_uncovered(small), "only the largest file joins"
        wanted = b"".join(bytes([1 + first // 64 % 250]) * (64 * PAGE) for first in range(0, pages, 64))
        assert await live.read(copy) == wanted
        live.machine.contents.closed(live.machine.inode(copy))
        await live.committer.commit()
        assert await live.read(copy) == wanted
        assert (tmp_path / "data.mdb").stat().st_size <= SMALLEST.map_bytes


@pytest.mark.parametrize("size", [48, 64])
async def test_scattered_writes_without_a_sync_end_too(
    tmp_path: Path, clock: MockClock, expect_log: Callable[..., None], size: int
) -> None:
    """Each page is promised a whole block, so room may be gone while hardly any is used: then the file joins."""
    expect_log("all of it is taken as synced now")
    limits = Limits.of(CacheConfig(directory=tmp_path, size_bytes=size << 20), 512 << 20)
    async with running(tmp_path, limits) as live:
        file = live.machine.create("a", atomic=True)
        calls = 0
        room = live.keeper.room

        async def counted() -> None:
            nonlocal calls
            calls += 1
            assert calls < 10_000, "who waits for room is woken for nothing"
            await room()

        live.keeper.room = counted  # type: ignore[method-assign]
        for block in range(2 * limits.full_bytes // BLOCK_SIZE):
            await live.write(file, block * BLOCK_PAGES, page("u"))
        assert live.keeper.joined


async def test_a_truncation_that_takes_long_holds_up_no_room(
    tmp_path: Path, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file of backends is removed while the cache is full of what may be evicted."""
    async with running(tmp_path) as live:
        file = live.machine.create("a")
        for first in range(0, SMALLEST.full_bytes // PAGE, 16):
            await live.write(file, first, page("x") * 16)
        steps = 0

        def without_end(most: int) -> bool:
            nonlocal steps
            steps += 1
            clock.jump(0.01)
            return False

        monkeypatch.setattr(live.store, "work_off_truncations", without_end)
        with trio.fail_after(600):
            for first in range(0, SMALLEST.full_bytes // PAGE, 16):
                await live.write(file, 1 << 20 | first, page("y") * 16)
        assert steps


async def test_names_are_refused_only_once_what_is_only_written_was_evicted_too(
    tmp_path: Path, clock: MockClock, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[..., None]
) -> None:
    """A backend is away, so no pack becomes full: that is taken after a minute, and until then room may come."""
    expect_log("what is only written is evicted too")
    monkeypatch.setattr("tests.core.test_room.SAFE", PackState.LOOKED)
    async with running(tmp_path) as live:
        store, keeper = live.store, live.keeper
        ledger = Ledger(TrioClock(7), 100)
        ledger.incomplete[1] = (PAGE, 0)
        space = DaemonSpace(
            store,
            Members(),
            CodeParams(4, 6),
            lambda name: 0,
            lambda: not keeper.futile
            or room_may_come(store, ledger, enough_backends=False, exhausted=keeper.exhausted),
        )
        file = live.machine.create("a")
        for block in itertools.count():
            if store.expected_bytes() >= store.limits.new_bytes + (256 << 10):
                break
            await live.write(file, block * 16, page("x") * 16)
        await trio.sleep(60)
        begin = trio.current_time()
        while True:
            try:
                assert space.has_room(), "a name is refused, and everything could be evicted"
                break
            except NeedRoom:
                await keeper.room()
        assert 50 < trio.current_time() - begin < 120


async def test_uncovered_data_do_not_join_while_waiting_makes_room(tmp_path: Path, clock: MockClock) -> None:
    """A large uncovered file and as much of other dirty data: uploads make room, so it stays uncovered."""
    async with running(tmp_path) as live:
        atomic = live.machine.create("atomic", atomic=True)
        plain = live.machine.create("plain")
        third = SMALLEST.full_bytes // PAGE // 3
        for first in range(0, third, 32):
            await live.write(atomic, first, page("u") * 32)
        for first in range(0, 6 * third, 32):
            await live.write(plain, first, page("p") * 32)
        assert live.keeper.joined == 0
        assert live.machine.contents.has_uncovered(atomic)
        assert live.machine.store.spill.any(atomic)


def test_room_is_kept_for_what_uncovered_writes_will_take(tmp_path: Path) -> None:
    """Scattered pages wait in memory, each for a block of its own: a sync of all of them fits in what is left."""
    machine = Machine(tmp_path, replace(SMALLEST, uncovered_bytes=64 << 20))
    atomic = machine.create("atomic", atomic=True)
    with pytest.raises(NeedRoom):
        for block in itertools.count():
            machine.write(atomic, block * BLOCK_PAGES, page("u"))
    machine.contents.cover(machine.inode(atomic))
    assert machine.store.expected_bytes() < SMALLEST.full_bytes + SMALLEST.group_bytes
    machine.commit()
    assert machine.store.used_bytes < SMALLEST.full_bytes + SMALLEST.group_bytes
    machine.close()


async def test_background_work_overfills_no_group(
    tmp_path: Path, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was spilled and is covered moves to its file in groups that are not larger than others."""
    async with running(tmp_path, backends=False) as live:
        atomic = live.machine.create("atomic", atomic=True)
        for first in range(0, SMALLEST.full_bytes // PAGE // 2, 32):
            await live.write(atomic, first, page("u") * 32)
        await live.committer.commit()
        weights, commit = [], live.store.commit

        def weigh(group: Group) -> None:
            weights.append(group.bytes)
            commit(group)

        monkeypatch.setattr(live.store, "commit", weigh)
        live.machine.contents.cover(live.machine.inode(atomic))
        while live.store.spill.any(atomic):
            await live.committer.commit()
            await trio.sleep(1)
        assert len(weights) > 3
        assert max(weights[1:]) <= SMALLEST.group_bytes * 5 // 4
        assert live.machine.page(atomic, 100) == page("u")


@pytest.mark.parametrize("change", ["chown", "unlink"])
async def test_what_is_never_refused_fits_beside_as_many_names_as_may_be_made(tmp_path: Path, change: str) -> None:
    """Each commit copies the pages that it changes: of a tree that fills the cache there would be no room for that."""
    source = random.Random(5)
    async with running(tmp_path, backends=False) as live:
        store, files = live.store, {}

        async def turn() -> None:
            while store.group_is_full():
                await live.keeper.room()

        async def publish() -> None:
            cut = await live.committer.commit()
            store.layers.open.published = Publication(cut, {})
            await live.committer.commit()

        for _ in range(8):
            while store.expected_bytes() < store.limits.new_bytes:
                await turn()
                name = source.randbytes(16).hex()
                files[name] = live.machine.create(name, opened=False)
            await publish()
        assert len(files) > 20_000
        names = list(files)
        source.shuffle(names)
        for name in names:
            await turn()
            with store.change() as changes:
                if change == "chown":
                    changes.patch(files[name], uid=7)
                else:
                    changes.delete(Table.ENTRIES, u64(1) + name.encode())
                    changes.remove(files[name])
            assert store.layers.open.row_count <= store.limits.group_bytes // 256 + 8
        await publish()
        assert live.committer.failed is None
        assert (tmp_path / "data.mdb").stat().st_size <= SMALLEST.map_bytes


async def test_a_write_that_waits_since_names_fill_the_cache_says_so(
    tmp_path: Path, clock: MockClock, expect_log: Callable[..., None]
) -> None:
    """Neither backends nor eviction can make that room: what helps is a larger cache."""
    expect_log(r"the cache is full: \d+ bytes of it are names", count=1)
    async with running(tmp_path, backends=False) as live:
        store = live.store
        while store.expected_bytes() < store.limits.new_bytes:
            while store.group_is_full():
                await live.keeper.room()
            number = live.machine.create(f"{store.counter(NEXT_INODE):0200}", opened=False)
        await live.committer.commit()
        store.limits = replace(store.limits, full_bytes=store.used_bytes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(live.write, number, 0, page("a"))
            await trio.sleep(200)
            nursery.cancel_scope.cancel()


async def test_a_failed_disk_ends_every_wait_with_its_error(
    tmp_path: Path, clock: MockClock, expect_log: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the local disk fails, whoever waits for room or a commit gets the error; the keeper goes on."""
    expect_log("read-only from here on")
    async with running(tmp_path, backends=False) as live:
        file = live.machine.create("a")
        live.machine.write(file, 0, page("a"))
        errors = []

        async def fill(first: int) -> None:
            try:
                while True:
                    await live.write(file, first, page("a") * 60)
                    first += 60
            except CacheError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(fill, 1 + i * 100_000)
            while live.keeper.waiting < 3:
                await trio.sleep(1)

            def fail(_: object) -> None:
                raise CacheError("no space left on device")

            monkeypatch.setattr(live.store, "commit", fail)
            with pytest.raises(CacheError):
                with live.store.change() as change:
                    change.patch(file, mode=0o100600)
                await live.committer.commit()
        assert len(errors) == 3
        with pytest.raises(CacheError):
            await live.committer.sync(file)
        assert live.machine.page(file, 0) == page("a")


async def test_an_unexpected_error_in_a_commit_is_a_failed_disk(
    tmp_path: Path, expect_log: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a commit raises: the committer ends in order, its group stays readable, callers get the error."""
    expect_log("failed unexpectedly")
    async with running(tmp_path, backends=False) as live:
        file = live.machine.create("a")
        live.machine.write(file, 0, page("a"))

        def fail(_: object) -> None:
            raise ValueError("cannot happen")

        monkeypatch.setattr(live.store, "commit", fail)
        with pytest.raises(CacheError, match="cannot happen"):
            await live.committer.commit()
        assert live.machine.read(file) == page("a")
        monkeypatch.undo()
        with pytest.raises(CacheError):
            await live.committer.sync(file)


async def test_what_an_unexpected_error_kept_from_the_journal_is_not_acknowledged(
    tmp_path: Path, expect_log: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fsyncs share a flush that fails: neither returns, also not by an empty flush after it."""
    expect_log("failed unexpectedly")
    async with running(tmp_path, backends=False, group_seconds=10_000) as live:
        files = [live.machine.create(name) for name in "ab"]
        await live.committer.commit()
        for file in files:
            live.machine.write(file, 0, page("a"))

        def fail(_: object) -> None:
            raise MemoryError("no memory for a thread")

        monkeypatch.setattr(live.store.journal, "write", fail)
        results: list[str] = []

        async def sync(file: int) -> None:
            try:
                await live.committer.sync(file)
                results.append("durable")
            except CacheError:
                results.append("failed")

        async with trio.open_nursery() as nursery:
            for file in files:
                nursery.start_soon(sync, file)
        assert results == ["failed", "failed"]


async def test_a_commit_waits_for_as_long_as_a_reader_holds_what_was_freed(
    tmp_path: Path, clock: MockClock, expect_log: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk may keep a cut's reading open; that is told, and never the end of the mount."""
    expect_log(r"waiting for pages that are being read", count=1)
    async with running(tmp_path, backends=False) as live:
        store = live.store
        store.clock = TrioClock(7)
        file = live.machine.create("a")
        commit, refused = store.commit, 0

        def count(group: Group) -> None:
            nonlocal refused
            try:
                commit(group)
            except StoreFull:
                refused += 1
                raise

        monkeypatch.setattr(store, "commit", count)

        async def rewrite() -> None:
            while not refused:
                live.machine.write(file, 0, os.urandom(256 * PAGE))
                await live.committer.commit()

        with CommittedState(store.environment, FixedClock(7)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rewrite)
                while refused < 60:
                    await trio.sleep(0.1)
                nursery.cancel_scope.cancel()
        await live.committer.commit()
        assert live.committer.failed is None
        assert not store.dirty


async def test_a_mount_that_finds_no_free_page_at_once_replays_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB reuses what it freed only two commits later; also the commit of a replay waits for that."""
    machine = Machine(tmp_path)
    file = machine.create("a")
    machine.write(file, 0, page("a") * 8)
    machine.fsync(file)
    right, full = Environment.write, []

    @contextmanager
    def write(environment: Environment, **how: bool) -> Iterator[Any]:
        with right(environment, **how) as transaction:
            yield transaction
            if not full:
                full.append(True)
                raise StoreFull("no free page")

    monkeypatch.setattr(Environment, "write", write)
    machine.crash()
    assert full and machine.read(file) == page("a") * 8
    machine.crash()
    assert machine.read(file) == page("a") * 8
    machine.close()
