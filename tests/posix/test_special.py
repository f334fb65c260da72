"""Devices, FIFOs and sockets."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from tests.posix.calls import fails

NULL = os.makedev(1, 3)


def test_a_fifo_connects_two_processes(place: Path) -> None:
    os.mkfifo(place / "fifo", 0o620)
    found = (place / "fifo").lstat()
    assert stat.S_ISFIFO(found.st_mode)
    assert (stat.S_IMODE(found.st_mode), found.st_size, found.st_nlink) == (0o600, 0, 1)
    child = os.fork()
    if child == 0:
        with (place / "fifo").open("wb") as writer:
            writer.write(b"through the fifo")
        os._exit(0)
    assert (place / "fifo").read_bytes() == b"through the fifo"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fifo_without_reader(place: Path) -> None:
    os.mkfifo(place / "fifo")
    fails(errno.ENXIO, os.open, place / "fifo", os.O_WRONLY | os.O_NONBLOCK)


def test_a_socket_has_a_name_in_the_file_system(place: Path) -> None:
    os.chdir(place)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        assert stat.S_ISSOCK(os.lstat("socket").st_mode)
        fails(errno.EADDRINUSE, client.bind, "socket")
        fails(errno.ENXIO, os.open, "socket", os.O_RDWR)
        server.listen()
        client.connect("socket")
        accepted, _ = server.accept()
        client.sendall(b"hello")
        assert accepted.recv(5) == b"hello"
        accepted.close()
    os.unlink("socket")


def test_a_socket_node_by_mknod(place: Path) -> None:
    os.mknod(place / "socket", stat.S_IFSOCK | 0o600)
    assert stat.S_ISSOCK((place / "socket").lstat().st_mode)


@pytest.mark.actors("root")
@pytest.mark.parametrize("kind_of_device", [stat.S_IFCHR, stat.S_IFBLK], ids=["character", "block"])
@pytest.mark.parametrize(
    ("major", "minor"), [(0, 0), (1, 3), (8, 255), (259, 256), (4095, 1048575)], ids=str
)
def test_device_numbers_are_kept(place: Path, kind_of_device: int, major: int, minor: int) -> None:
    os.mknod(place / "device", kind_of_device | 0o640, os.makedev(major, minor))
    found = (place / "device").lstat()
    assert stat.S_IFMT(found.st_mode) == kind_of_device
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (major, minor)
    os.rename(place / "device", place / "moved")
    assert (place / "moved").lstat().st_rdev == found.st_rdev


@pytest.mark.actors("root")
def test_a_device_can_be_used(place: Path) -> None:
    os.mknod(place / "null", stat.S_IFCHR | 0o666, NULL)
    with (place / "null").open("r+b", buffering=0) as null:
        assert null.write(b"gone") == 4
        assert null.read(1) == b""


@pytest.mark.actors("user")
def test_only_root_makes_devices(place: Path) -> None:
    for kind_of_device in (stat.S_IFCHR, stat.S_IFBLK):
        fails(errno.EPERM, os.mknod, place / "device", kind_of_device | 0o600, NULL)


def test_mknod_makes_no_directories(place: Path) -> None:
    fails((errno.EPERM, errno.EINVAL), os.mknod, place / "directory", stat.S_IFDIR | 0o700)
    fails(errno.EINVAL, os.mknod, place / "link", stat.S_IFLNK | 0o700)


def test_special_files_have_no_contents(place: Path) -> None:
    os.mkfifo(place / "fifo")
    fails(errno.EINVAL, os.truncate, place / "fifo", 0)
