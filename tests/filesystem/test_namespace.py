"""Names are made, found and removed by POSIX's rules, codes and times."""

from __future__ import annotations

import errno
import stat

import pytest

from qsfs.filesystem import posix
from qsfs.filesystem.needs import NeedRoom
from qsfs.filesystem.posix import Credentials
from qsfs.store.schema import ROOT_INODE, Table
from tests.filesystem.conftest import ROOT, USER


def test_a_new_file_belongs_to_its_maker_and_is_found(world):
    now = world.tick()
    inode = world.names.create(ROOT_INODE, b"f", 0o6640, USER)
    assert (inode.mode, inode.uid, inode.gid, inode.nlink) == (stat.S_IFREG | 0o6640, 1000, 100, 1)
    assert world.times(inode.number) == (now, now, now)
    assert world.find(b"f") == inode.number
    assert world.find(b"g") is None


def test_making_a_name_sets_the_times_of_its_directory(world):
    makers = (
        lambda: world.file(b"f"),
        lambda: world.directory(b"d"),
        lambda: world.names.symlink(ROOT_INODE, b"s", b"t", ROOT),
        lambda: world.names.mknod(ROOT_INODE, b"p", stat.S_IFIFO | 0o600, 0, ROOT),
        lambda: world.names.link(world.find(b"f"), ROOT_INODE, b"l"),
    )
    for make in makers:
        before = world.inode(ROOT_INODE).atime_ns
        now = world.tick()
        make()
        assert world.times(ROOT_INODE) == (before, now, now)


def test_removing_a_name_sets_the_times_of_its_directory(world):
    world.file(b"f")
    world.directory(b"d")
    for remove, name in ((world.names.unlink, b"f"), (world.names.rmdir, b"d")):
        now = world.tick()
        remove(ROOT_INODE, name)
        assert world.times(ROOT_INODE)[1:] == (now, now)


def test_a_failing_operation_changes_nothing(world, fails):
    number = world.file(b"f")
    world.directory(b"d")
    world.file(b"x", world.find(b"d"))
    before = [world.times(n) for n in (ROOT_INODE, number, world.find(b"d"))]
    world.tick()
    fails(errno.EEXIST, world.names.create, ROOT_INODE, b"f", 0o644, ROOT)
    fails(errno.EEXIST, world.names.mkdir, ROOT_INODE, b"f", 0o644, ROOT)
    fails(errno.EEXIST, world.names.link, number, ROOT_INODE, b"d")
    fails(errno.ENOTEMPTY, world.names.rmdir, ROOT_INODE, b"d")
    fails(errno.EISDIR, world.names.unlink, ROOT_INODE, b"d")
    fails(errno.ENOTDIR, world.names.rmdir, ROOT_INODE, b"f")
    fails(errno.ENOENT, world.names.unlink, ROOT_INODE, b"nothing")
    fails(errno.ENOENT, world.names.rmdir, ROOT_INODE, b"nothing")
    fails(errno.EPERM, world.names.link, world.find(b"d"), ROOT_INODE, b"l")
    fails(errno.ENOTDIR, world.names.create, number, b"x", 0o644, ROOT)
    fails(errno.ENOTDIR, world.names.lookup, number, b"x")
    fails(errno.ESTALE, world.names.lookup, 999, b"x")
    assert [world.times(n) for n in (ROOT_INODE, number, world.find(b"d"))] == before


@pytest.mark.parametrize(
    "name", [b"a" * 255, bytes(set(range(1, 256)) - {ord("/")})[:255], b"\xff\xfe", b" ", b"..."]
)
def test_a_name_holds_any_bytes(world, name):
    number = world.file(name)
    assert world.find(name) == number
    assert world.listing() == [name]
    world.names.unlink(ROOT_INODE, name)
    assert world.listing() == []


def test_names_that_cannot_be(world, fails):
    create = world.names.create
    fails(errno.ENAMETOOLONG, create, ROOT_INODE, b"a" * 256, 0o644, ROOT)
    fails(errno.ENAMETOOLONG, world.names.lookup, ROOT_INODE, b"a" * 256)
    fails(errno.EEXIST, create, ROOT_INODE, b".", 0o644, ROOT)
    fails(errno.EEXIST, world.names.mkdir, ROOT_INODE, b"..", 0o755, ROOT)
    for name in (b"", b"a/b", b"a\0b"):
        fails(errno.EINVAL, create, ROOT_INODE, name, 0o644, ROOT)
    fails(errno.EINVAL, world.names.rmdir, ROOT_INODE, b".")
    fails(errno.ENOTEMPTY, world.names.rmdir, ROOT_INODE, b"..")
    fails(errno.EISDIR, world.names.unlink, ROOT_INODE, b"..")


def test_dot_and_dot_dot_are_found_for_nfs(world):
    inner = world.directory(b"e", world.directory(b"d"))
    assert world.find(b".", inner) == inner
    assert world.find(b"..", inner) == world.find(b"d")
    assert world.find(b"..") == ROOT_INODE


def test_symlinks_hold_up_to_4095_bytes(world, fails):
    target = b"x" * 4095
    number = world.names.symlink(ROOT_INODE, b"s", target, USER).number
    assert world.names.readlink(number) == target
    assert stat.S_ISLNK(world.inode(number).mode)
    fails(errno.ENAMETOOLONG, world.names.symlink, ROOT_INODE, b"t", target + b"x", ROOT)
    fails(errno.ENOENT, world.names.symlink, ROOT_INODE, b"t", b"", ROOT)
    fails(errno.EINVAL, world.names.readlink, world.file(b"f"))


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
def test_mknod_makes_every_kind(world, kind):
    inode = world.names.mknod(ROOT_INODE, b"n", kind | 0o640, 0x1234, USER)
    assert inode.mode == kind | 0o640
    assert inode.rdev == (0x1234 if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)


def test_mknod_refuses_what_has_a_call_of_its_own(world, fails):
    for kind in (stat.S_IFDIR, stat.S_IFLNK):
        fails(errno.EINVAL, world.names.mknod, ROOT_INODE, b"n", kind | 0o640, 0, ROOT)
    fails(errno.EINVAL, world.names.mknod, ROOT_INODE, b"n", stat.S_IFCHR, 2**32, ROOT)


def test_ids_are_32_bits_wide(world, fails):
    inode = world.names.create(ROOT_INODE, b"f", 0o644, Credentials(2**32 - 2, 2**31))
    assert (inode.uid, inode.gid) == (2**32 - 2, 2**31)
    fails(errno.EINVAL, world.names.create, ROOT_INODE, b"g", 0o644, Credentials(2**32 - 1, 0))


def test_a_directory_counts_its_directories(world):
    one = world.directory(b"one")
    assert (world.inode(ROOT_INODE).nlink, world.inode(one).nlink) == (3, 2)
    world.directory(b"two", one)
    world.file(b"f", one)
    assert world.inode(one).nlink == 3
    world.names.rmdir(one, b"two")
    assert world.inode(one).nlink == 2


def test_links_are_counted_and_end_somewhere(world, fails, monkeypatch):
    number = world.file(b"f")
    now = world.tick()
    world.names.link(number, ROOT_INODE, b"g")
    assert (world.inode(number).nlink, world.inode(number).ctime_ns) == (2, now)
    assert world.find(b"g") == number
    monkeypatch.setattr("qsfs.filesystem.namespace.MAX_LINKS", 2)
    fails(errno.EMLINK, world.names.link, number, ROOT_INODE, b"h")
    fails(errno.EMLINK, world.names.mkdir, ROOT_INODE, b"d", 0o755, ROOT)
    now = world.tick()
    world.names.unlink(ROOT_INODE, b"f")
    assert (world.inode(number).nlink, world.inode(number).ctime_ns) == (1, now)
    assert posix.MAX_LINKS == 2**31 - 1


def test_what_lost_its_last_name_gets_no_other(world, fails):
    number = world.file(b"f")
    world.looked_up(number)
    world.names.unlink(ROOT_INODE, b"f")
    fails(errno.ENOENT, world.names.link, number, ROOT_INODE, b"g")


def test_nothing_is_made_in_a_removed_directory(world, fails):
    number = world.directory(b"d")
    world.looked_up(number)
    world.names.rmdir(ROOT_INODE, b"d")
    fails(errno.ENOENT, world.names.create, number, b"f", 0o644, ROOT)
    fails(errno.ENOENT, world.names.mkdir, number, b"f", 0o755, ROOT)
    fails(errno.ENOENT, world.names.link, world.file(b"f"), number, b"g")
    assert world.listing(number) == []


def test_a_set_group_id_directory_hands_its_group_down(world):
    world.names.mkdir(ROOT_INODE, b"d", 0o2775, Credentials(0, 42))
    parent = world.find(b"d")
    assert world.names.create(parent, b"f", 0o644, USER).gid == 42
    inner = world.names.mkdir(parent, b"e", 0o755, USER)
    assert (inner.gid, stat.S_IMODE(inner.mode)) == (42, 0o2755)
    assert world.names.symlink(parent, b"s", b"t", USER).gid == 42
    assert world.inode(world.find(b"f", parent)).mode == stat.S_IFREG | 0o644


def test_a_need_is_raised_before_anything_changed(world):
    if not hasattr(world.store, "need"):
        pytest.skip("only the model raises needs at will")
    for operation in (
        lambda: world.file(b"f"),
        lambda: world.directory(b"d"),
        lambda: world.names.rename(ROOT_INODE, b"f", ROOT_INODE, b"g"),
        lambda: world.names.unlink(ROOT_INODE, b"g"),
    ):
        rows = {table: dict(rows) for table, rows in world.store.rows.items()}
        world.store.need = NeedRoom()
        with pytest.raises(NeedRoom):
            operation()
        assert world.store.rows == rows
        operation()
    assert world.listing() == [b"d"]


def test_entries_and_cookies_say_the_same(world):
    for name in (b"b", b"a", b"c"):
        world.file(name)
    world.names.unlink(ROOT_INODE, b"a")
    world.names.rename(ROOT_INODE, b"b", ROOT_INODE, b"d")
    names = sorted(key[8:] for key, _ in world.store.scan(Table.ENTRIES, b"", None))
    assert names == sorted(row for _, row in world.store.scan(Table.COOKIES, b"", None)) == [b"c", b"d"]
