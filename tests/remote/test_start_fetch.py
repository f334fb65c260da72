"""A start whose pages are gone fetches at most twice what it touches, in bulk, here and where it was restored."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from qsfs.backend.limits import RateLimit, with_limits
from qsfs.daemon import warming
from qsfs.daemon.warming import warm_start
from qsfs.errors import LimitExceeded, Unavailable
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.needs import NeedPages
from qsfs.filesystem.transient import TransientPages
from qsfs.format.erasure import Code
from qsfs.remote import start_fetch
from qsfs.remote.context import FlushContext
from qsfs.remote.fetch import Fetcher
from qsfs.remote.packing import Sealer
from qsfs.remote.reader import PackReader
from qsfs.remote.restore import restore
from qsfs.remote.survey import Timing
from qsfs.store.packs import set_start
from qsfs.store.schema import PAGE, InodeFlag
from qsfs.store.start import blocks_of
from qsfs.store.store import Store
from tests.remote.flush_machine import LIMITS, FlushMachine
from tests.remote.flushing import RowsAStep, VirtualClock, flushing, until
from tests.remote.harness import World, make_world
from tests.remote.small_fs import SECRET, SmallFs, add_superblock, candidates_of, noise
from tests.remote.test_restore_flushed import add_owner_records

PAGES = 8192
TOUCHED = 0.026
"""Of a Casper node's storage.lmdb a start reads so many of the pages, all over the file."""
TIMING = Timing(attempt=5.0, retry=0.01, retry_most=0.02, grace=0.2)


class Application:
    """Reads a file as an application does: what is missing is fetched, then it reads again.  Counts what that costs."""

    def __init__(self, machine: FlushMachine, store: Store, fetcher: Fetcher) -> None:
        self.store = store
        self.fetcher = fetcher
        self.contents = Contents(store)
        self.waits = 0
        self._machine = machine

    async def page(self, number: int, page: int) -> bytes:
        inode = self.store.inode(number)
        assert inode is not None
        while True:
            try:
                return self.contents.read(inode, page * PAGE, PAGE)
            except NeedPages as need:
                self.waits += 1
                await self.fetcher.fetch(need.inode, need.first, need.count)

    @property
    def fetched_bytes(self) -> int:
        return self.fetcher.reader.counts.bytes


@contextlib.asynccontextmanager
async def reading(world: World, machine: FlushMachine, store: Store) -> AsyncIterator[Application]:
    class Room:
        async def room(self) -> None:
            await trio.lowlevel.checkpoint()
            if store.group_is_full():
                group = store.seal()
                store.commit(group)
                store.committed(group)

    reader = PackReader(machine.members(), world.keys, Code(world.code), worth_a_thread=64 << 20)
    fetcher = Fetcher(store, reader, Room(), TransientPages(), deadline_seconds=20)
    async with trio.open_nursery() as nursery:
        await nursery.start(fetcher.run)
        yield Application(machine, store, fetcher)
        nursery.cancel_scope.cancel()


def real_packs(machine: FlushMachine) -> FlushContext:
    """Packs of the usual size: 256 KiB a shard."""
    sealer = machine.context.sealer
    sealer = Sealer(sealer.keys, sealer.code, sealer.owner_epoch, sealer.clock)
    return dataclasses.replace(machine.context, sealer=sealer)


async def scan(application: Application, number: int, pages: list[int], content: bytes) -> float:
    """Reads pages as a start does; bytes from the backends for each byte touched."""
    before = application.fetched_bytes
    for page in pages:
        assert await application.page(number, page) == content[page * PAGE : (page + 1) * PAGE]
    return (application.fetched_bytes - before) / (len(pages) * PAGE)


@pytest.mark.parametrize("order", ["by hash", "ascending"])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_a_start_fetches_at_most_twice_what_it_touches(clock, scratch: Path, where: str, order: str):
    world = await make_world(8, k=4, m=2)
    machine = FlushMachine(world, scratch / "cache")
    machine.clock = VirtualClock(clock)
    machine.opened = lambda: machine.store.start.begin(60.0, 1 << 20)
    content = random.Random(1).randbytes(PAGES * PAGE)
    pages = sorted(random.Random(2).sample(range(PAGES), int(TOUCHED * PAGES)))
    if order == "by hash":
        random.Random(3).shuffle(pages)
    async with flushing(machine, real_packs) as flusher:
        number = machine.create("storage.lmdb", flags=InodeFlag.ATOMIC_SYNC | InodeFlag.WAIT)
        machine.write(number, 0, content)
        await flusher.sync()
        machine.evict(number)
        await trio.sleep(30)
        async with reading(world, machine, machine.store) as application:
            first = await scan(application, number, pages, content)
            assert first > 4 * 2, "what is scattered costs a multiple; less proves nothing"
        machine.store.start.end_all()
        machine.committer.commit_now()
        await until(lambda: flusher.status()["start"]["packed_bytes"])
        await flusher.sync()
        assert flusher.status()["start"]["packed_bytes"] == len(pages) * PAGE
        if where == "here":
            machine.evict(number)
            async with reading(world, machine, machine.store) as application:
                await check_start(application, number, pages, content)
            return
    store = await restored(world, scratch / "elsewhere")
    try:
        async with reading(world, machine, store) as application:
            await check_start(application, number, pages, content)
        found = [
            block * 4 + i
            for chunk, bits in store.start.chunks(number)
            for block, some in blocks_of(chunk, bits)
            for i in range(4)
            if some & 1 << i
        ]
        assert found == sorted(pages), "what was fetched so is recorded here too"
    finally:
        store.close()


async def check_start(application: Application, number: int, pages: list[int], content: bytes) -> None:
    ratio = await scan(application, number, pages, content)
    print(f"fetched for each byte touched: {ratio:.3f}; waits: {application.waits}")
    assert ratio <= 1.2, "twice is promised; this is what it is"
    counts = application.fetcher.start.counts
    assert counts.pages >= 0.9 * len(pages), "nearly all came in bulk"
    assert application.waits <= 10, "reads wait for the first of their pages, then all are here"
    assert await scan(application, number, pages, content) == 0


async def restored(world: World, directory: Path) -> Store:
    add_superblock(world)
    add_owner_records(world)
    directory.mkdir()
    clock = VirtualClock(trio.lowlevel.current_clock())  # type: ignore[arg-type]
    await restore(
        candidates_of(world), secret=SECRET, directory=directory, limits=LIMITS, clock=clock, timing=TIMING, force=True
    )
    store = Store(directory, LIMITS, clock)
    store.start.begin(60.0, 1 << 20)
    return store


# one pack at a time


@pytest.fixture
async def fs(scratch: Path):
    fs = await SmallFs.make(scratch / "cache")
    yield fs
    fs.close()


RUN = range(0, 480, 5)
AT_ONCE = 16


def start_file(fs: SmallFs, *, evicted: bool = True) -> tuple[int, list[int], bytes]:
    """A file of which every fifth page lies in start packs of 16 pages; its inode, those packs, its content."""
    data = noise(480 * PAGE)
    number = fs.write("a", data)
    fs.commit()
    fs.upload(number)
    for page in RUN:
        fs.overwrite(number, page, data[page * PAGE : (page + 1) * PAGE])
    fs.commit()
    packs = fs.upload(number, extents_in_pack=AT_ONCE)
    for pack in packs:
        assert set_start(fs.store, pack, True)
    if evicted:
        fs.evict(number)
    return number, packs, data


def resident(fs: SmallFs, number: int) -> set[int]:
    return {page for page in range(480) if fs.read(number, page, 1) != [None]}


async def settled(fetcher: Fetcher) -> None:
    """Returns once nothing is on its way: on the virtual clock that takes no time."""
    await trio.sleep(60)
    assert not fetcher.waits


async def test_a_touch_brings_its_pack_and_some_behind_it(fs: SmallFs, autojump_clock):
    number, _, data = start_file(fs)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        assert resident(fs, number) == set(RUN[: 3 * AT_ONCE])
        assert fetcher.start.counts.packs == 3
        await fetcher.fetch(number, RUN[3 * AT_ONCE], 1)
        await settled(fetcher)
        assert resident(fs, number) == set(RUN)
        for page in RUN:
            assert fs.read(number, page, 1) == [data[page * PAGE : (page + 1) * PAGE]]


async def test_other_packs_are_not_fetched_whole(fs: SmallFs, autojump_clock):
    number, packs, _ = start_file(fs)
    for pack in packs:
        set_start(fs.store, pack, False)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        assert fetcher.start.counts.packs == 0 and resident(fs, number) == {0}


async def test_one_page_of_many_that_are_here_is_fetched_by_itself(fs: SmallFs, autojump_clock):
    """Of a start pack that lost little nothing else is needed."""
    number, _, _ = start_file(fs, evicted=False)
    fs.store.blocks.evict(fs.inode(number), 0, 1)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        assert fetcher.start.counts.packs == 0 and 0 in resident(fs, number)


async def test_a_pack_is_fetched_whole_once(fs: SmallFs, autojump_clock):
    """What is evicted again for want of room must not be fetched again and again."""
    number, _, _ = start_file(fs)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        for _ in range(3):
            fs.evict(number)
            await fetcher.fetch(number, 0, 1)
            await settled(fetcher)
        assert fetcher.start.counts.packs == 3 and resident(fs, number) == {0}
        await trio.sleep(start_fetch._AGAIN_SECONDS)
        fs.evict(number)
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        assert fetcher.start.counts.packs > 3


async def test_a_pack_of_which_starts_read_little_is_fetched_whole_once_more(fs: SmallFs, autojump_clock):
    """A restored store has its marks from another; once it knows what its own starts read, that counts."""
    number, packs, _ = start_file(fs)
    record(fs, number, [*RUN[: AT_ONCE // 2], *RUN[AT_ONCE : AT_ONCE + AT_ONCE // 2 - 1]])
    recorded = fs.store.start.chunks(number)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        assert fetcher.start.counts.packs == 3
        assert [found for found, _ in await fetcher.start.all_packs()] == [packs[0], *packs[3:]]
        assert fs.store.start.chunks(number) == recorded


async def test_nothing_is_fetched_in_bulk_where_eviction_would_begin(scratch: Path, autojump_clock):
    fs = await SmallFs.make(scratch / "cache")
    number, _, _ = start_file(fs)
    fs.store.limits = fs.store._configured = dataclasses.replace(fs.store.limits, high_bytes=1, low_bytes=0)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        assert fetcher.start.counts.packs == 0 and resident(fs, number) == {0}
    fs.close()


def _write(fs: SmallFs, number: int) -> bytes:
    fs.overwrite(number, 0, b"w" * (480 * PAGE))
    return b"w" * (480 * PAGE)


def _truncate(fs: SmallFs, number: int) -> bytes:
    fs.store.truncate_data(fs.inode(number), 0, 0)
    fs.store.work_off_truncations(1 << 20)
    fs.inode(number).size = 480 * PAGE
    return bytes(480 * PAGE)


def _remove(fs: SmallFs, number: int) -> bytes:
    with fs.store.change() as change:
        change.remove(number)
    fs.store.work_off_truncations(1 << 20)
    return b""


def _rewrite(fs: SmallFs, number: int) -> bytes:
    """Written, uploaded, and evicted again: other extents, remote only like those that were asked for."""
    data = noise(480 * PAGE, 9)
    fs.overwrite(number, 0, data)
    fs.commit()
    fs.upload(number)
    fs.evict(number)
    return data


@pytest.mark.parametrize("change", [_write, _truncate, _remove, _rewrite])
async def test_what_happens_while_a_pack_is_on_its_way_wins(
    fs: SmallFs, autojump_clock, change: Callable[[SmallFs, int], bytes]
):
    number, packs, _ = start_file(fs)
    for backend in fs.backends.values():
        backend.delay = lambda call: 5.0
    async with fs.fetching() as fetcher:
        for pack in packs:
            fetcher._nursery.start_soon(fetcher.start.fetch, pack)
        await trio.sleep(1)
        data = change(fs, number)
        for backend in fs.backends.values():
            backend.delay = lambda call: 0.0
        await settled(fetcher)
        assert fetcher.start.counts.packs == len(packs) and fetcher.start.counts.pages == 0
        if data:
            await fetcher.fetch(number, 0, 480)
            found = b"".join(page or bytes(PAGE) for page in fs.read(number, 0, 480))
            assert found == data


async def test_a_pack_that_does_not_come_is_given_up(fs: SmallFs, autojump_clock):
    number, packs, data = start_file(fs)
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching() as fetcher:
        with pytest.raises(Unavailable, match="start pack"):
            await fetcher.start.fetch(packs[0])
        for backend in fs.backends.values():
            backend.down = False
        await settled(fetcher)
        await fetcher.fetch(number, 0, 1)
        await settled(fetcher)
        assert set(RUN[:AT_ONCE]) <= resident(fs, number)
        assert fs.read(number, 0, 1) == [data[:PAGE]]


async def test_what_the_download_rate_holds_up_is_not_late(fs: SmallFs, autojump_clock):
    """And comes once: no shard is asked for again."""
    number, packs, _ = start_file(fs)
    limit = RateLimit(200)
    for member in fs.members:
        member.data = with_limits(member.data, download=limit)
    begun = trio.current_time()
    async with fs.fetching(deadline_seconds=10) as fetcher:
        assert await fetcher.start.fetch(packs[0])
        assert trio.current_time() - begun > 100
        assert fetcher.reader.counts.gets == fs.world.code.k
    assert set(RUN[:AT_ONCE]) <= resident(fs, number)


async def test_a_pack_that_a_rate_held_up_is_still_given_up_when_no_backend_answers(fs: SmallFs, autojump_clock):
    _, packs, _ = start_file(fs)
    limit = RateLimit(200)
    for member in fs.members:
        member.data = with_limits(member.data, download=limit)
    limit.charge(10_000)
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching(deadline_seconds=10) as fetcher:
        with trio.fail_after(100), pytest.raises(Unavailable, match="start pack"):
            await fetcher.start.fetch(packs[0])


async def test_what_a_busy_local_store_holds_up_is_not_late(fs: SmallFs, autojump_clock, monkeypatch):
    number, packs, _ = start_file(fs)
    fs.overwrite(fs.create("filler"), 0, bytes(fs.store.limits.group_bytes))

    async def room() -> None:
        await trio.sleep(100)
        fs.commit()

    monkeypatch.setattr(fs, "room", room)
    async with fs.fetching(deadline_seconds=10) as fetcher:
        assert await fetcher.start.fetch(packs[0])
    assert set(RUN[:AT_ONCE]) <= resident(fs, number)


# by hand


async def warm(fs: SmallFs, fetcher: Fetcher) -> dict:
    class Committer:
        async def room(self) -> None:
            await fs.room()

        async def commit(self) -> int:
            fs.commit()
            return 0

    return await warm_start(fs.store, fetcher, Committer(), {})


def record(fs: SmallFs, number: int, pages: list[int]) -> None:
    fs.store.start.begin(60.0, 1 << 20)
    for page in pages:
        fs.store.start.note(number, page, 1)
    fs.store.start.end_all()


async def test_a_warm_fetches_all_start_packs_and_what_else_is_recorded(fs: SmallFs, autojump_clock):
    number, packs, _ = start_file(fs)
    record(fs, number, [0, 1, 2, 7, 400, 403])
    async with fs.fetching() as fetcher:
        found = await warm(fs, fetcher)
        assert {*RUN, 1, 2, 7, 400, 403} <= resident(fs, number)
        assert found["packs"] == len(packs) and found["fetched_bytes"] >= (len(RUN) + 4) * PAGE
        read = fetcher.reader.counts.bytes
        assert await warm(fs, fetcher) == {"packs": 0, "fetched_bytes": 0}
        assert fetcher.reader.counts.bytes == read, "what is here is not read again"


async def test_a_warm_lets_others_work_between_extents(fs: SmallFs, autojump_clock, monkeypatch: pytest.MonkeyPatch):
    """A chunk may be thousands of them."""
    number, _, _ = start_file(fs, evicted=False)
    record(fs, number, list(range(480)))
    monkeypatch.setattr(warming, "_EXTENTS_A_STEP", 16)
    async with fs.fetching() as fetcher:
        rows = RowsAStep(fs.store, monkeypatch)
        trio.lowlevel.add_instrument(rows)
        await warm(fs, fetcher)
        trio.lowlevel.remove_instrument(rows)
    assert 0 < rows.most <= 16


async def test_a_warm_of_a_restored_store_knows_the_packs_alone(fs: SmallFs, autojump_clock):
    number, packs, _ = start_file(fs)
    async with fs.fetching() as fetcher:
        assert (await warm(fs, fetcher))["packs"] == len(packs)
        assert resident(fs, number) == set(RUN)


async def test_a_warm_that_does_not_fit_begins_nothing(fs: SmallFs, autojump_clock):
    number, _, _ = start_file(fs)
    fs.store.limits = dataclasses.replace(fs.store.limits, high_bytes=fs.store.expected_bytes() + 10 * PAGE)
    async with fs.fetching() as fetcher:
        with pytest.raises(LimitExceeded, match="read at a start"):
            await warm(fs, fetcher)
        assert not resident(fs, number) and not fetcher.reader.counts.gets


async def test_a_warm_that_fills_the_cache_says_so(fs: SmallFs, autojump_clock):
    """Pages that lie apart take a block each, so that packs may fit and their pages not."""
    number, _, _ = start_file(fs)
    fs.store.limits = dataclasses.replace(fs.store.limits, high_bytes=fs.store.expected_bytes() + 100 * PAGE)
    async with fs.fetching() as fetcher:
        with pytest.raises(LimitExceeded, match="then the cache was full"):
            await warm(fs, fetcher)
        assert 0 < len(resident(fs, number)) < len(RUN)


async def test_a_warm_that_does_not_come_says_so(fs: SmallFs, autojump_clock):
    start_file(fs)
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching() as fetcher:
        with pytest.raises(Unavailable, match="parts did not come"):
            await warm(fs, fetcher)


async def test_a_warm_ends_where_reads_wait_for_ever(fs: SmallFs, autojump_clock, expect_log):
    """A policy is for those who read: their waits go on, also behind a warm that gave up the same pages."""
    expect_log(r"not here after 30 s", logging.ERROR)
    expect_log(r"has been waiting", logging.WARNING, optional=True)
    number, _, _ = start_file(fs)
    record(fs, number, [1, 201, 401])
    with fs.store.change() as change:
        change.patch(number, flags=int(InodeFlag.WAIT))
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        with trio.fail_after(120), pytest.raises(Unavailable, match="parts did not come"):
            await warm(fs, fetcher)
        nursery.start_soon(fetcher.fetch, number, 1, 1)
        await trio.sleep(300)
        assert [wait.keeps_waiting for wait in fetcher.waits] == [True]
        for backend in fs.backends.values():
            backend.down = False
