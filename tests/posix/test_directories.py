"""Directories: link counts, emptiness, and listings while others add and remove."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.posix.calls import Directory, fails
from tests.posix.users import ROOT, run

MANY = 600


def test_link_counts_count_subdirectories(place: Path) -> None:
    assert place.stat().st_nlink == 2
    for number in range(5):
        (place / str(number)).mkdir()
        (place / f"file{number}").write_bytes(b"")
        assert place.stat().st_nlink == 3 + number
    os.rename(place / "4", place / "0" / "moved")
    assert (place.stat().st_nlink, (place / "0").stat().st_nlink) == (6, 3)
    (place / "0" / "moved").rmdir()
    assert (place / "0").stat().st_nlink == 2
    os.rename(place / "0", place / "1")
    assert place.stat().st_nlink == 5


def test_only_empty_directories_are_removed(place: Path) -> None:
    (place / "d" / "sub").mkdir(parents=True)
    fails((errno.ENOTEMPTY, errno.EEXIST), os.rmdir, place / "d")
    (place / "d" / "sub").rmdir()
    (place / "d" / "link").symlink_to("x")
    fails((errno.ENOTEMPTY, errno.EEXIST), os.rmdir, place / "d")
    (place / "d" / "link").unlink()
    (place / "d").rmdir()
    fails(errno.ENOENT, os.rmdir, place / "d")


def test_directories_and_files_are_not_mixed_up(place: Path) -> None:
    (place / "d").mkdir()
    (place / "file").write_bytes(b"")
    os.symlink("d", place / "link")
    fails((errno.EISDIR, errno.EPERM), os.unlink, place / "d")
    fails(errno.ENOTDIR, os.rmdir, place / "file")
    fails(errno.ENOTDIR, os.rmdir, place / "link")
    fails(errno.ENOTDIR, os.listdir, place / "file")
    fails(errno.ENOTDIR, os.open, place / "file", os.O_RDONLY | os.O_DIRECTORY)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT):
        fails(errno.EISDIR, os.open, place / "d", flags)
    fails(errno.EISDIR, os.truncate, place / "d", 0)
    directory = os.open(place / "d", os.O_RDONLY)
    fails(errno.EISDIR, os.read, directory, 1)
    fails(errno.EBADF, os.write, directory, b"x")
    fails((errno.EINVAL, errno.EBADF), os.ftruncate, directory, 0)
    os.close(directory)


def test_dot_and_dotdot_cannot_be_removed(place: Path) -> None:
    (place / "d").mkdir()
    fails(errno.EINVAL, os.rmdir, f"{place}/d/.")
    fails((errno.ENOTEMPTY, errno.EEXIST), os.rmdir, f"{place}/d/..")


def test_a_removed_directory_holds_nothing(place: Path) -> None:
    (place / "d").mkdir()
    os.chdir(place / "d")
    directory = os.open(".", os.O_RDONLY)
    (place / "d").rmdir()
    assert os.listdir(directory) == []
    assert os.fstat(directory).st_nlink == 0
    for call in (os.mkdir, os.mknod, lambda name: os.open(name, os.O_CREAT | os.O_WRONLY), os.stat):
        fails(errno.ENOENT, call, "new")
    fails(errno.ENOENT, os.getcwd)
    os.fsync(directory)


def test_a_directory_replaced_by_rename_holds_nothing(place: Path) -> None:
    (place / "old").mkdir()
    (place / "new").mkdir()
    directory = os.open(place / "new", os.O_RDONLY)
    os.rename(place / "old", place / "new")
    assert os.fstat(directory).st_nlink == 0
    fails(errno.ENOENT, os.mkdir, "x", dir_fd=directory)


def test_deep_trees(place: Path) -> None:
    os.chdir(place)
    for _ in range(300):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
    Path("bottom").write_bytes(b"1")
    for _ in range(300):
        os.chdir("..")
    assert Path.cwd() == place


def test_a_listing_shows_kinds(place: Path) -> None:
    (place / "d").mkdir()
    (place / "file").write_bytes(b"")
    os.symlink("x", place / "link")
    os.mkfifo(place / "fifo")
    with os.scandir(place) as entries:
        kinds = {
            entry.name: (entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False), entry.is_symlink())
            for entry in entries
        }
    assert kinds == {
        "d": (True, False, False),
        "file": (False, True, False),
        "link": (False, False, True),
        "fifo": (False, False, False),
    }


def test_a_listing_begins_with_dot_and_dotdot(place: Path) -> None:
    directory = Directory(place)
    names = [directory.read(), directory.read()]
    assert sorted(name or b"" for name in names) == [b".", b".."]
    assert directory.read() is None
    directory.close()


def fill(place: Path, count: int = MANY) -> set[bytes]:
    for number in range(count):
        (place / f"entry-{number:06}").touch()
    return {f"entry-{number:06}".encode() for number in range(count)}


def test_a_listing_shows_each_name_once_whatever_others_do(place: Path) -> None:
    """What is there all the time appears exactly once; what comes or goes, at most once."""
    stay = fill(place)
    for number in range(0, MANY, 3):
        (place / f"goes-{number}").touch()
    directory = Directory(place)
    seen: list[bytes] = []
    number = 0
    while (name := directory.read()) is not None:
        seen.append(name)
        if number % 3 == 0 and number < MANY:
            (place / f"goes-{number}").unlink()
            (place / f"comes-{number}").touch()
            os.rename(place / f"comes-{number}", place / f"renamed-{number}")
        number += 1
    directory.close()
    assert len(seen) == len(set(seen))
    assert stay <= set(seen)


def test_positions_stay_valid(place: Path) -> None:
    fill(place, 400)
    directory = Directory(place)
    names, positions = [], []
    while True:
        positions.append(directory.tell())
        name = directory.read()
        if name is None:
            break
        names.append(name)
    for index in (0, 1, 2, 3, 200, 398, 401):
        directory.seek(positions[index])
        assert directory.read() == names[index]
    directory.seek(positions[402])
    assert directory.read() is None
    directory.seek(positions[300])
    rest = directory.rest()
    assert rest == [name for name in names[300:] if name not in (b".", b"..")]
    directory.rewind()
    assert len(directory.rest()) == 400
    directory.close()


def test_positions_survive_what_others_add_and_remove(place: Path) -> None:
    fill(place, 400)
    directory = Directory(place)
    for _ in range(200):
        directory.read()
    position = directory.tell()
    rest = directory.rest()
    for name in rest[:100]:
        os.unlink(os.fsencode(place) + b"/" + name)
    for number in range(100):
        (place / f"new{number}").touch()
    directory.seek(position)
    again = [name for name in directory.rest() if not name.startswith(b"new")]
    assert again == rest[100:]
    directory.close()


def test_rewinding_shows_what_came_meanwhile(place: Path) -> None:
    (place / "old").touch()
    directory = Directory(place)
    assert directory.rest() == [b"old"]
    (place / "new").touch()
    (place / "old").unlink()
    directory.rewind()
    assert directory.rest() == [b"new"]
    directory.close()


def test_removing_while_listing_removes_all(place: Path) -> None:
    """As `rm -r` does it."""
    fill(place, 400)
    with os.scandir(place) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(place) == []


def test_directories_are_synced(place: Path) -> None:
    directory = os.open(place, os.O_RDONLY)
    (place / "file").write_bytes(b"1")
    os.fsync(directory)
    os.fdatasync(directory)
    os.close(directory)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.actors("root")
@pytest.mark.kinds("disk", "tmpfs", "qsfs-large")
def test_a_million_entries(place: Path) -> None:
    """Listed twice while another process adds and removes: what stays appears exactly once."""
    count = 1_000_000
    root = os.open(place, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"entry-{number:07}", 0o600, dir_fd=root)
    child = os.fork()
    if child == 0:
        number = 0
        while os.getppid() != 1:
            os.mknod(f"comes-{number}", 0o600, dir_fd=root)
            if number % 2:
                os.unlink(f"comes-{number - 1}", dir_fd=root)
            number += 1
        os._exit(0)
    try:
        for _ in range(2):
            seen = [name for name in os.listdir(place) if name.startswith("entry-")]
            assert len(seen) == len(set(seen)) == count
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    for name in os.listdir(place):
        os.unlink(name, dir_fd=root)
    assert os.listdir(place) == []


def test_a_listing_needs_only_the_right_to_read(place: Path) -> None:
    (place / "d").mkdir()
    (place / "d" / "file").touch()
    (place / "d").chmod(0o400)
    if os.geteuid() == 0:
        assert run(ROOT, lambda: os.listdir(place / "d")) == ["file"]
    else:
        assert os.listdir(place / "d") == ["file"]
        fails(errno.EACCES, os.stat, place / "d" / "file")
    (place / "d").chmod(0o700)
