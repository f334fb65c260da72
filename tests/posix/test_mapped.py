"""Shared memory maps: several processes, mixed with read, write and truncate; SIGBUS; msync."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.calls import fails, msync

PAGE = 4096


def opened(path: Path, size: int = 0) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(file, size)
    return file


def in_child(action: Callable[[], object]) -> int:
    """How a child that runs `action` ends: 0, or a signal as a negative number."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_map_and_the_file_are_one(place: Path) -> None:
    file = opened(place / "file", 4 * PAGE)
    with mmap.mmap(file, 4 * PAGE) as view:
        view[100:106] = b"mapped"
        assert os.pread(file, 6, 100) == b"mapped"
        os.pwrite(file, b"written", PAGE)
        assert view[PAGE : PAGE + 7] == b"written"
        other = os.open(place / "file", os.O_RDONLY)
        assert os.pread(other, 6, 100) == b"mapped"
        os.close(other)
    os.close(file)
    assert (place / "file").read_bytes()[100:106] == b"mapped"


def test_processes_share_a_map(place: Path) -> None:
    file = opened(place / "file", 64 * PAGE)

    def fill(number: int) -> None:
        own = os.open(place / "file", os.O_RDWR)
        with mmap.mmap(own, 64 * PAGE) as view:
            for page in range(64):
                view[page * PAGE + number] = 100 + number

    with mmap.mmap(file, 64 * PAGE) as view:
        for number in range(4):
            assert in_child(lambda number=number: fill(number)) == 0
        for page in range(64):
            assert view[page * PAGE : page * PAGE + 5] == b"defg\0"
    os.close(file)


def test_a_private_map_changes_no_file(place: Path) -> None:
    (place / "file").write_bytes(b"x" * PAGE)
    file = os.open(place / "file", os.O_RDONLY)
    with mmap.mmap(file, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        view[0:4] = b"mine"
        assert os.pread(file, 4, 0) == b"xxxx"
    fails(errno.EACCES, mmap.mmap, file, PAGE)
    os.close(file)


def test_a_map_outlives_the_name_and_the_descriptor(place: Path) -> None:
    file = opened(place / "file", 2 * PAGE)
    view = mmap.mmap(file, 2 * PAGE)
    os.close(file)
    os.unlink(place / "file")
    view[0:5] = b"alive"
    view.flush()
    assert view[0:5] == b"alive"
    view.close()


def raw_map(file: int, length: int) -> int:
    """An address; unlike `mmap.mmap` it may reach beyond the end of the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(length), 3, mmap.MAP_SHARED, file, ctypes.c_long(0))
    assert address != ctypes.c_void_p(-1).value
    return int(address)


@pytest.mark.parametrize("access", ["read", "write"])
def test_sigbus_behind_the_last_page_and_only_there(place: Path, access: str) -> None:
    file = opened(place / "file", PAGE + 1)
    address = raw_map(file, 4 * PAGE)

    def touch(offset: int) -> Callable[[], object]:
        if access == "read":
            return lambda: ctypes.string_at(address + offset, 1)
        return lambda: ctypes.memset(address + offset, 1, 1)

    for offset in (0, PAGE, PAGE + 1, 2 * PAGE - 1):
        assert in_child(touch(offset)) == 0
    for offset in (2 * PAGE, 4 * PAGE - 1):
        assert in_child(touch(offset)) == -signal.SIGBUS
    os.ftruncate(file, 3 * PAGE)
    assert in_child(touch(2 * PAGE)) == 0
    os.ftruncate(file, 0)
    assert in_child(touch(0)) == -signal.SIGBUS
    os.close(file)


def test_bytes_behind_the_end_are_not_kept(place: Path) -> None:
    """What a map stores between the end and the end of its page is gone when the file grows."""
    file = opened(place / "file", 100)
    ctypes.memset(raw_map(file, PAGE), ord("x"), PAGE)
    os.fsync(file)
    os.ftruncate(file, PAGE)
    assert os.pread(file, PAGE, 0) == b"x" * 100 + bytes(PAGE - 100)
    os.close(file)


def test_truncation_takes_pages_out_of_maps(place: Path) -> None:
    file = opened(place / "file", 4 * PAGE)
    with mmap.mmap(file, 4 * PAGE) as view:
        view[:] = b"y" * (4 * PAGE)
        os.ftruncate(file, PAGE + 10)
        os.ftruncate(file, 4 * PAGE)
        assert view[:] == b"y" * (PAGE + 10) + bytes(3 * PAGE - 10)
        view[2 * PAGE : 2 * PAGE + 3] = b"new"
    assert os.pread(file, 3, 2 * PAGE) == b"new"
    os.close(file)


def test_msync(place: Path) -> None:
    file = opened(place / "file", 8 * PAGE)
    address = raw_map(file, 8 * PAGE)
    ctypes.memset(address + PAGE, 7, PAGE)
    msync(address, 8 * PAGE)
    fails(errno.EINVAL, msync, address + 1, PAGE)
    fails(errno.ENOMEM, msync, 1 << 46, PAGE)
    assert os.pread(file, 1, PAGE) == b"\x07"
    os.close(file)


def test_mapped_stores_mark_the_times(place: Path) -> None:
    file = opened(place / "file", PAGE)
    os.utime(file, (1, 1))
    with mmap.mmap(file, PAGE) as view:
        view[0] = 1
        view.flush()
        assert os.fstat(file).st_mtime > 1000
    os.close(file)


def test_maps_mixed_with_all_other_ways(place: Path) -> None:
    """Two processes take turns at random with store, write, truncate and read; both see one file."""
    size, rng = 32 * PAGE, random.Random(4)
    path = place / "file"
    file = opened(path, size)
    model = bytearray(size)
    view = mmap.mmap(file, size)
    for step in range(400):
        start = rng.randrange(size)
        length = min(rng.randrange(1, 3 * PAGE), size - start)
        data = bytes([step % 251 + 1]) * length
        match rng.randrange(5):
            case 0:
                view[start : start + length] = data
                model[start : start + length] = data
            case 1:
                os.pwrite(file, data, start)
                model[start : start + length] = data
            case 2:
                os.ftruncate(file, start)
                os.ftruncate(file, size)
                model[start:] = bytes(size - start)
            case 3:
                assert os.pread(file, length, start) == model[start : start + length], step
            case 4:
                assert view[start : start + length] == model[start : start + length], step
        if step % 100 == 50:
            assert in_child(lambda: path.read_bytes() == bytes(model) or os._exit(9)) == 0
    view.close()
    os.fsync(file)
    os.close(file)
    assert path.read_bytes() == bytes(model)
