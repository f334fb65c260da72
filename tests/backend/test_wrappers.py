"""Retry, limits and metrics, on a virtual clock: exact, and nobody waits."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qsfs.backend.contract import Backend
from qsfs.backend.faults import Faults, with_faults
from qsfs.backend.limits import RateLimit, rates_of, with_limits
from qsfs.backend.memory import MemoryBackend, MemoryStore
from qsfs.backend.metrics import Metrics, with_metrics
from qsfs.backend.retry import RetryBudget, RetryPolicy, with_retry
from qsfs.clock import FixedClock
from qsfs.errors import BackendFull, BackendRefused, BackendUnavailable


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


class Failing:
    """A backend whose first `failures` calls fail with `error`."""

    name = "failing"

    def __init__(self, failures: int, error: Exception) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error

    async def get(self, key: bytes) -> bytes:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return key


async def test_unknown_outcomes_are_tried_again(autojump_clock):
    inner = Failing(2, BackendUnavailable("x"))
    assert await with_retry(inner, FixedClock(), RetryPolicy(tries=3)).get(b"k") == b"k"
    assert inner.calls == 3


async def test_tries_are_bounded(autojump_clock):
    inner = Failing(3, BackendUnavailable("x"))
    with pytest.raises(BackendUnavailable):
        await with_retry(inner, FixedClock(), RetryPolicy(tries=3)).get(b"k")
    assert inner.calls == 3


@pytest.mark.parametrize("error", [BackendRefused("x"), BackendFull("x")])
async def test_final_answers_are_not_tried_again(autojump_clock, error):
    inner = Failing(1, error)
    with pytest.raises(type(error)):
        await with_retry(inner, FixedClock()).get(b"k")
    assert inner.calls == 1


async def test_pauses_grow_are_bounded_and_random(autojump_clock):
    def pauses(seed: int) -> float:
        return FixedClock(seed)

    policy = RetryPolicy(tries=30, first_pause=1.0, longest_pause=8.0)
    lengths = []
    for seed in range(5):
        begun = trio.current_time()
        inner = Failing(29, BackendUnavailable("x"))
        await with_retry(inner, pauses(seed), policy, RetryBudget(reserve=100)).get(b"k")
        lengths.append(trio.current_time() - begun)
    assert len(set(lengths)) == 5
    assert all(15 < length < 1 + 2 + 4 + 26 * 8 for length in lengths)


async def test_an_outage_is_not_answered_with_a_storm(autojump_clock):
    """All backends share the budget: of many failing calls few are repeated."""
    budget = RetryBudget(share=0.1, reserve=5)
    inner = Failing(10_000, BackendUnavailable("x"))
    backend = with_retry(inner, FixedClock(), RetryPolicy(tries=4), budget)
    for _ in range(200):
        with pytest.raises(BackendUnavailable):
            await backend.get(b"k")
    assert 200 + 5 <= inner.calls <= 200 + 5 + 21


async def test_a_retried_session_opens_again_but_is_not_retried_itself(autojump_clock, store):
    faults = Faults(seed=3, fail=0.5)
    policy, budget = RetryPolicy(tries=50), RetryBudget(reserve=1e6)
    backend = with_retry(with_faults(MemoryBackend(store), faults), FixedClock(), policy, budget)
    for _ in range(20):
        async with backend.session() as session:
            faults.fail = 1.0
            with pytest.raises(BackendUnavailable):
                await session.get(b"k")
            faults.fail = 0.0
            with pytest.raises(BackendUnavailable):
                await session.get(b"k")
        faults.fail = 0.5


@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_the_rate_holds_over_all_backends(autojump_clock, direction):
    """Ten backends share one limit; 10 MB at 1 MB/s take ten seconds, less what was saved up."""
    limit = RateLimit(1_000_000)
    backends = [with_limits(MemoryBackend(), **{direction: limit}) for _ in range(10)]
    value = bytes(100_000)
    if direction == "download":
        for backend in backends:
            await backend.set(b"0", value)
    begun = trio.current_time()

    async def work(backend: Backend) -> None:
        for number in range(10):
            if direction == "upload":
                await backend.set(b"%d" % number, value)
            else:
                await backend.get(b"0")

    async with trio.open_nursery() as nursery:
        for backend in backends:
            nursery.start_soon(work, backend)
    assert 8.5 <= trio.current_time() - begun <= 10.5


async def test_a_value_larger_than_the_bucket_passes_and_is_paid_for(autojump_clock):
    limit = RateLimit(1000)
    backend = with_limits(MemoryBackend(), upload=limit)
    await backend.set(b"k", bytes(10_000))
    assert trio.current_time() - (begun := trio.current_time()) <= 0
    await backend.set(b"l", b"")
    assert 9 <= trio.current_time() - begun <= 10.1


async def test_a_rate_can_be_changed_while_calls_wait(autojump_clock):
    limit = RateLimit(1)
    backend = with_limits(MemoryBackend(), upload=limit)
    await backend.set(b"k", bytes(1_000_000))
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.set, b"l", b"v")
        await trio.sleep(5)
        limit.rate = 0
    assert trio.current_time() - begun == 5
    assert await backend.get(b"l") == b"v"


async def test_no_limit_is_no_wait(autojump_clock):
    backend = with_limits(MemoryBackend(), upload=RateLimit(0), download=RateLimit(0))
    for number in range(100):
        await backend.set(b"%d" % number, bytes(100_000))
        await backend.get(b"%d" % number)
    assert trio.current_time() == 0


async def test_calls_at_a_time_are_bounded_over_all_backends(autojump_clock):
    most = current = 0

    class Counting(MemoryBackend):
        async def get(self, key: bytes) -> bytes | None:
            nonlocal most, current
            current += 1
            most = max(most, current)
            await trio.sleep(1)
            current -= 1
            return None

    bound = trio.Semaphore(4)
    backends = [with_limits(Counting(), concurrency=bound) for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for number in range(20):
            for backend in backends:
                nursery.start_soon(backend.get, b"%d" % number)
    assert most == 4
    assert trio.current_time() == 15


async def test_metrics_count_and_time(autojump_clock, store):
    metrics = Metrics()
    faults = Faults()
    latencies = iter([1.0] * 18 + [3.0, 9.0])
    inner = MemoryBackend(store, lambda call, size: next(latencies) if call == "get" else 0.0)
    backend = with_metrics(with_faults(inner, faults), metrics)
    await backend.set(b"k", b"value")
    for _ in range(20):
        await backend.get(b"k")
    assert metrics.calls == {"set": 1, "get": 20}
    assert (metrics.sent_bytes, metrics.received_bytes) == (6 + 20, 100)
    assert metrics.p50("get") == 1.0
    assert metrics.p95("get") == 9.0
    assert metrics.percentile("get", 0.9) == 3.0
    assert metrics.p95("scan") is None
    assert metrics.last_success_at == trio.current_time()
    assert metrics.last_error == ""
    faults.down = True
    with pytest.raises(BackendUnavailable):
        await backend.get(b"k")
    assert metrics.errors == {"BackendUnavailable": 1}
    assert "no answer" in metrics.last_error
    assert metrics.last_error_at == trio.current_time()
    assert metrics.in_flight == 0


async def test_metrics_forget_old_latencies(autojump_clock):
    metrics = Metrics()
    for _ in range(1000):
        metrics.note_latency("get", 100.0)
    for _ in range(256):
        metrics.note_latency("get", 1.0)
    assert metrics.percentile("get", 1.0) == 1.0


async def test_cancelled_calls_are_no_errors_and_not_in_flight(autojump_clock, store):
    metrics = Metrics()
    backend = with_metrics(MemoryBackend(store, 10.0), metrics)
    with trio.move_on_after(1):
        await backend.get(b"k")
    assert not metrics.errors
    assert metrics.in_flight == 0
    assert metrics.p50("get") is None


async def test_what_may_not_wait_is_charged_and_others_wait_for_it(autojump_clock, store):
    """Heads: held up they would expose data, not counted they would exceed the rate."""
    up, down = RateLimit(1000), RateLimit(1000)
    control = with_limits(MemoryBackend(store), upload=up, download=down, waits=False)
    data = with_limits(MemoryBackend(store), upload=up, download=down)
    for number in range(10):
        await control.set(b"%d" % number, bytes(999))
        await control.get(b"%d" % number)
    assert trio.current_time() == 0
    await data.set(b"k", b"")
    assert 9.5 <= trio.current_time() <= 10
    await trio.sleep(100)
    for number in range(10):
        await control.get(b"%d" % number)
    begun = trio.current_time()
    await data.get(b"k")
    assert 9.5 <= trio.current_time() - begun <= 10


async def test_a_turn_pays_in_advance_and_gives_back_what_was_not_needed(autojump_clock):
    limit = RateLimit(1000)
    backend = with_limits(MemoryBackend(), upload=limit)
    await backend.set(b"k", bytes(999))
    async with rates_of(backend).upload.turn(1000):
        begun = trio.current_time()
        assert 0.5 <= begun <= 1, "it waited before"
        await backend.set(b"l", bytes(99))
        await backend.set(b"m", bytes(99))
        assert trio.current_time() == begun
    await backend.set(b"n", b"")
    assert 0.15 <= trio.current_time() - begun <= 0.25
    assert not rates_of(MemoryBackend()).upload.waits
