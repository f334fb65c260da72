"""Names and paths: what a name may be, and which error comes first."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.posix.calls import fails, renameat2

LONG = b"n" * 255
TOO_LONG = b"n" * 256

# What takes a name that need not exist, and what needs one that does.
MAKERS: dict[str, Callable[[bytes], object]] = {
    "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
    "mkdir": os.mkdir,
    "mknod": os.mknod,
    "mkfifo": os.mkfifo,
    "symlink": lambda path: os.symlink(b"target", path),
    "link": lambda path: os.link(_other(path), path),
    "rename": lambda path: os.rename(_other(path), path),
    "exchange": lambda path: renameat2(_other(path), path, 2),
}
USERS: dict[str, Callable[[bytes], object]] = {
    "open": lambda path: os.open(path, os.O_RDONLY),
    "stat": os.stat,
    "lstat": os.lstat,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "readlink": os.readlink,
    "chmod": lambda path: os.chmod(path, 0o600),
    "chown": lambda path: os.chown(path, -1, -1),
    "truncate": lambda path: os.truncate(path, 0),
    "utime": os.utime,
    "link": lambda path: os.link(path, path + b"2"),
    "rename": lambda path: os.rename(path, path + b"2"),
    "listdir": os.listdir,
    "chdir": os.chdir,
    "statvfs": os.statvfs,
}


def _other(path: bytes) -> bytes:
    """An existing file beside the place where names are tried."""
    return os.environb[b"QSFS_PLACE"] + b"/other"


@pytest.fixture
def top(place: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setenv("QSFS_PLACE", str(place))
    return os.fsencode(place)


def make_other(top: bytes) -> None:
    with open(top + b"/other", "wb"):
        pass


def all_fail(code: int, calls: Iterable[Callable[[bytes], object]], *paths: bytes) -> None:
    for call in calls:
        for path in paths:
            fails(code, call, path)


def test_a_name_of_255_bytes_is_not_too_long(top: bytes) -> None:
    for name, call in MAKERS.items():
        make_other(top)
        path = top + b"/" + LONG
        if name == "exchange":
            os.mkdir(path)
        call(path)
        assert LONG in os.listdir(top)
        (os.rmdir if name == "mkdir" else os.unlink)(path)


def test_making_a_longer_name_fails(top: bytes) -> None:
    make_other(top)
    all_fail(errno.ENAMETOOLONG, MAKERS.values(), top + b"/" + TOO_LONG)
    assert os.listdir(top) == [b"other"]


def test_using_a_longer_name_fails(top: bytes) -> None:
    all_fail(errno.ENAMETOOLONG, USERS.values(), top + b"/" + TOO_LONG, top + b"/" + TOO_LONG + b"/below")


def test_what_is_not_there(top: bytes) -> None:
    all_fail(errno.ENOENT, USERS.values(), top + b"/missing", top + b"/missing/below", b"")


def test_a_file_is_no_directory_to_look_in(top: bytes) -> None:
    make_other(top)
    for calls in (MAKERS, USERS):
        all_fail(errno.ENOTDIR, calls.values(), top + b"/other/below", top + b"/other/" + LONG)


def test_links_that_lead_in_circles(top: bytes) -> None:
    make_other(top)
    os.symlink(b"two", top + b"/one")
    os.symlink(b"one", top + b"/two")
    for calls in (MAKERS, USERS):
        all_fail(errno.ELOOP, calls.values(), top + b"/one/below")


def test_a_circle_at_the_end_of_the_path(top: bytes) -> None:
    os.symlink(b"circle", top + b"/circle")
    followers = ("open", "stat", "chmod", "truncate", "utime", "chdir", "statvfs")
    all_fail(errno.ELOOP, [USERS[name] for name in followers], top + b"/circle")


@pytest.mark.parametrize("what", ["file", "directory", "symlink", "dangling", "fifo", "dot"])
def test_what_exists_is_not_made_again(top: bytes, what: str) -> None:
    make_other(top)
    path = top + b"/there"
    match what:
        case "file":
            os.mknod(path)
        case "directory":
            os.mkdir(path)
        case "symlink":
            os.symlink(b"other", path)
        case "dangling":
            os.symlink(b"nowhere", path)
        case "fifo":
            os.mkfifo(path)
        case "dot":
            path = top + b"/."
    all_fail(errno.EEXIST, [MAKERS[name] for name in ("mkdir", "mknod", "mkfifo", "symlink", "link")], path)


def test_exclusive_creation_follows_no_link(top: bytes) -> None:
    os.symlink(b"nowhere", top + b"/link")
    fails(errno.EEXIST, os.open, top + b"/link", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(os.open(top + b"/link", os.O_CREAT | os.O_WRONLY))
    assert sorted(os.listdir(top)) == [b"link", b"nowhere"]


def test_a_path_may_have_4095_bytes(top: bytes) -> None:
    os.chdir(top)
    steps = b"./" * 2046
    with open(steps + b"abc", "wb"):
        pass
    assert len(steps + b"abc") == 4095
    assert os.stat(steps + b"abc").st_size == 0
    fails(errno.ENAMETOOLONG, os.stat, steps + b"abcd")


def test_a_slash_at_the_end_asks_for_a_directory(top: bytes) -> None:
    make_other(top)
    calls = ("open", "stat", "unlink", "chmod", "truncate", "rename", "link")
    all_fail(errno.ENOTDIR, [USERS[name] for name in calls], top + b"/other/")


def test_every_byte_but_slash_and_zero_may_be_in_a_name(top: bytes) -> None:
    names = [bytes([byte]) for byte in range(1, 256) if bytes([byte]) not in (b"/", b".")]
    names += [b"..." + bytes([byte]) * 200 for byte in (1, 10, 92, 127, 128, 255)]
    for name in names:
        with open(top + b"/" + name, "wb") as file:
            file.write(name)
    assert sorted(os.listdir(top)) == sorted(names)
    for name in names:
        with open(top + b"/" + name, "rb") as file:
            assert file.read() == name


def test_names_differ_by_bytes_not_by_letters(top: bytes) -> None:
    names = ["a", "A", "\u00e9", "e\u0301"]
    for name in names:
        os.mkdir(top + b"/" + name.encode())
    assert sorted(os.listdir(top)) == sorted(name.encode() for name in names)


def test_what_was_not_there_is_seen_once_it_is(top: bytes) -> None:
    """The kernel keeps absent names too."""
    for call in (os.mkdir, os.mknod, lambda path: os.symlink(b"x", path)):
        fails(errno.ENOENT, os.lstat, top + b"/name")
        call(top + b"/name")
        os.lstat(top + b"/name")
        (os.rmdir if call is os.mkdir else os.unlink)(top + b"/name")
    fails(errno.ENOENT, os.lstat, top + b"/name")
    make_other(top)
    os.rename(top + b"/other", top + b"/name")
    os.lstat(top + b"/name")
    fails(errno.ENOENT, os.lstat, top + b"/other")
