"""Cold tiering by hand: what `qsfs cache` and `qsfs info` promise, on a small file system in memory."""

from __future__ import annotations

import dataclasses
import logging
import random
import stat

import pytest
import trio

from qsfs.config import PolicyRule
from qsfs.daemon import caching as caching_module
from qsfs.daemon.caching import Caching, Range
from qsfs.daemon.informing import answering_of, inform
from qsfs.daemon.jobs import Jobs
from qsfs.errors import Corrupt, LimitExceeded, NotFound, QsfsError, Unavailable
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.posix import Credentials
from qsfs.remote.restore import restore
from qsfs.remote.survey import Timing
from qsfs.store.eviction import Evictor
from qsfs.store.packs import set_looked
from qsfs.store.schema import BLOCK_PAGES, PAGE, ROOT_INODE, InodeFlag, PackState, Table, u64
from qsfs.store.survey import FileSurvey, holes
from tests.remote.small_fs import LIMITS, SECRET, SmallFs, noise

TIMING = Timing(attempt=2.0, retry=0.01, retry_most=0.02, grace=0.2)
OWNER = Credentials(0, 0)


class Cached(SmallFs):
    """A small file system with the parts of a daemon that the commands use."""

    def start(self, rules=()):
        self.contents = Contents(self.store)
        self.namespace = Namespace(self.store, self.contents, Policies(rules))
        self.tree = self.namespace.tree

    def look(self, *packs: int) -> None:
        """The second look found these packs whole."""
        for pack in packs:
            assert set_looked(self.store, pack, self.pack_row(pack).placement, self.clock.time_ns())
        SmallFs.commit(self)

    def resident(self, number: int) -> int:
        pages = -(-self.inode(number).size // PAGE)
        return sum(page is not None for page in self.read(number, 0, pages))


class Room:
    """What the committer offers."""

    def __init__(self, fs: Cached) -> None:
        self._fs = fs

    async def room(self) -> None:
        if self._fs.store.group_is_full():
            self._fs.commit()

    async def commit(self) -> None:
        self._fs.commit()


@pytest.fixture
async def fs(scratch):
    fs = await Cached.make(scratch / "cache")
    fs.add_superblock()
    fs.start()
    yield fs
    fs.close()


def caching(fs: Cached, fetcher=None) -> Caching:
    return Caching(fs.store, fs.tree, fetcher, Room(fs))


# info


async def test_info_counts_pages_as_they_are(fs):
    """Pages by state, against a count of every single page after random writes, uploads, evictions and a truncation."""
    rng = random.Random(4)
    number = fs.create("a")
    fs.overwrite(number, 0, noise(300 * PAGE))
    fs.upload(number)
    for _ in range(60):
        first, count = rng.randrange(290), rng.randrange(1, 9)
        fs.overwrite(number, first, noise(count * PAGE, first))
        if rng.random() < 0.2:
            fs.upload(number)
        if rng.random() < 0.4:
            block = rng.randrange(70)
            fs.store.blocks.evict(fs.inode(number), block, rng.randrange(16))
    fs.inode(number).size = 320 * PAGE
    fs.store.truncate_data(fs.inode(number), 250, 250 * PAGE)
    found = FileSurvey(fs.store, answering_of(fs.members, 4))
    for _ in found.steps(fs.inode(number)):
        pass
    wanted = {"clean": 0, "dirty": 0, "remote": 0}
    for page in range(320):
        state = fs.store.blocks.state(number, page // BLOCK_PAGES)
        bit = 1 << page % BLOCK_PAGES
        if state is not None and state.resident & bit:
            wanted["dirty" if state.dirty & bit else "clean"] += 1
        elif fs.store.blocks.remote_extent(number, page) is not None:
            wanted["remote"] += 1
    assert min(wanted.values()) > 0
    assert {name: getattr(found.pages, name) for name in wanted} == wanted
    assert holes(320 * PAGE, found.pages) == 320 - sum(wanted.values())


async def test_info_says_what_losses_a_file_survives(fs):
    """Spare shards as stored and as of now, the class of packs, and on which backends their shards lie."""
    number = fs.write("a", noise(32 * PAGE))
    fs.commit()
    full, written = fs.upload(number, extents_in_pack=2)
    row = fs.pack_row(written)
    fs.store.layers.put(
        Table.PACKS, u64(written), dataclasses.replace(row, state=0, placement=(*row.placement[:5], -1)).encode()
    )
    fs.look(full)
    fs.members.by_number(fs.pack_row(full).placement[0]).identified = False
    found = await inform(fs.store, fs.tree, fs.contents, fs.members, 4, fs.inode(number), {}, extents=True)
    packs = found["packs"]
    assert (packs["count"], packs["full"], packs["written"], packs["looked"]) == (2, 1, 1, 1)
    assert packs["spare_shards"] == {"1": 1, "2": 1}
    assert min(map(int, packs["spare_shards_now"])) < 2
    assert sum(found["shards"].values()) == 11 and len(found["listed_packs"]) == 2
    assert [extent["first_page"] for extent in found["listed_extents"]] == [0, 8, 16, 24]
    assert found["pages"]["unpublished"] == 32


async def test_info_of_a_directory_is_the_sum(fs):
    """Everything below counts, a file with two names once."""
    directory = fs.create("dir", mode=stat.S_IFDIR | 0o755)
    one = fs.write("a", noise(5 * PAGE), parent=directory)
    fs.write("b", noise(3 * PAGE))
    fs.namespace.link(one, ROOT_INODE, b"again")
    found = await inform(fs.store, fs.tree, fs.contents, fs.members, 4, fs.inode(ROOT_INODE), {})
    assert found["contains"] == {"directory": 2, "file": 2}
    assert (found["size"], found["pages"]["dirty"]) == (8 * PAGE, 8)


async def test_info_works_in_short_steps(fs):
    """However many extents a file has, no more than some rows are looked at between two other requests."""
    number = fs.create("sparse")
    for i in range(1000):
        fs.overwrite(number, 50 * i, b"x")
    fs.upload(number, extents_in_pack=500)
    survey = FileSurvey(fs.store, answering_of(fs.members, 4), most_extents=3)
    reads = []
    get = fs.store.get

    def counted(table, key):
        reads[-1] += 1
        return get(table, key)

    fs.store.get = counted
    reads.append(0)
    for _ in survey.steps(fs.inode(number), 500):
        reads.append(0)
    assert survey.extents == 1000 and max(reads) <= 64 and len(reads) > 30
    assert [listed.row.first for listed in survey.listed] == [500, 550, 600] and survey.next_page == 650


# evict


async def test_only_what_is_safe_is_dropped(fs):
    """Full and looked at goes; dirty, not full, not looked at, pinned and local-only pages stay, each named."""
    names = ("safe", "not_looked", "not_full", "dirty", "pinned")
    files = {name: fs.write(name, noise(8 * PAGE, i)) for i, name in enumerate(names)}
    files["local_only"] = fs.write("local_only", noise(8 * PAGE), flags=InodeFlag.LOCAL_ONLY)
    fs.commit()
    packs = {name: fs.upload(files[name])[0] for name in names if name != "dirty"}
    row = fs.pack_row(packs["not_full"])
    fs.store.layers.put(
        Table.PACKS, u64(packs["not_full"]), dataclasses.replace(row, state=int(PackState.LOOKED)).encode()
    )
    fs.look(packs["safe"], packs["pinned"])
    with fs.store.change() as change:
        change.patch(files["pinned"], flags=InodeFlag.PINNED_BY_HAND)
    found = await caching(fs).evict([fs.inode(ROOT_INODE)], {})
    assert found["dropped_bytes"] == 8 * PAGE
    assert found["stays"] == {reason: 8 * PAGE for reason in sorted(files) if reason != "safe"}
    assert {name: fs.resident(number) for name, number in files.items()} == {
        name: 0 if name == "safe" else 8 for name in files
    }


async def test_a_block_that_is_dirty_in_part_stays_whole(fs):
    """What is left of a block takes as much room as all of it."""
    number = fs.write("a", noise(8 * PAGE))
    fs.commit()
    fs.look(*fs.upload(number))
    fs.overwrite(number, 1, noise(PAGE, 5))
    found = await caching(fs).evict([fs.inode(number)], {})
    assert found == {"dropped_bytes": 4 * PAGE, "stays": {"dirty": PAGE, "shares_block": 3 * PAGE}}


# warm


async def test_warm_brings_everything_and_only_that(fs):
    """All remote pages of a range come, byte for byte, and nothing outside of it."""
    data = noise(100 * PAGE)
    number = fs.remote_file("a", data)
    other = fs.remote_file("b", noise(4 * PAGE, 2))
    async with fs.fetching() as fetcher:
        progress: dict = {}
        found = await caching(fs, fetcher).warm([fs.inode(number)], Range(16 * PAGE, 48 * PAGE), progress)
        assert found["fetched_bytes"] == found["wanted_bytes"] == 32 * PAGE == progress["fetched_bytes"]
        assert b"".join(fs.read(number, 16, 32)) == data[16 * PAGE : 48 * PAGE]
        found = await caching(fs, fetcher).warm([fs.inode(number)], Range(), {})
        assert b"".join(fs.read(number, 0, 100)) == data
        assert fs.resident(other) == 0
        assert (await caching(fs, fetcher).warm([fs.inode(number)], Range(), {}))["wanted_bytes"] == 0


async def test_a_warm_that_does_not_fit_begins_nothing(fs):
    """The room without eviction is the bound: refused with what is needed and what there is."""
    number = fs.remote_file("a", noise(100 * PAGE))
    fs.store.limits = dataclasses.replace(fs.store.limits, high_bytes=fs.store.expected_bytes() + 99 * PAGE)
    async with fs.fetching() as fetcher:
        with pytest.raises(LimitExceeded, match=r"400.0 KiB .*has room for 396.0 KiB"):
            await caching(fs, fetcher).warm([fs.inode(number)], Range(), {})
    assert fs.resident(number) == 0


async def test_a_warm_that_does_not_come_says_so(fs, autojump_clock, expect_log, monkeypatch):
    """Backends that do not answer: an error with what came, never silence."""
    expect_log(r"not here after", optional=True)
    monkeypatch.setattr(caching_module, "_CHUNK_PAGES", 4)
    monkeypatch.setattr(caching_module, "_MOST_FAILURES", 2)
    number = fs.remote_file("a", noise(64 * PAGE))
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching(deadline_seconds=1) as fetcher:
        with pytest.raises(Unavailable, match=r"0 B of 256.0 KiB were fetched, then [2-9] parts"):
            await caching(fs, fetcher).warm([fs.inode(number)], Range(), {})


@pytest.mark.parametrize("command", ["warm", "pin"])
async def test_a_command_ends_where_reads_wait_for_ever(fs, autojump_clock, expect_log, command):
    """`unavailable = "wait"` is for those who read: a command gives up each part after the deadline."""
    expect_log(r"not here after", logging.ERROR)
    number = fs.remote_file("a", noise(64 * PAGE))
    with fs.store.change() as change:
        change.patch(number, flags=int(InodeFlag.WAIT))
    for backend in fs.backends.values():
        backend.down = True
    async with fs.fetching(deadline_seconds=10) as fetcher:
        commands = caching(fs, fetcher)
        with trio.fail_after(60), pytest.raises(Unavailable, match="parts did not come"):
            if command == "warm":
                await commands.warm([fs.inode(number)], Range(), {})
            else:
                await commands.pin([fs.inode(number)], {})


# pins


async def test_a_walk_that_fails_while_parts_are_fetched_is_told_as_it_is(fs, monkeypatch):
    """As the one error that a command knows how to tell, though it ends fetches that are under way."""

    class Never:
        async def fetch(self, inode, first, count, *, may_wait):
            await trio.sleep_forever()

    number = fs.remote_file("a", noise(64 * PAGE))
    walks = []

    def fail_at_the_second(tree, root):
        walks.append(root)
        yield [root.number]
        if len(walks) == 2:
            raise Corrupt("a directory entry names no inode")

    monkeypatch.setattr(caching_module, "walk", fail_at_the_second)
    with pytest.raises(Corrupt, match="names no inode"):
        await caching(fs, Never()).warm([fs.inode(number)], Range(), {})
    assert len(walks) == 2


def make(fs: Cached, parent: int, name: bytes, mode: int = stat.S_IFREG | 0o644):
    if stat.S_ISDIR(mode):
        return fs.namespace.mkdir(parent, name, 0o755, OWNER)
    return fs.namespace.create(parent, name, 0o644, OWNER)


async def test_a_pinned_directory_holds_what_is_made_in_it_later(fs):
    """The pin is of the file system: set below, inherited by new files and directories, gone with unpin."""
    directory = fs.create("dir", mode=stat.S_IFDIR | 0o755)
    old = fs.write("old", noise(4 * PAGE), parent=directory)
    fs.commit()
    async with fs.fetching() as fetcher:
        commands = caching(fs, fetcher)
        assert (await commands.pin([fs.inode(directory)], {}))["changed"] == 2
        below = make(fs, directory, b"sub", stat.S_IFDIR).number
        new = make(fs, below, b"new").number
        beside = make(fs, ROOT_INODE, b"beside").number
        flags = [bool(fs.inode(n).flags & InodeFlag.PINNED_BY_HAND) for n in (directory, old, below, new, beside)]
        assert flags == [True, True, True, True, False]
        assert (await commands.status())["pinned_files"] == 2
        assert (await commands.unpin([fs.inode(directory)]))["changed"] == 4
        assert (await commands.status())["pinned_bytes"] == 0


async def test_pinned_pages_are_fetched_and_never_evicted(fs):
    """A pin fetches what is remote; eviction passes it over whatever the need."""
    number = fs.remote_file("a", noise(16 * PAGE))
    fs.look(1)
    async with fs.fetching() as fetcher:
        found = await caching(fs, fetcher).pin([fs.inode(number)], {})
    assert found["fetched_bytes"] == found["pinned_bytes"] == 16 * PAGE
    evictor = Evictor(fs.store)
    for _ in range(3):
        assert evictor.step(1000, 1000, recent_too=True, written_will_do=True).blocks == 0
    assert fs.resident(number) == 16


async def test_pins_cannot_fill_the_cache(fs, monkeypatch):
    """Beyond half of the cache a pin is refused, and nothing of it is left behind."""
    small = fs.remote_file("small", noise(8 * PAGE))
    number = fs.remote_file("a", noise(100 * PAGE))
    async with fs.fetching() as fetcher:
        commands = caching(fs, fetcher)
        await commands.pin([fs.inode(small)], {})
        monkeypatch.setattr(Caching, "most_pinned", lambda _: 107 * PAGE)
        with pytest.raises(LimitExceeded, match="nothing was pinned"):
            await commands.pin([fs.inode(number)], {})
        assert not fs.inode(number).flags and fs.resident(number) == 0
        monkeypatch.setattr(Caching, "most_pinned", lambda _: 108 * PAGE)
        assert (await commands.pin([fs.inode(number)], {}))["pinned_bytes"] == 108 * PAGE


async def test_no_rule_takes_a_pin_away(fs):
    """A walk of changed rules and a rename out of the directory leave the pin; rules decide the rest."""
    directory = fs.create("dir", mode=stat.S_IFDIR | 0o755)
    number = fs.write("a.db", noise(PAGE), parent=directory)
    fs.commit()
    async with fs.fetching() as fetcher:
        await caching(fs, fetcher).pin([fs.inode(directory)], {})
    fs.start((PolicyRule(match="*.db", unavailable="wait"),))
    while not fs.namespace.policies.step():
        pass
    both = InodeFlag.PINNED_BY_HAND | InodeFlag.WAIT
    assert fs.inode(number).flags == both
    fs.namespace.rename(directory, b"a.db", ROOT_INODE, b"b.db")
    assert fs.inode(number).flags == both
    assert fs.namespace.policies.status().waiting == ()


async def test_a_pin_survives_a_restore(fs, scratch):
    """On a new machine the pins are there, and `warm --pinned` fetches what they name."""
    data = noise(8 * PAGE)
    number = fs.remote_file("a", data)
    fs.remote_file("b", noise(8 * PAGE, 2))
    async with fs.fetching() as fetcher:
        await caching(fs, fetcher).pin([fs.inode(number)], {})
    fs.commit()
    fs.publish()
    new = scratch / "new"
    new.mkdir()
    await restore(
        fs.candidates(), secret=SECRET, directory=new, limits=LIMITS, clock=fs.clock, timing=TIMING
    )
    there = Cached(fs.world, new)
    there.start()
    async with there.fetching() as fetcher:
        found = await caching(there, fetcher).warm_pinned({})
    assert found["fetched_bytes"] == 8 * PAGE and b"".join(there.read(number, 0, 8)) == data
    there.close()


# jobs


async def test_a_job_is_answered_when_it_is_done(autojump_clock):
    """Its result or its error, once; then it is forgotten."""
    jobs = Jobs()

    async def work(progress):
        progress["done"] = 1
        await trio.sleep(3)
        if progress.get("fail"):
            raise NotFound("gone")
        return 7

    async def failing(progress):
        progress["fail"] = True
        return await work(progress)

    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.run)
        for wanted, started in ((7, await jobs.start(work)), (None, await jobs.start(failing))):
            assert (started["done"], started["progress"]["done"]) == (False, 1)
            while not started["done"]:
                try:
                    started = await jobs.ask(started["job"])
                except NotFound as error:
                    assert wanted is None and str(error) == "gone"
                    break
            else:
                assert started["result"] == wanted
            with pytest.raises(NotFound):
                await jobs.ask(started["job"])
        nursery.cancel_scope.cancel()


async def test_a_job_ends_with_its_command(autojump_clock):
    """Cancelled at once when told so, and after a while when nobody asks any more."""
    jobs = Jobs()
    ended = []

    async def work(progress):
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.run)
        first = await jobs.start(work)
        jobs.cancel(first["job"])
        with pytest.raises(QsfsError, match="ended"):
            await jobs.ask(first["job"])
        await jobs.start(work)
        begin = trio.current_time()
        await trio.sleep(120)
        assert len(ended) == 2 and ended[1] - begin < 60
        nursery.cancel_scope.cancel()
