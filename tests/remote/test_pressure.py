"""Room that is on its way: nobody is told that the file system is full while what fills it only waits its turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qsfs.remote.ledger import Ledger
from qsfs.remote.pressure import more_will_be_evictable
from qsfs.store.packs import pack_row, set_looked
from qsfs.store.schema import PackState, Table, u64
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
