"""The retention time of dead packs goes on over restarts, and is never over too early."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from trio.testing import MockClock

from qsfs.format.head import HeadRef, Owner
from qsfs.remote import running
from qsfs.remote.base import BASE_KEY, encode_local_head
from qsfs.remote.deaths import DEATH_PREFIX, Death, death_key
from qsfs.remote.flush import Flusher
from qsfs.remote.running import RUNNING_KEY, RunningTime
from qsfs.store.schema import PAGE, Table
from tests.remote.flush_machine import FlushMachine
from tests.remote.flushing import VirtualClock, flushing, pack_rows, stored_packs
from tests.remote.harness import World

RETENTION = 400.0
X, Y, Z = (Owner(epoch, bytes([epoch]) * 16) for epoch in (5, 6, 7))


async def let_die(machine: FlushMachine, flusher: Flusher) -> set[bytes]:
    """The data packs of a file's first version; the retention time of all of them has begun."""
    number = machine.create("a")
    old: set[bytes] = set()
    for byte in range(1, 6):
        machine.write(number, 0, bytes([byte]) * PAGE * 40)
        await flusher.sync()
        await trio.sleep(2)
        old = old or {row.pack_id for row in pack_rows(machine).values() if row.kind == 1}
    return old


async def publish(machine: FlushMachine, flusher: Flusher, heads: int = 2) -> None:
    """More generations, and time to delete what they allow."""
    for _ in range(heads):
        machine.create(f"at {trio.current_time()}")
        await flusher.sync()
        await trio.sleep(5)


def deaths(machine: FlushMachine) -> list[bytes]:
    return [key for key, _ in machine.store.scan(Table.LOCAL, DEATH_PREFIX, b"dead;")]


async def test_a_machine_that_restarts_more_often_than_the_retention_time_still_deletes(
    world: World, machine: FlushMachine, clock: MockClock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        old = await let_die(machine, flusher)
        await trio.sleep(RETENTION / 4)
        await flusher.stop(60)
    for _ in range(5):
        async with flushing(machine, retention_seconds=RETENTION) as flusher:
            await publish(machine, flusher)
            await trio.sleep(RETENTION / 4)
            await flusher.stop(60)
    assert not old & stored_packs(world)


async def test_only_time_that_was_mounted_counts(world: World, machine: FlushMachine, clock: MockClock):
    """Whoever reads an old generation has the whole time to finish, however the mounts lie in it."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        old = await let_die(machine, flusher)
        await flusher.stop(60)
    for _ in range(4):
        await trio.sleep(10 * RETENTION)
        async with flushing(machine, retention_seconds=RETENTION) as flusher:
            await publish(machine, flusher)
            await trio.sleep(RETENTION / 5)
            await flusher.stop(60)
    assert old <= stored_packs(world)


async def test_what_is_gone_leaves_no_row(world: World, machine: FlushMachine, clock: MockClock):
    async with flushing(machine, retention_seconds=100.0) as flusher:
        await let_die(machine, flusher)
        assert deaths(machine)
        for _ in range(4):
            await publish(machine, flusher)
            await trio.sleep(200.0)
        dead = {n for n, row in pack_rows(machine).items() if row.kind == 1 and not row.live}
        assert not dead
        listed = {pack.ref.pack_id for pack in flusher.generations.chain.all_packs()}
        metadata = {n for n, row in pack_rows(machine).items() if row.kind == 2 and row.pack_id not in listed}
        assert {key[len(DEATH_PREFIX) :] for key in deaths(machine)} <= {n.to_bytes(8, "big") for n in metadata}


async def test_a_crash_loses_what_was_not_recorded_and_no_more(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(running, "RECORD_SECONDS", 50.0)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await let_die(machine, flusher)
        await trio.sleep(RETENTION / 2)
        before = flusher._upkeep._running.seconds
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        after = flusher._upkeep._running.seconds
        assert before - 90 <= after <= before


async def test_a_death_that_was_recorded_later_than_the_running_time_counts_from_now(
    world: World, machine: FlushMachine, clock: MockClock
):
    """A crash took the running time back to before that death."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        old = await let_die(machine, flusher)
        for number, row in pack_rows(machine).items():
            if row.pack_id in old:
                ahead = Death(row.pack_id, 1, 10 * RETENTION)
                machine.store.layers.put(Table.LOCAL, death_key(number), ahead.encode())
        machine.committer.commit_now()
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await publish(machine, flusher)
        await trio.sleep(RETENTION - 30)
        await publish(machine, flusher)
        assert old <= stored_packs(world)
        await trio.sleep(60)
        await publish(machine, flusher)
        assert not old & stored_packs(world)


async def test_a_pin_from_after_its_death_holds_no_pack_also_after_a_restart(
    world: World, machine: FlushMachine, clock: MockClock
):
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        old = await let_die(machine, flusher)
        flusher.generations.pins[machine.publisher.published] = ("after",)
        await publish(machine, flusher)
        await flusher.stop(60)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await publish(machine, flusher)
        await trio.sleep(RETENTION)
        await publish(machine, flusher)
        assert not old & stored_packs(world)


async def test_a_number_that_another_pack_has_now_does_not_inherit_its_time(
    world: World, machine: FlushMachine, clock: MockClock
):
    """A crash gives numbers back that no commit had."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        old = await let_die(machine, flusher)
        for number, row in pack_rows(machine).items():
            if row.pack_id in old:
                other = Death(bytes(16), 1, 0.0)
                machine.store.layers.put(Table.LOCAL, death_key(number), other.encode())
        await trio.sleep(RETENTION - 100)
        await flusher.stop(60)
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        await trio.sleep(200)
        await publish(machine, flusher, heads=3)
        assert old <= stored_packs(world)


@pytest.mark.parametrize("restored", [True, False])
async def test_a_store_whose_base_another_machine_published_begins_anew(
    world: World, machine: FlushMachine, clock: MockClock, restored: bool
):
    """Also where rows of an older state have come along."""
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        old = await let_die(machine, flusher)
        await trio.sleep(RETENTION - 100)
        await flusher.stop(60)
        base = flusher.generations.base
        machine.store.set_local(BASE_KEY, encode_local_head(base.sealed, ours=not restored))
        machine.committer.commit_now()
    async with flushing(machine, retention_seconds=RETENTION) as flusher:
        seconds = flusher._upkeep._running.seconds
        await trio.sleep(200)
        await publish(machine, flusher, heads=3)
        assert (old <= stored_packs(world)) is restored
        assert (seconds < 60) is restored


HEAD = HeadRef(Y, 7, bytes(32))


@pytest.mark.parametrize(
    ("newest", "ours", "goes_on"),
    [
        (dataclasses.replace(HEAD, owner=X), (), True),
        (HEAD, (HEAD,), True),
        (HEAD, (), False),
        (None, (), False),
    ],
)
async def test_time_goes_on_only_if_nobody_else_owned_meanwhile(
    machine: FlushMachine, clock: MockClock, newest: HeadRef | None, ours: tuple[HeadRef, ...], goes_on: bool
):
    async with machine.mounted():
        before = RunningTime(machine.store, machine.clock)
        before.resume(X, None, ())
        await trio.sleep(100)
        before.note()
        counted = RunningTime(machine.store, machine.clock)
    assert counted.resume(Z, newest, ours) is goes_on
    assert int(counted.seconds) == (100 if goes_on else 0)


async def test_a_running_time_that_cannot_be_read_begins_anew(machine: FlushMachine, clock: MockClock):
    async with machine.mounted():
        machine.store.set_local(RUNNING_KEY, b"\x93\x01")
        anew = RunningTime(machine.store, VirtualClock(clock))
        assert not anew.resume(Z, HEAD, (HEAD,)) and anew.seconds < 1


def test_the_rows_keep_their_form():
    row = Death(bytes(range(16)), 258, 1.5).encode()
    assert row == b"\x01" + bytes(range(16)) + b"\x02\x01" + bytes(6) + (1_500_000_000).to_bytes(8, "little")
    assert Death.decode(row) == Death(bytes(range(16)), 258, 1.5)
    waiting = Death(bytes(16), 3, None)
    assert waiting.encode().endswith(b"\xff" * 8) and Death.decode(waiting.encode()) == waiting
    assert Death.decode(b"\x02" + row[1:]) is None and Death.decode(row[:-1]) is None
    assert death_key(258) == b"dead:" + bytes(6) + b"\x01\x02"
