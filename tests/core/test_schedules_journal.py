"""Schedules of journal and groups that lost or invented data while one sentence of the design was missing.

Each test is one schedule, named by it; the docstring says the promise.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qsfs import failpoints
from qsfs.errors import Corrupt
from qsfs.store import replay
from qsfs.store.direct import SECTOR
from qsfs.store.journal import decode_frames, encode_record, read_frames
from qsfs.store.schema import PAGE, Table, u64
from qsfs.store.store import JOURNAL_KEY, CommitNeeded
from tests.core.machine import ZEROS, Machine, page, with_limits, write_torn


class PowerCut(Exception):
    """The machine stops here."""


def cut_power() -> None:
    raise PowerCut


def test_cover_then_commit_then_truncate_and_fsync_keeps_the_covered_write(machine: Machine) -> None:
    """An atomic-sync file's covered data get new write numbers, so that replay does not take them for old.

    create, write (uncovered), commit, truncate, fsync, crash: the write is newer than the commit.
    """
    file = machine.create("a", atomic=True)
    machine.write(file, 0, page("x") + page("y"))
    machine.commit()
    machine.truncate(file, 1)
    machine.fsync(file)
    machine.crash()
    assert machine.read(file) == page("x")


def test_a_spill_in_a_later_group_leaves_earlier_appends_to_be_replayed(machine: Machine) -> None:
    """create A, fsync A; write A, spilled with a group; crash: the fsynced name is there, the spill is not.

    The write number that a commit stores is that of its sealing; spilled rows do not count.
    """
    file = machine.create("a", atomic=True)
    machine.fsync(file)
    machine.write(file, 0, page("s") * 40)
    machine.contents.must_wait()
    assert machine.store.spill.any(file)
    machine.crash()
    assert machine.names() == {"a"}
    assert machine.read(file) == b""


def test_a_spill_that_commits_takes_no_append_of_its_group_with_it(machine: Machine) -> None:
    """The same with the group committed: what was fsynced before is in it, the uncovered write is not."""
    file = machine.create("a", atomic=True)
    plain = machine.create("b")
    machine.write(plain, 0, page("p"))
    machine.fsync(file, plain)
    machine.write(file, 0, page("s") * 40)
    machine.contents.must_wait()
    machine.seal()
    machine.write(plain, 1, page("q"))
    machine.fsync(plain)
    machine.finish()
    machine.crash()
    assert machine.read(file) == b""
    assert machine.read(plain) == page("p") + page("q")


def test_write_truncate_into_it_fsync_crash_extend_shows_zeros(machine: Machine) -> None:
    """Truncations are journaled in order with writes: extending after a crash brings no old byte back."""
    file = machine.create("a")
    machine.write(file, 0, page("a") + page("b") + page("c"))
    machine.fsync(file)
    machine.truncate_to(file, PAGE + 100)
    machine.fsync(file)
    machine.crash()
    machine.truncate(file, 3)
    assert machine.read(file) == page("a") + b"b" * 100 + bytes(2 * PAGE - 100)


def test_write_truncate_write_in_one_append_is_replayed_in_order(machine: Machine) -> None:
    """One append with both writes and the truncation between them: what was written last is there."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 6)
    machine.truncate(file, 1)
    machine.write(file, 4, page("z"))
    machine.fsync(file)
    machine.crash()
    assert machine.read(file) == page("a") + ZEROS * 3 + page("z")


def test_write_seal_fsync_while_the_group_commits_crash(machine: Machine) -> None:
    """fsync journals what the committing group holds, too: that group may never become durable."""
    file = machine.create("a")
    machine.write(file, 0, page("a"))
    machine.seal()
    machine.fsync(file)
    machine.crash()
    assert machine.names() == {"a"}
    assert machine.read(file) == page("a")


def test_write_seal_fsync_commit_crash_replays_nothing_twice(machine: Machine) -> None:
    """The same with the commit done: the append is below the commit's write number and is passed over."""
    file = machine.create("a")
    machine.write(file, 0, page("a"))
    machine.seal()
    machine.fsync(file)
    machine.finish()
    machine.truncate(file, 0)
    machine.commit()
    machine.crash()
    assert machine.read(file) == b""


def test_the_second_half_of_an_atomic_files_append_is_torn(machine: Machine) -> None:
    """An append is replayed whole or not at all: no half of an atomic-sync file's cover."""
    file = machine.create("a", atomic=True)
    machine.fsync(file)
    machine.write(file, 0, page("a"))
    machine.write(file, 9, page("b"))
    frame = machine.frame(file)
    assert frame is not None
    where, offset, data = frame
    for length in range(SECTOR, len(data) - SECTOR + 1, SECTOR):
        write_torn(machine.store.directory, (where, offset, data), length)
        machine.crash()
        assert machine.read(file) == b"", length
        machine.write(file, 0, page("a"))
        machine.write(file, 9, page("b"))
        again = machine.frame(file)
        assert again is not None
        where, offset, data = again


def test_a_new_mounts_append_in_the_place_of_one_that_a_power_cut_lost(machine: Machine) -> None:
    """fsync 1, fsync 2; a cut keeps only append 2; mount; a new fsync takes place 1; crash: old 2 stays out.

    Appends carry a number that each mount renews.
    """
    file = machine.create("a")
    machine.commit()
    machine.write(file, 0, page("1"))
    first = machine.frame(file)
    machine.write(file, 0, page("2"))
    second = machine.frame(file)
    assert first is not None and second is not None
    where = f"journal.{first[0]}"
    machine.store.journal.write([second])
    machine.crash()
    assert machine.read(file) == b""
    machine.write(file, 0, page("3"))
    third = machine.frame(file)
    assert third is not None
    assert (third[0], third[1], len(third[2])) == (int(where[-1]), first[1], len(first[2]))
    machine.store.journal.write([third])
    machine.crash()
    assert machine.read(file) == page("3")


def test_half_of_an_evicted_page_is_written_and_fsynced(machine: Machine) -> None:
    """page written, uploaded, evicted; half of it written, fsync (the rest is in the lost group), crash.

    The journal holds whole pages, so the other half is no zeros.
    """
    file = machine.create("a")
    machine.write(file, 0, page("a"))
    machine.commit()
    machine.upload(file, [0])
    machine.evict(file, [0])
    machine.commit()
    assert machine.fetch(file, 0)()
    machine.write_at(file, 0, b"b" * 2000)
    machine.fsync(file)
    machine.crash()
    assert machine.read(file) == b"b" * 2000 + b"a" * (PAGE - 2000)


def test_an_evicted_page_is_cut_by_a_truncation_fsynced_and_extended(machine: Machine) -> None:
    """The same with a truncation into the middle of the page: the journal has the page that it cuts."""
    file = machine.create("a")
    machine.write(file, 0, page("a") * 2)
    machine.commit()
    machine.upload(file, [0, 1])
    machine.evict(file, [0, 1])
    machine.commit()
    assert machine.fetch(file, 0)()
    machine.truncate_to(file, 1000)
    machine.fsync(file)
    machine.crash()
    machine.truncate(file, 2)
    assert machine.read(file) == b"a" * 1000 + bytes(2 * PAGE - 1000)


def test_a_crash_in_the_middle_of_a_replay_repeats_it(machine: Machine, tmp_path: Path) -> None:
    """write o1@2, create o0@3, fsync o0, fsync o1 (journal order 3, 2); crash during replay after 3.

    Replay takes one transaction, so the lower write number that comes later is not passed over.
    """
    one = machine.create("o1")
    machine.commit()
    machine.write(one, 0, page("1"))
    zero = machine.create("o0")
    machine.fsync(zero)
    machine.fsync(one)
    machine.close()
    hits = 0

    def cut_at_second() -> None:
        nonlocal hits
        hits += 1
        if hits == 2:
            raise PowerCut

    failpoints.arm("replay.frame", cut_at_second)
    with pytest.raises(PowerCut):
        machine.open()
    failpoints.disarm_all()
    for point in ("commit.applied", "commit.before"):
        failpoints.arm(point, cut_power)
        with pytest.raises(PowerCut):
            machine.open()
        failpoints.disarm_all()
    failpoints.arm("commit.done", cut_power)
    with pytest.raises(PowerCut):
        machine.open()
    failpoints.disarm_all()
    machine.open()
    assert machine.names() == {"o1", "o0"}
    assert machine.read(one) == page("1")


def test_a_large_sync_that_commits_brings_every_sync_that_had_returned(tmp_path: Path) -> None:
    """Large fsync of A commits the group; B's fsync returned before A's was requested: both are there."""
    machine = Machine(tmp_path, with_limits(largest_append=4 * PAGE))
    a, b = machine.create("a"), machine.create("b")
    machine.commit()
    machine.write(a, 0, page("a") * 20)
    machine.write(b, 0, page("b"))
    machine.fsync(b)
    with pytest.raises(CommitNeeded):
        machine.fsync(a)
    machine.commit()
    machine.crash()
    assert machine.read(a) == page("a") * 20
    assert machine.read(b) == page("b")
    machine.close()


def test_a_sync_behind_a_large_one_keeps_its_own_promise(tmp_path: Path) -> None:
    """While A's large fsync commits B is fsynced by the journal, the commit is lost: only B is there."""
    machine = Machine(tmp_path, with_limits(largest_append=4 * PAGE))
    a, b = machine.create("a"), machine.create("b")
    machine.commit()
    machine.write(a, 0, page("a") * 20)
    machine.write(b, 0, page("b"))
    with pytest.raises(CommitNeeded):
        machine.fsync(a)
    machine.seal()
    machine.write(b, 1, page("c"))
    machine.fsync(b)
    machine.crash()
    assert machine.read(a) == b""
    assert machine.read(b) == page("b") + page("c")
    machine.close()


def test_every_mount_renews_the_journals_number(machine: Machine) -> None:
    """rollback restores a smaller write number while the old journal is there: nothing of it is replayed.

    A rollback ends in a mount of the restored store, whose LMDB holds a number that no append has.
    """
    file = machine.create("a")
    machine.commit()
    lmdb = (machine.directory / "data.mdb").read_bytes()
    before = machine.store.local(JOURNAL_KEY)
    machine.write(file, 0, page("a"))
    machine.fsync(file)
    machine.crash()
    after = machine.store.local(JOURNAL_KEY)
    assert after != before
    machine.write(file, 0, page("b"))
    machine.fsync(file)
    machine.close()
    (machine.directory / "data.mdb").write_bytes(lmdb)
    machine.open()
    assert machine.read(file) == b""


# Found since, by reading and by power cuts


def test_an_unacknowledged_append_spoils_superfluous_ones_in_front_of_it(machine: Machine) -> None:
    """Group 1 in file 0, group 2 in file 1 and committing, group 3's append over group 1's is torn.

    What is left of group 1's superfluous appends must not hide group 2's, which were acknowledged.
    """
    file = machine.create("a")
    machine.commit()
    for letter in "ab":
        machine.write(file, 0, page(letter))
        machine.fsync(file)
    machine.commit()
    machine.write(file, 1, page("c"))
    machine.fsync(file)
    machine.seal()
    machine.write(file, 2, page("d") * 4)
    torn = machine.frame(file)
    assert torn is not None
    where, offset, data = torn
    assert offset == 0

    def cut(files: dict[str, bytearray]) -> None:
        late = files[f"journal.{where}"]
        assert len(list(decode_frames(bytes(late), bytes(machine.store.journal.number)))) == 2
        late[2 * PAGE : len(data)] = data[2 * PAGE :]

    machine.power_cut(cut)
    assert machine.read(file) == page("b") + page("c")


def test_a_groups_first_append_is_lost_and_the_next_groups_is_not(machine: Machine) -> None:
    """Neither append was acknowledged; a cut keeps the later one, which must not be replayed alone.

    The namespace is a prefix of the operations received, never the second without the first.
    """
    machine.commit()
    machine.create("first")
    first = machine.frame()
    machine.seal()
    second_file = machine.create("second")
    second = machine.frame(second_file)
    assert first is not None and second is not None and first[0] != second[0]
    machine.store.journal.write([second])
    machine.crash()
    assert machine.names() == set()


def test_a_rename_over_a_name_waits_for_covered_data_that_were_spilled(machine: Machine) -> None:
    """copy to a new name, last close covers what had spilled, rename over, fsync of the directory, crash.

    The source's data go with the rename; spilled ones are in no append, so the group is committed.
    """
    machine.create("db", atomic=True)
    machine.commit()
    copy = machine.create("db.new", atomic=True)
    machine.write(copy, 0, page("n") * 40)
    machine.contents.must_wait()
    assert machine.store.spill.any(copy)
    machine.contents.closed(machine.inode(copy))
    machine.rename_over("db.new", "db")
    assert machine.fsync_or_commit()
    machine.crash()
    assert machine.names() == {"db"}
    assert machine.read(copy) == page("n") * 40


def test_a_journaled_rename_over_a_name_brings_the_sources_data(machine: Machine) -> None:
    """write tmp, rename it over a name, fsync of another file, crash: the name has the new data, whole."""
    target = machine.create("name")
    machine.write(target, 0, page("o"))
    other = machine.create("other")
    machine.commit()
    tmp = machine.create("tmp")
    machine.write(tmp, 0, page("n") * 3)
    machine.rename_over("tmp", "name")
    machine.fsync(other)
    machine.crash()
    assert machine.names() == {"name", "other"}
    assert machine.store.inode(target) is None
    assert machine.read(tmp) == page("n") * 3


def test_other_files_data_stay_out_of_an_append(machine: Machine) -> None:
    """A small fsync writes no other file's data, and after a crash that file is as it was committed."""
    small, large = machine.create("small"), machine.create("large")
    machine.commit()
    machine.write(large, 0, page("l") * 200)
    machine.write(small, 0, page("s"))
    frame = machine.frame(small)
    assert frame is not None and len(frame[2]) < 3 * PAGE
    machine.store.journal.write([frame])
    machine.crash()
    assert machine.read(large) == b""
    assert machine.read(small) == page("s")


def test_data_of_an_inode_that_is_gone_are_passed_over(machine: Machine) -> None:
    """write, fsync, unlink, fsync of the directory, crash: replay skips nothing else and invents no inode."""
    file, other = machine.create("a"), machine.create("b")
    machine.write(file, 0, page("a"))
    machine.fsync(file)
    with machine.store.change() as change:
        change.delete(Table.ENTRIES, u64(1) + b"a")
        change.remove(file)
    machine.write(other, 0, page("b"))
    machine.fsync(other)
    machine.crash()
    assert machine.names() == {"b"}
    assert machine.store.inode(file) is None
    assert machine.read(other) == page("b")
    body = struct.pack("<QQQ", file, 0, machine.store.write_number + 1) + page("z")
    machine.store.journal.write([machine.store.journal.frame([encode_record(replay.PAGES, body)])])
    machine.crash()
    assert machine.store.inode(file) is None
    assert machine.store.blocks.numbers(file, 0) == []


def test_an_append_made_while_a_group_commits_repeats_nothing_of_it(machine: Machine) -> None:
    """create A, write it, seal, fsync of B (journals the creation of A), commit, crash: A keeps its data.

    Replay applies only what is above the write number at which the committed group was sealed.
    """
    other = machine.create("b")
    machine.commit()
    file = machine.create("a")
    machine.write(file, 0, page("a") * 2)
    machine.seal()
    machine.fsync(other)
    machine.finish()
    machine.crash()
    assert machine.read(file) == page("a") * 2
    assert machine.inode(file).allocated == 2


def test_a_full_journal_commits_instead(tmp_path: Path) -> None:
    """fsyncs without end between two commits: what the journal has no room for is committed."""
    machine = Machine(tmp_path, with_limits(journal_bytes=64 << 10, largest_append=16 << 10))
    file = machine.create("a")
    commits = 0
    for _ in range(40):
        machine.write(file, 0, page("x"))
        commits += machine.fsync_or_commit(file)
    assert 3 <= commits <= 8
    machine.crash()
    assert machine.read(file) == page("x")
    machine.close()


def test_replay_changes_nothing_twice_after_many_mounts(machine: Machine) -> None:
    """A mount that replays commits; the next one finds nothing to replay and the same files."""
    file = machine.create("a")
    machine.write(file, 0, page("a"))
    machine.fsync(file)
    for _ in range(3):
        machine.crash()
        assert machine.read(file) == page("a")
        assert machine.inode(file).allocated == 1
        number = machine.store.local(JOURNAL_KEY)
        assert number is not None
        assert read_frames(machine.directory, number, 1) == []


def test_an_append_of_an_unknown_kind_is_refused(machine: Machine) -> None:
    """An append that only another version can have written is no state to go on from: the mount says so."""
    machine.store.journal.write([machine.store.journal.frame([encode_record(9, b"?")])])
    machine.close()
    with pytest.raises(Corrupt, match="unknown kind 9"):
        machine.open()
    (machine.directory / "journal.0").unlink()
    machine.open()
