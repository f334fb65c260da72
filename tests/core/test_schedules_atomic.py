"""Schedules of atomic sync: a file is at one of its covers after a crash, whatever came between them."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from qsfs.config import PolicyRule
from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.needs import NeedPages
from qsfs.filesystem.policies import Policies
from qsfs.store.blocks import Blocks
from qsfs.store.schema import PAGE, Inode, InodeFlag, Table, u64
from tests.core.machine import ZEROS, Machine, page, with_limits


def age_group(machine: Machine) -> None:
    """What a daemon does of itself while an application goes on: groups, spills, moves."""
    machine.contents.must_wait()
    machine.commit()
    machine.store.move_covered(100)
    machine.store.work_off_truncations(100)
    machine.commit()


def test_nothing_covers_while_the_application_runs(machine: Machine) -> None:
    """store D1, M1; WRITE D1; store D2, M2; WRITE M2: no group may hold M2 with D1.

    Neither age nor commits nor memory cover; only the file's own sync does.
    """
    file = machine.create("a", atomic=True)
    machine.write(file, 1, page("d"))
    machine.write(file, 0, page("m"))
    machine.fsync(file)
    machine.write(file, 1, page("D"))
    age_group(machine)
    machine.write(file, 0, page("M"))
    age_group(machine)
    assert machine.read(file) == page("M") + page("D")
    machine.crash()
    assert machine.read(file) == page("m") + page("d")


def test_what_is_uncovered_counts_as_not_durable_until_its_sync_is_committed(machine: Machine) -> None:
    """No commit of other changes makes it durable, so none may end its exposure."""
    file = machine.create("a", atomic=True)
    machine.commit()
    assert machine.store.undurable_seconds() is None
    machine.write(file, 0, page("x"))
    age_group(machine)
    assert machine.store.undurable_seconds() is not None and machine.store.promised_bytes() >= PAGE
    machine.fsync(file)
    machine.commit()
    assert machine.store.undurable_seconds() is None and machine.store.promised_bytes() == 0


def test_another_files_sync_covers_nothing(machine: Machine) -> None:
    """An fsync of B, or of a directory, leaves uncovered what A wrote since its own."""
    file, other = machine.create("a", atomic=True), machine.create("b", atomic=True)
    machine.write(file, 0, page("a"))
    machine.write(other, 0, page("b"))
    machine.fsync(other)
    machine.fsync()
    machine.crash()
    assert machine.read(file) == b""
    assert machine.read(other) == page("b")


def test_a_stop_with_the_file_open_is_no_last_close(machine: Machine) -> None:
    """SIGTERM with the file open: WRITE M arrived, WRITE D not.  A stop commits, and covers nothing."""
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("a") * 2)
    machine.fsync(file)
    machine.write(file, 0, page("M"))
    machine.commit()
    machine.crash()
    assert machine.read(file) == page("a") * 2


def test_a_close_of_one_of_two_handles_is_no_last_close(machine: Machine) -> None:
    """Two handles, one of them is closed: what was written stays uncovered until the other is, too."""
    file = machine.create("a", atomic=True)
    machine.contents.opened(machine.inode(file))
    machine.write(file, 0, page("a"))
    machine.contents.closed(machine.inode(file))
    machine.commit()
    assert machine.contents.has_uncovered(file)
    machine.contents.closed(machine.inode(file))
    machine.commit()
    assert not machine.contents.has_uncovered(file)
    machine.crash()
    assert machine.read(file) == page("a")


def atomic_namespace(machine: Machine) -> Namespace:
    """A namespace in which `*.mdb` has atomic sync."""
    rules = (PolicyRule(match="*.mdb", atomic_sync=True),)
    return Namespace(machine.store, machine.contents, Policies(rules))


def test_a_file_leaves_the_policy_when_nothing_of_it_is_uncovered(machine: Machine) -> None:
    """truncate an uncovered file, rename it out of the pattern, write: all or nothing of that is there."""
    namespace = atomic_namespace(machine)
    number = namespace.create(1, b"a.mdb", 0o644, Caller()).number
    machine.contents.opened(machine.inode(number))
    machine.write(number, 0, page("a") * 3)
    machine.fsync(number)
    machine.truncate(number, 1)
    namespace.rename(1, b"a.mdb", 1, b"a.txt")
    machine.write(number, 1, page("b"))
    machine.commit()
    assert machine.inode(number).flags & InodeFlag.ATOMIC_SYNC
    machine.crash()
    assert machine.read(number) == page("a") * 3

    machine.contents.opened(machine.inode(number))
    namespace = atomic_namespace(machine)
    machine.truncate(number, 1)
    namespace.rename(1, b"a.txt", 1, b"b.txt")
    machine.fsync(number)
    while not namespace.policies.step():
        pass
    assert not machine.inode(number).flags & InodeFlag.ATOMIC_SYNC
    machine.write(number, 1, page("c"))
    machine.commit()
    machine.crash()
    assert machine.read(number) == page("a") + page("c")


def test_a_change_to_a_closed_file_is_covered_at_once(machine: Machine) -> None:
    """`truncate(path)`, a write by a late writeback, or `utime(path)` of a file that nobody has open."""
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("a") * 3)
    machine.contents.closed(machine.inode(file))
    machine.truncate(file, 1)
    assert not machine.contents.has_uncovered(file)
    machine.write(file, 2, page("b"))
    machine.contents.set_times(machine.inode(file), mtime_ns=77)
    assert not machine.contents.has_uncovered(file)
    machine.commit()
    machine.crash()
    assert machine.read(file) == page("a") + ZEROS + page("b")
    assert machine.inode(file).mtime_ns == 77


def test_a_need_leaves_nothing_uncovered_behind(machine: Machine) -> None:
    """A truncation of a closed file that waits for a page has changed nothing: nothing waits for a sync."""
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("a") * 2)
    machine.contents.closed(machine.inode(file))
    machine.commit()
    machine.upload(file, [0, 1])
    machine.evict(file, [0, 1])
    with pytest.raises(NeedPages):
        machine.truncate_to(file, 10)
    assert not machine.contents.has_uncovered(file)
    assert machine.contents.oldest_uncovered() is None


def test_a_copy_larger_than_memory_spills_and_its_close_covers_all_of_it(tmp_path: Path) -> None:
    """cp onto an atomic name: the writes spill, crash before the close: nothing; after it: everything."""
    machine = Machine(tmp_path, with_limits(group_bytes=1 << 20))
    for closed in (False, True):
        file = machine.create(f"a{closed}", atomic=True)
        for first in range(0, 400, 20):
            machine.write(file, first, page("a") * 20)
            if machine.store.group_is_full():
                machine.commit()
        assert machine.store.spill.any(file)
        assert machine.read(file) == page("a") * 400
        if closed:
            machine.contents.closed(machine.inode(file))
        machine.commit()
        machine.crash()
        assert machine.read(file) == (page("a") * 400 if closed else b"")
        while not machine.store.move_covered(7):
            machine.commit()
        machine.commit()
        assert machine.read(file) == (page("a") * 400 if closed else b"")
        assert machine.inode(file).allocated == (400 if closed else 0)
        assert not list(machine.store.scan(Table.SPILL_BLOCKS, b"", None))
    machine.close()


def test_a_rename_over_an_existing_name_takes_no_uncovered_data_along(machine: Machine) -> None:
    """rename A over B, A has uncovered writes, fsync of the directory, crash: B shows A's last cover."""
    target = machine.create("b", atomic=True)
    machine.commit()
    source = machine.create("a", atomic=True)
    machine.write(source, 0, page("a"))
    machine.fsync(source)
    machine.write(source, 0, page("u"))
    machine.rename_over("a", "b")
    machine.fsync()
    assert machine.contents.has_uncovered(source)
    machine.crash()
    assert machine.names() == {"b"}
    assert machine.store.inode(target) is None
    assert machine.read(source) == page("a")


def test_syncs_of_two_files_are_there_in_their_order(machine: Machine) -> None:
    """data.lmdb is synced before storage.lmdb: no crash shows the second without the first."""
    data, storage = machine.create("data", atomic=True), machine.create("storage", atomic=True)
    machine.commit()
    for turn, letter in enumerate("abcd"):
        machine.write(data, 0, page(letter))
        machine.write(storage, 0, page(letter))
        first = machine.frame(data)
        second = machine.frame(storage)
        assert first is not None and second is not None
        if turn % 2:
            machine.store.journal.write([first, second])
            wanted = (page(letter), page(letter))
        else:
            machine.store.journal.write([second])
            wanted = (page("b"), page("b")) if turn else (b"", b"")
        machine.crash()
        assert (machine.read(data), machine.read(storage)) == wanted


# Spilled pages and what is done to the file meanwhile


def spilled(machine: Machine, letter: str = "s", pages: int = 40) -> int:
    file = machine.create(letter, atomic=True)
    machine.write(file, 0, page(letter) * pages)
    machine.contents.must_wait()
    assert machine.store.spill.any(file)
    return file


def test_a_page_rewritten_after_it_spilled_is_the_newer_one(machine: Machine) -> None:
    """spill page 3, write it again, sync: the spilled copy of it is not what the cover has."""
    file = spilled(machine)
    machine.write(file, 3, page("n"))
    wanted = page("s") * 3 + page("n") + page("s") * 36
    assert machine.read(file) == wanted
    assert machine.contents.stat(machine.inode(file)).allocated == 40
    assert machine.fsync_or_commit(file)
    assert machine.read(file) == wanted
    machine.crash()
    assert machine.read(file) == wanted
    while not machine.store.move_covered(3):
        machine.commit()
    machine.commit()
    assert machine.read(file) == wanted
    assert machine.inode(file).allocated == 40


def test_a_truncation_after_a_spill_cuts_what_spilled(machine: Machine) -> None:
    """spill, truncate, extend, sync: neither reads nor the cover show a spilled page behind the cut."""
    file = spilled(machine)
    machine.truncate(file, 5)
    machine.truncate(file, 40)
    wanted = page("s") * 5 + ZEROS * 35
    assert machine.read(file) == wanted
    assert machine.fsync_or_commit(file)
    assert machine.read(file) == wanted
    machine.crash()
    machine.store.move_covered(1000)
    assert machine.read(file) == wanted


def test_a_truncation_before_a_spill_does_not_cut_what_spilled(machine: Machine) -> None:
    """committed data, truncate (uncovered), write and spill, sync: the spilled pages are the newer ones."""
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("o") * 60)
    machine.fsync_or_commit(file)
    machine.commit()
    machine.truncate(file, 10)
    machine.write(file, 20, page("n") * 40)
    machine.contents.must_wait()
    wanted = page("o") * 10 + ZEROS * 10 + page("n") * 40
    assert machine.read(file) == wanted
    assert machine.fsync_or_commit(file)
    machine.crash()
    assert machine.read(file) == wanted
    machine.store.move_covered(1000)
    machine.work_off()
    assert machine.read(file) == wanted
    assert machine.inode(file).allocated == 50


def test_pages_move_under_a_truncation_that_is_not_worked_off(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """truncate (uncovered), write and spill, sync, the pages move while the truncation is pending: they stay.

    Moved pages carry the write number of their cover, which is above the truncation's.
    """
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("o") * 60)
    machine.fsync_or_commit(file)
    machine.commit()
    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "work_off", lambda *_: False)
        machine.truncate(file, 10)
        machine.write(file, 20, page("n") * 40)
        machine.contents.must_wait()
        assert machine.fsync_or_commit(file)
        while not machine.store.move_covered(3):
            machine.commit()
    wanted = page("o") * 10 + ZEROS * 10 + page("n") * 40
    assert machine.read(file) == wanted
    machine.work_off()
    machine.commit()
    machine.crash()
    assert machine.read(file) == wanted
    assert machine.inode(file).allocated == 50


@pytest.mark.parametrize("journaled", [False, True])
def test_a_file_goes_on_being_written_while_its_covered_pages_move(
    machine: Machine, journaled: bool
) -> None:
    """sync with spilled pages; some of them move; write, truncate, sync again, crash; the rest moves."""
    file = spilled(machine)
    assert machine.fsync_or_commit(file)
    assert not machine.store.move_covered(3)
    machine.write(file, 0, page("0"))
    machine.write(file, 30, page("1"))
    machine.truncate(file, 33)
    wanted = page("0") + page("s") * 29 + page("1") + page("s") * 2
    assert machine.read(file) == wanted
    if journaled:
        machine.fsync(file)
    else:
        machine.contents.cover(machine.inode(file))
        machine.commit()
    assert machine.read(file) == wanted
    machine.crash()
    assert machine.read(file) == wanted
    while not machine.store.move_covered(1):
        machine.commit()
    machine.truncate(file, 40)
    assert machine.read(file) == wanted + ZEROS * 7
    assert machine.inode(file).allocated == 33


def test_uncovered_writes_over_moving_pages_stay_uncovered(machine: Machine) -> None:
    """covered pages move while newer uncovered ones wait: a crash shows the cover, not a mixture."""
    file = spilled(machine)
    assert machine.fsync_or_commit(file)
    machine.write(file, 7, page("u"))
    machine.truncate(file, 20)
    machine.truncate(file, 40)
    assert machine.read(file) == page("s") * 7 + page("u") + page("s") * 12 + ZEROS * 20
    machine.truncate(file, 20)
    while not machine.store.move_covered(2):
        machine.commit()
    machine.commit()
    assert machine.read(file) == page("s") * 7 + page("u") + page("s") * 12
    machine.crash()
    assert machine.read(file) == page("s") * 40


def test_a_removed_file_leaves_no_spilled_page(machine: Machine) -> None:
    """unlink a file with spilled pages, covered or not: nothing of it stays in the store."""
    for cover in (False, True):
        file = spilled(machine, f"s{cover}")
        if cover:
            machine.fsync_or_commit(file)
        with machine.store.change() as change:
            change.delete(Table.ENTRIES, u64(1) + b"s%d" % cover)
            change.remove(file)
        machine.contents.forget(file)
        machine.store.move_covered(1000)
        machine.work_off()
        machine.commit()
        for table in (Table.SPILL_BLOCKS, Table.SPILL_VALUES, Table.SPILL_COVERED, Table.BLOCKS):
            assert not list(machine.store.scan(table, b"", None)), table.name


def test_a_failed_cover_is_repeated_by_the_next_sync(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cover that fails half way (a damaged row) is an error of that sync; nothing uncovered is dropped."""
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("a") * 6)
    machine.write(file, 50, page("b"))
    calls = 0
    original = machine.store.put_pages

    def fail_at_fifth(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("a row cannot be read")
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(machine.store, "put_pages", fail_at_fifth)
    with pytest.raises(RuntimeError):
        machine.contents.cover(machine.inode(file))
    assert machine.contents.has_uncovered(file)
    wanted = page("a") * 6 + ZEROS * 44 + page("b")
    assert machine.read(file) == wanted
    machine.fsync(file)
    assert not machine.contents.has_uncovered(file)
    machine.crash()
    assert machine.read(file) == wanted


def test_a_large_cover_holds_no_page_twice(tmp_path: Path) -> None:
    """What waited in memory for its sync moves to the group as it is: it may be most of the memory there is."""
    machine = Machine(tmp_path, with_limits(uncovered_bytes=8 << 20))
    file = machine.create("a", atomic=True)
    pages = 1000
    for first in range(0, pages, 50):
        machine.write(file, first, os.urandom(50 * PAGE))
    tracemalloc.start()
    machine.contents.cover(machine.inode(file))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not machine.contents.has_uncovered(file)
    assert most < pages * PAGE // 4
    machine.close()


class Caller:
    uid = 0
    gid = 0
    umask = 0


def test_names_and_modes_are_no_part_of_what_is_uncovered(machine: Machine) -> None:
    """chmod and rename of a file with uncovered writes are durable by themselves."""
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("a"))
    with machine.store.change() as change:
        change.patch(file, mode=0o100600)
    machine.fsync()
    machine.crash()
    inode: Inode = machine.inode(file)
    assert inode.mode == 0o100600
    assert machine.read(file) == b""
