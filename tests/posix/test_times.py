"""Times: who may set them, their range, and what every operation does to them."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.posix.calls import EXCHANGE, NOW, OMIT, fails, fallocate, libc, renameat2, utimensat
from tests.posix.users import ALICE, BOB, run

as_root = pytest.mark.actors("root")
OLD = (1_000_000_000, 123_456_789)
NS = OLD[0] * 10**9 + OLD[1]
COARSE = 5  # CLOCK_REALTIME_COARSE
PAST = NS - 10**9


def set_old(*paths: Path) -> None:
    for path in paths:
        utimensat(path, (OLD, OLD), follow=False)


def times(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns


def tick() -> int:
    """Waits for the coarse clock that local file systems use to pass this moment; what it says then.

    Past the exact time, because the kernel never stamps earlier than its last exact stamp of any file.
    """
    start = time.time_ns()
    while (now := time.clock_gettime_ns(COARSE)) <= start:
        pass
    return now


class Marks:
    """Which times of some files an action changed, as letters: `m`, `c` or both."""

    def __init__(self, *paths: Path) -> None:
        self._files = [os.open(path, os.O_PATH | os.O_NOFOLLOW) for path in paths]
        self._before = self._now()
        tick()

    def _now(self) -> list[tuple[int, int]]:
        return [(found.st_mtime_ns, found.st_ctime_ns) for found in map(os.fstat, self._files)]

    def changed(self) -> list[str]:
        """For each of the files."""
        found = []
        for before, after in zip(self._before, self._now(), strict=True):
            assert before <= after
            found.append("".join(letter for letter, a, b in zip("mc", before, after, strict=True) if a != b))
        self._before = self._now()
        tick()
        return found


def test_making_a_file_marks_it_and_its_directory(place: Path) -> None:
    makers: tuple[Callable[[Path], object], ...] = (
        os.mkdir,
        os.mknod,
        os.mkfifo,
        partial(os.symlink, "x"),
        lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
    )
    for number, make in enumerate(makers):
        parent = Marks(place)
        before = tick()
        make(place / str(number))
        atime, mtime, ctime = times(place / str(number))
        assert before <= atime == mtime == ctime <= time.time_ns()
        assert parent.changed() == ["mc"]


@pytest.mark.parametrize("call", ["write", "pwrite", "append", "truncate", "ftruncate", "grow", "O_TRUNC", "fsynced"])
def test_changing_contents_marks_mtime_and_ctime(place: Path, call: str) -> None:
    path = place / "file"
    path.write_bytes(b"contents")
    marks = Marks(path, place)
    flags = os.O_WRONLY | (os.O_APPEND if call == "append" else 0) | (os.O_TRUNC if call == "O_TRUNC" else 0)
    match call:
        case "truncate":
            os.truncate(path, 3)
        case "grow":
            os.truncate(path, 1000)
        case _:
            file = os.open(path, flags)
            if call == "ftruncate":
                os.ftruncate(file, 1)
            elif call != "O_TRUNC":
                os.pwrite(file, b"new", 2) if call == "pwrite" else os.write(file, b"new")
            if call == "fsynced":
                os.fsync(file)
            os.close(file)
    assert marks.changed() == ["mc", ""]


def test_times_of_a_write_stay_when_it_is_written_back(place: Path) -> None:
    path = place / "file"
    with path.open("wb") as file:
        file.write(b"contents")
        file.flush()
        shown = times(path)
        tick()
        os.fsync(file.fileno())
        assert times(path) == shown
    assert times(path) == shown


def test_truncating_to_the_same_size(place: Path) -> None:
    """Linux marks both times even so; POSIX asks for it only where the size changes."""
    path = place / "file"
    path.write_bytes(b"contents")
    marks = Marks(path)
    os.truncate(path, 8)
    assert marks.changed() == ["mc"]


def test_writing_nothing_marks_nothing(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"contents")
    marks = Marks(path)
    file = os.open(path, os.O_WRONLY)
    os.write(file, b"")
    os.close(file)
    assert marks.changed() == [""]


def test_changing_attributes_marks_ctime(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"contents")
    marks = Marks(path, place)
    path.chmod(0o600)
    assert marks.changed() == ["c", ""]
    path.chmod(0o600)
    assert marks.changed() == ["c", ""]
    os.chown(path, os.geteuid(), os.getegid())
    assert marks.changed() == ["c", ""]
    set_old(path)
    assert times(path)[1] == NS
    assert times(path)[2] > NS


def test_links_and_renames_mark_ctime_and_the_directories(place: Path) -> None:
    one, two, path = place / "one", place / "two", place / "one" / "file"
    one.mkdir()
    two.mkdir()
    path.write_bytes(b"1")
    marks = Marks(path, one, two)
    os.link(path, two / "link")
    assert marks.changed() == ["c", "", "mc"]
    os.rename(path, two / "file")
    assert marks.changed() == ["c", "mc", "mc"]
    os.unlink(two / "link")
    assert marks.changed() == ["c", "", "mc"]
    os.rename(two / "file", two / "new")
    assert marks.changed() == ["c", "", "mc"]
    (two / "over").write_bytes(b"")
    replaced = Marks(two / "over")
    marks.changed()
    os.rename(two / "new", two / "over")
    assert marks.changed() == ["c", "", "mc"]
    assert replaced.changed() == ["c"]


def test_exchanging_marks_both(place: Path) -> None:
    for name in ("a", "b"):
        (place / name).mkdir()
        (place / name / "file").write_bytes(b"1")
    marks = Marks(place / "a", place / "b", place / "a" / "file", place / "b" / "file")
    renameat2(place / "a" / "file", place / "b" / "file", EXCHANGE)
    assert marks.changed() == ["mc", "mc", "c", "c"]


def test_removing_marks_the_directory(place: Path) -> None:
    (place / "d" / "sub").mkdir(parents=True)
    marks = Marks(place / "d", place)
    (place / "d" / "sub").rmdir()
    assert marks.changed() == ["mc", ""]
    os.mkdir(place / "d" / "new")
    assert marks.changed() == ["mc", ""]


def test_what_fails_marks_nothing(place: Path) -> None:
    (place / "d" / "sub").mkdir(parents=True)
    (place / "file").write_bytes(b"1")
    marks = Marks(place, place / "d", place / "file")
    fails(errno.ENOTEMPTY, os.rmdir, place / "d")
    fails(errno.EEXIST, os.link, place / "file", place / "d")
    fails(errno.ENOTDIR, os.rename, place / "d", place / "file")
    fails(errno.EISDIR, os.unlink, place / "d")
    fails(errno.EISDIR, os.rename, place / "file", place / "d")
    assert marks.changed() == ["", "", ""]


def make_readable(path: Path, what: str) -> Callable[[], object]:
    """Something at `path`, and how it is read."""
    if what == "directory":
        path.mkdir()
        (path / "file").touch()
        return lambda: os.listdir(path)
    if what == "symlink":
        path.symlink_to("target")
        return path.readlink
    if what == "program":
        path.write_bytes(b"#!/bin/true\n")
        path.chmod(0o755)
        return lambda: os.waitpid(os.spawnv(os.P_NOWAIT, path, ["program"]), 0)
    path.write_bytes(b"contents")
    return path.read_bytes if what == "file" else lambda: map_and_read(path)


def map_and_read(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view[:]


@pytest.mark.parametrize("what", ["file", "map", "program", "directory", "symlink"])
def test_reading_marks_atime_where_it_is_due(place: Path, what: str) -> None:
    """relatime: if it is not newer than mtime and ctime, and never again before one of them is."""
    path = place / "x"
    read = make_readable(path, what)
    set_old(path)
    for _ in range(2):
        before = times(path)
        tick()
        read()
        first = times(path)
        assert first[0] > before[2]
        assert first[1:] == before[1:]
        tick()
        read()
        assert times(path) == first
        os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)


def test_a_read_of_what_was_just_written_marks_atime(place: Path) -> None:
    """Also where the kernel has all of it, so that no request tells of the read."""
    path = place / "file"
    path.write_bytes(b"contents")
    for _ in range(2):
        tick()
        with path.open("r+b") as file:
            file.write(b"changed.")
        tick()
        path.read_bytes()
        atime, mtime, _ = times(path)
        assert atime > mtime


def test_reading_a_large_file_that_was_just_written_marks_atime(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"contents" * 100_000)
    tick()
    path.read_bytes()
    atime, mtime, _ = times(path)
    assert atime > mtime


def test_who_asks_for_it_marks_no_atime(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"contents")
    set_old(path)
    file = os.open(path, os.O_RDONLY | os.O_NOATIME)
    os.read(file, 10)
    os.close(file)
    file = os.open(path, os.O_WRONLY)
    os.close(file)
    assert times(path)[0] == NS


def test_opening_alone_marks_no_atime(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"contents")
    set_old(path)
    os.close(os.open(path, os.O_RDONLY))
    assert times(path)[0] == NS


def test_reading_what_changed_since_it_was_opened_marks_atime(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"contents")
    with path.open("rb", buffering=0) as file:
        file.read()
        tick()
        path.write_bytes(b"changed.")
        tick()
        file.seek(0)
        file.read()
    atime, mtime, _ = times(path)
    assert atime > mtime


def test_times_can_be_set_apart(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"1")
    utimensat(path, ((5, 7), (11, 13)))
    assert times(path)[:2] == (5_000_000_007, 11_000_000_013)
    utimensat(path, ((0, OMIT), (17, 19)))
    assert times(path)[:2] == (5_000_000_007, 17_000_000_019)
    utimensat(path, ((23, 29), (0, OMIT)))
    assert times(path)[:2] == (23_000_000_029, 17_000_000_019)
    before = tick()
    utimensat(path, ((0, NOW), (0, OMIT)))
    assert before <= times(path)[0] <= time.time_ns()
    assert times(path)[1] == 17_000_000_019
    utimensat(path, ((31, 37), (0, NOW)))
    assert times(path)[0] == 31_000_000_037
    assert before <= times(path)[1] <= time.time_ns()
    utimensat(path, None)
    assert times(path)[0] >= before


def test_omitting_both_changes_nothing(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"1")
    marks = Marks(path)
    utimensat(path, ((0, OMIT), (0, OMIT)))
    assert marks.changed() == [""]


def test_wrong_nanoseconds_are_refused(place: Path) -> None:
    for wrong in (10**9, -1, NOW - 1 if NOW - 1 != OMIT else 10**9 + 1):
        fails(errno.EINVAL, utimensat, place, ((1, wrong), (1, 1)))
        fails(errno.EINVAL, utimensat, place, ((1, 1), (1, wrong)))


@pytest.mark.parametrize("what", ["file", "directory", "symlink", "fifo"])
@pytest.mark.parametrize(
    "seconds", [1 - 2**31, -1, 0, 2**31 - 1, 2**31, 2**32, 2**33], ids=str
)
def test_times_before_1970_and_after_2038(place: Path, what: str, seconds: int) -> None:
    path = place / "x"
    match what:
        case "file":
            path.write_bytes(b"1")
        case "directory":
            path.mkdir()
        case "symlink":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
    utimensat(path, ((seconds, 1), (seconds, 999_999_999)), follow=False)
    assert times(path)[:2] == (seconds * 10**9 + 1, seconds * 10**9 + 999_999_999)


def test_times_after_2262(place: Path) -> None:
    path = place / "directory"
    path.mkdir()
    utimensat(path, ((10**10, 1), (10**10, 2)))
    assert times(path)[:2] == (10**19 + 1, 10**19 + 2)


@as_root
def test_who_may_set_times(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"1")
    os.chown(path, ALICE.uid, ALICE.gid)
    path.chmod(0o666)
    run(ALICE, partial(utimensat, path, (OLD, OLD)))
    run(BOB, partial(fails, errno.EPERM, utimensat, path, (OLD, OLD)))
    run(BOB, partial(fails, errno.EPERM, utimensat, path, ((0, NOW), (0, OMIT))))
    run(BOB, partial(utimensat, path, None))
    run(BOB, partial(utimensat, path, ((0, NOW), (0, NOW))))
    run(BOB, partial(utimensat, path, ((0, OMIT), (0, OMIT))))
    path.chmod(0o644)
    run(BOB, partial(fails, errno.EACCES, utimensat, path, None))
    run(BOB, partial(fails, errno.EACCES, utimensat, path, ((0, NOW), (0, NOW))))


def test_times_set_on_an_open_file_win_over_its_writes(place: Path) -> None:
    """`cp -p` and `tar` write, set times and close: the times must stay."""
    path = place / "file"
    with path.open("wb") as file:
        file.write(b"contents")
        file.flush()
        libc.futimens(file.fileno(), None)
        os.utime(file.fileno(), ns=(NS, PAST))
    assert times(path)[:2] == (NS, PAST)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    assert times(path)[:2] == (NS, PAST)


def test_allocating_marks_ctime(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"1")
    marks = Marks(path)
    with path.open("r+b") as file:
        fallocate(file.fileno(), 0, 0, 100_000)
        assert "c" in marks.changed()[0]
