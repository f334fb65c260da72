"""Extended attributes and ACLs."""

from __future__ import annotations

import errno
import stat
import struct

import pytest

from qsfs.filesystem import acl
from qsfs.filesystem.attributes import AttributeChange
from qsfs.filesystem.posix import Credentials
from qsfs.store.schema import ROOT_INODE, Table
from tests.filesystem.conftest import ROOT, USER

NOBODY = 2**32 - 1


def value(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def with_user(user: int, owner: int = 7, mask: int = 7, other: int = 0) -> bytes:
    """An ACL that names a user."""
    named = ((1, owner, NOBODY), (2, 7, user), (4, 5, NOBODY))
    return value(*named, (16, mask, NOBODY), (32, other, NOBODY))


MINIMAL = value((1, 6, NOBODY), (4, 4, NOBODY), (32, 0, NOBODY))


def test_an_attribute_is_kept_replaced_listed_and_removed(world, fails):
    number, other = world.file(b"f"), world.file(b"g")
    now = world.tick()
    world.names.set_xattr(number, b"user.b", b"1")
    world.names.set_xattr(number, b"user.a", b"")
    world.names.set_xattr(other, b"user.c", b"3")
    assert world.inode(number).ctime_ns == now
    world.names.set_xattr(number, b"user.b", b"\0\xff")
    assert world.names.list_xattrs(number) == [b"user.a", b"user.b"]
    assert world.names.get_xattr(number, b"user.b") == b"\0\xff"
    assert world.names.get_xattr(number, b"user.a") == b""
    world.names.remove_xattr(number, b"user.b")
    fails(errno.ENODATA, world.names.get_xattr, number, b"user.b")
    fails(errno.ENODATA, world.names.remove_xattr, number, b"user.b")
    assert world.names.list_xattrs(number) == [b"user.a"]


def test_limits_of_attributes(world, fails):
    number = world.file(b"f")
    world.names.set_xattr(number, b"user." + b"n" * 250, b"v" * 65536)
    assert len(world.names.get_xattr(number, b"user." + b"n" * 250)) == 65536
    fails(errno.ERANGE, world.names.set_xattr, number, b"user." + b"n" * 251, b"")
    fails(errno.E2BIG, world.names.set_xattr, number, b"user.x", b"v" * 65537)
    fails(errno.EOPNOTSUPP, world.names.set_xattr, number, b"system.other", b"")
    fails(errno.EOPNOTSUPP, world.names.get_xattr, number, b"nonsense")
    for prefix in (b"user.", b"trusted.", b"security."):
        world.names.set_xattr(number, prefix + b"x", b"1")


def test_a_list_of_names_that_nobody_could_read_does_not_grow(world, fails):
    number = world.file(b"f")
    for index in range(256):
        world.names.set_xattr(number, b"user.%0250d" % index, b"")
    fails(errno.ENOSPC, world.names.set_xattr, number, b"user.more", b"")
    world.names.set_xattr(number, b"user.%0250d" % 7, b"replaced")


def test_attributes_go_with_their_inode(world):
    number = world.file(b"f")
    world.names.set_xattr(number, b"user.a", b"1")
    world.names.unlink(ROOT_INODE, b"f")
    assert list(world.store.scan(Table.XATTRS, b"", None)) == []


def test_an_access_acl_sets_the_mode(world):
    number = world.file(b"f", mode=0o4600)
    world.names.set_xattr(number, acl.ACCESS, with_user(5, owner=6, mask=4, other=1))
    assert stat.S_IMODE(world.inode(number).mode) == 0o4641
    assert world.names.get_xattr(number, acl.ACCESS) == with_user(5, owner=6, mask=4, other=1)


def test_an_acl_that_is_only_a_mode_is_not_kept(world, fails):
    number = world.file(b"f")
    world.names.set_xattr(number, acl.ACCESS, with_user(5))
    world.names.set_xattr(number, acl.ACCESS, MINIMAL)
    assert stat.S_IMODE(world.inode(number).mode) == 0o640
    fails(errno.ENODATA, world.names.get_xattr, number, acl.ACCESS)
    world.names.remove_xattr(number, acl.ACCESS)


def test_chmod_moves_the_mask(world):
    number = world.file(b"f")
    world.names.set_xattr(number, acl.ACCESS, with_user(5))
    world.names.set_attributes(number, AttributeChange(mode=0o640))
    expected = with_user(5, owner=6, mask=4, other=0)
    assert world.names.get_xattr(number, acl.ACCESS) == expected


def test_a_default_acl_is_handed_down(world):
    directory = world.directory(b"d")
    world.names.set_xattr(directory, acl.DEFAULT, with_user(5, mask=6, other=5))
    inode = world.names.create(directory, b"f", 0o664, USER)
    assert stat.S_IMODE(inode.mode) == 0o664
    assert world.names.get_xattr(inode.number, acl.ACCESS) == with_user(5, owner=6, mask=6, other=4)
    assert world.names.list_xattrs(inode.number) == [acl.ACCESS]
    inner = world.names.mkdir(directory, b"e", 0o700, USER)
    assert stat.S_IMODE(inner.mode) == 0o700
    assert world.names.get_xattr(inner.number, acl.DEFAULT) == with_user(5, mask=6, other=5)
    assert world.names.list_xattrs(world.names.symlink(directory, b"s", b"t", ROOT).number) == []


def test_a_default_acl_that_is_only_a_mode_narrows_the_mode(world):
    directory = world.directory(b"d")
    world.names.set_xattr(directory, acl.DEFAULT, MINIMAL)
    inode = world.names.create(directory, b"f", 0o777, USER)
    assert stat.S_IMODE(inode.mode) == 0o640
    assert world.names.list_xattrs(inode.number) == []


def test_a_default_acl_takes_the_place_of_the_umask(world):
    directory = world.directory(b"d")
    careful = Credentials(0, 0, umask=0o077)
    assert stat.S_IMODE(world.names.create(directory, b"f", 0o666, careful).mode) == 0o600
    assert stat.S_IMODE(world.names.mkdir(directory, b"e", 0o1777, careful).mode) == 0o1700
    assert stat.S_IMODE(world.names.symlink(directory, b"s", b"t", careful).mode) == 0o777
    world.names.set_xattr(directory, acl.DEFAULT, with_user(5, mask=6, other=5))
    assert stat.S_IMODE(world.names.create(directory, b"g", 0o666, careful).mode) == 0o664


def test_an_acl_by_a_stranger_to_the_group_takes_the_setgid_bit(world):
    number = world.file(b"f", mode=0o2755)
    world.names.set_xattr(number, b"user.a", b"1", keeps_set_gid=False)
    world.names.set_xattr(number, acl.ACCESS, with_user(5, mask=7, other=5))
    assert stat.S_IMODE(world.inode(number).mode) == 0o2775
    world.names.set_xattr(number, acl.ACCESS, with_user(5, mask=7, other=5), keeps_set_gid=False)
    assert stat.S_IMODE(world.inode(number).mode) == 0o775


def test_a_default_acl_is_for_directories(world, fails):
    fails(errno.EACCES, world.names.set_xattr, world.file(b"f"), acl.DEFAULT, MINIMAL)


@pytest.mark.parametrize(
    ("damaged", "code"),
    [
        (b"", errno.EINVAL),
        (b"\2\0\0\0\1", errno.EINVAL),
        (struct.pack("<I", 3), errno.EOPNOTSUPP),
        (struct.pack("<I", 2), errno.EINVAL),
        (value((1, 7, NOBODY), (4, 7, NOBODY)), errno.EINVAL),
        (value((1, 9, NOBODY), (4, 7, NOBODY), (32, 0, NOBODY)), errno.EINVAL),
        (value((4, 7, NOBODY), (1, 7, NOBODY), (32, 0, NOBODY)), errno.EINVAL),
        (value((1, 7, NOBODY), (1, 7, NOBODY), (4, 7, NOBODY), (32, 0, NOBODY)), errno.EINVAL),
        (value((1, 7, NOBODY), (2, 7, 5), (4, 7, NOBODY), (32, 0, NOBODY)), errno.EINVAL),
        (
            value((1, 7, 0), (2, 7, 5), (2, 7, 5), (4, 7, 0), (16, 7, 0), (32, 0, 0)),
            errno.EINVAL,
        ),
        (value((1, 7, NOBODY), (4, 7, NOBODY), (32, 0, NOBODY), (64, 0, NOBODY)), errno.EINVAL),
    ],
)
def test_what_is_no_acl_is_refused(world, fails, damaged, code):
    number = world.file(b"f")
    fails(code, world.names.set_xattr, number, acl.ACCESS, damaged)
    assert stat.S_IMODE(world.inode(number).mode) == 0o644
