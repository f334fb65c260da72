"""rename(2) and renameat2(2), over every combination of what may be in the way."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.posix.calls import EXCHANGE, NOREPLACE, WHITEOUT, fails, renameat2

SIMPLE = ("file", "fifo", "symlink", "dangling")
KINDS = (*SIMPLE, "empty", "full")


def make(path: Path, what: str) -> None:
    match what:
        case "file":
            path.write_bytes(os.fsencode(path.name))
        case "fifo":
            os.mkfifo(path)
        case "symlink":
            path.symlink_to(".")
        case "dangling":
            path.symlink_to("nowhere")
        case "empty":
            path.mkdir()
        case "full":
            path.mkdir()
            (path / "inside").write_bytes(b"1")


def identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_ino, stat.S_IFMT(found.st_mode)


def pairs(place: Path, old: str | None, news: Sequence[str | None]) -> Iterator[tuple[Path, Path, str | None]]:
    """Two names, in one directory and in two, with `old` and each of `news` there; and which that is."""
    for across in (False, True):
        for number, new in enumerate(news):
            top = place / f"{across}-{number}"
            paths = (top / "from" / "old", top / ("to" if across else "from") / "new")
            for path, what in zip(paths, (old, new), strict=True):
                path.parent.mkdir(exist_ok=True, parents=True)
                if what is not None:
                    make(path, what)
            yield *paths, new


def check_links(*parents: Path) -> None:
    """The link counts of directories go with what is in them."""
    for parent in parents:
        assert parent.stat().st_nlink == 2 + sum(map(is_directory, parent.iterdir()))


@pytest.mark.parametrize("what", KINDS)
def test_to_a_name_that_is_free(place: Path, what: str) -> None:
    for old, new, _ in pairs(place, what, [None]):
        before = identity(old)
        for flags in (0, NOREPLACE):
            renameat2(old, new, flags)
            assert identity(new) == before
            fails(errno.ENOENT, os.lstat, old)
            os.rename(new, old)
        fails(errno.ENOENT, renameat2, old, new, EXCHANGE)
        assert identity(old) == before


@pytest.mark.parametrize("old_kind", KINDS)
def test_over_what_is_there(place: Path, old_kind: str) -> None:
    for old, new, new_kind in pairs(place, old_kind, KINDS):
        replace(old, new, old_kind, new_kind)


def replace(old: Path, new: Path, old_kind: str, new_kind: str | None) -> None:
    old_before, new_before = identity(old), identity(new)
    fails(errno.EEXIST, renameat2, old, new, NOREPLACE)
    old_is_directory, new_is_directory = old_kind in ("empty", "full"), new_kind in ("empty", "full")
    refusal = 0
    if new_is_directory and not old_is_directory:
        refusal = errno.EISDIR
    elif old_is_directory and not new_is_directory:
        refusal = errno.ENOTDIR
    elif new_kind == "full":
        refusal = errno.ENOTEMPTY
    if refusal:
        fails(refusal, os.rename, old, new)
        assert (identity(old), identity(new)) == (old_before, new_before)
        return
    os.rename(old, new)
    assert identity(new) == old_before
    fails(errno.ENOENT, os.lstat, old)
    check_links(old.parent, new.parent)


def is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


@pytest.mark.parametrize("old_kind", KINDS)
def test_exchange(place: Path, old_kind: str) -> None:
    for old, new, _ in pairs(place, old_kind, KINDS):
        old_before, new_before = identity(old), identity(new)
        renameat2(old, new, EXCHANGE)
        assert (identity(old), identity(new)) == (new_before, old_before)
        check_links(old.parent, new.parent)


def test_a_name_over_another_of_the_same_file_changes_nothing(place: Path) -> None:
    for old, new, _ in pairs(place, "file", [None]):
        os.link(old, new)
        for flags in (0, EXCHANGE):
            renameat2(old, new, flags)
            assert identity(old) == identity(new)
            assert old.stat().st_nlink == 2
        fails(errno.EEXIST, renameat2, old, new, NOREPLACE)
        os.rename(old, old)
        assert old.stat().st_nlink == 2


def test_a_directory_cannot_move_below_itself(place: Path) -> None:
    (place / "a" / "b" / "c").mkdir(parents=True)
    for target in ("a/x", "a/b/x", "a/b/c"):
        fails(errno.EINVAL, os.rename, place / "a", place / target)
    for flags in (NOREPLACE, EXCHANGE):
        fails((errno.EINVAL, errno.EEXIST), renameat2, place / "a", place / "a" / "b" / "c", flags)
    fails(errno.EINVAL, renameat2, place / "a" / "b" / "c", place / "a", EXCHANGE)
    fails(errno.ENOTEMPTY, os.rename, place / "a" / "b" / "c", place / "a")


def test_dot_and_dotdot_cannot_be_renamed(place: Path) -> None:
    (place / "d").mkdir()
    for name in ("d/.", "d/.."):
        fails((errno.EBUSY, errno.EINVAL), os.rename, f"{place}/{name}", place / "x")
        fails((errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY), os.rename, place / "d", f"{place}/{name}")


def test_unknown_flags_are_refused(place: Path) -> None:
    for old, new, _ in pairs(place, "file", ["file"]):
        for flags in (NOREPLACE | EXCHANGE, 8, 1 << 31, WHITEOUT | EXCHANGE):
            fails(errno.EINVAL, renameat2, old, new, flags)


def test_dotdot_follows_a_moved_directory(place: Path) -> None:
    (place / "from" / "moving").mkdir(parents=True)
    (place / "to").mkdir()
    os.rename(place / "from" / "moving", place / "to" / "moved")
    assert os.stat(f"{place}/to/moved/..").st_ino == (place / "to").stat().st_ino
    assert ((place / "from").stat().st_nlink, (place / "to").stat().st_nlink) == (2, 3)


def test_what_is_open_stays_open_through_renames(place: Path) -> None:
    with (place / "a").open("w+b") as file, (place / "b").open("w+b") as lost:
        lost.write(b"lost")
        lost.flush()
        os.rename(place / "a", place / "b")
        file.write(b"kept")
        file.flush()
        assert (place / "b").read_bytes() == b"kept"
        lost.seek(0)
        assert lost.read() == b"lost"
        assert os.fstat(lost.fileno()).st_nlink == 0


def test_a_working_directory_moves_along(place: Path) -> None:
    (place / "a" / "b").mkdir(parents=True)
    os.chdir(place / "a" / "b")
    os.rename(place / "a", place / "c")
    assert Path.cwd() == place / "c" / "b"
    Path("file").write_bytes(b"1")
    assert (place / "c" / "b" / "file").exists()


def test_a_slash_behind_the_new_name_of_a_file(place: Path) -> None:
    (place / "file").write_bytes(b"")
    (place / "d").mkdir()
    fails(errno.ENOTDIR, os.rename, place / "file", f"{place}/new/")
    os.rename(place / "d", f"{place}/new/")
    assert (place / "new").is_dir()


def test_whiteouts_need_an_overlay(place: Path) -> None:
    (place / "file").write_bytes(b"")
    try:
        renameat2(place / "file", place / "new", WHITEOUT)
    except OSError as error:
        assert error.errno in (errno.EINVAL, errno.EPERM)
    else:
        assert stat.S_ISCHR((place / "file").lstat().st_mode)
