"""The system calls on a file's bytes and attributes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess

import pytest

from qsfs.store.schema import PAGE
from tests.fuse.calls import as_nobody, hand_over, in_child, msync

pytestmark = pytest.mark.mount

TIB = 1 << 40


def test_bytes_come_back_as_they_were_written(root):
    data = os.urandom(5 * (1 << 20) + 123)
    (root / "f").write_bytes(data)
    assert (root / "f").read_bytes() == data
    with open(root / "f", "r+b") as file:
        file.seek(1_000_001)
        file.write(b"changed")
    assert (root / "f").read_bytes() == data[:1_000_001] + b"changed" + data[1_000_008:]


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR])
def test_appends_go_to_the_end(root, access):
    """Also through a handle that may not read: the kernel reads through it to fill the last page."""
    (root / "f").write_bytes(b"x" * 5000)
    subprocess.run(["sync", "-f", root], check=True)
    one, two = (os.open(root / "f", access | os.O_APPEND) for _ in range(2))
    os.posix_fadvise(one, 0, 0, os.POSIX_FADV_DONTNEED)
    for number in range(50):
        os.write(one, b"a%d" % number)
        os.write(two, b"b%d" % number)
    os.fsync(one)
    os.close(one)
    os.close(two)
    wanted = b"x" * 5000 + b"".join(b"a%d" % n + b"b%d" % n for n in range(50))
    assert (root / "f").read_bytes() == wanted


def test_a_write_only_handle_fills_a_page_that_is_not_cached(root, mount):
    (root / "f").write_bytes(b"x" * 3 * PAGE)
    hand_over(root)
    handle = os.open(root / "f", os.O_WRONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    mount.requests()
    os.pwrite(handle, b"y", PAGE + 5)
    assert mount.requests().get("read"), "the page was still cached: this proves nothing"
    os.close(handle)
    assert (root / "f").read_bytes() == b"x" * (PAGE + 5) + b"y" + b"x" * (2 * PAGE - 6)


def test_a_shared_map_is_written_and_synced(root, mount):
    with open(root / "f", "w+b") as file:
        file.truncate(64 * PAGE)
        with mmap.mmap(file.fileno(), 64 * PAGE) as shared:
            shared[10:15] = b"hello"
            shared[40 * PAGE : 40 * PAGE + 5] = b"world"
            mount.command("take_syncs")
            msync(ctypes.addressof(ctypes.c_char.from_buffer(shared)), 64 * PAGE)
            assert mount.command("take_syncs") == [[os.stat(root / "f").st_ino, True]]
            shared[20:22] = b"no"
        assert os.pread(file.fileno(), 22, 0) == bytes(10) + b"hello" + bytes(5) + b"no"
    hand_over(root)
    with open(root / "f", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read()[40 * PAGE :][:5] == b"world"


def test_a_sparse_file_of_terabytes_takes_no_room(root):
    with open(root / "f", "w+b") as file:
        file.truncate(2 * TIB)
        assert (os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_blocks) == (2 * TIB, 0)
        os.pwrite(file.fileno(), b"x" * PAGE, TIB)
        os.pwrite(file.fileno(), b"end", 2 * TIB - 3)
        os.fsync(file.fileno())
    found = os.stat(root / "f")
    assert (found.st_size, found.st_blocks) == (2 * TIB, 2 * PAGE // 512)
    assert subprocess.check_output(["du", "-k", root / "f"]).split()[0] == b"8"
    with open(root / "f", "r+b") as file:
        assert os.pread(file.fileno(), 10, TIB - 5) == bytes(5) + b"xxxxx"
        assert os.pread(file.fileno(), 10, 2 * TIB - 3) == b"end"
        file.truncate(TIB)
        file.truncate(2 * TIB)
        assert os.pread(file.fileno(), 10, TIB) == bytes(10)
    assert os.stat(root / "f").st_blocks == 0


def test_the_largest_file_of_the_kernel(root):
    (root / "f").touch()
    os.truncate(root / "f", 2**63 - PAGE)
    assert os.stat(root / "f").st_size == 2**63 - PAGE
    with open(root / "f", "rb") as file:
        assert os.pread(file.fileno(), 4, 2**63 - 2 * PAGE) == bytes(4)


def test_cutting_a_file_never_brings_old_bytes_back(root):
    with open(root / "f", "w+b") as file:
        os.pwrite(file.fileno(), b"secret" * 1000, 0)
        os.fsync(file.fileno())
        os.ftruncate(file.fileno(), 3)
        os.ftruncate(file.fileno(), 6000)
        assert os.pread(file.fileno(), 6000, 0) == b"sec" + bytes(5997)
    with open(root / "f", "wb"):
        assert os.stat(root / "f").st_size == 0


def test_o_direct(root):
    handle = os.open(root / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, 4 * PAGE) as buffer:
        buffer[:] = os.urandom(4 * PAGE)
        os.pwritev(handle, [buffer], PAGE)
        with mmap.mmap(-1, 4 * PAGE) as back:
            os.preadv(handle, [back], PAGE)
            assert back[:] == buffer[:]
        assert (root / "f").read_bytes() == bytes(PAGE) + buffer[:]
    os.close(handle)


@pytest.mark.parametrize(
    "times", [(1, 2), (1_700_000_000_123_456_789, 5), (-1_000_000_001, -5), (2**33 * 10**9, 0)]
)
@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_times_are_kept_to_the_nanosecond(root, times, kind):
    path = root / "f"
    {"file": path.touch, "directory": path.mkdir, "symlink": lambda: path.symlink_to("x")}[kind]()
    before = os.lstat(path).st_ctime_ns
    os.utime(path, ns=times, follow_symlinks=False)
    found = os.lstat(path)
    wanted = tuple(min(time, 2**63 - 1) for time in times)
    assert (found.st_atime_ns, found.st_mtime_ns) == wanted
    assert found.st_ctime_ns >= before


def test_a_file_keeps_the_times_of_its_writes(root, mount):
    """The kernel sets them while it holds the pages back, and hands them over."""
    (root / "f").write_bytes(b"x")
    shown = os.stat(root / "f")
    hand_over(root)
    number = shown.st_ino
    assert mount.command("times", number)[1:] == [shown.st_mtime_ns, shown.st_ctime_ns]
    os.utime(root / "f", ns=(5, 6))
    (root / "f").read_bytes()
    hand_over(root)
    assert mount.command("times", number)[:2] == [5, 6]


def test_chmod_and_chown(root):
    (root / "f").touch()
    os.chmod(root / "f", 0o1640)
    os.chown(root / "f", 4_000_000_000, 7)
    found = os.stat(root / "f")
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o1640, 4_000_000_000, 7)
    with pytest.raises(PermissionError):
        raise OSError(as_nobody(root, lambda: os.chmod("f", 0o777)), "")


def test_umask(root):
    old = os.umask(0o027)
    try:
        (root / "d").mkdir()
        os.close(os.open(root / "f", os.O_CREAT, 0o666))
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(root / "d").st_mode) == 0o750
    assert stat.S_IMODE(os.stat(root / "f").st_mode) == 0o640


def set_ids(root):
    return stat.S_IMODE(os.stat(root / "f").st_mode) & 0o6000


@pytest.fixture
def privileged(root):
    """A file with set-id bits that everybody may write."""
    (root / "f").write_bytes(b"x" * 100)
    os.chmod(root / "f", 0o6777)
    assert set_ids(root) == 0o6000
    return root / "f"


def write_byte(path):
    handle = os.open(path, os.O_WRONLY)
    os.pwrite(handle, b"y", 5)
    os.fsync(handle)
    os.close(handle)


def test_root_keeps_the_set_id_bits_through_writes_and_truncations(root, privileged):
    write_byte(privileged)
    os.truncate(privileged, 50)
    os.close(os.open(privileged, os.O_WRONLY | os.O_TRUNC))
    hand_over(root)
    assert set_ids(root) == 0o6000


def test_a_write_that_is_not_cached_takes_the_set_id_bits(make_mount):
    """Nobody knows who made it."""
    root = make_mount(policies=({"match": "f", "write_through": True},)).path
    (root / "f").write_bytes(b"x")
    (root / "f").chmod(0o6777)
    write_byte(root / "f")
    assert wait_until(lambda: set_ids(root) == 0)


def test_a_write_by_another_takes_the_set_id_bits_at_once(root, privileged):
    assert as_nobody(root, lambda: os.pwrite(os.open("f", os.O_WRONLY), b"y", 5) - 1) == 0
    assert set_ids(root) == 0


def test_truncations_by_others_take_the_set_id_bits(root, privileged):
    for action in (
        lambda: os.truncate("f", 50),
        lambda: os.close(os.open("f", os.O_WRONLY | os.O_TRUNC)),
    ):
        os.chmod(privileged, 0o6777)
        assert as_nobody(root, action) == 0
        assert set_ids(root) == 0


def test_chown_takes_the_set_id_bits(root, privileged):
    for action in (
        lambda: os.chown(privileged, 5, -1),
        lambda: os.chown(privileged, -1, 6),
        lambda: os.chown(privileged, -1, -1),
    ):
        os.chmod(privileged, 0o6777)
        action()
        assert set_ids(root) == 0


def test_chmod_after_a_write_keeps_the_set_id_bits(root):
    """As an installer does it: the pages must not arrive after the chmod and take the bits again."""
    with open(root / "f", "wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        os.fchmod(file.fileno(), 0o6755)
        os.fsync(file.fileno())
    hand_over(root)
    assert set_ids(root) == 0o6000


def wait_until(condition):
    """The kernel is told by another thread, so a moment may pass; nothing else can make it true."""
    for _ in range(1000):
        if condition():
            return True
        os.sched_yield()
    return bool(condition())


def test_set_group_id_directories_hand_their_group_down(root):
    (root / "d").mkdir()
    os.chown(root / "d", 0, 77)
    os.chmod(root / "d", 0o2777)
    assert as_nobody(root, lambda: os.mkdir("d/e")) == 0
    assert as_nobody(root, lambda: os.close(os.open("d/f", os.O_CREAT, 0o644))) == 0
    inner, file = os.stat(root / "d" / "e"), os.stat(root / "d" / "f")
    assert (inner.st_gid, inner.st_uid, bool(inner.st_mode & stat.S_ISGID)) == (77, 65534, True)
    assert (file.st_gid, file.st_uid) == (77, 65534)


def test_permissions_hold_for_others(root):
    (root / "private").mkdir(mode=0o700)
    (root / "private" / "f").touch()
    (root / "f").write_text("x")
    os.chmod(root / "f", 0o640)
    (root / "sticky").mkdir()
    os.chmod(root / "sticky", 0o1777)
    (root / "sticky" / "mine").touch()
    denied = (
        lambda: os.close(os.open("f", os.O_RDONLY)),
        lambda: os.close(os.open("f", os.O_WRONLY)),
        lambda: os.listdir("private") and 0,
        lambda: os.stat("private/f") and 0,
        lambda: os.mkdir("new"),
        lambda: os.unlink("f"),
    )
    assert [as_nobody(root, action) for action in denied] == [errno.EACCES] * len(denied)
    forbidden = (
        lambda: os.chmod("f", 0o777),
        lambda: os.chown("f", 65534, -1),
        lambda: os.unlink("sticky/mine"),
        lambda: os.rename("sticky/mine", "sticky/x"),
    )
    assert [as_nobody(root, action) for action in forbidden] == [errno.EPERM] * len(forbidden)
    assert as_nobody(root, lambda: os.close(os.open("sticky/own", os.O_CREAT))) == 0
    assert as_nobody(root, lambda: os.unlink("sticky/own")) == 0


def test_locks_are_the_kernels(root):
    (root / "f").touch()
    with open(root / "f", "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1_000_000)

        def lock():
            with open(root / "f", "r+b") as other:
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1_000_000)

        assert in_child(lock) in (errno.EAGAIN, errno.EACCES)
        fcntl.lockf(file, fcntl.LOCK_UN)
        assert in_child(lock) == 0


def test_statvfs_shows_the_usable_size(root):
    found = os.statvfs(root)
    assert found.f_blocks * found.f_frsize == 1 << 40
    assert found.f_bavail * found.f_frsize == 1 << 39
    assert (found.f_namemax, found.f_ffree) == (255, 1_000_000)
    assert subprocess.check_output(["df", "--output=size,avail", "-B1", root]).split()[-2:] == [
        b"%d" % (1 << 40),
        b"%d" % (1 << 39),
    ]


def test_what_cannot_be_carried_says_so(root):
    """Programs fall back: the codes are the ones that they look for."""
    (root / "f").write_bytes(b"x" * PAGE)
    with open(root / "f", "r+b") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(file.fileno(), 0, ctypes.c_long(0), ctypes.c_long(PAGE)) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        with pytest.raises(OSError) as caught:
            os.open(root, os.O_TMPFILE | os.O_RDWR)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == PAGE
