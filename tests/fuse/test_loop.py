"""The shorter request loop waits as pyfuse3 expects, and starves nobody."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import socket
import threading

import pyfuse3
import pytest
import trio
import trio.testing

from qsfs.fuse import loop
from qsfs.store.schema import PAGE
from tests.fuse.calls import hand_over

STORM = 3000

@pytest.fixture
def pair():
    one, two = socket.socketpair()
    with one, two:
        yield one, two


async def steps_of(awaitable):
    """How often awaiting gives other tasks a turn."""
    turns = 0
    finished = trio.Event()

    async def count():
        nonlocal turns
        while not finished.is_set():
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        before = turns
        await awaitable
        after = turns
        finished.set()
    return after - before


async def test_a_request_that_is_there_is_taken_without_a_pause(pair):
    one, two = pair
    two.send(b"x")
    assert await steps_of(loop.ShortLoop().lowlevel.wait_readable(one.fileno())) == 0


async def test_a_request_that_is_not_there_is_waited_for(pair):
    one, two = pair
    done = []

    async def wait():
        await loop.ShortLoop().lowlevel.wait_readable(one.fileno())
        done.append(one.recv(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        two.send(b"x")
    assert done == [b"x"]


class Descriptor:
    """Polled like one where the next request is there only at the poll after so many."""

    def __init__(self):
        self.misses = 0

    def poll(self, _):
        self.misses -= 1
        return [] if self.misses >= 0 else [(0, 1)]


async def test_spins_are_made_only_while_they_pay(monkeypatch):
    """Each tick of the clock is a look at it: a spin has time for two polls, a short wait for nine."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop, "perf_counter", lambda: next(ticks) * 10e-6)
    asked = []

    async def wait_readable(descriptor):
        asked.append(descriptor)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    lowlevel = loop.ShortLoop().lowlevel
    lowlevel._polls[0] = descriptor = Descriptor()

    async def asks_event_loop(misses):
        descriptor.misses = misses
        asked.clear()
        await lowlevel.wait_readable(0)
        return bool(asked)

    assert not await asks_event_loop(0)
    assert await asks_event_loop(1), "nothing says that a request comes soon"
    assert not await asks_event_loop(2), "the last one came soon"
    assert await asks_event_loop(9), "it did not come soon"
    for _ in range(3):
        assert await asks_event_loop(1), "a spin that was in vain must be earned again"
    assert not await asks_event_loop(2)


async def test_a_wake_up_without_a_request_is_waited_through(monkeypatch):
    """The event loop may say "readable" when nothing is there (any more): a read would block the thread."""
    wakes = []

    async def wait_readable(descriptor):
        wakes.append(descriptor)
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    lowlevel = loop.ShortLoop().lowlevel
    lowlevel._polls[0] = descriptor = Descriptor()
    descriptor.misses = 4
    await lowlevel.wait_readable(0)
    assert wakes == [0] * 4, "one poll before the first wait, and one after each wake-up"
    assert descriptor.misses == -1, "it ended with the poll that found a request"


async def test_closing_ends_the_wait(pair):
    one, _ = pair
    short = loop.ShortLoop()
    async with trio.open_nursery() as nursery:

        async def wait():
            with pytest.raises(short.ClosedResourceError):
                await short.lowlevel.wait_readable(one.fileno())

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        short.lowlevel.notify_closing(one.fileno())


async def test_one_holds_the_lock_at_a_time_and_all_get_it():
    lock = loop.ReadLock(0.0)
    holders, turns = [], dict.fromkeys(range(6), 0)
    order = random.Random(7)

    async def work(number):
        for _ in range(40):
            async with lock:
                assert holders == []
                holders.append(number)
                for _ in range(order.randrange(3)):
                    await trio.lowlevel.checkpoint()
                holders.remove(number)
                turns[number] += 1
            for _ in range(order.randrange(3)):
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for number in turns:
            nursery.start_soon(work, number)
    assert set(turns.values()) == {40}


async def test_a_cancelled_waiter_leaves_the_lock_to_the_others():
    lock = loop.ReadLock(0.0)
    got = []

    async def take(number, scope):
        with scope:
            async with lock:
                got.append(number)

    scopes = [trio.CancelScope() for _ in range(4)]
    async with trio.open_nursery() as nursery, lock:
        for number, scope in enumerate(scopes):
            nursery.start_soon(take, number, scope)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        scopes[2].cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(got) == [1, 3]


async def test_one_worker_goes_on_while_another_waits_for_its_turn():
    lock = loop.ReadLock(1e9)
    got = []

    async def wait():
        async with lock:
            got.append("other")

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(100):
            async with lock:
                assert got == []
        await trio.testing.wait_all_tasks_blocked()
        assert got == ["other"]


async def test_requests_without_end_leave_the_others_their_turn(monkeypatch):
    """Each look at the clock is 10 us: between two turns each of three workers answers at most 50."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop, "perf_counter", lambda: next(ticks) * 10e-6)
    lock = loop.ReadLock(500e-6)
    served, seen = 0, []

    async def work():
        nonlocal served
        while served < 5000:
            async with lock:
                if served % 1000 == 0:
                    # The event loop is asked; meanwhile other workers come and wait.
                    await trio.lowlevel.checkpoint()
                served += 1

    async def another_task():
        while served < 5000:
            seen.append(served)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(work)
        nursery.start_soon(another_task)
    assert max(later - sooner for sooner, later in itertools.pairwise([*seen, served])) <= 3 * 50


def test_it_is_installed_for_a_block_and_only_where_it_fits(monkeypatch):
    assert pyfuse3.trio is trio
    with loop.installed() as used:
        assert used
        assert isinstance(pyfuse3.trio, loop.ShortLoop)
        assert pyfuse3.trio.open_nursery is trio.open_nursery
        assert pyfuse3.trio.lowlevel.current_task is trio.lowlevel.current_task
    assert pyfuse3.trio is trio
    with loop.installed(False) as used:
        assert not used
        assert pyfuse3.trio is trio
    monkeypatch.setattr(pyfuse3, "__version__", "9.9.9")
    with loop.installed() as used:
        assert not used
        assert pyfuse3.trio is trio


@pytest.mark.mount
@pytest.mark.parametrize("short_loop", [True, False])
def test_both_loops_serve(make_mount, short_loop):
    root = make_mount(short_loop=short_loop).path
    for number in range(100):
        (root / f"{number}").write_bytes(b"%d" % number)
    assert sorted(os.listdir(root)) == sorted(map(str, range(100)))
    with open(root / "0", "r+b") as file:
        for _ in range(20):
            file.write(b"x")
            os.fsync(file.fileno())


@pytest.mark.mount
@pytest.mark.parametrize("short_loop", [True, False])
def test_other_tasks_get_their_turn_under_load(make_mount, short_loop):
    """The daemon commits, uploads and answers its control socket on the same event loop."""
    mount = make_mount(short_loop=short_loop)
    stop = threading.Event()

    def load(name):
        while not stop.is_set():
            os.mkfifo(mount.path / name)
            os.unlink(mount.path / name)

    threads = [threading.Thread(target=load, args=(str(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        answers = [mount.requests() for _ in range(50)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(answers) == 50


@pytest.mark.mount
@pytest.mark.parametrize("short_loop", [True, False])
def test_a_storm_of_forgets_gives_all_back_and_starves_nobody(make_mount, short_loop):
    """Others stat the same files while the kernel forgets thousands of them, by memory pressure and by unlink."""
    mount = make_mount(short_loop=short_loop)
    (mount.path / "d").mkdir()
    names = [mount.path / "d" / str(number) for number in range(STORM)]
    for number, name in enumerate(names):
        os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o600))
        os.truncate(name, number)
    hand_over(mount.path)
    assert mount.command("known") > STORM // 2
    stayed = range(0, STORM, 2)
    wrong = []
    counted = threading.Condition()
    stats, stop = 0, threading.Event()

    def look(number):
        nonlocal stats
        if os.stat(names[number]).st_size != number:
            wrong.append(number)
        with counted:
            stats += 1
            counted.notify()

    def look_on():
        for number in itertools.cycle(stayed):
            if stop.is_set():
                return
            look(number)

    def others_go_on():
        """The stats and the daemon's other tasks, by as many as there are files that stay."""
        mount.command("known")
        with counted:
            wanted = stats + len(stayed)
            assert counted.wait_for(lambda: stats >= wanted, timeout=60), f"{stats} stats, then no more"

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        for _ in range(3):
            forget_names()
            others_go_on()
        for number in range(1, STORM, 2):
            os.unlink(names[number])
        others_go_on()
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert mount.command("settled"), "what was unlinked is removed once it is forgotten"
    assert len(mount.command("inodes")) == len(stayed) + 2
    assert sorted(os.listdir(mount.path / "d"), key=int) == [str(number) for number in stayed]
    forget_names()
    assert mount.command("known_only", 0), "the kernel gave all back"


@pytest.mark.mount
@pytest.mark.parametrize("short_loop", [True, False])
def test_hundreds_of_waiting_page_faults_leave_the_rest_alone(make_mount, short_loop):
    """With pyfuse3's default of 99 workers the whole mount would hang."""
    mount = make_mount(short_loop=short_loop)
    count = 120
    (mount.path / "f").write_bytes(bytes(count * PAGE))
    hand_over(mount.path)
    handle = os.open(mount.path / "f", os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    mount.command("need_pages", os.fstat(handle).st_ino, True)
    with mmap.mmap(handle, count * PAGE, prot=mmap.PROT_READ) as shared:
        shared.madvise(mmap.MADV_RANDOM)
        children = [touch(shared, page) for page in range(count)]
        assert mount.command("waiting", count)
        assert os.stat(mount.path / "f").st_size == count * PAGE
        (mount.path / "g").write_text("alive")
        hand_over(mount.path)
        assert sorted(os.listdir(mount.path)) == ["f", "g"]
        mount.command("release", 0)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
    os.close(handle)


def forget_names():
    """Has the kernel forget all names that are not in use."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")


def touch(shared, page):
    """A child that reads one byte of a mapped page; a thread would hold the interpreter's lock."""
    child = os.fork()
    if child == 0:
        os._exit(shared[page * PAGE])
    return child
