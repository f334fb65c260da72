"""Files have the flags that the rules give to their names, and differences are found and worked off."""

from __future__ import annotations

import pytest

from qsfs.config import PolicyRule
from qsfs.filesystem.policies import Policies, safer
from qsfs.filesystem.rename import EXCHANGE
from qsfs.store.schema import ROOT_INODE, InodeFlag, Table
from tests.filesystem.conftest import ROOT

LOCKS = PolicyRule(match="*.lock", local_only=True)
DATABASES = PolicyRule(match="*.lmdb", atomic_sync=True, unavailable="wait")
PINNED = PolicyRule(match="hot/*", pinned=True)
DEEP = PolicyRule(match="**/units/*", write_through=True, restore_aside=True)

ATOMIC = InodeFlag.ATOMIC_SYNC | InodeFlag.WAIT
LOCAL = int(InodeFlag.LOCAL_ONLY)


def flags(world, number):
    return world.inode(number).flags


def test_each_attribute_of_a_rule_is_a_flag():
    rule = PolicyRule(match="a", pinned=True, write_through=True, restore_aside=True, unavailable="wait")
    flags = Policies([rule]).flags(b"a", lambda: None)
    assert flags == InodeFlag.PINNED | InodeFlag.WRITE_THROUGH | InodeFlag.RESTORE_ASIDE | InodeFlag.WAIT
    assert Policies([LOCKS]).flags(b"a.lock", lambda: None) == LOCAL
    assert Policies([DATABASES]).flags(b"a.lmdb", lambda: None) == ATOMIC
    assert Policies([DATABASES]).flags(b"a", lambda: None) == 0


def test_the_first_rule_that_matches_decides():
    policies = Policies([PolicyRule(match="a*", pinned=True), PolicyRule(match="ab", local_only=True)])
    assert policies.flags(b"ab", lambda: None) == InodeFlag.PINNED
    assert not policies.needs_path
    with_path = Policies([PolicyRule(match="d/a", local_only=True), PolicyRule(match="a", pinned=True)])
    assert with_path.flags(b"a", lambda: b"d/a") == LOCAL
    assert with_path.flags(b"a", lambda: b"e/a") == InodeFlag.PINNED


def test_the_safer_value_wins():
    assert safer(LOCAL, 0) == 0
    assert safer(LOCAL, LOCAL) == LOCAL
    others = InodeFlag.PINNED | ATOMIC | InodeFlag.WRITE_THROUGH | InodeFlag.RESTORE_ASIDE
    assert safer(int(others), LOCAL) == others
    assert safer(0, int(others)) == others


def test_a_fingerprint_changes_with_the_rules():
    prints = [Policies(rules).fingerprint for rules in ([], [LOCKS], [DATABASES], [LOCKS, DATABASES])]
    assert len(set(prints)) == 4
    same = PolicyRule(match="*.lock", local_only=True)
    assert Policies([LOCKS]).fingerprint == Policies([same]).fingerprint


def test_a_new_file_gets_the_flags_of_its_name_and_path(make_world):
    world = make_world(DATABASES, PINNED, DEEP)
    hot = world.directory(b"hot")
    units = world.directory(b"units", world.directory(b"net", world.directory(b"casper")))
    assert flags(world, world.file(b"a.lmdb")) == ATOMIC
    assert flags(world, world.file(b"a", hot)) == InodeFlag.PINNED
    assert flags(world, world.file(b"a")) == 0
    assert flags(world, world.file(b"u.dat", units)) == InodeFlag.WRITE_THROUGH | InodeFlag.RESTORE_ASIDE
    assert flags(world, world.directory(b"d.lmdb")) == 0
    assert flags(world, world.names.symlink(ROOT_INODE, b"s.lmdb", b"a", ROOT).number) == 0


def test_a_rename_changes_the_flags(make_world):
    world = make_world(DATABASES, PINNED)
    hot = world.directory(b"hot")
    number = world.file(b"a")
    world.names.rename(ROOT_INODE, b"a", ROOT_INODE, b"a.lmdb")
    assert flags(world, number) == ATOMIC
    world.names.rename(ROOT_INODE, b"a.lmdb", hot, b"a")
    assert flags(world, number) == InodeFlag.PINNED
    other = world.file(b"b.lmdb")
    world.names.rename(hot, b"a", ROOT_INODE, b"b.lmdb", EXCHANGE)
    assert (flags(world, number), flags(world, other)) == (ATOMIC, InodeFlag.PINNED)


def test_a_file_with_several_names_has_the_safer_of_their_flags(make_world):
    world = make_world(LOCKS, DATABASES)
    number = world.file(b"a.lock")
    assert flags(world, number) == LOCAL
    world.names.link(number, ROOT_INODE, b"b.lock")
    assert flags(world, number) == LOCAL
    world.names.link(number, ROOT_INODE, b"c.lmdb")
    assert flags(world, number) == ATOMIC
    world.names.rename(ROOT_INODE, b"c.lmdb", ROOT_INODE, b"c")
    assert flags(world, number) == ATOMIC
    world.names.unlink(ROOT_INODE, b"c")
    world.names.unlink(ROOT_INODE, b"a.lock")
    assert flags(world, number) == LOCAL


def test_a_file_written_beside_and_linked_into_place_gets_the_flags_of_its_place(make_world):
    """As git does: link, then unlink the first name."""
    world = make_world(LOCKS)
    number = world.file(b"tmp")
    world.names.link(number, ROOT_INODE, b"x.lock")
    assert flags(world, number) == 0
    world.names.unlink(ROOT_INODE, b"tmp")
    assert flags(world, number) == LOCAL
    assert not world.names.policies.status().recheck


def test_a_lost_name_of_an_unseen_link_is_looked_at_later(make_world):
    world = make_world(LOCKS)
    number = world.file(b"a.lock")
    world.names.link(number, ROOT_INODE, b"b")
    world.work_off_policies()
    world = make_world(LOCKS, again=True)
    world.names.unlink(ROOT_INODE, b"b")
    assert flags(world, number) == 0
    assert world.names.policies.status().recheck
    world.work_off_policies()
    assert flags(world, number) == LOCAL
    world.file(b"x.lock")
    world.names.link(number, ROOT_INODE, b"c")
    world.names.rename(ROOT_INODE, b"c", ROOT_INODE, b"d")
    world.work_off_policies()
    assert world.names.policies.status().recheck, "a second walk waits, whatever renames there are"
    world.clock.advance(3600)
    world.work_off_policies()
    assert not world.names.policies.status().recheck


def test_a_renamed_directory_is_worked_off_in_steps(make_world):
    world = make_world(PINNED, PolicyRule(match="hot/*/*", pinned=True))
    world.work_off_policies()
    cold = world.directory(b"cold")
    numbers = [world.file(b"%d" % n, cold) for n in range(10)]
    inner = world.directory(b"inner", cold)
    numbers += [world.file(b"%d" % n, inner) for n in range(10)]
    world.names.rename(ROOT_INODE, b"cold", ROOT_INODE, b"hot")
    assert world.names.policies.status().directories == 1
    steps = 0
    while not world.names.policies.step(4):
        steps += 1
    assert steps >= 4
    assert {flags(world, number) for number in numbers} == {InodeFlag.PINNED}
    assert world.names.policies.status().directories == 0
    world.names.rename(ROOT_INODE, b"hot", ROOT_INODE, b"cold")
    world.work_off_policies()
    assert {flags(world, number) for number in numbers} == {0}


def test_rules_without_paths_need_no_walk_for_a_renamed_directory(make_world):
    world = make_world(DATABASES)
    world.work_off_policies()
    world.directory(b"d")
    world.names.rename(ROOT_INODE, b"d", ROOT_INODE, b"e")
    assert world.names.policies.status().directories == 0


def test_a_changed_configuration_is_worked_off_after_the_next_mount(make_world):
    world = make_world(DATABASES)
    numbers = [world.file(b"%d.lmdb" % n, world.directory(b"%d" % n)) for n in range(5)]
    world.work_off_policies()
    world = make_world(DATABASES, again=True)
    assert world.names.policies.status().directories == 0
    world = make_world(PolicyRule(match="*.lmdb", pinned=True), again=True)
    assert world.names.policies.status().directories == 1
    assert flags(world, numbers[0]) == ATOMIC
    world.work_off_policies(limit=2)
    assert {flags(world, number) for number in numbers} == {InodeFlag.PINNED}


def test_a_walk_that_a_stop_cut_short_begins_again(make_world):
    world = make_world(PINNED)
    cold = world.directory(b"cold")
    number = world.file(b"f", cold)
    world.work_off_policies()
    world.names.rename(ROOT_INODE, b"cold", ROOT_INODE, b"hot")
    world = make_world(PINNED, again=True)
    assert flags(world, number) == 0
    world.work_off_policies()
    assert flags(world, number) == InodeFlag.PINNED


def test_a_walk_gives_a_file_with_several_names_the_safer_flags(make_world):
    world = make_world()
    one, two = world.directory(b"one"), world.directory(b"two")
    number = world.file(b"a.lock", one)
    world.names.link(number, two, b"b.lock")
    world.names.link(number, ROOT_INODE, b"c.lmdb")
    only_locks = world.file(b"d.lock")
    world.names.link(only_locks, two, b"e.lock")
    world = make_world(LOCKS, DATABASES, again=True)
    world.work_off_policies(limit=1)
    assert (flags(world, number), flags(world, only_locks)) == (ATOMIC, LOCAL)


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_a_walk_meets_everything_though_the_tree_changes_under_it(make_world, limit):
    world = make_world()
    numbers = []
    for outer in range(4):
        directory = world.directory(b"%d" % outer)
        numbers += [world.file(b"%d" % n, directory) for n in range(3)]
    rule = PolicyRule(match="**/*", pinned=True)
    world = make_world(rule, again=True)
    world.names.policies.step(limit)
    world.names.rename(ROOT_INODE, b"3", world.find(b"0"), b"moved")
    world.names.policies.step(limit)
    world.names.unlink(world.find(b"1"), b"1")
    numbers.append(world.file(b"new", world.find(b"2")))
    world.work_off_policies(limit)
    left = [number for number in numbers if world.store.inode(number) is not None]
    assert len(left) == 12
    assert {flags(world, number) for number in left} == {InodeFlag.PINNED}


def test_a_file_keeps_atomic_sync_until_nothing_of_it_is_uncovered(make_world):
    """Else a later write would be visible without the earlier ones."""
    world = make_world(DATABASES)
    number = world.file(b"a.lmdb")
    world.contents.opened(world.inode(number))
    world.contents.write(world.inode(number), 0, b"x")
    world.names.rename(ROOT_INODE, b"a.lmdb", ROOT_INODE, b"a")
    assert flags(world, number) & InodeFlag.ATOMIC_SYNC
    assert world.names.policies.status().waiting == (number,)
    world.names.policies.step()
    assert flags(world, number) & InodeFlag.ATOMIC_SYNC
    world.contents.closed(world.inode(number))
    world.work_off_policies()
    assert flags(world, number) == 0
    assert world.names.policies.status().waiting == ()


def test_a_file_that_comes_back_keeps_atomic_sync(make_world):
    world = make_world(DATABASES)
    number = world.file(b"a.lmdb")
    world.contents.opened(world.inode(number))
    world.contents.write(world.inode(number), 0, b"x")
    world.names.rename(ROOT_INODE, b"a.lmdb", ROOT_INODE, b"a")
    world.names.rename(ROOT_INODE, b"a", ROOT_INODE, b"b.lmdb")
    world.contents.closed(world.inode(number))
    world.work_off_policies()
    assert flags(world, number) == ATOMIC


def test_what_is_left_open_is_remembered_over_a_crash(make_world):
    world = make_world(DATABASES)
    world.work_off_policies()
    number = world.file(b"a.lmdb")
    world.contents.opened(world.inode(number))
    world.contents.write(world.inode(number), 0, b"x")
    world.names.rename(ROOT_INODE, b"a.lmdb", ROOT_INODE, b"a")
    world = make_world(DATABASES, again=True)
    world.work_off_policies()
    assert flags(world, number) == 0


def test_the_record_of_finished_work_is_taken_back_in_the_change_that_makes_it_untrue(make_world):
    world = make_world(PINNED)
    world.work_off_policies()
    assert len(list(world.store.scan(Table.LOCAL, b"policies", b"policies\0"))) == 1
    world.directory(b"d")
    world.names.rename(ROOT_INODE, b"d", ROOT_INODE, b"e")
    assert list(world.store.scan(Table.LOCAL, b"policies", b"policies\0")) == []
