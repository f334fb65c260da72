"""Fetch: what came while a fetch was under way wins over what it brings."""

from __future__ import annotations

import logging

import pytest
import trio

from qsfs import failpoints
from qsfs.errors import DataLost, Unavailable
from qsfs.store.schema import PAGE
from tests.remote.small_fs import SmallFs, noise


@pytest.fixture
async def fs(scratch):
    fs = await SmallFs.make(scratch / "cache")
    yield fs
    fs.close()


async def fetch_with(fs, number, first, count, meanwhile):
    """Fetches, and does `meanwhile` when the extent has arrived and nothing of it is installed."""
    called = []

    def once():
        if not called:
            called.append(True)
            meanwhile()

    failpoints.arm("fetch.arrived", once)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, first, count)
    assert called


async def test_truncate_then_write_another_page_of_the_block(fs, autojump_clock):
    """fetch starts, truncate to 0, write another page of the block, fetch lands"""
    number = fs.remote_file("a", noise(4 * PAGE))
    new = noise(PAGE, 9)

    def meanwhile():
        fs.store.truncate_data(fs.inode(number), 0, 0)
        fs.overwrite(number, 2, new)

    await fetch_with(fs, number, 0, 4, meanwhile)
    assert fs.read(number, 0, 4) == [None, None, new, None]
    fs.commit()
    assert fs.read(number, 0, 4) == [None, None, new, None]
    assert fs.inode(number).allocated == 1


async def test_truncate_that_is_not_worked_off_yet(fs, autojump_clock):
    """fetch starts, a huge file is truncated (pending), fetch lands"""
    number = fs.remote_file("a", noise(8 * PAGE))

    def meanwhile():
        fs.store.blocks.truncate(fs.inode(number), 2, fs.store.next_write())

    await fetch_with(fs, number, 0, 8, meanwhile)
    assert [page is None for page in fs.read(number, 0, 8)] == [False, False, *[True] * 6]


async def test_rewritten_evicted_and_uploaded_again(fs, autojump_clock):
    """fetch in flight, page rewritten, evicted and uploaded again, fetch lands"""
    old, new = noise(4 * PAGE), noise(PAGE, 9)
    number = fs.remote_file("a", old)

    def meanwhile():
        fs.overwrite(number, 1, new)
        fs.commit()
        fs.upload(number)
        fs.evict(number)
        assert fs.read(number, 1, 1) == [None]

    await fetch_with(fs, number, 0, 4, meanwhile)
    assert fs.read(number, 1, 1) == [None]
    assert fs.read(number, 0, 1) == [old[:PAGE]]
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 1, 1)
    assert fs.read(number, 1, 1) == [new]


async def test_written_meanwhile(fs, autojump_clock):
    """fetch in flight, one of its pages is written, fetch lands"""
    old, new = noise(4 * PAGE), noise(PAGE, 9)
    number = fs.remote_file("a", old)
    await fetch_with(fs, number, 0, 4, lambda: fs.overwrite(number, 3, new))
    assert b"".join(fs.read(number, 0, 4)) == old[: 3 * PAGE] + new
    state = fs.store.blocks.state(number, 0)
    assert (state.resident, state.dirty) == (15, 8)


async def test_removed_meanwhile(fs, autojump_clock):
    """fetch in flight, the file is removed, fetch lands: its number names nothing"""
    number = fs.remote_file("a", noise(4 * PAGE))

    def meanwhile():
        with fs.store.change() as change:
            change.remove(number)

    await fetch_with(fs, number, 0, 4, meanwhile)
    fs.commit()
    assert fs.store.inode(number) is None
    assert fs.store.blocks.numbers(number, 0) == []


async def test_committed_between_start_and_landing(fs, autojump_clock):
    """fetch in flight, group commits, fetch lands: judged by what the newest layers show"""
    data = noise(4 * PAGE)
    number = fs.remote_file("a", data)

    def meanwhile():
        fs.overwrite(number, 0, noise(PAGE, 9))
        fs.commit()
        fs.store.truncate_data(fs.inode(number), 0, 0)
        fs.commit()

    await fetch_with(fs, number, 0, 4, meanwhile)
    assert fs.read(number, 0, 4) == [None] * 4


async def test_an_eviction_between_install_and_commit_loses_nothing(fs, autojump_clock):
    """fetch lands, evict before the commit, fetch again"""
    data = noise(4 * PAGE)
    number = fs.remote_file("a", data)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 4)
        fs.store.blocks.evict(fs.inode(number), 0, 15)
        assert fs.read(number, 0, 4) == [None] * 4
        await fetcher.fetch(number, 0, 4)
    assert b"".join(fs.read(number, 0, 4)) == data


async def test_a_read_that_failed_while_its_pages_moved_is_no_error(fs, autojump_clock):
    """fetch waits for lost shards, the file is truncated meanwhile: nobody needs them"""
    number = fs.remote_file("a", noise(4 * PAGE))
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.fetch, number, 0, 4)
        await trio.sleep(10)
        fs.store.truncate_data(fs.inode(number), 0, 0)


def lost_file(fs):
    """A file of four pages, all remote, whose pack has too few shards; backends take a moment to say so."""
    number = fs.write("a", noise(4 * PAGE))
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    for place, key in fs.shard_keys(pack)[:3]:
        fs.world.data[place - 1].lose(key)
    for backend in fs.backends.values():
        backend.delay = lambda call: 0.1
    return number


async def test_a_pack_that_is_lost_while_its_pages_are_rewritten_is_no_error(fs, autojump_clock, expect_log):
    """fetch under way, its page is rewritten, the fetch finds its pack lost: nobody needs it"""
    expect_log(r"read from others", logging.WARNING)
    number = lost_file(fs)
    new = noise(4 * PAGE, 9)
    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.fetch, number, 0, 4)
        await trio.sleep(0.05)
        fs.overwrite(number, 0, new)
        fs.commit()
        fs.upload(number)
    assert b"".join(fs.read(number, 0, 4)) == new


@pytest.mark.parametrize("lost", [False, True])
async def test_a_reader_whose_page_was_rewritten_gets_no_error_of_another(fs, autojump_clock, expect_log, lost):
    """two fetch pages of one extent, the page of one is rewritten, the extent does not come or its pack is lost"""
    expect_log(r"read from others", logging.WARNING, optional=not lost)
    expect_log(r"of its 6 shards 3 are absent" if lost else r"not here after 30 s", logging.ERROR)
    number = lost_file(fs)
    for backend in fs.backends.values():
        backend.down = not lost
    ended = []

    async def read(fetcher, page):
        try:
            await fetcher.fetch(number, page, 1)
            ended.append((page, None))
        except (DataLost, Unavailable) as error:
            ended.append((page, type(error)))

    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        nursery.start_soon(read, fetcher, 0)
        nursery.start_soon(read, fetcher, 1)
        await trio.sleep(0.05)
        fs.overwrite(number, 0, noise(PAGE, 9))
        fs.commit()
    assert sorted(ended) == [(0, None), (1, DataLost if lost else Unavailable)]


async def test_an_extent_split_by_a_newer_one_is_fetched_in_its_parts(fs, autojump_clock):
    old, new = noise(8 * PAGE), noise(2 * PAGE, 9)
    number = fs.remote_file("a", old)
    fs.overwrite(number, 3, new)
    fs.commit()
    fs.upload(number)
    fs.evict(number)
    assert len(list(fs.store.extents.overlapping(number, 0, 8))) == 3
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 6, 1)
        assert b"".join(fs.read(number, 5, 3)) == old[5 * PAGE :]
        await fetcher.fetch(number, 0, 8)
    assert b"".join(fs.read(number, 0, 8)) == old[: 3 * PAGE] + new + old[5 * PAGE :]
