"""What only qsfs has: its size, its policies, what a kill leaves, and work that goes on after a restart."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.posix.calls import EXCHANGE, fails, renameat2, syncfs, write_asynchronously
from tests.posix.conftest import BACKEND_BYTES, BACKENDS, SHARDS
from tests.support.daemon import FileSystem

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def fs(root_of: Callable[[str], Path], mounted: dict[str, FileSystem]) -> FileSystem:
    root_of("qsfs")
    return mounted["qsfs"]


@pytest.fixture
def top(fs: FileSystem) -> Iterator[Path]:
    """A directory on the mount; the cases of this module run in the test's own process, as root."""
    path = fs.mountpoint / "own"
    path.mkdir()
    yield path
    for below in sorted(path.rglob("*"), reverse=True):
        below.rmdir() if below.is_dir() and not below.is_symlink() else below.unlink()
    path.rmdir()


def again(fs: FileSystem) -> None:
    """Ends the daemon at once, and mounts again."""
    fs.kill()
    fs.mount()


def test_the_size_is_what_the_backends_can_hold(top: Path) -> None:
    found = os.statvfs(top)
    k, m = SHARDS
    capacity = BACKENDS * BACKEND_BYTES * k // (k + m)
    assert found.f_frsize == found.f_bsize == PAGE
    assert capacity * 0.99 <= found.f_blocks * PAGE <= capacity
    assert 0 < found.f_bavail == found.f_bfree <= found.f_blocks
    assert found.f_namemax == 255
    assert 0 < found.f_ffree < found.f_files


def test_what_is_written_is_missed_at_once(fs: FileSystem, top: Path) -> None:
    """Also before it is uploaded, and no less after it was."""
    size = 8 * MIB
    fs.sync()
    before = os.statvfs(top)
    (top / "data").write_bytes(os.urandom(size))
    for sync in (partial(syncfs, top), fs.sync):
        sync()
        now = os.statvfs(top)
        assert now.f_bavail * PAGE <= before.f_bavail * PAGE - size
        assert now.f_blocks >= before.f_blocks - 100


def test_du_shows_what_a_file_holds(top: Path) -> None:
    with (top / "sparse").open("wb") as file:
        file.truncate(2 << 40)
        file.seek(1 << 40)
        file.write(b"x" * 10 * PAGE)
        os.fsync(file.fileno())
    found = (top / "sparse").stat()
    assert (found.st_size, found.st_blocks * 512) == (2 << 40, 10 * PAGE)
    before = os.statvfs(top).f_bfree
    os.truncate(top / "sparse", 0)
    assert (top / "sparse").stat().st_blocks == 0
    assert os.statvfs(top).f_bfree >= before - 100


def test_a_truncation_survives_a_kill_before_its_work_is_done(fs: FileSystem, top: Path) -> None:
    """What is written into the range meanwhile stays, and nothing of before comes back."""
    path = top / "big"
    size = 48 * MIB
    with path.open("w+b") as file:
        for _ in range(size // MIB):
            file.write(b"old!" * (MIB // 4))
        file.flush()
        os.fsync(file.fileno())
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), b"new", 20 * MIB + 5)
        os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())
        again(fs)
    while path.stat().st_blocks > 8:  # the work goes on, and is seen to
        pass
    assert (path.stat().st_size, path.stat().st_blocks) == (size, 8)
    with path.open("rb") as file:
        for offset in range(0, size, MIB):
            expected = bytes(5) + b"new" + bytes(MIB - 8) if offset == 20 * MIB else bytes(MIB)
            assert file.read(MIB) == expected, offset


def test_files_without_a_name_are_gone_after_a_kill(fs: FileSystem, top: Path) -> None:
    """fsck, at the end of all tests, finds none either."""
    files = os.statvfs(top).f_files - os.statvfs(top).f_ffree
    for _ in range(5):
        file = os.open(top / "unnamed", os.O_RDWR | os.O_CREAT)
        os.write(file, b"x" * MIB)
        os.fsync(file)
        os.unlink(top / "unnamed")
    directory = os.open(top, os.O_RDONLY)
    os.fsync(directory)
    again(fs)
    assert os.listdir(top) == []
    fs.sync()
    assert os.statvfs(top).f_files - os.statvfs(top).f_ffree <= files + 1


def is_written_through(path: Path) -> bool:
    """A file of which every write is durable at once is not cached, and cannot be mapped shared."""
    file = os.open(path, os.O_RDWR)
    try:
        mmap.mmap(file, 10).close()
    except OSError as error:
        assert error.errno == errno.ENODEV
        return True
    finally:
        os.close(file)
    return False


def test_a_policy_follows_the_names_of_a_file(top: Path) -> None:
    """With several names the safer value counts; an open file keeps what it was opened with."""
    plain, through, other = top / "plain", top / "log.through", top / "other.through"
    plain.write_bytes(b"0123456789")
    assert not is_written_through(plain)
    os.rename(plain, through)
    assert is_written_through(through)
    os.link(through, plain)
    assert is_written_through(plain)
    os.unlink(through)
    assert not is_written_through(plain)
    os.link(plain, through)
    assert is_written_through(plain)
    os.rename(plain, other)
    os.rename(other, top / "a")
    os.unlink(through)
    assert not is_written_through(top / "a")
    (top / "b.through").write_bytes(b"0123456789")
    renameat2(top / "a", top / "b.through", EXCHANGE)
    assert is_written_through(top / "b.through")
    assert not is_written_through(top / "a")
    (top / "c").write_bytes(b"0123456789")
    os.rename(top / "c", top / "b.through")
    assert is_written_through(top / "b.through")


def test_writes_under_a_policy_survive_a_kill_without_a_sync(fs: FileSystem, top: Path) -> None:
    (top / "file").touch()
    os.rename(top / "file", top / "log.through")
    file = os.open(top / "log.through", os.O_WRONLY | os.O_APPEND)
    for number in range(20):
        os.write(file, f"{number}\n".encode())
    again(fs)
    os.close(file)
    assert (top / "log.through").read_text() == "".join(f"{number}\n" for number in range(20))


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_synchronous_writes_survive_a_kill(fs: FileSystem, top: Path, flag: int) -> None:
    file = os.open(top / "file", os.O_WRONLY | os.O_CREAT | flag)
    for number in range(20):
        os.pwrite(file, bytes([number]) * 100, number * 5000)
    again(fs)
    os.close(file)
    data = (top / "file").read_bytes()
    assert [data[number * 5000 : number * 5000 + 100] for number in range(20)] == [
        bytes([number]) * 100 for number in range(20)
    ]


def test_direct_synchronous_writes_survive_a_kill(fs: FileSystem, top: Path) -> None:
    file = os.open(top / "file", os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_DSYNC)
    with mmap.mmap(-1, PAGE) as buffer:
        for number in range(10):
            buffer[:] = bytes([number]) * PAGE
            os.pwritev(file, [buffer], number * PAGE)
    again(fs)
    os.close(file)
    assert (top / "file").read_bytes() == b"".join(bytes([number]) * PAGE for number in range(10))


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_asynchronous_synchronous_writes_survive_a_kill(fs: FileSystem, top: Path, flag: int) -> None:
    """As databases with native AIO write; the kernel sends no FSYNC after them."""
    (top / "file").write_bytes(bytes(10 * PAGE))
    file = os.open(top / "file", os.O_WRONLY | os.O_DIRECT | flag)
    os.fsync(file)
    with mmap.mmap(-1, PAGE) as buffer:
        for number in range(10):
            buffer[:] = bytes([number]) * PAGE
            assert write_asynchronously(file, buffer, number * PAGE) == PAGE
    again(fs)
    os.close(file)
    assert (top / "file").read_bytes() == b"".join(bytes([number]) * PAGE for number in range(10))


def test_what_msync_returned_for_survives_a_kill(fs: FileSystem, top: Path) -> None:
    file = os.open(top / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 64 * PAGE)
    with mmap.mmap(file, 64 * PAGE) as view:
        for page in range(0, 64, 7):
            view[page * PAGE : page * PAGE + 6] = b"synced"
        view.flush()
        again(fs)
    os.close(file)
    data = (top / "file").read_bytes()
    assert [page for page in range(64) if data[page * PAGE :].startswith(b"synced")] == list(range(0, 64, 7))


def test_a_synced_directory_keeps_its_names_through_a_kill(fs: FileSystem, top: Path) -> None:
    directory = os.open(top, os.O_RDONLY)
    (top / "a").mkdir()
    (top / "gone").touch()
    os.symlink("x", top / "link")
    os.mkfifo(top / "fifo")
    os.rename(top / "a", top / "b")
    os.unlink(top / "gone")
    os.fsync(directory)
    again(fs)
    assert sorted(os.listdir(top)) == ["b", "fifo", "link"]


def test_an_open_file_of_a_dead_mount_answers_nothing(fs: FileSystem, top: Path) -> None:
    (top / "file").write_bytes(b"1")
    with (top / "file").open("rb") as file:
        again(fs)
        fails((errno.ENOTCONN, errno.ECONNABORTED), os.statvfs, file.fileno())
