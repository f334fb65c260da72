"""Extended attributes: namespaces, sizes and errors as on ext4."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest

from tests.posix.calls import fails
from tests.posix.users import ALICE, BOB, run

pytestmark = pytest.mark.kinds("disk", "tmpfs", "qsfs-xattr")
as_root = pytest.mark.actors("root")


def file_of(path: Path) -> Path:
    path.write_bytes(b"contents")
    return path


def test_attributes_are_set_read_listed_and_removed(place: Path) -> None:
    for path in (file_of(place / "file"), place):
        for name, value in (("user.a", b"1"), ("user.b", b""), ("user.\u00e9 x", bytes(range(256)))):
            os.setxattr(path, name, value)
            assert os.getxattr(path, name) == value
        assert sorted(os.listxattr(path)) == ["user.a", "user.b", "user.\u00e9 x"]
        os.setxattr(path, "user.a", b"another")
        assert os.getxattr(path, "user.a") == b"another"
        os.removexattr(path, "user.b")
        fails(errno.ENODATA, os.getxattr, path, "user.b")
        fails(errno.ENODATA, os.removexattr, path, "user.b")
        assert sorted(os.listxattr(path)) == ["user.a", "user.\u00e9 x"]


def test_create_and_replace(place: Path) -> None:
    path = file_of(place / "file")
    fails(errno.ENODATA, os.setxattr, path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    fails(errno.EEXIST, os.setxattr, path, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"3"


def test_names_and_sizes(place: Path) -> None:
    path = file_of(place / "file")
    longest = "user." + "n" * 250
    os.setxattr(path, longest, b"1")
    assert os.listxattr(path) == [longest]
    fails(errno.ERANGE, os.setxattr, path, longest + "n", b"1")
    fails((errno.ERANGE, errno.EINVAL), os.setxattr, path, "", b"1")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "nonsense.x", b"1")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "no-namespace", b"1")
    os.setxattr(path, "user.big", b"v" * 2000)
    assert os.getxattr(path, "user.big") == b"v" * 2000
    fails((errno.E2BIG, errno.ENOSPC), os.setxattr, path, "user.big", b"v" * 65537)
    assert os.getxattr(path, "user.big") == b"v" * 2000


def test_only_files_and_directories_have_user_attributes(place: Path) -> None:
    os.symlink("nowhere", place / "link")
    os.mkfifo(place / "fifo")
    fails(errno.EPERM, os.setxattr, place / "link", "user.a", b"1", follow_symlinks=False)
    fails(errno.EPERM, os.setxattr, place / "fifo", "user.a", b"1")
    assert os.listxattr(place / "link", follow_symlinks=False) == []


def test_attributes_belong_to_the_inode(place: Path) -> None:
    path = file_of(place / "file")
    os.setxattr(path, "user.a", b"1")
    os.link(path, place / "link")
    os.rename(path, place / "renamed")
    with (place / "renamed").open() as file:
        assert os.getxattr(file.fileno(), "user.a") == b"1"
        os.setxattr(file.fileno(), "user.b", b"2")
    assert sorted(os.listxattr(place / "link")) == ["user.a", "user.b"]


def test_setting_marks_ctime_only(place: Path) -> None:
    path = file_of(place / "file")
    for change in (
        partial(os.setxattr, path, "user.a", b"1"),
        partial(os.setxattr, path, "user.a", b"1"),
        partial(os.removexattr, path, "user.a"),
    ):
        before = path.stat()
        while change() or path.stat().st_ctime_ns == before.st_ctime_ns:
            os.setxattr(path, "user.a", b"again")
        assert path.stat().st_mtime_ns == before.st_mtime_ns


@as_root
def test_who_may_set_and_read(place: Path) -> None:
    path = file_of(place / "file")
    os.chown(path, ALICE.uid, ALICE.gid)
    path.chmod(0o644)
    run(ALICE, partial(os.setxattr, path, "user.a", b"1"))
    assert run(BOB, partial(os.getxattr, path, "user.a")) == b"1"
    run(BOB, partial(fails, errno.EACCES, os.setxattr, path, "user.a", b"2"))
    run(BOB, partial(fails, errno.EACCES, os.removexattr, path, "user.a"))
    path.chmod(0o600)
    run(BOB, partial(fails, errno.EACCES, os.getxattr, path, "user.a"))


@as_root
def test_trusted_attributes_are_roots(place: Path) -> None:
    path = file_of(place / "file")
    os.chown(path, ALICE.uid, ALICE.gid)
    os.setxattr(path, "trusted.a", b"secret")
    assert os.getxattr(path, "trusted.a") == b"secret"
    assert os.listxattr(path) == ["trusted.a"]
    run(ALICE, partial(fails, errno.EPERM, os.setxattr, path, "trusted.a", b"1"))
    run(ALICE, partial(fails, errno.ENODATA, os.getxattr, path, "trusted.a"))


@as_root
def test_trusted_names_are_hidden_from_others(place: Path) -> None:
    path = file_of(place / "file")
    os.setxattr(path, "trusted.a", b"secret")
    os.setxattr(path, "user.a", b"1")
    assert run(ALICE, partial(os.listxattr, path)) == ["user.a"]


@as_root
def test_security_attributes(place: Path) -> None:
    path = file_of(place / "file")
    path.chmod(0o755)
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(path, "security.capability", capability)
    assert os.getxattr(path, "security.capability") == capability
    run(ALICE, partial(fails, errno.EPERM, os.setxattr, path, "security.capability", capability))
    os.setxattr(path, "security.other", b"x")
    assert sorted(os.listxattr(path)) == ["security.capability", "security.other"]


@as_root
@pytest.mark.parametrize("change", ["write", "truncate", "chown"])
def test_changing_a_file_takes_its_capabilities(place: Path, change: str) -> None:
    path = file_of(place / "file")
    path.chmod(0o777)
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    match change:
        case "write":
            path.write_bytes(b"new")
        case "truncate":
            os.truncate(path, 1)
        case "chown":
            os.chown(path, ALICE.uid, -1)
    fails(errno.ENODATA, os.getxattr, path, "security.capability")


@pytest.mark.kinds("qsfs")
def test_without_the_option_there_are_none(place: Path) -> None:
    path = file_of(place / "file")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "user.a", b"1")
    fails(errno.EOPNOTSUPP, os.getxattr, path, "user.a")
    fails(errno.EOPNOTSUPP, os.listxattr, path)
    fails(errno.EOPNOTSUPP, os.setxattr, path, "system.posix_acl_access", bytes.fromhex("02000000"))
