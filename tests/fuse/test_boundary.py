"""Nothing that goes wrong in one request ends the mount or goes unseen."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import pytest

from tests.fuse.calls import hand_over

pytestmark = pytest.mark.mount


def code_of(operation, *arguments):
    with pytest.raises(OSError) as caught:
        operation(*arguments)
    return caught.value.errno


@pytest.mark.parametrize(
    ("error", "code", "logged"),
    [
        ("ValueError", errno.EIO, "ValueError: planned"),
        ("OSError", errno.ENOSPC, "planned"),
        ("KeyError group", errno.EIO, "KeyError: 'planned'"),
        ("BaseException", errno.EIO, "Panic: planned"),
    ],
)
def test_an_unexpected_exception_is_an_error_of_its_request_only(mount, root, error, code, logged):
    mount.expected_log = logged
    mount.command("break_next", "namespace.mkdir", error)
    assert code_of(os.mkdir, root / "d") == code
    os.mkdir(root / "d")
    assert mount.command("unexpected") == 1
    assert "Traceback" in mount.log


def test_a_posix_error_in_a_group_is_that_error(mount, root):
    mount.command("break_next", "namespace.mkdir", "ExceptionGroup")
    assert code_of(os.mkdir, root / "d") == errno.ENOENT
    assert mount.command("unexpected") == 0


def read_in_thread(path):
    """Reads a file in a thread; returns the thread and what comes of it."""
    result = []

    def read():
        try:
            result.append(path.read_bytes())
        except OSError as error:
            result.append(error.errno)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, result


@pytest.mark.parametrize(("error", "expected"), [(0, b"x" * 5000), (errno.EIO, errno.EIO)])
def test_a_request_waits_for_what_it_needs_while_others_go_on(mount, root, error, expected):
    (root / "f").write_bytes(b"x" * 5000)
    hand_over(root)
    handle = os.open(root / "f", os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    mount.command("need_pages", os.stat(root / "f").st_ino)
    thread, result = read_in_thread(root / "f")
    assert mount.command("waiting", 1)
    (root / "g").write_text("meanwhile")
    assert os.listdir(root) == ["f", "g"]
    mount.command("release", error)
    thread.join(30)
    assert result == [expected]
    mount.command("release", 0)
    assert (root / "f").read_bytes() == b"x" * 5000


def test_no_room_stops_new_files_and_no_write(mount, root):
    with open(root / "f", "w+b") as file:
        mount.command("fill_up", True)
        assert code_of(os.mkdir, root / "d") == errno.ENOSPC
        assert code_of(os.symlink, "t", root / "s") == errno.ENOSPC
        assert code_of(os.open, root / "g", os.O_CREAT) == errno.ENOSPC
        assert code_of(os.link, root / "f", root / "l") == errno.ENOSPC
        assert code_of(os.mkfifo, root / "p") == errno.ENOSPC
        assert os.statvfs(root).f_bavail == 0
        file.write(b"x" * 100_000)
        file.flush()
        os.fsync(file.fileno())
        file.truncate(1 << 40)
        os.rename(root / "f", root / "moved")
    os.unlink(root / "moved")
    mount.command("fill_up", False)
    (root / "d").mkdir()


CHANGES = {
    "unlink": lambda root: os.unlink(root / "f"),
    "rmdir": lambda root: os.rmdir(root / "d"),
    "rename": lambda root: os.rename(root / "f", root / "g"),
    "chown": lambda root: os.chown(root / "f", 5, 5),
    "truncate": lambda root: os.truncate(root / "f", 0),
    "mkdir": lambda root: os.mkdir(root / "e"),
    "removexattr": lambda root: os.removexattr(root / "f", "user.a"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_are_never_refused_wait_while_a_group_is_full(make_mount, change):
    """What takes a group's bytes only by its rows would grow it without bound otherwise."""
    mount = make_mount(xattr=True)
    (mount.path / "f").write_bytes(b"x")
    (mount.path / "d").mkdir()
    os.setxattr(mount.path / "f", "user.a", b"a")
    hand_over(mount.path)
    mount.command("fill_group")
    thread = threading.Thread(target=CHANGES[change], args=[mount.path], daemon=True)
    thread.start()
    assert mount.command("waiting", 1)
    assert thread.is_alive()
    mount.command("release", 0)
    thread.join(30)
    assert not thread.is_alive()
    assert mount.command("unexpected") == 0


@pytest.mark.parametrize("stop", ["fill_group", "fence"])
def test_reads_wait_for_no_access_time(make_mount, stop):
    """While it cannot be set, the group being full or the mount read-only, it stays as it is."""
    mount = make_mount(relatime=True)
    mount.expected_log = "read-only from now on: planned" if stop == "fence" else ""
    (mount.path / "d").mkdir()
    (mount.path / "f").write_bytes(b"contents")
    os.symlink("target", mount.path / "s")
    hand_over(mount.path)
    names = ("d", "f", "s")
    before = [os.lstat(mount.path / name).st_atime_ns for name in names]
    mount.command(stop)
    assert os.listdir(mount.path / "d") == []
    assert (mount.path / "f").read_bytes() == b"contents"
    assert os.readlink(mount.path / "s") == "target"
    assert [os.lstat(mount.path / name).st_atime_ns for name in names] == before


def test_many_files_that_go_when_they_are_closed_wait_while_a_group_is_full(mount, root):
    """A close is answered at once; the removal goes on by itself when there is a new group."""
    for number in range(300):
        (root / f"f{number}").touch()
    files = [os.open(root / f"f{number}", os.O_RDONLY) for number in range(300)]
    for number in range(300):
        os.unlink(root / f"f{number}")
    mount.command("fill_group")
    for file in files:
        os.close(file)
    assert mount.command("waiting", 1)
    assert len(mount.command("inodes")) == 301
    mount.command("release", 0)
    assert mount.command("settled")
    assert len(mount.command("inodes")) == 1


def test_a_fenced_mount_reads_and_changes_nothing(mount, root):
    mount.expected_log = "read-only from now on: planned"
    (root / "f").write_bytes(b"x")
    hand_over(root)
    handle = os.open(root / "f", os.O_RDWR)
    mount.command("fence")
    os.write(handle, b"y" * 10_000)
    assert code_of(os.fsync, handle) == errno.EIO
    with contextlib.suppress(OSError):
        os.close(handle)
    assert code_of(os.mkdir, root / "d") == errno.EROFS
    assert code_of(os.unlink, root / "f") == errno.EROFS
    assert code_of(os.chmod, root / "f", 0o600) == errno.EROFS
    assert code_of(os.rename, root / "f", root / "g") == errno.EROFS
    assert code_of(os.open, root / "f", os.O_WRONLY) == errno.EROFS
    assert os.listdir(root) == ["f"]
    assert (root / "f").exists()


def test_a_failed_mount_answers_everything_that_changes_with_eio(mount, root):
    mount.expected_log = "read-only from now on: planned"
    (root / "f").write_bytes(b"x")
    hand_over(root)
    mount.command("fail")
    directory = os.open(root, os.O_RDONLY)
    assert code_of(os.fsync, directory) == errno.EIO
    os.close(directory)
    assert code_of(os.mkdir, root / "d") == errno.EIO
    assert (root / "f").read_bytes() == b"x"


def test_a_dead_mount_stays_visibly_dead(mount, root):
    """Were the directory below visible, a node would start a new database in it."""
    (root / "f").write_text("x")
    mount.kill()
    assert code_of(os.listdir, root) == errno.ENOTCONN
    assert code_of((root / "new").write_text, "x") == errno.ENOTCONN
