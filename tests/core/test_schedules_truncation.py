"""Schedules of truncations, background work and fetches that brought old bytes back or lost new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsfs.filesystem.needs import NeedPages
from qsfs.store.blocks import Blocks
from qsfs.store.packs import add_pack
from qsfs.store.schema import PAGE, ExtentRow, PackRow, PackState, Table, u64
from qsfs.store.store import NEXT_PACK
from tests.core.machine import ZEROS, Machine, page, with_limits


@contextmanager
def pending(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Truncations in the block stay pending, as those of a huge file do."""
    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "work_off", lambda *_: False)
        yield


def test_a_write_behind_a_pending_truncation_brings_no_old_page_of_its_block_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """write page 4, truncate to page 2 (pending), write page 5 of the same block: page 4 is a hole.

    A write into a truncated range first works off the truncation in its block.
    """
    for where in ("open", "committing", "committed"):
        file = machine.create(where)
        machine.write(file, 0, page("a") * 5)
        if where == "committed":
            machine.commit()
        elif where == "committing":
            machine.seal()
        with pending(monkeypatch):
            machine.truncate(file, 2)
        machine.write(file, 5, page("b"))
        wanted = page("a") * 2 + ZEROS * 3 + page("b")
        assert machine.read(file) == wanted
        machine.work_off()
        assert machine.read(file) == wanted
        machine.commit()
        assert machine.read(file) == wanted
        assert machine.inode(file).allocated == 3
        machine.crash()
        assert machine.read(file) == wanted


def test_a_truncation_shows_zeros_before_it_is_worked_off(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """truncate (pending), extend, read, crash, read: what was cut is a hole from the first moment on."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 8)
    machine.commit()
    machine.upload(file, [4, 5, 6])
    machine.evict(file, [4, 5])
    machine.commit()
    with pending(monkeypatch):
        machine.truncate(file, 3)
        machine.truncate(file, 8)
        assert machine.read(file) == page("a") * 3 + ZEROS * 5
        machine.commit()
        machine.crash()
    assert machine.store.pending_truncations(file)
    assert machine.read(file) == page("a") * 3 + ZEROS * 5
    machine.work_off()
    assert machine.read(file) == page("a") * 3 + ZEROS * 5
    assert machine.inode(file).allocated == 3
    assert not list(machine.store.extents.overlapping(file, 0, 100))


def test_a_clean_mark_does_not_reach_a_page_under_a_pending_truncation(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """commit, pre-copy reads a page, truncate to 0 (pending), clean mark: refused; extend shows zeros."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 2)
    machine.commit()
    read = machine.read_committed(file, [0, 1])
    with pending(monkeypatch):
        machine.truncate(file, 0)
        assert machine.land_upload(file, 0, read) is None
    machine.truncate(file, 2)
    machine.commit()
    machine.work_off()
    assert machine.read(file) == ZEROS * 2
    machine.crash()
    assert machine.read(file) == ZEROS * 2
    machine.work_off()
    assert machine.inode(file).allocated == 0


def test_a_clean_mark_does_not_reach_a_page_that_was_written_since(machine: Machine) -> None:
    """commit, pre-copy reads a page, the page is written again, clean mark: refused; the page stays dirty."""
    file = machine.create("a")
    machine.write(file, 0, page("a"))
    machine.commit()
    read = machine.read_committed(file, [0])
    machine.write(file, 0, page("b"))
    assert machine.land_upload(file, 0, read) is None
    machine.evict(file, [0])
    assert machine.read(file) == page("b")


def test_background_changes_meet_the_overlay(machine: Machine) -> None:
    """page 3 committed, page 2 of the block in the overlay; page 3 is marked clean and evicted; commit.

    The block's row is the one that the newest group has: no resident bit without a value, no lost page.
    """
    file = machine.create("a")
    machine.write(file, 3, page("c"))
    machine.commit()
    read = machine.read_committed(file, [3])
    machine.write(file, 2, page("b"))
    assert machine.land_upload(file, 3, read) is not None
    machine.evict(file, [3])
    assert machine.page(file, 2) == page("b")
    machine.commit()
    assert machine.page(file, 2) == page("b")
    assert machine.fetch(file, 3)()
    assert machine.page(file, 3) == page("c")
    machine.crash()
    assert machine.page(file, 2) == page("b")
    assert machine.fetch(file, 3)()
    assert machine.read(file) == ZEROS * 2 + page("b") + page("c")


def test_background_changes_meet_the_committing_group(machine: Machine) -> None:
    """The same with the write in the group that commits while the page is marked clean and evicted."""
    file = machine.create("a")
    machine.write(file, 3, page("c"))
    machine.commit()
    read = machine.read_committed(file, [3])
    machine.write(file, 2, page("b"))
    machine.seal()
    assert machine.land_upload(file, 3, read) is not None
    machine.evict(file, [3])
    machine.commit()
    machine.crash()
    assert machine.page(file, 2) == page("b")
    assert machine.fetch(file, 3)()
    assert machine.read(file) == ZEROS * 2 + page("b") + page("c")


@pytest.mark.parametrize("is_pending", [False, True])
def test_a_fetch_that_lands_after_a_truncation_installs_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, is_pending: bool
) -> None:
    """fetch starts, truncate to 0, write another page of the block, the fetch lands: a hole stays one."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 2)
    machine.commit()
    machine.upload(file, [0, 1])
    machine.evict(file, [0, 1])
    machine.commit()
    land = machine.fetch(file, 0)
    if is_pending:
        with pending(monkeypatch):
            machine.truncate(file, 0)
            machine.write(file, 1, page("b"))
            assert not land()
    else:
        machine.truncate(file, 0)
        machine.write(file, 1, page("b"))
        assert not land()
    assert machine.read(file) == ZEROS + page("b")
    machine.commit()
    machine.work_off()
    assert machine.read(file) == ZEROS + page("b")
    assert machine.inode(file).allocated == 1


def test_a_fetch_that_lands_after_its_page_was_uploaded_again_installs_nothing(machine: Machine) -> None:
    """fetch in flight, page rewritten, uploaded again, evicted, the fetch lands: the extent is another."""
    file = machine.create("a")
    machine.write(file, 0, page("a"))
    machine.commit()
    machine.upload(file, [0])
    machine.evict(file, [0])
    machine.commit()
    land = machine.fetch(file, 0)
    machine.write(file, 0, page("b"))
    machine.commit()
    machine.upload(file, [0])
    machine.evict(file, [0])
    assert not land()
    assert machine.fetch(file, 0)()
    assert machine.read(file) == page("b")


def test_a_fetch_lands_for_the_right_page_of_a_trimmed_extent(machine: Machine) -> None:
    """One extent of 8 pages, split by a rewrite, trimmed by a truncation: fetches bring the right pages."""
    file = machine.create("a")
    machine.write(file, 0, b"".join(page(letter) for letter in "abcdefgh"))
    machine.commit()
    machine.upload(file, range(8), together=True)
    machine.evict(file, range(8))
    land = machine.fetch(file, 6)
    machine.write(file, 3, page("X"))
    machine.truncate(file, 7)
    machine.commit()
    machine.upload(file, [3])
    assert land()
    for index in (0, 1, 2, 4, 5):
        assert machine.fetch(file, index)()
    assert machine.read(file) == b"".join(page(letter) for letter in "abcXefg")
    assert machine.inode(file).allocated == 7


def test_reuse_behind_a_removal_that_is_not_worked_off(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """unlink a file (pending), crash, work off: nothing of it is left, and no inode comes back."""
    file = machine.create("a", opened=False)
    machine.write(file, 0, page("a") * 9)
    machine.commit()
    machine.upload(file, [0, 1, 2])
    machine.evict(file, [0])
    machine.commit()
    with pending(monkeypatch):
        with machine.store.change() as change:
            change.delete(Table.ENTRIES, u64(1) + b"a")
            change.remove(file)
        machine.commit()
        machine.crash()
    assert machine.store.inode(file) is None
    machine.work_off()
    machine.commit()
    assert machine.store.inode(file) is None
    for table in (Table.BLOCKS, Table.VALUES, Table.DIRTY, Table.EXTENTS, Table.TRUNCATIONS, Table.INODES):
        assert not list(machine.store.scan(table, u64(file), u64(file + 1))), table.name


def test_a_truncation_is_worked_off_in_bounded_steps(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work for a file of many blocks grows with their number, not with its square.

    Each step goes on where the last one ended, through blocks in groups, in LMDB, and extents.
    """
    file = machine.create("a")
    blocks = 600
    for first in range(0, blocks * 4, 64):
        machine.write(file, first, page("a") * 64)
        if first % 512 == 0:
            machine.commit()
    machine.commit()
    machine.upload(file, range(400))
    with pending(monkeypatch):
        machine.truncate(file, 0)
    looked = 0
    original = Blocks._work_off_block

    def counted(self: Blocks, *arguments: object) -> None:
        nonlocal looked
        looked += 1
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Blocks, "_work_off_block", counted)
    steps = 0
    while not machine.store.work_off_truncations(32):
        steps += 1
        if steps % 8 == 0:
            machine.commit()
    assert looked <= 2 * blocks
    assert steps >= blocks // 32
    assert machine.inode(file).allocated == 0
    machine.commit()
    assert not list(machine.store.scan(Table.BLOCKS, u64(file), u64(file + 1)))
    assert not list(machine.store.scan(Table.EXTENTS, u64(file), u64(file + 1)))


def test_a_truncation_ends_also_with_many_newer_extents_before_the_old_ones(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """truncate (pending), write and upload more extents than a step takes: the old ones behind still go."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 60)
    machine.commit()
    machine.upload(file, range(60))
    machine.evict(file, range(60))
    machine.commit()
    with pending(monkeypatch):
        machine.truncate(file, 0)
        machine.write(file, 0, page("b") * 30)
    machine.commit()
    machine.upload(file, range(30))
    for _ in range(100):
        if machine.store.work_off_truncations(4):
            break
    assert not machine.store.pending_truncations(file)
    machine.truncate(file, 60)
    assert machine.read(file) == page("b") * 30 + ZEROS * 30
    assert machine.inode(file).allocated == 30


def test_a_truncation_while_another_is_being_worked_off(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """truncate to 40 (half worked off), write behind it, truncate to 4: both hold, wherever the work was."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 200)
    machine.commit()
    with pending(monkeypatch):
        machine.truncate(file, 40)
    assert not machine.store.work_off_truncations(5)
    machine.write(file, 44, page("b") * 100)
    assert not machine.store.work_off_truncations(5)
    with pending(monkeypatch):
        machine.truncate(file, 4)
    machine.write(file, 100, page("c"))
    while not machine.store.work_off_truncations(3):
        machine.commit()
    machine.truncate(file, 200)
    assert machine.read(file) == page("a") * 4 + ZEROS * 96 + page("c") + ZEROS * 99
    assert machine.inode(file).allocated == 5


def test_a_truncation_to_the_middle_of_a_remote_page_waits_for_that_page(machine: Machine) -> None:
    """A truncation into a page is a write to that page: nothing changes before its bytes are there."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 3)
    machine.commit()
    machine.upload(file, [0, 1, 2])
    machine.evict(file, [0, 1, 2])
    machine.commit()
    with pytest.raises(NeedPages) as need:
        machine.truncate_to(file, PAGE + 10)
    assert (need.value.inode, need.value.first, need.value.count) == (file, 1, 1)
    assert machine.contents.stat(machine.inode(file)).size == 3 * PAGE
    assert machine.fetch(file, 1)()
    machine.truncate_to(file, PAGE + 10)
    machine.truncate(file, 3)
    assert machine.fetch(file, 0)()
    assert machine.read(file) == page("a") + b"a" * 10 + bytes(2 * PAGE - 10)


EXTENT_PAGES = 64
STEPS = 64


def fill_remotely(machine: Machine, file: int, pages: int) -> None:
    """Gives a file pages that are remote only, without their bytes."""
    store = machine.store
    pack = store.next_number(NEXT_PACK)
    add_pack(store, pack, PackRow(bytes(16), bytes(32), 1, 1, 1, 0, 0, 0, 0, 0, 0, int(PackState.FULL), ()))
    for first in range(0, pages, EXTENT_PAGES):
        length = EXTENT_PAGES * PAGE
        store.extents.insert(file, ExtentRow(first, 1, EXTENT_PAGES, 0, pack, 0, 0, 0, length, 0))
        if first % (EXTENT_PAGES << 16) == 0:
            machine.commit()
    inode = machine.inode(file)
    inode.size, inode.allocated = pages * PAGE, pages
    store.touch_data(inode)
    machine.commit()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("gib", [1, pytest.param(200, marks=pytest.mark.slow)])
def test_a_full_file_is_cut_at_once_and_worked_off_in_bounded_steps(tmp_path: Path, gib: int) -> None:
    """Whatever its size; a restart goes on, and what is written into the range meanwhile stays."""
    machine = Machine(tmp_path, with_limits(map_bytes=512 << 20, high_bytes=400 << 20, full_bytes=450 << 20))
    pages = (gib << 30) // PAGE
    file = machine.create("huge")
    fill_remotely(machine, file, pages)

    def rows_of(action: Callable[[], object]) -> int:
        before = machine.store.layers.open.row_count
        action()
        machine.store.extents.write_back()
        return machine.store.layers.open.row_count - before

    assert rows_of(lambda: machine.truncate(file, 0)) <= 32
    machine.truncate(file, pages)
    kept = pages // 2 + 3
    machine.write(file, kept, page("n"))
    machine.commit()
    calls, done = 0, False
    while not done:

        def step() -> None:
            nonlocal done
            done = machine.store.work_off_truncations(STEPS)

        assert rows_of(step) <= STEPS + 4
        calls += 1
        if calls % 20_000 == 0:
            machine.commit()
        if calls in (7, 5000):
            machine.crash()
            assert machine.store.pending_truncations(file)
            assert machine.page(file, kept) == page("n")
            assert machine.page(file, 5) == ZEROS
    assert calls >= pages // EXTENT_PAGES // STEPS
    machine.commit()
    machine.crash()
    assert machine.inode(file).allocated == 1
    assert machine.page(file, kept) == page("n")
    assert not list(machine.store.extents.overlapping(file, 0, pages))
    machine.close()
