"""Injected faults are those asked for, the same for the same seed, and honest in their kind."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qsfs.backend.contract import Backend
from qsfs.backend.faults import Faults, with_faults
from qsfs.backend.memory import MemoryBackend, MemoryStore
from qsfs.errors import BackendFull, BackendRefused, BackendUnavailable


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def faulty(store: MemoryStore, **faults: object) -> tuple[Backend, Faults]:
    settings = Faults(**faults)
    return with_faults(MemoryBackend(store), settings), settings


async def outcomes(backend: Backend, order: list[int]) -> dict[int, str]:
    result = {}
    for number in order:
        try:
            await backend.set(b"%d" % number, b"v")
            result[number] = "done"
        except BackendUnavailable:
            result[number] = "failed"
    return result


async def test_the_same_seed_hits_the_same_calls_in_any_order():
    numbers = list(range(100))
    forward = await outcomes(faulty(MemoryStore(), seed=5, fail=0.3)[0], numbers)
    backward = await outcomes(faulty(MemoryStore(), seed=5, fail=0.3)[0], numbers[::-1])
    other = await outcomes(faulty(MemoryStore(), seed=6, fail=0.3)[0], numbers)
    assert forward == backward
    assert forward != other
    assert 15 <= list(forward.values()).count("failed") <= 45


async def test_down_and_up_again(store):
    backend, faults = faulty(store)
    await backend.set(b"k", b"v")
    faults.down = True
    for call in (backend.get(b"k"), backend.set(b"k", b"w"), backend.info(), backend.scan()):
        with pytest.raises(BackendUnavailable):
            await call
    faults.down = False
    assert await backend.get(b"k") == b"v"
    assert faults.injected["down"] == 4


async def test_a_session_that_met_a_fault_stays_broken(store):
    backend, faults = faulty(store)
    async with backend.session() as session:
        faults.down = True
        with pytest.raises(BackendUnavailable):
            await session.get(b"k")
        faults.down = False
        with pytest.raises(BackendUnavailable):
            await session.get(b"k")
    async with backend.session() as session:
        assert await session.get(b"k") is None


async def test_fail_has_no_effect_and_fail_after_has(store):
    backend, _ = faulty(store, fail=1.0)
    with pytest.raises(BackendUnavailable):
        await backend.set(b"k", b"v")
    assert store.peek(b"k") is None
    backend, _ = faulty(store, fail_after=1.0)
    with pytest.raises(BackendUnavailable):
        await backend.set(b"k", b"v")
    assert store.peek(b"k") == b"v"


async def test_lost_values_are_acknowledged(store):
    backend, faults = faulty(store, lose=1.0)
    await backend.set(b"k", b"v")
    assert await backend.get(b"k") is None
    assert faults.injected["lose"] == 1


async def test_flipped_and_truncated_values_differ_by_that_alone(store):
    value = bytes(range(200))
    await MemoryBackend(store).set(b"k", value)
    backend, _ = faulty(store, flip=1.0)
    got = await backend.get(b"k")
    assert sum((a ^ b).bit_count() for a, b in zip(got, value, strict=True)) == 1
    assert store.peek(b"k") == value
    backend, _ = faulty(store, truncate=1.0)
    got = await backend.get(b"k")
    assert len(got) < len(value)
    assert value.startswith(got)


async def test_old_answers_what_was_there_before(store):
    backend, faults = faulty(store, old=1.0)
    await backend.set(b"k", b"1")
    assert await backend.get(b"k") is None
    await backend.set(b"k", b"2")
    assert await backend.get(b"k") == b"1"
    await backend.delete(b"k")
    assert await backend.get(b"k") == b"2"
    faults.old = 0.0
    assert await backend.get(b"k") is None


async def test_full_refuses_stores_only(store):
    backend, faults = faulty(store)
    await backend.set(b"k", b"v")
    faults.full = True
    with pytest.raises(BackendFull):
        await backend.set(b"l", b"v")
    assert await backend.get(b"k") == b"v"
    assert await backend.delete(b"k") is True


async def test_slow_and_flapping_by_the_clock(store, autojump_clock):
    backend, _ = faulty(store, slow=2.0)
    await backend.get(b"k")
    assert trio.current_time() == 2.0
    backend, _ = faulty(store, flap=(3.0, 5.0))
    up = []
    for _ in range(16):
        try:
            await backend.get(b"k")
            up.append(True)
        except BackendUnavailable:
            up.append(False)
        await trio.sleep(1)
    assert up == [True] + [False] * 5 + [True] * 3 + [False] * 5 + [True] * 2


async def test_hanging_calls_answer_never_and_half_of_them_took_effect(store, autojump_clock):
    backend, faults = faulty(store, seed=1, hang=1.0)
    for number in range(40):
        with trio.move_on_after(10) as scope:
            await backend.set(b"%d" % number, b"v")
        assert scope.cancelled_caught
    assert 10 <= len(store.keys()) <= 30
    assert faults.injected["hang"] == 40


async def test_latency_falls_before_and_after_the_effect(store, autojump_clock):
    """A call that is cancelled may or may not have taken effect, as over a network."""
    backend = MemoryBackend(store, 2.0)
    for seconds, effect in ((0.9, None), (1.1, b"v")):
        with trio.move_on_after(seconds):
            await backend.set(b"k", b"v")
        assert store.peek(b"k") == effect


async def test_a_cancelled_call_breaks_a_session_in_memory_too(store, autojump_clock):
    async with MemoryBackend(store, 2.0).session() as session:
        with trio.move_on_after(1):
            await session.get(b"k")
        with pytest.raises(BackendUnavailable):
            await session.get(b"k")


async def test_a_full_disk_refuses_stores_and_deletions_but_answers():
    store = MemoryStore(disk_bytes=100)
    backend = MemoryBackend(store)
    await backend.set(b"a", bytes(60))
    with pytest.raises(BackendUnavailable):
        await backend.set(b"b", bytes(60))
    await backend.set(b"c", bytes(38))
    with pytest.raises(BackendUnavailable):
        await backend.delete(b"a")
    assert len(await backend.get(b"a")) == 60
    assert (await backend.info()).free_bytes == 0


async def test_rights_and_locks_of_a_store(store):
    backend = MemoryBackend(store)
    await backend.set(b"k", b"v")
    store.worm = True
    for call in (backend.set(b"k", b"v"), backend.delete(b"k")):
        with pytest.raises(BackendRefused):
            await call
    await backend.set(b"new", b"v")
    store.locked = True
    with pytest.raises(BackendUnavailable):
        await backend.set(b"x", b"v")
    assert (await backend.info()).locked
    store.read_only = True
    with pytest.raises(BackendRefused, match="read-only"):
        await backend.set(b"x", b"v")


async def test_rot_is_found_by_check_and_returned_by_get(store):
    backend = MemoryBackend(store)
    await backend.set(b"k", b"value")
    store.rot(b"k", lambda value: value[:-1])
    assert await backend.check(b"k") is False
    assert await backend.get(b"k") == b"valu"
    assert store.info().data_bytes == 4


async def test_a_store_can_come_back_old_or_empty(store):
    backend = MemoryBackend(store)
    await backend.set(b"a", b"1")
    earlier = store.copy()
    await backend.set(b"a", b"2")
    await backend.set(b"b", b"2")
    cursor = (await backend.scan()).cursor
    store.go_back_to(earlier)
    assert [entry.key for entry in (await backend.scan()).entries] == [b"a"]
    assert await backend.get(b"a") == b"1"
    with pytest.raises(BackendRefused, match="cursor"):
        await backend.scan(cursor)
    store.lose(b"a")
    assert store.keys() == []
    assert store.info().data_bytes == 0
    await backend.set(b"c", b"3")
    store.clear()
    assert (await backend.info()).entries == 0
