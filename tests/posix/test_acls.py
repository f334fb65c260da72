"""POSIX ACLs: what they grant, how they and the mode follow each other, and what new files inherit."""

from __future__ import annotations

import errno
import os
import stat
import struct
from functools import partial
from pathlib import Path

import pytest

from tests.posix.calls import fails
from tests.posix.users import ALICE, BOB, TEAM, User, run

pytestmark = pytest.mark.kinds("disk", "tmpfs", "qsfs-xattr")
as_root = pytest.mark.actors("root")

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
TAGS = {"u": (1, 2), "g": (4, 8), "m": (16, 16), "o": (32, 32)}
NOBODY = 2**32 - 1


def acl(text: str) -> bytes:
    """The value of an ACL: `u::7 u:1000:5 g::5 m::7 o::0`."""
    value = struct.pack("<I", 2)
    for entry in text.split():
        kind, number, bits = entry.split(":")
        value += struct.pack("<HHI", TAGS[kind][bool(number)], int(bits), int(number or NOBODY))
    return value


def text(value: bytes) -> str:
    """The reverse of `acl`."""
    names = {1: "u", 2: "u", 4: "g", 8: "g", 16: "m", 32: "o"}
    return " ".join(
        f"{names[tag]}:{'' if number == NOBODY else number}:{bits}"
        for tag, bits, number in struct.iter_unpack("<HHI", value[4:])
    )


def get(path: Path, name: str = ACCESS) -> str:
    return text(os.getxattr(path, name))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def with_bob(owner: int, bob: int, group: int, mask: int, other: int) -> str:
    return f"u::{owner} u:{BOB.uid}:{bob} g::{group} m::{mask} o::{other}"


def allowed(path: Path, user: User, wanted: int) -> bool:
    return bool(run(user, partial(os.access, path, wanted, effective_ids=True)))


@as_root
def test_an_acl_grants_and_denies(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"contents")
    os.chown(path, ALICE.uid, ALICE.gid)
    os.setxattr(path, ACCESS, acl(f"u::7 u:{BOB.uid}:6 g::0 g:{TEAM}:4 m::7 o::0"))
    other, member = User("other", 61020, 61020), User("member", 61021, 61021, (TEAM,))
    assert run(BOB, path.read_bytes) == b"contents"
    assert allowed(path, BOB, os.W_OK)
    assert allowed(path, member, os.R_OK)
    assert not allowed(path, member, os.W_OK)
    assert not allowed(path, other, os.R_OK)
    os.setxattr(path, ACCESS, acl(f"u::7 u:{BOB.uid}:6 g::0 g:{TEAM}:4 m::4 o::6"))
    assert not allowed(path, BOB, os.W_OK)
    assert allowed(path, BOB, os.R_OK)
    assert allowed(path, other, os.W_OK)
    run(BOB, partial(fails, errno.EACCES, os.open, path, os.O_WRONLY))


def test_the_mode_shows_the_mask(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"")
    os.setxattr(path, ACCESS, acl(with_bob(6, 7, 4, 5, 1)))
    assert mode_of(path) == 0o651
    path.chmod(0o734)
    assert get(path) == with_bob(7, 7, 4, 3, 4)
    os.removexattr(path, ACCESS)
    fails(errno.ENODATA, os.getxattr, path, ACCESS)


def test_an_acl_that_says_no_more_than_a_mode_becomes_one(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"")
    os.setxattr(path, ACCESS, acl("u::6 g::4 o::0"))
    assert mode_of(path) == 0o640
    fails(errno.ENODATA, os.getxattr, path, ACCESS)
    assert os.listxattr(path) == []


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_a_default_acl_takes_the_place_of_the_umask(place: Path, umask: int) -> None:
    os.setxattr(place, DEFAULT, acl(with_bob(7, 6, 5, 7, 4)))
    os.umask(umask)
    os.mkdir(place / "d", 0o777)
    os.close(os.open(place / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    os.close(os.open(place / "private", os.O_CREAT | os.O_WRONLY, 0o600))
    os.mkfifo(place / "fifo", 0o666)
    os.symlink("x", place / "link")
    assert get(place / "d", DEFAULT) == with_bob(7, 6, 5, 7, 4)
    assert get(place / "d") == with_bob(7, 6, 5, 7, 4)
    assert get(place / "file") == with_bob(6, 6, 5, 6, 4)
    assert get(place / "private") == with_bob(6, 6, 5, 0, 0)
    assert get(place / "fifo") == with_bob(6, 6, 5, 6, 4)
    assert [mode_of(place / name) for name in ("d", "file", "private")] == [0o774, 0o664, 0o600]
    fails(errno.ENODATA, os.getxattr, place / "file", DEFAULT)


def test_a_plain_default_acl_is_inherited_as_a_mode(place: Path) -> None:
    os.setxattr(place, DEFAULT, acl("u::7 g::5 o::1"))
    os.umask(0o077)
    os.close(os.open(place / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkdir(place / "d")
    assert (mode_of(place / "file"), mode_of(place / "d")) == (0o640, 0o751)
    fails(errno.ENODATA, os.getxattr, place / "file", ACCESS)
    assert get(place / "d", DEFAULT) == "u::7 g::5 o::1"
    os.removexattr(place, DEFAULT)
    os.mkdir(place / "e")
    assert mode_of(place / "e") == 0o700


def test_only_directories_have_default_acls(place: Path) -> None:
    (place / "file").write_bytes(b"")
    fails(errno.EACCES, os.setxattr, place / "file", DEFAULT, acl("u::7 g::5 o::1"))


@pytest.mark.parametrize(
    "wrong",
    [
        "u::7 g::5",
        "u::7 u:5:7 g::5 o::0",
        "u::7 g::5 o::0 o::0",
        "g::5 u::7 o::0",
        "u::8 g::5 o::0",
    ],
)
def test_wrong_acls_are_refused(place: Path, wrong: str) -> None:
    fails(errno.EINVAL, os.setxattr, place, ACCESS, acl(wrong))
    fails(errno.EINVAL, os.setxattr, place, DEFAULT, acl(wrong))


def test_values_that_are_no_acls_are_refused(place: Path) -> None:
    fails(errno.EINVAL, os.setxattr, place, ACCESS, b"\2\0\0\0short")
    fails(errno.EOPNOTSUPP, os.setxattr, place, ACCESS, struct.pack("<I", 1) + acl("u::7 g::5 o::0")[4:])


@as_root
def test_only_the_owner_sets_acls(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"")
    os.chown(path, ALICE.uid, ALICE.gid)
    path.chmod(0o666)
    value = acl(with_bob(6, 6, 6, 6, 6))
    run(BOB, partial(fails, errno.EPERM, os.setxattr, path, ACCESS, value))
    run(ALICE, partial(os.setxattr, path, ACCESS, value))
    run(BOB, partial(fails, errno.EPERM, os.removexattr, path, ACCESS))


@as_root
def test_an_acl_set_by_a_stranger_to_the_group_takes_the_setgid_bit(place: Path) -> None:
    path = place / "file"
    for group, kept in ((BOB.gid, 0), (TEAM, 0o2000), (ALICE.gid, 0o2000)):
        path.write_bytes(b"")
        os.chown(path, ALICE.uid, group)
        path.chmod(0o2775)
        run(ALICE, partial(os.setxattr, path, ACCESS, acl(with_bob(7, 7, 7, 7, 5))))
        assert oct(mode_of(path)) == oct(0o775 | kept)
        os.unlink(path)


def test_an_acl_survives_renames_and_links(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"")
    os.setxattr(path, ACCESS, acl(with_bob(6, 4, 4, 4, 0)))
    os.link(path, place / "link")
    os.rename(path, place / "new")
    path.write_bytes(b"")
    os.rename(place / "new", path)
    assert get(place / "link") == with_bob(6, 4, 4, 4, 0)


@as_root
def test_acls_decide_about_directories(place: Path) -> None:
    directory = place / "d"
    directory.mkdir(0o700)
    os.setxattr(directory, ACCESS, acl(with_bob(7, 7, 0, 7, 0)))
    run(BOB, partial(os.mkdir, directory / "bobs"))
    run(ALICE, partial(fails, errno.EACCES, os.mkdir, directory / "alices"))
    run(ALICE, partial(fails, errno.EACCES, os.listdir, directory))
    assert run(BOB, partial(os.listdir, directory)) == ["bobs"]
