"""Room that is on its way: nobody is told that the file system is full while what fills it only waits its turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qsfs.remote.ledger import Ledger
from qsfs.remote.pressure import more_will_be_evictable
from qsfs.store.packs import pack_row, set_looked
from qsfs.store.schema import ExtentRow, PackState, Table, u64
from tests.core.machine import Machine, page


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def test_room_is_on_its_way_from_the_write_until_the_second_look_is_committed(machine: Machine) -> None:
    """At every step between: not committed, being committed, dirty, uploaded, to be looked at, looked at."""
    store = machine.store
    ledger = Ledger(machine.clock, 100)

    def on_its_way() -> bool:
        return more_will_be_evictable(store, ledger)

    number = machine.create("a")
    assert not on_its_way(), "a name is never evicted"
    machine.write(number, 0, page("x") * 4)
    assert on_its_way()
    machine.seal()
    assert on_its_way()
    machine.finish()
    assert on_its_way()

    (pack,) = machine.upload(number, range(4), together=True)
    row = pack_row(store, pack)
    assert row is not None
    written = replace(row, state=int(PackState.FULL))
    store.layers.put(Table.PACKS, u64(pack), written.encode())
    ledger.note(pack, written)
    assert on_its_way()
    machine.commit()
    assert not store.layers.view.count(Table.DIRTY)
    assert on_its_way()

    assert set_looked(store, pack, (), 1)
    looked = pack_row(store, pack)
    assert looked is not None
    ledger.note(pack, looked)
    assert not ledger.looks
    assert on_its_way(), "eviction tries again with the commit of the look"
    machine.seal()
    assert on_its_way()
    machine.finish()
    assert not on_its_way()


def test_a_pack_that_is_being_recorded_is_not_taken_for_an_empty_one(machine: Machine) -> None:
    """What its first extents held is gone before the last ones are recorded: those live in it."""
    number = machine.create("a")
    machine.write(number, 0, page("x") * 8)
    machine.commit()
    extents = machine.store.extents
    first, second = machine.read_committed(number, range(4)), machine.read_committed(number, range(4, 8))
    pack = machine.land_upload(number, 0, first)
    assert pack is not None
    with extents.recording(pack):
        extents.take(number, 0, 4)
        machine.commit()
        row = pack_row(machine.store, pack)
        assert row is not None and row.live == 0
        assert not extents.emptied and not extents.thinned
        highest = max(write for write, _ in second)
        inode = machine.inode(number)
        assert all(machine.store.blocks.clean(inode, 4 + i, (write,)) for i, (write, _) in enumerate(second))
        extents.insert(number, ExtentRow(4, highest, 4, 4, pack, 0, 0, 0, 8 * 4096, 0))
    machine.commit()
    assert pack not in extents.emptied
    extents.take(number, 4, 8)
    machine.commit()
    assert pack in extents.emptied
