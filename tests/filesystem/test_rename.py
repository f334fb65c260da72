"""Rename moves a name wholly or not at all, in all its forms."""

from __future__ import annotations

import errno

import pytest

from qsfs.filesystem.rename import EXCHANGE, NOREPLACE
from qsfs.store.schema import ROOT_INODE, Table
from tests.filesystem.conftest import ROOT


def test_a_file_moves_with_its_inode_and_times(world):
    directory = world.directory(b"d")
    number = world.file(b"f")
    now = world.tick()
    world.names.rename(ROOT_INODE, b"f", directory, b"g")
    assert (world.find(b"f"), world.find(b"g", directory)) == (None, number)
    assert world.inode(number).ctime_ns == now
    for parent in (ROOT_INODE, directory):
        assert world.times(parent)[1:] == (now, now)


def test_a_directory_moves_with_its_parent_and_counts(world):
    one, two = world.directory(b"one"), world.directory(b"two")
    moved = world.directory(b"m", one)
    world.names.rename(one, b"m", two, b"n")
    assert [world.inode(n).nlink for n in (one, two, ROOT_INODE)] == [2, 3, 4]
    assert world.find(b"..", moved) == two
    assert world.names.tree.path(moved) == b"two/n"


def test_a_file_replaces_a_file(world):
    old, new = world.file(b"old"), world.file(b"new")
    world.looked_up(old)
    now = world.tick()
    world.names.rename(ROOT_INODE, b"new", ROOT_INODE, b"old")
    assert world.find(b"old") == new
    assert (world.inode(old).nlink, world.inode(old).ctime_ns) == (0, now)
    assert world.listing() == [b"old"]


def test_a_replaced_file_with_other_names_lives_on(world):
    old, new = world.file(b"old"), world.file(b"new")
    world.names.link(old, ROOT_INODE, b"other")
    world.names.rename(ROOT_INODE, b"new", ROOT_INODE, b"old")
    assert (world.find(b"old"), world.find(b"other"), world.inode(old).nlink) == (new, old, 1)


def test_a_directory_replaces_an_empty_one(world):
    old, new = world.directory(b"old"), world.directory(b"new")
    world.file(b"f", new)
    world.names.rename(ROOT_INODE, b"new", ROOT_INODE, b"old")
    assert world.find(b"old") == new
    assert world.inode(ROOT_INODE).nlink == 3
    assert world.store.inode(old) is None


def test_a_directory_replaces_an_empty_one_elsewhere(world):
    place, new = world.directory(b"place"), world.directory(b"new")
    world.directory(b"old", place)
    world.names.rename(ROOT_INODE, b"new", place, b"old")
    assert (world.inode(ROOT_INODE).nlink, world.inode(place).nlink) == (3, 3)
    assert world.find(b"..", new) == place


def test_what_rename_refuses(world, fails):
    rename = world.names.rename
    full, empty = world.directory(b"full"), world.directory(b"empty")
    world.file(b"x", full)
    world.file(b"f")
    fails(errno.ENOENT, rename, ROOT_INODE, b"nothing", ROOT_INODE, b"g")
    fails(errno.EISDIR, rename, ROOT_INODE, b"f", ROOT_INODE, b"empty")
    fails(errno.ENOTDIR, rename, ROOT_INODE, b"empty", ROOT_INODE, b"f")
    fails(errno.ENOTEMPTY, rename, ROOT_INODE, b"empty", ROOT_INODE, b"full")
    fails(errno.EBUSY, rename, ROOT_INODE, b".", ROOT_INODE, b"g")
    fails(errno.EBUSY, rename, ROOT_INODE, b"f", empty, b"..")
    fails(errno.ENAMETOOLONG, rename, ROOT_INODE, b"f", ROOT_INODE, b"a" * 256)
    fails(errno.EINVAL, rename, ROOT_INODE, b"f", ROOT_INODE, b"g", NOREPLACE | EXCHANGE)
    fails(errno.EINVAL, rename, ROOT_INODE, b"f", ROOT_INODE, b"g", 4)
    assert sorted(world.listing()) == [b"empty", b"f", b"full"]


def test_a_directory_never_moves_below_itself(world, fails):
    top = world.directory(b"top")
    middle = world.directory(b"middle", top)
    bottom = world.directory(b"bottom", middle)
    for below in (top, middle, bottom):
        fails(errno.EINVAL, world.names.rename, ROOT_INODE, b"top", below, b"x")
    fails(errno.ENOTEMPTY, world.names.rename, middle, b"bottom", ROOT_INODE, b"top")
    fails(errno.EINVAL, world.names.rename, ROOT_INODE, b"top", middle, b"bottom", EXCHANGE)
    fails(errno.EINVAL, world.names.rename, middle, b"bottom", ROOT_INODE, b"top", EXCHANGE)


def test_names_of_one_inode_rename_to_each_other_without_effect(world):
    number = world.file(b"a")
    world.names.link(number, ROOT_INODE, b"b")
    before = world.times(ROOT_INODE)
    world.tick()
    world.names.rename(ROOT_INODE, b"a", ROOT_INODE, b"b")
    world.names.rename(ROOT_INODE, b"a", ROOT_INODE, b"a")
    world.names.rename(ROOT_INODE, b"a", ROOT_INODE, b"b", EXCHANGE)
    assert (world.find(b"a"), world.find(b"b"), world.inode(number).nlink) == (number, number, 2)
    assert world.times(ROOT_INODE) == before


def test_noreplace_keeps_what_is_there(world, fails):
    one, two = world.file(b"one"), world.file(b"two")
    fails(errno.EEXIST, world.names.rename, ROOT_INODE, b"one", ROOT_INODE, b"two", NOREPLACE)
    world.names.rename(ROOT_INODE, b"one", ROOT_INODE, b"three", NOREPLACE)
    assert (world.find(b"three"), world.find(b"two")) == (one, two)


def test_exchange_swaps_two_files(world, fails):
    directory = world.directory(b"d")
    one, two = world.file(b"one"), world.file(b"two", directory)
    now = world.tick()
    world.names.rename(ROOT_INODE, b"one", directory, b"two", EXCHANGE)
    assert (world.find(b"one"), world.find(b"two", directory)) == (two, one)
    assert [world.inode(n).ctime_ns for n in (one, two, directory, ROOT_INODE)] == [now] * 4
    fails(errno.ENOENT, world.names.rename, ROOT_INODE, b"one", ROOT_INODE, b"none", EXCHANGE)


def test_exchange_swaps_a_directory_for_a_file(world):
    place = world.directory(b"place")
    moved = world.directory(b"moved")
    number = world.file(b"f", place)
    world.names.rename(ROOT_INODE, b"moved", place, b"f", EXCHANGE)
    assert (world.find(b"moved"), world.find(b"f", place)) == (number, moved)
    assert (world.inode(ROOT_INODE).nlink, world.inode(place).nlink) == (3, 3)
    assert world.find(b"..", moved) == place
    assert world.names.tree.path(moved) == b"place/f"


def test_exchange_swaps_two_directories_in_place(world):
    one, two = world.directory(b"one"), world.directory(b"two")
    world.names.rename(ROOT_INODE, b"one", ROOT_INODE, b"two", EXCHANGE)
    assert (world.find(b"one"), world.find(b"two")) == (two, one)
    assert (world.names.tree.path(one), world.names.tree.path(two)) == (b"two", b"one")
    assert world.inode(ROOT_INODE).nlink == 4


def test_too_many_links_stop_a_move(world, fails, monkeypatch):
    place = world.directory(b"place")
    world.directory(b"inner", place)
    world.directory(b"moved")
    world.file(b"f", place)
    monkeypatch.setattr("qsfs.filesystem.rename.MAX_LINKS", 3)
    fails(errno.EMLINK, world.names.rename, ROOT_INODE, b"moved", place, b"m")
    fails(errno.EMLINK, world.names.rename, ROOT_INODE, b"moved", place, b"f", EXCHANGE)
    world.names.rename(ROOT_INODE, b"moved", place, b"inner")


@pytest.mark.parametrize("flags", [0, EXCHANGE])
def test_a_rename_over_a_name_takes_the_data_to_the_journal(world, flags):
    """Else a crash leaves the new name with the old length of the file, often zero."""
    if not hasattr(world.store, "changes"):
        pytest.skip("looks into the model's changes")
    one, two = world.file(b"one"), world.file(b"two")
    world.names.rename(ROOT_INODE, b"one", ROOT_INODE, b"free")
    assert world.store.changes[-1].data_of == []
    world.names.rename(ROOT_INODE, b"free", ROOT_INODE, b"two", flags)
    assert world.store.changes[-1].data_of == ([one, two] if flags else [one])


def test_a_replaced_name_keeps_its_place_in_a_listing(world):
    """A reader that has passed it does not meet it again; one that has not does not miss it."""
    for name in (b"a", b"b", b"c"):
        world.file(name)
    rows = {name: cookie for cookie, name, _ in world.names.list_directory(ROOT_INODE, 0)}
    world.names.rename(ROOT_INODE, b"c", ROOT_INODE, b"a")
    assert world.listing() == [b"a", b"b"]
    assert world.listing(after=rows[b"a"]) == [b"b"]
    world.names.rename(ROOT_INODE, b"b", ROOT_INODE, b"a", EXCHANGE)
    assert world.listing() == [b"a", b"b"]


def test_moving_a_name_into_a_removed_directory_fails(world, fails):
    gone = world.directory(b"gone")
    world.looked_up(gone)
    world.names.rmdir(ROOT_INODE, b"gone")
    world.file(b"f")
    fails(errno.ENOENT, world.names.rename, ROOT_INODE, b"f", gone, b"f")
    assert world.names.create(ROOT_INODE, b"gone", 0o644, ROOT).number != gone


def test_no_row_is_left_behind(world):
    world.directory(b"d")
    for number in range(20):
        world.file(b"%d" % number)
        world.names.rename(ROOT_INODE, b"%d" % number, world.find(b"d"), b"same")
    world.names.unlink(world.find(b"d"), b"same")
    world.names.rmdir(ROOT_INODE, b"d")
    for table in (Table.ENTRIES, Table.COOKIES, Table.ORPHANS):
        assert list(world.store.scan(table, b"", None)) == []
