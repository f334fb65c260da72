"""Locks between processes: flock, POSIX record locks, open-file-description locks."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.calls import OFD_GETLK, OFD_SETLK, OFD_SETLKW, fails, lock

BUSY = (errno.EAGAIN, errno.EACCES)


def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    return os.open(path, flags, 0o644)


def in_child(action: Callable[[], object]) -> None:
    """`action` must succeed in a child."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_flock_excludes_other_open_files(place: Path) -> None:
    one, two = opened(place / "file"), opened(place / "file")
    fcntl.flock(one, fcntl.LOCK_EX)
    fails(errno.EWOULDBLOCK, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fails(errno.EWOULDBLOCK, fcntl.flock, two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_SH)
    fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fails(errno.EWOULDBLOCK, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_UN)
    fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(two)
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    in_child(lambda: fails(errno.EWOULDBLOCK, fcntl.flock, opened(place / "file"), fcntl.LOCK_EX | fcntl.LOCK_NB))


def test_flock_is_inherited_and_goes_with_the_last_copy(place: Path) -> None:
    one, two = opened(place / "file"), opened(place / "file")
    fcntl.flock(one, fcntl.LOCK_EX)
    copy = os.dup(one)
    os.close(one)
    fails(errno.EWOULDBLOCK, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    in_child(lambda: fcntl.flock(copy, fcntl.LOCK_UN))
    fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_record_locks_belong_to_processes(place: Path) -> None:
    file = opened(place / "file")
    fcntl.lockf(file, fcntl.LOCK_EX, 100, 0)

    def other() -> None:
        own = opened(place / "file")
        fails(BUSY, fcntl.lockf, own, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 99)
        fails(BUSY, fcntl.lockf, own, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 50)
        fcntl.lockf(own, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, 100)
        answer = fcntl.fcntl(own, fcntl.F_GETLK, lock(fcntl.F_WRLCK))
        kind, _, start, length, process = struct.unpack("hhqqi4x", answer)
        assert (kind, start, length, process) == (fcntl.F_WRLCK, 0, 100, os.getppid())

    in_child(other)
    fcntl.lockf(file, fcntl.LOCK_UN, 50, 25)
    in_child(lambda: fcntl.lockf(opened(place / "file"), fcntl.LOCK_EX | fcntl.LOCK_NB, 50, 25))
    in_child(lambda: fails(BUSY, fcntl.lockf, opened(place / "file"), fcntl.LOCK_EX | fcntl.LOCK_NB, 51, 25))
    os.close(opened(place / "file"))  # closing any descriptor of the file frees the process's locks
    in_child(lambda: fcntl.lockf(opened(place / "file"), fcntl.LOCK_EX | fcntl.LOCK_NB))


def test_a_lock_waits_until_it_is_free(place: Path) -> None:
    for take in (
        lambda file: fcntl.flock(file, fcntl.LOCK_EX),
        lambda file: fcntl.lockf(file, fcntl.LOCK_EX),
        lambda file: fcntl.fcntl(file, OFD_SETLKW, lock(fcntl.F_WRLCK)),
    ):
        file = opened(place / "file")
        reader, writer = os.pipe()
        take(file)
        child = os.fork()
        if child == 0:
            os.close(file)
            own = opened(place / "file")
            os.write(writer, b"1")
            take(own)
            os._exit(0 if (place / "file").read_bytes() == b"done" else 1)
        os.read(reader, 1)
        os.pwrite(file, b"done", 0)
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.lockf(file, fcntl.LOCK_UN)
        os.close(file)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.truncate(place / "file", 0)


def test_a_deadlock_is_refused(place: Path) -> None:
    file = opened(place / "file")
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        own = opened(place / "file")
        fcntl.lockf(own, fcntl.LOCK_EX, 1, 1)
        os.write(ready[1], b"1")
        fcntl.lockf(own, fcntl.LOCK_EX, 1, 0)
        os._exit(0)
    os.read(ready[0], 1)
    while f"-> POSIX  ADVISORY  WRITE {child}" not in Path("/proc/locks").read_text():
        pass
    fails(errno.EDEADLK, fcntl.lockf, file, fcntl.LOCK_EX, 1, 1)
    fcntl.lockf(file, fcntl.LOCK_UN)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(go[0])


def test_locks_of_open_files_exclude_within_a_process(place: Path) -> None:
    one, two = opened(place / "file"), opened(place / "file")
    fcntl.fcntl(one, OFD_SETLK, lock(fcntl.F_WRLCK, 0, 10))
    fails(BUSY, fcntl.fcntl, two, OFD_SETLK, lock(fcntl.F_WRLCK, 9, 1))
    fcntl.fcntl(two, OFD_SETLK, lock(fcntl.F_WRLCK, 10, 1))
    kind, _, start, length, process = struct.unpack(
        "hhqqi4x", fcntl.fcntl(two, OFD_GETLK, lock(fcntl.F_RDLCK, 0, 10))
    )
    assert (kind, start, length, process) == (fcntl.F_WRLCK, 0, 10, -1)
    fails(BUSY, fcntl.lockf, two, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
    os.close(one)
    fcntl.fcntl(two, OFD_SETLK, lock(fcntl.F_WRLCK, 0, 10))


def test_a_lock_needs_the_access_that_it_promises(place: Path) -> None:
    opened(place / "file")
    reading, writing = opened(place / "file", os.O_RDONLY), opened(place / "file", os.O_WRONLY)
    fails(errno.EBADF, fcntl.lockf, reading, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fails(errno.EBADF, fcntl.lockf, writing, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(reading, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", range(2))
def test_locks_end_with_their_process(place: Path, number: int) -> None:
    def take() -> None:
        file = opened(place / "file")
        fcntl.flock(file, fcntl.LOCK_EX) if number else fcntl.lockf(file, fcntl.LOCK_EX)

    in_child(take)
    file = opened(place / "file")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
