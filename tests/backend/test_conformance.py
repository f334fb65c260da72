"""One suite for everything that calls itself a backend: in memory, wrapped, and a server over sockets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from qsfs.backend.contract import MAX_VALUE_BYTES, Backend, ScanEntry, ScanPage
from qsfs.backend.faults import Faults, with_faults
from qsfs.backend.limits import RateLimit, with_limits
from qsfs.backend.memory import MemoryBackend, MemoryStore
from qsfs.backend.metrics import Metrics, with_metrics
from qsfs.backend.open import open_backend
from qsfs.backend.retry import with_retry
from qsfs.backend.zdb import ZdbBackend
from qsfs.clock import FixedClock
from qsfs.config import BackendConfig
from qsfs.errors import BackendFull, BackendRefused, BackendUnavailable, WrongBackend
from tests.support.backends import in_process

LIMIT = 20_000_000


def in_memory(port: int) -> Backend:
    return MemoryBackend(MemoryStore(limit_bytes=LIMIT))


def wrapped(port: int) -> Backend:
    backend = with_metrics(with_faults(in_memory(port), Faults()), Metrics())
    upload, download = RateLimit(1e12), RateLimit()
    backend = with_limits(backend, upload=upload, download=download, concurrency=trio.Semaphore(3))
    return with_retry(backend, FixedClock())


def over_sockets(port: int) -> Backend:
    return ZdbBackend("127.0.0.1", port, "default")


def opened(port: int) -> Backend:
    return open_backend(
        BackendConfig(address=f"127.0.0.1:{port}", namespace="default"),
        metrics=Metrics(),
        upload=RateLimit(),
        concurrency=trio.Semaphore(4),
    )


@pytest.fixture(params=[in_memory, wrapped, over_sockets, opened], ids=lambda make: make.__name__)
async def backend(request: pytest.FixtureRequest, scratch: Path) -> AsyncIterator[Backend]:
    make: Callable[[int], Backend] = request.param
    needs_server = make in (over_sockets, opened)
    async with contextlib.AsyncExitStack() as stack:
        port = 0
        if needs_server:
            port = (await stack.enter_async_context(in_process(scratch / "z", default_maxsize=LIMIT)))[0]
        backend = make(port)
        yield backend
        await backend.aclose()


async def everything(scan: Callable[[bytes | None], object]) -> list[ScanEntry]:
    found: list[ScanEntry] = []
    cursor: bytes | None = None
    while True:
        page: ScanPage = await scan(cursor)
        assert (page.cursor is None) == (not page.entries), "only the end, which is empty, has no cursor"
        if page.cursor is None:
            return found
        found += page.entries
        cursor = page.cursor


async def test_a_value_comes_back_as_it_was_stored(backend):
    for value in (b"", b"x", b"\0\r\n$-1\r\n", bytes(range(256)) * 1024):
        await backend.set(b"\0\xff key\r\n", value)
        assert await backend.get(b"\0\xff key\r\n") == value


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_values_may_be_any_buffer(backend, kind):
    await backend.set(b"k", kind(b"v" * 10_000))
    assert await backend.get(b"k") == b"v" * 10_000


async def test_a_slice_of_a_view_is_stored_without_its_surroundings(backend):
    await backend.set(b"k", memoryview(bytearray(b"0123456789" * 1000))[10:5000])
    assert await backend.get(b"k") == (b"0123456789" * 1000)[10:5000]


async def test_absent_is_none_and_false(backend):
    assert await backend.get(b"no") is None
    assert await backend.exists(b"no") is False
    assert await backend.check(b"no") is None
    assert await backend.delete(b"no") is False


async def test_present_checked_deleted(backend):
    await backend.set(b"k", b"v")
    assert await backend.exists(b"k") is True
    assert await backend.check(b"k") is True
    assert await backend.delete(b"k") is True
    assert await backend.delete(b"k") is False
    assert await backend.get(b"k") is None


async def test_storing_the_same_twice_succeeds_and_keeps_the_place(backend):
    await backend.set(b"a", b"1")
    await backend.set(b"b", b"2")
    await backend.set(b"a", b"1")
    assert [entry.key for entry in (await backend.scan(None)).entries] == [b"a", b"b"]
    await backend.set(b"a", b"3")
    assert [entry.key for entry in (await backend.scan(None)).entries] == [b"b", b"a"]


async def test_scans_meet_every_key_oldest_and_newest_first(backend):
    keys = [b"%04d" % number for number in range(700)]
    async with trio.open_nursery() as nursery:
        for key in keys[:3]:
            nursery.start_soon(backend.set, key, key)
    for key in keys[3:]:
        await backend.set(key, key)
    await backend.delete(keys[300])
    del keys[300]
    found = await everything(backend.scan)
    assert sorted(entry.key for entry in found) == keys
    assert [entry.key for entry in found[3:]] == keys[3:]
    assert all(entry.size == 4 and entry.time_s > 1_600_000_000 for entry in found)
    assert await everything(backend.rscan) == found[::-1]


async def test_an_old_cursor_yields_what_came_since(backend):
    assert await backend.scan(None) == ScanPage(None, ())
    await backend.set(b"a", b"1")
    cursor = (await backend.scan(None)).cursor
    assert await backend.scan(cursor) == ScanPage(None, ())
    await backend.set(b"b", b"2")
    assert [entry.key for entry in (await backend.scan(cursor)).entries] == [b"b"]
    assert await backend.rscan(cursor) == ScanPage(None, ())


async def test_a_foreign_cursor_is_refused(backend):
    with pytest.raises(BackendRefused, match=r"cursor|key format"):
        await backend.scan(b"nonsense")


@pytest.mark.parametrize("key", [b"", b"k" * 256])
async def test_keys_have_1_to_255_bytes(backend, key):
    for call in (backend.get, backend.exists, backend.check, backend.delete):
        with pytest.raises(BackendRefused, match="1 to 255"):
            await call(key)
    with pytest.raises(BackendRefused, match="1 to 255"):
        await backend.set(key, b"")
    await backend.set(b"k" * 255, b"v")
    assert await backend.get(b"k" * 255) == b"v"


async def test_values_have_at_most_8_mib(backend):
    with pytest.raises(BackendRefused, match="at most 8388608 bytes"):
        await backend.set(b"k", bytes(MAX_VALUE_BYTES + 1))
    await backend.set(b"k", bytes(MAX_VALUE_BYTES))
    assert len(await backend.get(b"k")) == MAX_VALUE_BYTES


async def test_full_means_that_nothing_was_stored(backend):
    await backend.set(b"a", bytes(MAX_VALUE_BYTES))
    await backend.set(b"b", bytes(MAX_VALUE_BYTES))
    with pytest.raises(BackendFull, match=r"maxsize|quota"):
        await backend.set(b"c", bytes(MAX_VALUE_BYTES))
    assert await backend.get(b"c") is None
    await backend.set(b"a", b"\1" * MAX_VALUE_BYTES)
    assert await backend.delete(b"b") is True
    await backend.set(b"c", bytes(MAX_VALUE_BYTES))


async def test_info(backend):
    await backend.set(b"a", b"12345")
    await backend.set(b"b", b"123")
    info = await backend.info()
    assert (info.entries, info.data_bytes, info.limit_bytes) == (2, 8, LIMIT)
    assert info.free_bytes == min(LIMIT - 8, info.disk_free_bytes)
    assert not info.locked
    assert not info.worm


async def test_a_session_makes_the_same_calls(backend):
    async with backend.session() as session:
        assert session.name == backend.name
        await session.set(b"k", b"v")
        assert await session.get(b"k") == b"v"
        assert await session.exists(b"k") is True
        assert await session.check(b"k") is True
        assert [entry.key for entry in (await session.scan(None)).entries] == [b"k"]
        assert [entry.key for entry in (await session.rscan(None)).entries] == [b"k"]
        assert (await session.info()).entries == 1
        assert await session.delete(b"k") is True
    with pytest.raises(BackendUnavailable):
        await session.get(b"k")
    assert await backend.get(b"k") is None


async def test_calls_side_by_side_do_not_mix(backend):
    async def one(number: int) -> None:
        value = b"%d" % number * (number * 1000)
        await backend.set(b"%d" % number, value)
        assert await backend.get(b"%d" % number) == value

    async with trio.open_nursery() as nursery, backend.session() as session:
        for number in range(1, 30):
            nursery.start_soon(one, number)
        await session.set(b"s", b"1")


async def test_cancelled_calls_leave_nothing_half_read(backend):
    for number in range(20):
        await backend.set(b"%d" % number, b"%d" % number * 50_000)
    for delay in range(20):
        with trio.move_on_after(delay / 4000):
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(backend.get, b"%d" % number)
        number = delay
        assert await backend.get(b"%d" % number) == b"%d" % number * 50_000


async def test_a_closed_backend_answers_nothing(backend):
    await backend.set(b"k", b"v")
    await backend.aclose()
    with pytest.raises(BackendUnavailable):
        await backend.get(b"k")
    with pytest.raises(BackendUnavailable):
        async with backend.session():
            pass


async def test_a_connection_is_used_only_where_the_expected_record_is(backend):
    """So an emptied, re-created or swapped backend is noticed before anything is stored there."""
    await backend.set(b"who", b"it is me")
    backend.expect(b"who", b"it is me")
    await backend.set(b"k", b"v")
    async with backend.session() as session:
        assert await session.get(b"k") == b"v"
    backend.expect(b"who", b"somebody else")
    with pytest.raises(WrongBackend, match=backend.name):
        await backend.set(b"k", b"w")
    with pytest.raises(WrongBackend, match=backend.name):
        async with backend.session():
            pass
    backend.expect(b"who", None)
    assert await backend.get(b"k") == b"v"
    backend.expect(b"nobody", b"x")
    with pytest.raises(WrongBackend):
        await backend.get(b"k")
    backend.expect(b"who", b"it is me")
    assert await backend.get(b"k") == b"v", "what is expected changed: no pause is left from before"
