"""Open files: flags, sizes, appending, unlinked files, allocation and holes, copies, syncing."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import signal
from pathlib import Path

import pytest

from tests.posix.calls import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    MAX_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    fails,
    fallocate,
    libc,
    syncfs,
)

PAGE = 4096


def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    return os.open(path, flags, 0o644)


# opening


def test_an_access_mode_is_kept_to(place: Path) -> None:
    (place / "file").write_bytes(b"contents")
    file = opened(place / "file", os.O_RDONLY)
    fails(errno.EBADF, os.write, file, b"x")
    fails((errno.EINVAL, errno.EBADF), os.ftruncate, file, 1)
    os.close(file)
    file = opened(place / "file", os.O_WRONLY)
    fails(errno.EBADF, os.read, file, 1)
    os.close(file)
    fails(errno.EBADF, os.read, file, 1)


def test_truncating_when_opening(place: Path) -> None:
    (place / "file").write_bytes(b"contents")
    os.close(opened(place / "file", os.O_WRONLY))
    assert (place / "file").stat().st_size == 8
    os.close(opened(place / "file", os.O_WRONLY | os.O_TRUNC))
    assert (place / "file").stat().st_size == 0


def test_unnamed_files(place: Path) -> None:
    file = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(file, b"unnamed")
    assert os.pread(file, 7, 0) == b"unnamed"
    assert os.fstat(file).st_nlink == 0
    os.close(file)
    assert os.listdir(place) == []


def test_the_kernel_refuses_more_than_the_file_size_limit(place: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = opened(place / "file")
    assert os.pwrite(file, b"x" * 20000, 0) == 10000
    fails(errno.EFBIG, os.pwrite, file, b"x", 10000)
    fails(errno.EFBIG, os.ftruncate, file, 10001)
    assert os.fstat(file).st_size == 10000


# sizes

HUGE = (2**31, 2**32 + 1, 2**40, 2**44 - PAGE)


@pytest.mark.parametrize("size", HUGE)
def test_growing_to_any_size_costs_nothing(place: Path, size: int) -> None:
    file = opened(place / "file")
    os.pwrite(file, b"start", 0)
    os.ftruncate(file, size)
    assert os.fstat(file).st_size == size
    assert os.fstat(file).st_blocks <= 256
    assert os.pread(file, 10, size - 5) == bytes(5)
    assert os.pread(file, 10, size) == b""
    os.pwrite(file, b"end", size - 3)
    os.fsync(file)
    assert os.pread(file, 10, size - 5) == b"\0\0end"
    assert os.fstat(file).st_blocks <= 512
    os.ftruncate(file, 3)
    assert os.pread(file, 10, 0) == b"sta"
    os.close(file)


def test_a_file_may_have_8_eib_less_one_byte(place: Path) -> None:
    file = opened(place / "file")
    os.ftruncate(file, MAX_SIZE)
    assert os.fstat(file).st_size == MAX_SIZE
    assert os.pread(file, 10, MAX_SIZE - 10) == bytes(10)
    assert os.lseek(file, 0, os.SEEK_END) == MAX_SIZE
    assert os.pwrite(file, b"the end of it", MAX_SIZE - 5000) == 13
    os.fsync(file)
    assert os.pread(file, 13, MAX_SIZE - 5000) == b"the end of it"
    os.ftruncate(file, 0)
    os.close(file)


def test_a_write_across_the_largest_size_is_cut(place: Path) -> None:
    file = opened(place / "file")
    os.ftruncate(file, 5)
    fails((errno.EFBIG, errno.EINVAL), os.pwrite, file, b"x", MAX_SIZE)
    fails(errno.EINVAL, os.ftruncate, file, -1)
    fails(errno.EINVAL, os.lseek, file, -1, os.SEEK_SET)
    os.lseek(file, 100, os.SEEK_SET)
    fails(errno.EINVAL, os.lseek, file, -101, os.SEEK_CUR)
    assert os.fstat(file).st_size == 5
    os.close(file)


def test_a_gap_reads_as_zeros_and_takes_no_space(place: Path) -> None:
    file = opened(place / "file")
    os.pwrite(file, b"end", 10 << 20)
    os.fsync(file)
    assert os.pread(file, 3, 5 << 20) == bytes(3)
    assert os.fstat(file).st_blocks <= 128
    os.close(file)


def test_what_was_cut_off_never_comes_back(place: Path) -> None:
    file = opened(place / "file")
    for size in (1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 100, 16 * PAGE):
        os.pwrite(file, b"x" * 20 * PAGE, 0)
        os.ftruncate(file, size)
        os.ftruncate(file, 20 * PAGE)
        assert os.pread(file, 20 * PAGE, 0) == b"x" * size + bytes(20 * PAGE - size)
    os.close(file)


# appending


def test_appending_goes_to_the_end_wherever_the_position_is(place: Path) -> None:
    file = opened(place / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(file, b"one")
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, b"two")
    assert os.lseek(file, 0, os.SEEK_CUR) == 6
    os.pwrite(file, b"three", 0)
    assert os.pread(file, 20, 0) == b"onetwothree"
    os.close(file)


@pytest.mark.parametrize("flags", [0, os.O_DSYNC], ids=["buffered", "synced"])
def test_many_writers_append_whole_records(place: Path, flags: int) -> None:
    writers, records, length = 8, 25 if flags else 150, 61
    children = []
    for writer in range(writers):
        child = os.fork()
        if child == 0:
            file = opened(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | flags)
            for record in range(records):
                os.write(file, f"{writer} {record}".encode().ljust(length - 1) + b"\n")
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * writers
    lines = (place / "log").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert {len(line) for line in lines} == {length - 1}
    assert sorted(tuple(map(int, line.split())) for line in lines) == [
        (writer, record) for writer in range(writers) for record in range(records)
    ]


# unlinked, open


def test_an_unlinked_file_lives_while_it_is_open(place: Path) -> None:
    file = opened(place / "file")
    os.write(file, b"a" * 100_000)
    os.unlink(place / "file")
    opened(place / "file")
    found = os.fstat(file)
    assert (found.st_nlink, found.st_size) == (0, 100_000)
    os.pwrite(file, b"more", 100_000)
    os.fchmod(file, 0o600)
    os.utime(file, (1, 2))
    os.fsync(file)
    again = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    assert os.pread(again, 10, 99_998) == b"aamore"
    os.ftruncate(file, 1)
    assert os.fstat(again).st_size == 1
    os.close(file)
    assert os.pread(again, 10, 0) == b"a"
    os.close(again)
    assert (place / "file").stat().st_size == 0


# durability by flags


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_synchronous_writes(place: Path, flag: int) -> None:
    file = opened(place / "file", os.O_RDWR | os.O_CREAT | flag)
    for number in range(10):
        assert os.pwrite(file, bytes([number]) * 1000, number * 1000) == 1000
    assert os.pwritev(file, [b"v"], 0, os.RWF_DSYNC) == 1
    assert os.pread(file, 2, 9999) == b"\x09"
    os.close(file)


def test_direct_io(place: Path) -> None:
    file = opened(place / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_DSYNC)
    with mmap.mmap(-1, 16 * PAGE) as buffer:
        buffer[:] = b"direct! " * (2 * PAGE)
        assert os.pwritev(file, [buffer], 0) == 16 * PAGE
        buffered = opened(place / "file", os.O_RDWR)
        assert os.pread(buffered, 16, 8 * PAGE) == b"direct! direct! "
        os.pwrite(buffered, b"buffered", PAGE)
        buffer[:] = bytes(16 * PAGE)
        assert os.preadv(file, [buffer], 0) == 16 * PAGE
        assert buffer[PAGE : PAGE + 16] == b"buffereddirect! "
        assert os.preadv(file, [buffer], 12 * PAGE) == 4 * PAGE
        assert os.preadv(file, [buffer], 16 * PAGE) == 0
        os.close(buffered)
    os.close(file)


def test_everything_can_be_synced(place: Path) -> None:
    file = opened(place / "file")
    os.write(file, b"contents")
    os.fsync(file)
    os.fdatasync(file)
    assert libc.sync_file_range(file, 0, 0, 7) == 0
    syncfs(place)
    os.close(file)


# allocation and holes


@pytest.mark.parametrize(
    "mode",
    [0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, COLLAPSE_RANGE, INSERT_RANGE],
    ids=["allocate", "keep size", "punch", "zero", "collapse", "insert"],
)
def test_fallocate_does_it_or_says_that_it_cannot(place: Path, mode: int) -> None:
    file = opened(place / "file")
    data = b"x" * (8 * PAGE)
    os.pwrite(file, data, 0)
    os.fsync(file)
    try:
        fallocate(file, mode, 2 * PAGE, 2 * PAGE)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        expected = data
    else:
        gap = bytes(2 * PAGE)
        expected = {
            PUNCH_HOLE | KEEP_SIZE: data[: 2 * PAGE] + gap + data[4 * PAGE :],
            ZERO_RANGE: data[: 2 * PAGE] + gap + data[4 * PAGE :],
            COLLAPSE_RANGE: data[2 * PAGE :],
            INSERT_RANGE: data[: 2 * PAGE] + gap + data[2 * PAGE :],
        }.get(mode, data)
    assert os.pread(file, 20 * PAGE, 0) == expected
    os.close(file)


def test_fallocate(place: Path) -> None:
    file = opened(place / "file")
    fallocate(file, 0, 0, 100_000)
    assert os.fstat(file).st_size == 100_000
    os.close(file)


def test_posix_fallocate_grows_and_keeps(place: Path) -> None:
    """libc writes a byte into each block where the file system has no fallocate."""
    file = opened(place / "file")
    os.pwrite(file, b"data", 50_000)
    os.posix_fallocate(file, 0, 100_000)
    os.fsync(file)
    assert os.fstat(file).st_size == 100_000
    assert os.fstat(file).st_blocks * 512 >= 100_000
    assert os.pread(file, 10, 49_998) == b"\0\0data\0\0\0\0"
    os.close(file)


def holes(file: int) -> list[tuple[int, int]]:
    """The data ranges that a copier finds."""
    found, end = [], 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            return found
        end = os.lseek(file, start, os.SEEK_HOLE)
        found.append((start, end))


def test_a_copier_finds_all_data_by_seeking(place: Path) -> None:
    """Holes may be shown as data, never data as a hole."""
    file = opened(place / "file")
    size = 1 << 20
    os.ftruncate(file, size)
    for offset in (0, 300_000, size - 5):
        os.pwrite(file, b"12345", offset)
    ranges = holes(file)
    copy = bytearray(size)
    for start, end in ranges:
        copy[start:end] = os.pread(file, end - start, start)
    assert bytes(copy) == os.pread(file, size, 0)
    for wrong in (size, size + 1):
        fails(errno.ENXIO, os.lseek, file, wrong, os.SEEK_DATA)
        fails(errno.ENXIO, os.lseek, file, wrong, os.SEEK_HOLE)
    os.close(file)


def test_holes_are_found_by_seeking(place: Path) -> None:
    file = opened(place / "file")
    os.ftruncate(file, 10 << 20)
    os.pwrite(file, b"data", 5 << 20)
    os.fsync(file)
    assert os.lseek(file, 0, os.SEEK_DATA) > 0
    os.close(file)


@pytest.mark.parametrize("length", [0, 1, 5000, 300_000])
def test_copy_file_range(place: Path, length: int) -> None:
    source, target = opened(place / "source"), opened(place / "target")
    data = os.urandom(300_000)
    os.pwrite(source, data, 0)
    os.pwrite(target, b"y" * 1000, 0)
    copied = 0
    while copied < length:
        copied += os.copy_file_range(source, target, length - copied, copied, 100 + copied)
    assert os.copy_file_range(source, target, 100, 300_000, 0) == 0
    expected = b"y" * 100 + data[:length] + b"y" * max(0, 900 - length)
    assert os.pread(target, 400_000, 0) == expected
    os.close(source)
    os.close(target)


def test_sendfile_and_splice(place: Path) -> None:
    source, target = opened(place / "source"), opened(place / "target")
    data = os.urandom(200_000)
    os.pwrite(source, data, 0)
    sent = 0
    while sent < len(data):
        sent += os.sendfile(target, source, sent, len(data) - sent)
    assert os.pread(target, 300_000, 0) == data
    reader, writer = os.pipe()
    moved = os.splice(source, writer, 5000, offset_src=1000)
    assert os.splice(reader, target, moved, offset_dst=0) == moved
    assert os.pread(target, moved, 0) == data[1000 : 1000 + moved]
    os.close(source)
    os.close(target)


def test_reflinks_are_refused_so_that_cp_copies(place: Path) -> None:
    source, target = opened(place / "source"), opened(place / "target")
    os.write(source, b"x" * PAGE)
    fails((errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL), fcntl.ioctl, target, 0x40049409, source)
    os.close(source)
    os.close(target)


def test_vectors(place: Path) -> None:
    file = opened(place / "file")
    assert os.pwritev(file, [b"one", b"", b"two", b"x" * 100_000], 5) == 100_006
    parts = [bytearray(8), bytearray(3), bytearray(200_000)]
    assert os.preadv(file, parts, 0) == 100_011
    assert (bytes(parts[0]), bytes(parts[1])) == (b"\0" * 5 + b"one", b"two")
    os.close(file)


def test_positions_belong_to_the_open_file_not_to_the_process(place: Path) -> None:
    file = opened(place / "file")
    if (child := os.fork()) == 0:
        os.write(file, b"child ")
        os._exit(0)
    os.waitpid(child, 0)
    os.write(os.dup(file), b"parent")
    assert os.lseek(file, 0, os.SEEK_CUR) == 12
    assert os.pread(file, 20, 0) == b"child parent"
    os.close(file)
