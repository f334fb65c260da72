"""The schedule of collecting in which heads alone were asked; see `test_schedules` for the others of ownership."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock

from qsfs.format.extent import PackKind
from qsfs.remote import scanning, stray_collect, upkeep
from qsfs.store.schema import PAGE
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.flushing import flushing, pack_rows, stored_packs, until
from tests.remote.harness import World
from tests.remote.test_strays import RETENTION, go_on, plant_stray, told


async def test_a_pre_copied_page_is_named_by_the_local_tables_alone(
    world: World, machine: FlushMachine, clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """Its pack is no garbage, however long no head names it, while what is garbage goes; a head names it later."""
    monkeypatch.setattr(scanning, "AGAIN_SECONDS", 20.0)
    monkeypatch.setattr(stray_collect, "SIEVE_SECONDS", 20.0)
    monkeypatch.setattr(upkeep, "HEAD_SECONDS", math.inf)
    async with flushing(machine, retention_seconds=RETENTION, cut_seconds=math.inf) as flusher:
        dying = machine.create("dying")
        machine.write(dying, 0, b"o" * PAGE * 16)
        await flusher.sync()
        dead = stored_packs(world)
        stray = plant_stray(world, 1)
        machine.write(dying, 0, b"n" * PAGE * 16)
        await flusher.sync()
        before = set(pack_rows(machine))
        newest = flusher.generations.base.sealed.ref
        ahead = machine.create("ahead")
        machine.write(ahead, 0, b"x" * PAGE * 16)
        await machine.committer.commit()
        await until(lambda: set(pack_rows(machine)) - before)
        rows_ahead = [row for number, row in pack_rows(machine).items() if number not in before]
        assert [row.kind for row in rows_ahead] == [PackKind.DATA]
        machine.evict(ahead)
        machine.store.extents.emptied.update(pack_rows(machine))
        for _ in range(3):
            await trio.sleep(RETENTION)
            assert told(flusher)["packs"] == 1, "only what was planted is a stray"
            assert flusher.dead_packs()["deleted_packs"] == 0
        assert flusher.generations.base.sealed.ref == newest, "a head may name it by now"
        await go_on(machine, flusher, 5)
        await flusher.collect()
        assert stray not in stored_packs(world) and not dead <= stored_packs(world)
        assert rows_ahead[0].pack_id in stored_packs(world)
        assert machine.content(ahead) == b"x" * PAGE * 16
    assert restore(world).files["ahead"] == b"x" * PAGE * 16
