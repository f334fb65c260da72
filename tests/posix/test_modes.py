"""chmod, chown, and the set-id bits."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.posix.calls import fails
from tests.posix.users import ALICE, BOB, ROOT, TEAM, User, run

as_root = pytest.mark.actors("root")
BOTH = 0o6777


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def ids(path: Path) -> tuple[int, int]:
    return path.lstat().st_uid, path.lstat().st_gid


def file_of(path: Path, user: User, mode: int, group: int | None = None) -> Path:
    path.write_bytes(b"contents")
    os.chown(path, user.uid, user.gid if group is None else group)
    path.chmod(mode)
    return path


def test_every_mode_can_be_set(place: Path) -> None:
    (place / "file").write_bytes(b"")
    (place / "directory").mkdir()
    os.mkfifo(place / "fifo")
    for name in ("file", "directory", "fifo"):
        for mode in (*(1 << bit for bit in range(12)), 0, 0o7777, 0o1234, 0o4711):
            (place / name).chmod(mode)
            assert mode_of(place / name) == mode
        (place / name).chmod(0o700)


def test_chmod_of_an_open_file(place: Path) -> None:
    with (place / "file").open("wb") as file:
        os.fchmod(file.fileno(), 0o640)
        assert mode_of(place / "file") == 0o640
        (place / "file").unlink()
        os.fchmod(file.fileno(), 0o604)
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o604


@as_root
def test_only_the_owner_changes_the_mode(place: Path) -> None:
    path = file_of(place / "file", ALICE, 0o666)
    run(BOB, partial(fails, errno.EPERM, os.chmod, path, 0o600))
    run(ALICE, partial(os.chmod, path, 0o600))
    assert mode_of(path) == 0o600


@as_root
def test_chmod_by_a_stranger_to_the_group_leaves_no_setgid_bit(place: Path) -> None:
    for name in ("file", "directory"):
        path = place / name
        path.mkdir() if name == "directory" else path.write_bytes(b"")
        os.chown(path, ALICE.uid, BOB.gid)
        run(ALICE, partial(os.chmod, path, 0o2775))
        assert mode_of(path) == 0o775
        os.chown(path, ALICE.uid, TEAM)
        run(ALICE, partial(os.chmod, path, 0o2775))
        assert mode_of(path) == 0o2775


@as_root
def test_root_gives_files_away(place: Path) -> None:
    path = file_of(place / "file", ROOT, 0o644)
    os.chown(path, BOB.uid, -1)
    assert ids(path) == (BOB.uid, 0)
    os.chown(path, -1, TEAM)
    assert ids(path) == (BOB.uid, TEAM)
    os.symlink("file", place / "link")
    os.chown(place / "link", 7, 8, follow_symlinks=False)
    assert (ids(place / "link"), ids(path)) == ((7, 8), (BOB.uid, TEAM))
    os.chown(place / "link", 9, 10)
    assert (ids(place / "link"), ids(path)) == ((7, 8), (9, 10))


@as_root
def test_an_owner_changes_the_group_to_one_of_his_own(place: Path) -> None:
    path = file_of(place / "file", ALICE, 0o644)
    run(ALICE, partial(os.chown, path, -1, TEAM))
    assert ids(path) == (ALICE.uid, TEAM)
    run(ALICE, partial(os.chown, path, ALICE.uid, ALICE.gid))
    run(ALICE, partial(fails, errno.EPERM, os.chown, path, -1, BOB.gid))
    run(ALICE, partial(fails, errno.EPERM, os.chown, path, BOB.uid, -1))
    run(BOB, partial(fails, errno.EPERM, os.chown, path, BOB.uid, BOB.gid))
    run(BOB, partial(fails, errno.EPERM, os.chown, path, -1, BOB.gid))
    assert ids(path) == (ALICE.uid, ALICE.gid)


# Set-id bits: what takes them away, by whom

CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda path: write(path, b"x"),
    "append": lambda path: write(path, b"x", os.O_APPEND),
    "sync write": lambda path: write(path, b"x", os.O_SYNC),
    "truncate": lambda path: os.truncate(path, 3),
    "grow": lambda path: os.truncate(path, 30),
    "open with O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "chown": lambda path: os.chown(path, -1, TEAM),
    "chown to the same": lambda path: os.chown(path, path.stat().st_uid, path.stat().st_gid),
    "chown of nothing": lambda path: os.chown(path, -1, -1),
}


def write(path: Path, data: bytes, flags: int = 0) -> None:
    file = os.open(path, os.O_WRONLY | flags)
    os.write(file, data)
    os.close(file)


@as_root
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("user", [ROOT, ALICE], ids=lambda user: user.name)
def test_set_id_bits_go_as_on_a_local_disk(place: Path, change: str, user: User) -> None:
    """Root keeps them when it writes and truncates, nobody keeps them through a chown."""
    modes = (BOTH, 0o4755, 0o2755, 0o2745, 0o6666)
    paths = [file_of(place / oct(mode), user, mode) for mode in modes]
    run(user, lambda: [CHANGES[change](path) for path in paths] and None)
    for mode, path in zip(modes, paths, strict=True):
        kept = mode
        if user is not ROOT or change.startswith("chown"):
            kept &= ~stat.S_ISUID
            if mode & stat.S_IXGRP:
                kept &= ~stat.S_ISGID
        assert oct(mode_of(path)) == oct(kept)


@as_root
def test_a_write_of_nothing_keeps_them(place: Path) -> None:
    path = file_of(place / "file", ALICE, 0o6755)
    run(ALICE, partial(write, path, b""))
    assert mode_of(path) == 0o6755


@as_root
def test_a_stranger_who_may_write_takes_them_away(place: Path) -> None:
    path = file_of(place / "file", ALICE, 0o6777)
    run(BOB, partial(write, path, b"x"))
    assert mode_of(path) == 0o777


@as_root
def test_directories_keep_them(place: Path) -> None:
    (place / "d").mkdir()
    (place / "d").chmod(0o6777)
    os.chown(place / "d", ALICE.uid, TEAM)
    assert mode_of(place / "d") == 0o6777
    run(ALICE, partial(os.chown, place / "d", -1, ALICE.gid))
    assert mode_of(place / "d") == 0o6777
    (place / "d" / "file").write_bytes(b"1")
    assert mode_of(place / "d") == 0o6777


def test_the_owner_keeps_them_through_renames_links_and_times(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"1")
    path.chmod(0o6755)
    os.utime(path, (1, 1))
    os.link(path, place / "link")
    os.rename(path, place / "new")
    (place / "link").read_bytes()
    os.utime(place / "new")
    assert mode_of(place / "new") == 0o6755


def test_the_sticky_bit_of_a_file_is_kept(place: Path) -> None:
    (place / "file").write_bytes(b"1")
    (place / "file").chmod(0o1644)
    write(place / "file", b"2")
    assert mode_of(place / "file") == 0o1644
