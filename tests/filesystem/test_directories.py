"""A listing goes on where it stopped, whatever happens to the directory meanwhile."""

from __future__ import annotations

import pytest

from qsfs.errors import Corrupt
from qsfs.store.schema import ROOT_INODE, Table, u64
from tests.filesystem.conftest import ROOT


def test_a_listing_begins_with_the_directory_and_its_parent(world):
    inner = world.directory(b"d")
    world.file(b"f", inner)
    rows = [(cookie, name, inode.number) for cookie, name, inode in world.names.list_directory(inner, 0)]
    assert rows == [(1, b".", inner), (2, b"..", ROOT_INODE), (3, b"f", world.find(b"f", inner))]
    assert [name for _, name, _ in world.names.list_directory(ROOT_INODE, 0)] == [b".", b"..", b"d"]


def test_any_cookie_is_a_place_to_go_on_from(world):
    names = [b"%d" % n for n in range(50)]
    for name in names:
        world.file(name)
    rows = [(cookie, name) for cookie, name, _ in world.names.list_directory(ROOT_INODE, 0)]
    for place, (cookie, _) in enumerate(rows):
        rest = [name for _, name, _ in world.names.list_directory(ROOT_INODE, cookie)]
        assert rest == [name for _, name in rows[place + 1 :]]


def test_what_stays_is_listed_exactly_once_while_the_rest_changes(world):
    stays = [b"stay%d" % n for n in range(20)]
    for number, name in enumerate(stays):
        world.file(name)
        world.file(b"go%d" % number)
    seen: list[bytes] = []
    cookie = 0
    while batch := [row[:2] for row in world.names.list_directory(ROOT_INODE, cookie)][:3]:
        cookie = batch[-1][0]
        seen += [name for _, name in batch]
        gone = next((name for name in world.listing() if name.startswith(b"go")), None)
        if gone is not None:
            world.names.unlink(ROOT_INODE, gone)
    assert [name for name in seen if name.startswith(b"stay")] == stays


def test_a_cookie_is_never_given_to_another_name(world):
    given: dict[int, bytes] = {}
    for number in range(30):
        world.file(b"%d" % number)
        for cookie, name, _ in world.names.list_directory(ROOT_INODE, 2):
            assert given.setdefault(cookie, name) == name
        world.names.unlink(ROOT_INODE, b"%d" % number)


def test_cookies_count_on_after_a_remount(make_world):
    world = make_world()
    world.file(b"a")
    world.file(b"b")
    cookies = [cookie for cookie, _, _ in world.names.list_directory(ROOT_INODE, 2)]
    world.names.unlink(ROOT_INODE, b"b")
    world = make_world(again=True)
    world.file(b"c")
    rows = {name: cookie for cookie, name, _ in world.names.list_directory(ROOT_INODE, 2)}
    assert rows[b"c"] > max(cookies)


def test_paths_follow_renames_and_survive_a_remount(make_world):
    world = make_world()
    a = world.directory(b"a")
    b = world.directory(b"b", a)
    c = world.directory(b"c", b)
    assert world.names.tree.path(c) == b"a/b/c"
    world.names.rename(a, b"b", ROOT_INODE, b"x")
    assert world.names.tree.path(c) == b"x/c"
    assert world.names.tree.path_in(ROOT_INODE, b"f") == b"f"
    world = make_world(again=True)
    assert world.names.tree.path(c) == b"x/c"
    world.names.rmdir(b, b"c")
    assert world.names.tree.path(c) is None


def test_a_damaged_directory_is_an_error_and_no_shorter_listing(world):
    world.file(b"f")
    number = world.file(b"g")
    with world.store.change() as change:
        change.delete(Table.ENTRIES, u64(ROOT_INODE) + b"f")
    with pytest.raises(Corrupt, match="fsck"):
        world.listing()
    with world.store.change() as change:
        change.remove(number)
    with pytest.raises(Corrupt, match="does not exist"):
        world.names.lookup(ROOT_INODE, b"g")


def test_only_an_empty_directory_is_removed(world, fails):
    number = world.directory(b"d")
    neighbour = world.directory(b"e")
    world.file(b"f", neighbour)
    world.names.rmdir(ROOT_INODE, b"d")
    assert world.store.inode(number) is None
    world.names.unlink(neighbour, b"f")
    world.names.rmdir(ROOT_INODE, b"e")
    assert world.names.create(ROOT_INODE, b"d", 0o600, ROOT).number > neighbour
