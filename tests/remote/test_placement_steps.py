"""The table of losses is read in short steps, from the newest rows, with the packs that only a head names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from qsfs.clock import FixedClock, SystemClock
from qsfs.daemon import placing
from qsfs.daemon.placing import Known, PlacementWatch, check_placement, read_table
from qsfs.errors import CacheError
from qsfs.format.erasure import CodeParams
from qsfs.format.extent import PackKind, PackRef
from qsfs.format.fleet import Fleet
from qsfs.format.head import MetadataPack
from qsfs.remote.losses import LossTable
from qsfs.remote.members import Members
from qsfs.remote.promises import Promises
from qsfs.store.environment import Environment
from qsfs.store.schema import PackRow, PackState, Table, u64
from tests.remote.test_placement import entry

CODE = CodeParams(4, 6)
FLEET = Fleet(1, tuple(entry(number, f"g{number % 3}") for number in range(1, 7)))


def row(number: int, placement: tuple[int, ...], unnamed: int = 0) -> bytes:
    state = int(PackState.FULL) if -1 not in placement else 0
    return PackRow(
        number.to_bytes(16, "big"), bytes(32), 1, 1, 1, 4000, 1000, 4000, 1, 0, unnamed, state, placement
    ).encode()


@pytest.fixture
def environment(tmp_path: Path):
    opened = Environment(tmp_path, 16 << 20)
    with opened.write() as txn:
        for number in range(300):
            placement = (1, 2, 3, 4, 5, 6) if number % 50 else (1, 2, 3, 4, -1, 6)
            txn.put(u64(number), row(number, placement), db=opened.databases[Table.PACKS])
        gone = row(999, (1, -1, -1, -1, -1, -1), unnamed=7)
        txn.put(u64(999), gone, db=opened.databases[Table.PACKS])
    yield opened
    opened.close()


def metadata(number: int, placement: tuple[int, ...]) -> MetadataPack:
    ref = PackRef(number.to_bytes(16, "big"), bytes(32), PackKind.METADATA, 1, 1, 4000, 1000)
    return MetadataPack(ref, placement, 1)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
async def test_all_packs_are_counted_however_long_a_step_is(environment, monkeypatch, seconds):
    """With steps of one row each transaction is closed after it; the table is the same."""
    monkeypatch.setattr(placing, "_STEP_SECONDS", seconds)
    steps = []
    step = placing.read_step
    monkeypatch.setattr(placing, "read_step", lambda *args: steps.append(1) or step(*args))
    known = Known((FLEET,), {})
    clock = SystemClock() if seconds else FixedClock()
    table = await read_table(environment, clock, known, CODE, ())
    assert (table.full, table.written, environment.readers) == (294, 6, 0)
    assert len(steps) == (1 if seconds else 302)


async def test_packs_that_only_the_head_names_count_and_rows_win_over_it(environment):
    """The newest generation's metadata must be readable too; a row knows of repairs that the head does not."""
    stale, unknown = metadata(1, (1, -1, -1, -1, -1, -1)), metadata(5000, (1, 2, 3, 4, 5, -1))
    known = Known((FLEET,), {pack.ref.pack_id: pack for pack in (stale, unknown)})
    table = await read_table(environment, FixedClock(), known, CODE, ())
    assert (table.full, table.written) == (294, 7)
    assert table.any_may_be_lost("backend") == 1


async def test_the_check_says_what_goes_on_without_some(environment):
    found = await check_placement(
        environment, FixedClock(), Known((FLEET,)), CODE, Promises(groups=1), lose=["group:g0"], down={1}
    )
    alone, with_down = found["losses"]
    # Packs of which one shard is not stored have no shard to spare for a second one.
    assert (alone["survived"], alone["lost"]) == (False, {"full": 0, "written": 6, "bytes": 24000})
    assert with_down["lost"]["full"] == 294
    assert (alone["flushing"], alone["restore_proved"]) == (False, True)
    (broken,) = found["broken_promises"]
    assert "all packs (some are not full) survive the loss of any 0 groups" in broken


async def test_without_a_generation_there_is_nothing_to_judge(environment):
    with pytest.raises(CacheError, match="no generation is known"):
        await check_placement(environment, FixedClock(), Known(), CODE, Promises(), lose=[])


async def test_promises_are_judged_anew_when_the_fleet_changes(
    environment, monkeypatch, autojump_clock, caplog, expect_log
):
    """Within seconds, not at the next look; the log says each broken promise once."""
    expect_log(r"redundant_nodes = 2 does not hold", count=1)
    expect_log(r"redundant_nodes = 2 cannot be kept", count=1)
    fleets = [FLEET]
    known = Known((FLEET,))

    async def read_at_once(environment, clock, known, code, losses):
        # A thread's work takes no virtual time, but the clock would jump meanwhile.
        table = LossTable(placing.entries_of(known.fleets), code, losses)
        placing.read_step(environment, SystemClock(), table, b"", {})
        return table

    monkeypatch.setattr(placing, "read_known", lambda environment, keys: known)
    monkeypatch.setattr(placing, "read_table", read_at_once)
    monkeypatch.setattr(placing, "_STEP_SECONDS", 60.0)
    opened = SimpleNamespace(superblock=SimpleNamespace(code=CODE), keys=None)
    promises = Promises(nodes=2)
    watch = PlacementWatch(environment, FixedClock(), opened, promises, Members(), lambda: tuple(fleets))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(1200)
        assert [record.message for record in caplog.records] == watch.warnings()
        assert len(caplog.records) == 1 and "all packs" in caplog.records[0].message
        fleets[:] = [Fleet(2, tuple(entry(number, "", f"n{number % 3}") for number in range(1, 7)))]
        await trio.sleep(10)
        assert "redundant_nodes = 2 cannot be kept" in caplog.records[1].message
        nursery.cancel_scope.cancel()
