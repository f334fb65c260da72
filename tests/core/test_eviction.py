"""Only what can be had from the backends leaves the cache: clean pages of packs that are full and were looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qsfs.store.eviction import Evictor
from qsfs.store.packs import pack_row, set_looked, set_placement
from qsfs.store.schema import InodeFlag, PackState, Table, u64
from tests.core.machine import Machine, page

BLOCK = [page(letter) for letter in "abcd"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def clean_block(machine: Machine, name: str = "a") -> tuple[int, int]:
    """A file of one block that is clean, and its pack."""
    number = machine.create(name)
    machine.write(number, 0, b"".join(BLOCK))
    machine.commit()
    (pack,) = machine.upload(number, range(4), together=True)
    machine.commit()
    return number, pack


def evict(machine: Machine, *, written_will_do: bool = False) -> int:
    """One round of the hand over everything; the blocks that went."""
    done = Evictor(machine.store).step(1000, 1000, recent_too=True, written_will_do=written_will_do)
    assert done.came_round
    machine.commit()
    return done.blocks


def resident(machine: Machine, number: int) -> int:
    state = machine.store.blocks.state(number, 0)
    return 0 if state is None else state.resident


def set_state(machine: Machine, pack: int, state: PackState) -> None:
    row = pack_row(machine.store, pack)
    assert row is not None
    machine.store.layers.put(Table.PACKS, u64(pack), replace(row, state=int(state)).encode())
    machine.commit()


def test_a_clean_block_of_a_full_pack_that_was_looked_at_goes(machine: Machine) -> None:
    number, _ = clean_block(machine)
    assert evict(machine) == 1
    assert resident(machine, number) == 0


@pytest.mark.parametrize(
    ("state", "in_need_too"),
    [
        (PackState(0), False),
        (PackState.FULL, False),
        (PackState.LOOKED, True),
    ],
)
def test_a_pack_must_be_full_and_looked_at(machine: Machine, state: PackState, in_need_too: bool) -> None:
    """A pack that is only written will do in need, when it was looked at; an acknowledgement alone never does."""
    number, pack = clean_block(machine)
    set_state(machine, pack, state)
    assert evict(machine) == 0
    assert evict(machine, written_will_do=True) == in_need_too
    assert resident(machine, number) == (0 if in_need_too else 0b1111)


def test_pages_of_a_pack_of_which_nothing_is_recorded_stay(machine: Machine) -> None:
    number, pack = clean_block(machine)
    machine.store.layers.delete(Table.PACKS, u64(pack))
    machine.commit()
    assert evict(machine, written_will_do=True) == 0
    assert resident(machine, number) == 0b1111


def rewrite(machine: Machine, number: int) -> None:
    machine.write(number, 1, page("x"))


def truncate_and_write(machine: Machine, number: int) -> None:
    """The extent is cut, and the pages behind it are new."""
    machine.truncate(number, 0)
    machine.write(number, 0, page("x"))


def lose_extent(machine: Machine, number: int) -> None:
    """Clean, and in no pack: what must not be, and must not be made worse."""
    machine.store.extents.take(number, 1, 2)


@pytest.mark.parametrize("harm", [rewrite, truncate_and_write, lose_extent])
@pytest.mark.parametrize("commit", [True, False], ids=["committed", "open"])
def test_a_block_with_a_page_that_no_pack_has_stays_whole(
    machine: Machine, harm: Callable[[Machine, int], None], commit: bool
) -> None:
    number, _ = clean_block(machine)
    harm(machine, number)
    before, held = machine.read(number), resident(machine, number)
    if commit:
        machine.commit()
    assert evict(machine, written_will_do=True) == 0
    assert resident(machine, number) == held
    assert machine.read(number) == before


def test_a_page_under_a_pending_truncation_is_not_taken_for_one_that_a_pack_has(machine: Machine) -> None:
    """Its extent is a hole by then: what is resident there is newer."""
    number, _ = clean_block(machine)
    machine.store.blocks.truncate(machine.inode(number), 0, machine.store.next_write())
    machine.commit()
    extent = machine.store.extents.at(number, 0)
    assert extent is not None and machine.store.blocks.remote_extent(number, 0) is None
    newer = machine.store.blocks.writable(machine.inode(number), 0)
    newer.resident, newer.writes[0] = 1, machine.store.next_write()
    newer.set_page(0, page("n"))
    machine.store.layers.open.fill(newer)
    machine.commit()
    assert evict(machine, written_will_do=True) == 0
    assert machine.page(number, 0) == page("n")


@pytest.mark.parametrize("flag", [InodeFlag.LOCAL_ONLY, InodeFlag.PINNED])
def test_pinned_and_local_only_files_stay(machine: Machine, flag: InodeFlag) -> None:
    number, _ = clean_block(machine)
    machine.inode(number).flags |= flag
    machine.store.inodes.touch(machine.inode(number))
    machine.commit()
    assert evict(machine, written_will_do=True) == 0
    assert resident(machine, number) == 0b1111


def test_a_pack_whose_shards_moved_has_to_be_looked_at_again(machine: Machine) -> None:
    """A new place is an acknowledgement, and a look counts for the places that it found only."""
    number, pack = clean_block(machine)
    store = machine.store
    assert set_placement(store, pack, (1, 2, 3), 5) is not None
    machine.commit()
    assert evict(machine) == 0
    assert not set_looked(store, pack, (1, 2, 4), 6)
    machine.commit()
    assert evict(machine) == 0
    assert set_looked(store, pack, (1, 2, 3), 7)
    machine.commit()
    assert evict(machine) == 1
    assert resident(machine, number) == 0
