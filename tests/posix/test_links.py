"""Hard links and symlinks."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.posix.calls import NOREPLACE, fails, link_following, renameat2


def test_a_link_is_another_name_of_the_same_file(place: Path) -> None:
    (place / "one").write_bytes(b"1")
    os.link(place / "one", place / "two")
    one, two = (place / "one").stat(), (place / "two").stat()
    assert (one.st_ino, one.st_nlink) == (two.st_ino, two.st_nlink) == (two.st_ino, 2)
    (place / "two").write_bytes(b"22")
    (place / "two").chmod(0o640)
    assert (place / "one").read_bytes() == b"22"
    assert stat.S_IMODE((place / "one").stat().st_mode) == 0o640
    (place / "one").unlink()
    assert (place / "two").stat().st_nlink == 1
    assert (place / "two").read_bytes() == b"22"


def test_a_directory_gets_no_second_name(place: Path) -> None:
    (place / "directory").mkdir()
    fails(errno.EPERM, os.link, place / "directory", place / "two")


@pytest.mark.parametrize("what", ["fifo", "symlink"])
def test_other_kinds_of_files_can_be_linked(place: Path, what: str) -> None:
    if what == "fifo":
        os.mkfifo(place / "one")
    else:
        os.symlink("nowhere", place / "one")
    os.link(place / "one", place / "two", follow_symlinks=False)
    assert (place / "two").lstat().st_ino == (place / "one").lstat().st_ino
    assert (place / "two").lstat().st_nlink == 2


def test_a_link_to_a_symlink_or_to_what_it_names(place: Path) -> None:
    (place / "file").write_bytes(b"1")
    os.symlink("file", place / "symlink")
    link_following(place / "symlink", place / "followed")
    assert (place / "followed").lstat().st_ino == (place / "file").stat().st_ino


def test_a_link_to_another_file_system_is_refused(place: Path) -> None:
    (place / "file").write_bytes(b"1")
    for call in (os.link, os.rename, lambda old, new: renameat2(old, new, NOREPLACE)):
        fails(errno.EXDEV, call, place / "file", "/dev/shm/qsfs-never-made")


def test_an_unlinked_open_file_gets_no_name_again(place: Path) -> None:
    with (place / "file").open("wb") as file:
        (place / "file").unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        fails(errno.ENOENT, link_following, f"/proc/self/fd/{file.fileno()}", place / "again")


def test_many_links(place: Path) -> None:
    (place / "file").write_bytes(b"x")
    for number in range(300):
        os.link(place / "file", place / f"link{number}")
    assert (place / "file").stat().st_nlink == 301
    for number in range(300):
        (place / f"link{number}").unlink()
    assert (place / "file").stat().st_nlink == 1


@pytest.mark.parametrize("length", [1, 59, 60, 255, 4094, 4095])
def test_a_symlink_holds_up_to_4095_bytes(place: Path, length: int) -> None:
    target = os.fsencode("t" * length)
    os.symlink(target, os.fsencode(place / "link"))
    assert os.readlink(os.fsencode(place / "link")) == target
    assert (place / "link").lstat().st_size == length
    assert stat.S_IMODE((place / "link").lstat().st_mode) == 0o777


def test_a_longer_or_empty_target_is_refused(place: Path) -> None:
    fails(errno.ENAMETOOLONG, os.symlink, "t" * 4096, place / "link")
    fails(errno.ENOENT, os.symlink, "", place / "link")
    assert not os.listdir(place)


def test_a_symlink_holds_any_bytes(place: Path) -> None:
    target = bytes(range(1, 256))
    os.symlink(target, os.fsencode(place / "link"))
    assert os.readlink(os.fsencode(place / "link")) == target


def test_only_symlinks_are_read_as_such(place: Path) -> None:
    (place / "file").write_bytes(b"")
    for path in (place, place / "file"):
        fails(errno.EINVAL, os.readlink, path)


def test_a_symlink_is_opened_only_with_its_target(place: Path) -> None:
    (place / "file").write_bytes(b"1")
    os.symlink("file", place / "link")
    assert (place / "link").read_bytes() == b"1"
    fails(errno.ELOOP, os.open, place / "link", os.O_RDONLY | os.O_NOFOLLOW)
    fails(errno.ENOTDIR, os.open, place / "link", os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    handle = os.open(place / "link", os.O_PATH | os.O_NOFOLLOW)
    assert stat.S_ISLNK(os.fstat(handle).st_mode)
    os.close(handle)


def test_forty_symlinks_in_a_row_are_followed_and_no_more(place: Path) -> None:
    (place / "0").write_bytes(b"end")
    for number in range(1, 42):
        os.symlink(str(number - 1), place / str(number))
    assert (place / "40").read_bytes() == b"end"
    fails(errno.ELOOP, os.stat, place / "41")


def test_what_a_symlink_names_is_looked_up_when_it_is_used(place: Path) -> None:
    os.symlink("target", place / "link")
    fails(errno.ENOENT, os.stat, place / "link")
    (place / "target").mkdir()
    assert (place / "link").is_dir()
    (place / "target").rmdir()
    (place / "target").write_bytes(b"1")
    assert (place / "link").is_file()
