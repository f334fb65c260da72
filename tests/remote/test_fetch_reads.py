"""Fetch: what is remote comes back as it was written, from few backends, whatever m of n do."""

from __future__ import annotations

import itertools
import logging
import random

import pytest
import trio
import trio.testing

from qsfs.errors import BackendUnavailable, CacheError, Corrupt, DataLost, QsfsError, Unavailable
from qsfs.remote.fetch import AHEAD_AT_ONCE
from qsfs.remote.readahead import FIRST_PAGES
from qsfs.store.schema import PAGE, InodeFlag, Table, u64
from tests.remote.small_fs import SmallFs, noise


@pytest.fixture
async def fs(scratch):
    fs = await SmallFs.make(scratch / "cache")
    yield fs
    fs.close()


def gets(fs: SmallFs) -> int:
    return sum(call == "get" for backend in fs.backends.values() for call, _ in backend.calls)


async def test_a_cold_page_comes_from_the_one_shard_that_holds_its_extent(fs, autojump_clock):
    data = noise(16 * PAGE)
    number = fs.remote_file("a", data, extent_pages=4)
    assert fs.read(number, 0, 16) == [None] * 16
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 1, 1)
        assert fs.read(number, 1, 1) == [data[PAGE : 2 * PAGE]]
        assert gets(fs) <= 2
        assert not fetcher.waits


async def test_a_whole_file_comes_back(fs, autojump_clock):
    data = noise(200 * PAGE)
    number = fs.remote_file("a", data)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 200)
    assert b"".join(fs.read(number, 0, 200)) == data


async def test_what_is_fetched_is_clean_and_survives_a_commit(fs, autojump_clock):
    data = noise(4 * PAGE)
    number = fs.remote_file("a", data)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 4)
    fs.commit()
    state = fs.store.blocks.state(number, 0)
    assert (state.resident, state.dirty) == (15, 0)
    assert b"".join(fs.read(number, 0, 4)) == data
    assert fs.inode(number).allocated == 4


@pytest.mark.parametrize("lost", list(itertools.combinations(range(6), 2)))
async def test_any_m_of_n_may_be_down(scratch, autojump_clock, lost):
    fs = await SmallFs.make(scratch / "cache", 6)
    data = noise(40 * PAGE)
    number = fs.remote_file("a", data)
    for index in lost:
        fs.backends[index + 1].down = True
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 40)
    assert b"".join(fs.read(number, 0, 40)) == data
    fs.close()


@pytest.mark.parametrize("damage", ["absent", "flipped", "cut", "swapped", "empty"])
async def test_any_m_of_n_may_be_wrong(scratch, autojump_clock, damage, expect_log):
    expect_log(r"pack [0-9a-f]{32}, shard \d: .*read from others", logging.WARNING)
    fs = await SmallFs.make(scratch / "cache", 6)
    data = noise(40 * PAGE)
    number = fs.write("a", data)
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    keys = fs.shard_keys(pack)
    values = {key: fs.world.data[place - 1].peek(key) for place, key in keys}
    for i in (0, 1):
        place, key = keys[i]
        store = fs.world.data[place - 1]
        if damage == "absent":
            store.lose(key)
        elif damage == "flipped":
            store.rot(key, lambda value: value[:500] + bytes([value[500] ^ 1]) + value[501:])
        elif damage == "cut":
            store.rot(key, lambda value: value[:-1])
        elif damage == "swapped":
            store.rot(key, lambda value: values[keys[5][1]])
        else:
            store.rot(key, lambda value: b"")
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 40)
    assert b"".join(fs.read(number, 0, 40)) == data
    fs.close()


async def test_more_than_m_down_is_an_error_and_all_is_well_on_return(fs, autojump_clock, expect_log):
    expect_log(r"/file-\d+ \(inode \d+\), page 0: not here after 30 s; pack .* of the 4", logging.ERROR)
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    before = [set(store.keys()) for store in fs.world.data]
    down = range(1, 6)
    for place in down:
        fs.backends[place].down = True
    async with fs.fetching() as fetcher:
        began = trio.current_time()
        with pytest.raises(Unavailable, match="of the 4 shards needed"):
            await fetcher.fetch(number, 0, 8)
        assert trio.current_time() - began == pytest.approx(30)
        assert [set(store.keys()) for store in fs.world.data] == before
        for place in down:
            fs.backends[place].down = False
        await fetcher.fetch(number, 0, 8)
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_a_wait_ends_with_the_data(fs, autojump_clock, expect_log):
    expect_log(r"has been waiting for \d+ s: pack", logging.WARNING)
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    with fs.store.change() as change:
        change.patch(number, flags=int(InodeFlag.WAIT))
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.fetch, number, 0, 8)
        await trio.sleep(1000)
        (wait,) = fetcher.waits
        assert (wait.inode, wait.keeps_waiting) == (number, True)
        assert wait.seconds >= 999 and "is down" in wait.why
        for backend in fs.backends.values():
            backend.down = False
        await trio.sleep(20)
        assert not fetcher.waits
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_a_wait_ends_with_unblock(fs, autojump_clock, expect_log):
    expect_log(r"has been waiting", logging.WARNING, optional=True)
    expect_log(r"ended by 'qsfs unblock'", logging.ERROR, count=1)
    number = fs.remote_file("a", noise(8 * PAGE))
    other = fs.remote_file("b", noise(8 * PAGE, 2))
    with fs.store.change() as change:
        change.patch(number, flags=int(InodeFlag.WAIT))
        change.patch(other, flags=int(InodeFlag.WAIT))
    for backend in fs.backends.values():
        backend.down = True
    results = []

    async def read(fetcher, inode):
        try:
            await fetcher.fetch(inode, 0, 1)
        except Unavailable as error:
            results.append((inode, str(error)))

    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        nursery.start_soon(read, fetcher, number)
        nursery.start_soon(read, fetcher, other)
        await trio.sleep(100)
        assert len(fetcher.waits) == 2
        assert fetcher.unblock(number) == 1
        await trio.sleep(1)
        assert [inode for inode, _ in results] == [number]
        assert [wait.inode for wait in fetcher.waits] == [other]
        nursery.cancel_scope.cancel()


async def test_the_same_read_asked_again_by_the_kernel_does_not_wait_anew(fs, autojump_clock, expect_log):
    expect_log(r"has been waiting", logging.WARNING)
    expect_log(r"ended by 'qsfs unblock'", logging.ERROR, count=1)
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    with fs.store.change() as change:
        change.patch(number, flags=int(InodeFlag.WAIT))
    for backend in fs.backends.values():
        backend.down = True
    ends = []

    async def read_as_the_kernel_does(fetcher):
        for first, count in ((0, 8), (0, 1)):
            with pytest.raises(Unavailable):
                await fetcher.fetch(number, first, count)
            ends.append(trio.current_time())

    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        nursery.start_soon(read_as_the_kernel_does, fetcher)
        await trio.sleep(100)
        assert fetcher.unblock(number) == 1
        await trio.sleep(2)
        assert len(ends) == 2 and ends[1] - ends[0] < 1
        nursery.start_soon(fetcher.fetch, number, 0, 1)
        await trio.sleep(100)
        assert len(fetcher.waits) == 1, "a later read waits as its policy says"
        for backend in fs.backends.values():
            backend.down = False
    assert fs.read(number, 0, 1) == [data[:PAGE]]


async def test_positively_lost_is_an_error_of_its_own_at_once(fs, autojump_clock, expect_log):
    expect_log(r"pack .*, shard \d: .*read from others", logging.WARNING)
    expect_log(r"page 0: pack [0-9a-f]{32} is lost: all 8 backends answered", logging.ERROR, count=1)
    number = fs.write("a", noise(8 * PAGE))
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    for i, (place, key) in enumerate(fs.shard_keys(pack)[:3]):
        if i:
            fs.world.data[place - 1].lose(key)
        else:
            fs.world.data[place - 1].rot(key, lambda value: value[:-3])
    async with fs.fetching() as fetcher:
        began = trio.current_time()
        for page in range(3):
            with pytest.raises(DataLost):
                await fetcher.fetch(number, page, 1)
        assert trio.current_time() - began < 5


async def test_nothing_is_lost_while_one_backend_may_still_hold_it(fs, autojump_clock, expect_log):
    expect_log(r"read from others", logging.WARNING)
    expect_log(r"not here after 30 s", logging.ERROR)
    number = fs.write("a", noise(8 * PAGE))
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    keys = fs.shard_keys(pack)
    for place, key in keys[:3]:
        fs.world.data[place - 1].lose(key)
    holders = {place for place, _ in keys}
    spare = next(place for place in fs.backends if place not in holders)
    fs.backends[spare].down = True
    async with fs.fetching() as fetcher:
        with pytest.raises(Unavailable):
            await fetcher.fetch(number, 0, 1)


async def test_a_backend_that_has_not_shown_its_identity_proves_no_loss(fs, autojump_clock, expect_log):
    expect_log(r"read from others", logging.WARNING)
    expect_log(r"not here after 30 s", logging.ERROR)
    number = fs.write("a", noise(8 * PAGE))
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    keys = fs.shard_keys(pack)
    for place, key in keys[:3]:
        fs.world.data[place - 1].lose(key)
    member = fs.members.by_number(keys[0][0])
    member.identified = False
    async with fs.fetching() as fetcher:
        with pytest.raises(Unavailable):
            await fetcher.fetch(number, 0, 1)


async def test_a_backend_that_leaves_while_a_read_waits_is_not_counted_on(fs, autojump_clock):
    """What it gave before counts no more: the read ends once others can give k shards."""
    data = noise(16 * PAGE)
    number = fs.write("a", data)
    fs.commit()
    (pack,) = fs.upload(number, extent_pages=1)
    fs.evict(number)
    places = fs.pack_row(pack).placement
    for place in (places[0], places[4], places[5]):
        fs.backends[place].down = True
    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.fetch, number, 0, 1)
        await trio.sleep(5)
        assert [wait.why.split(";")[0] for wait in fetcher.waits] == [
            f"pack {fs.pack_row(pack).pack_id.hex()}: 3 of the 4 shards needed can be had"
        ]
        assert fs.members.remove(places[1]) is not None
        for place in places[4:]:
            fs.backends[place].down = False
    assert fs.read(number, 0, 1) == [data[:PAGE]]


async def test_placement_is_a_hint(fs, autojump_clock, expect_log):
    expect_log(r"read from others", logging.WARNING)
    data = noise(8 * PAGE)
    number = fs.write("a", data)
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    for place, key in fs.shard_keys(pack):
        value = fs.world.data[place - 1].peek(key)
        fs.world.data[place - 1].lose(key)
        fs.world.data[place % 8].put(key, value)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 8)
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_a_late_answer_is_hedged(fs, autojump_clock):
    data = noise(8 * PAGE)
    number = fs.write("a", data)
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    for place, _ in fs.shard_keys(pack)[:2]:
        fs.backends[place].delay = lambda call: 100.0
    async with fs.fetching() as fetcher:
        began = trio.current_time()
        await fetcher.fetch(number, 0, 8)
        assert trio.current_time() - began < 1
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_where_all_answers_are_late_nothing_is_asked_of_backends_that_were_given_nothing(
    fs, autojump_clock
):
    """A machine that is slow itself is not made slower by asking 8 backends for each of 6 shards."""
    data = noise(8 * PAGE)
    number = fs.write("a", data)
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    asked = []

    def slow(call: str) -> float:
        asked.append(call)
        return 1.1

    for backend in fs.backends.values():
        backend.delay = slow
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 8)
    assert asked.count("get") <= len(fs.shard_keys(pack))
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_a_backend_that_is_always_slow_does_not_use_up_a_readers_time(fs, autojump_clock):
    """Its usual 40 s count for nothing: others are asked long before the reader's 30 s are over."""
    number = fs.write("a", noise(8 * PAGE))
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    slow = fs.shard_keys(pack)[0][0]
    fs.backends[slow].delay = lambda call: 100.0
    async with fs.fetching() as fetcher:
        for _ in range(64):
            fetcher.reader.latencies.note(slow, 40.0)
        began = trio.current_time()
        await fetcher.fetch(number, 0, 8)
        assert trio.current_time() - began < 5


async def test_backends_that_hang_do_not_keep_those_that_returned_from_being_seen(fs, autojump_clock):
    """Two backends count as down and have returned, two others answer nothing: four of six are needed."""
    data = noise(8 * PAGE)
    number = fs.write("a", data)
    fs.commit()
    (pack,) = fs.upload(number)
    fs.evict(number)
    places = [place for place, _ in fs.shard_keys(pack)]
    for place in places[:2]:
        for _ in range(9):
            fs.members.by_number(place).failed(BackendUnavailable("no answer"))
    for place in places[2:4]:
        fs.backends[place].delay = lambda call: 1e6
    async with fs.fetching() as fetcher:
        began = trio.current_time()
        await fetcher.fetch(number, 0, 8)
        assert trio.current_time() - began < 5
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_readers_of_one_pack_share_one_fetch(fs, autojump_clock):
    data = noise(64 * PAGE)
    number = fs.remote_file("a", data, extent_pages=8)
    for backend in fs.backends.values():
        backend.delay = lambda call: 0.01
    async with fs.fetching() as fetcher:
        async with trio.open_nursery() as nursery:
            for page in [*range(64), *range(64)]:
                nursery.start_soon(fetcher.fetch, number, page, 1)
        assert gets(fs) == 4
    assert b"".join(fs.read(number, 0, 64)) == data


async def test_a_reader_that_gives_up_does_not_end_the_others(fs, autojump_clock):
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    for backend in fs.backends.values():
        backend.delay = lambda call: 0.2
    async with fs.fetching() as fetcher:
        with trio.move_on_after(0.1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetcher.fetch, number, 0, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.fetch, number, 0, 8)
            with trio.move_on_after(0.05):
                await fetcher.fetch(number, 0, 1)
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_a_sequential_reader_is_read_ahead(fs, autojump_clock):
    data = noise(512 * PAGE)
    number = fs.remote_file("a", data, extent_pages=16)
    async with fs.fetching() as fetcher:
        for page in range(0, 48, 16):
            await fetcher.fetch(number, page, 16)
        await trio.sleep(5)
        assert fs.read(number, 64, 64) == [data[p * PAGE : (p + 1) * PAGE] for p in range(64, 128)]


async def test_the_next_stretch_is_on_its_way_before_the_last_one_is_read(fs, autojump_clock):
    """A line with a long round trip stays full: a read in the newest stretch begins the one behind it."""
    pages = 2048
    number = fs.remote_file("a", noise(pages * PAGE), extent_pages=16)
    async with fs.fetching() as fetcher:
        for page in range(0, pages, 16):
            if None in fs.read(number, page, 16):
                await fetcher.fetch(number, page, 16)
            await trio.sleep(5)
            fs.commit()
            ahead = min(pages, page + 16 + FIRST_PAGES)
            if page >= 64 and ahead < pages:
                here = sum(data is not None for data in fs.read(number, page + 16, ahead - page - 16))
                assert here >= FIRST_PAGES - 2 * 16, f"after page {page}: {here} pages are here"
        assert fetcher.fetched_pages == pages


async def test_what_is_held_for_a_reader_is_not_asked_for_again(fs, autojump_clock):
    number = fs.remote_file("a", noise(512 * PAGE), extent_pages=16)
    async with fs.fetching() as fetcher:
        for page in (0, 16):
            await fetcher.fetch(number, page, 16)
        await trio.sleep(5)
        assert fs.read(number, 32, 16) == [None] * 16
        for backend in fs.backends.values():
            backend.calls.clear()
            backend.delay = lambda call: 60.0
        with trio.fail_after(1):
            await fetcher.fetch(number, 32, 16)
        assert None not in fs.read(number, 32, 16)


async def test_every_place_among_what_is_fetched_ahead_is_given_back(fs, autojump_clock):
    """Also where two streams wait for a place for the same extent: each one lost is lost for as long as the mount."""
    number = fs.remote_file("a", noise((AHEAD_AT_ONCE + 8) * 8 * PAGE), extent_pages=8)
    async with fs.fetching() as fetcher, trio.open_nursery() as nursery:
        for backend in fs.backends.values():
            backend.delay = lambda call: 2.0
        shared = AHEAD_AT_ONCE * 8
        nursery.start_soon(fetcher._fetch_ahead, number, 0, shared + 8)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(fetcher._fetch_ahead, number, shared, shared + 64)
        await trio.sleep(300)
        assert None not in fs.read(number, shared, 8)
        assert fetcher._ahead_slots.value == AHEAD_AT_ONCE and not fetcher._jobs


async def test_nothing_is_fetched_ahead_while_reads_fail(fs, autojump_clock, expect_log):
    expect_log(r"not here after", logging.ERROR)
    number = fs.remote_file("a", noise(512 * PAGE), extent_pages=16)
    async with fs.fetching(deadline_seconds=2.0) as fetcher:
        for backend in fs.backends.values():
            backend.delay = lambda call: 3600.0
        with pytest.raises(Unavailable):
            await fetcher.fetch(number, 0, 16)
        for backend in fs.backends.values():
            backend.calls.clear()
        for page in range(16, 64):
            with pytest.raises(Unavailable):
                await fetcher.fetch(number, page, 1)
        asked = {key for backend in fs.backends.values() for call, key in backend.calls if call == "get"}
        assert len(asked) <= 3 * 6


async def test_a_random_reader_is_not(fs, autojump_clock):
    number = fs.remote_file("a", noise(512 * PAGE), extent_pages=16)
    async with fs.fetching() as fetcher:
        for page in (400, 16, 300, 100):
            await fetcher.fetch(number, page, 1)
        await trio.sleep(5)
        assert fetcher.fetched_pages == 64


async def test_a_file_without_remote_pages_asks_nobody(fs, autojump_clock):
    number = fs.write("a", noise(4 * PAGE))
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 100)
    assert gets(fs) == 0


async def test_what_the_cache_has_no_room_for_is_kept_briefly(fs, autojump_clock):
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    fs.store.used_bytes = fs.store.limits.full_bytes
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 2, 2)
    assert fs.read(number, 0, 8) == [None] * 8
    kept = [fs.transient.get(number, page, fs.store.extents.at(number, page)) for page in range(8)]
    assert kept == [None, None, data[2 * PAGE : 3 * PAGE], data[3 * PAGE : 4 * PAGE], None, None, None, None]


async def test_a_full_group_is_committed_first(fs, autojump_clock):
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    filler = fs.create("filler")
    fs.overwrite(filler, 0, bytes(fs.store.limits.group_bytes))
    assert fs.store.group_is_full()
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 8)
    assert fs.room_waits
    assert b"".join(fs.read(number, 0, 8)) == data


async def test_a_read_that_only_the_local_store_holds_up_does_not_blame_backends(
    fs, autojump_clock, monkeypatch, expect_log
):
    why = "its data came, but the local store is busy"
    expect_log(f"page 0: not here after 10 s; pack .*: {why}", logging.ERROR)
    number = fs.remote_file("a", noise(8 * PAGE))
    fs.overwrite(fs.create("filler"), 0, bytes(fs.store.limits.group_bytes))

    async def room() -> None:
        await trio.sleep(100)

    monkeypatch.setattr(fs, "room", room)
    async with fs.fetching(deadline_seconds=10) as fetcher:
        with pytest.raises(Unavailable, match=why) as caught:
            await fetcher.fetch(number, 0, 8)
        assert "not being read" not in str(caught.value)


async def test_what_is_remote_is_read_past_a_cache_whose_disk_failed(fs, autojump_clock, monkeypatch):
    """The mount is read-only then, with a group that stays full: that is no reason for a read to fail."""
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    fs.overwrite(fs.create("filler"), 0, bytes(fs.store.limits.group_bytes))

    async def room() -> None:
        raise CacheError("no space left on device")

    monkeypatch.setattr(fs, "room", room)
    async with fs.fetching() as fetcher:
        await fetcher.fetch(number, 0, 8)
    kept = [fs.transient.get(number, page, fs.store.extents.at(number, page)) for page in range(8)]
    assert b"".join(kept) == data


async def test_a_missing_pack_row_is_a_named_error(fs, autojump_clock, expect_log):
    expect_log(r"page 0: its extent lies in pack number 1, which is unknown", logging.ERROR)
    number = fs.remote_file("a", noise(8 * PAGE))
    fs.store.layers.delete(Table.PACKS, u64(1))
    async with fs.fetching() as fetcher:
        with pytest.raises(Corrupt):
            await fetcher.fetch(number, 0, 1)


async def test_hundreds_of_waits_for_dead_backends_cost_next_to_nothing(fs, autojump_clock):
    """One probe a second and backend, and nothing a wait."""
    numbers = []
    for i in range(300):
        number = fs.write(f"f{i}", noise(PAGE, i), flags=int(InodeFlag.WAIT))
        fs.upload(number, commit=False)
        numbers.append(number)
    fs.commit()
    for number in numbers:
        fs.evict(number)
    for backend in fs.backends.values():
        backend.down = True
    asked = [0]

    def count(call):
        asked[0] += 1
        return 0.0

    async with fs.fetching(deadline_seconds=600) as fetcher, trio.open_nursery() as nursery:
        for number in numbers:
            nursery.start_soon(fetcher.fetch, number, 0, 1)
        await trio.sleep(60)
        assert len(fetcher.waits) == 300
        for backend in fs.backends.values():
            backend.delay = count
        await trio.sleep(100)
        assert asked[0] <= 8 * 110
        assert trio.lowlevel.current_statistics().tasks_runnable < 10
        # ... and when the backends return, all get their data.
        for backend in fs.backends.values():
            backend.down = False
        await trio.sleep(60)
        assert not fetcher.waits
    for i, number in enumerate(numbers):
        assert fs.read(number, 0, 1) == [noise(PAGE, i)]


async def test_stopping_ends_every_wait(fs, autojump_clock, expect_log):
    expect_log(r"the daemon stops", logging.ERROR)
    number = fs.remote_file("a", noise(8 * PAGE))
    for backend in fs.backends.values():
        backend.down = True
    raised = []

    async def read(fetcher):
        try:
            await fetcher.fetch(number, 0, 1)
        except Unavailable as error:
            raised.append(error)

    async with trio.open_nursery() as readers, fs.fetching() as fetcher:
        readers.start_soon(read, fetcher)
        await trio.sleep(1)
    assert len(raised) == 1


@pytest.mark.parametrize("seed", range(30))
async def test_damaged_rows_give_errors_and_never_wrong_bytes(fs, autojump_clock, expect_log, seed):
    expect_log(r"", optional=True)
    source = random.Random(seed)
    data = noise(40 * PAGE)
    number = fs.remote_file("a", data)
    for _ in range(source.randrange(1, 4)):
        table = source.choice((Table.EXTENTS, Table.PACKS))
        key, row = source.choice(list(fs.store.scan(table, b"", None)))
        at = source.randrange(len(row))
        changed = row[:at] + bytes([row[at] ^ 1 << source.randrange(8)]) + row[at + 1 :]
        fs.store.layers.put(table, key, source.choice((changed, row[:at])))
    async with fs.fetching() as fetcher:
        for page in range(40):
            try:
                await fetcher.fetch(number, page, 1)
            except QsfsError:
                continue
            assert fs.read(number, page, 1) in ([None], [data[page * PAGE : (page + 1) * PAGE]])
