"""Who may do what: EACCES, EPERM, sticky and setgid directories, umask, supplementary groups."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.posix.calls import EXCHANGE, fails, renameat2
from tests.posix.users import ALICE, BOB, TEAM, User, run

as_root = pytest.mark.actors("root")
PERMISSIONS = {os.R_OK: 4, os.W_OK: 2, os.X_OK: 1}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def owned(path: Path, user: User, mode: int, group: int | None = None, *, directory: bool = False) -> Path:
    """A file or directory of `user`; made by root."""
    if directory:
        path.mkdir()
    else:
        path.write_bytes(b"contents")
    os.chown(path, user.uid, user.gid if group is None else group)
    path.chmod(mode)
    return path


def refused(user: User, code: int | tuple[int, ...], call: Callable[..., object], *arguments: object) -> None:
    run(user, partial(fails, code, call, *arguments))


@as_root
@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_permission_bits(place: Path, directory: bool) -> None:
    """The first class that a user belongs to decides, and no other."""
    modes = (0o000, 0o100, 0o200, 0o400, 0o010, 0o040, 0o070, 0o007, 0o004, 0o750, 0o077)
    paths = [owned(place / oct(mode), ALICE, mode, TEAM, directory=directory) for mode in modes]

    def check(shift: int) -> None:
        for mode, path in zip(modes, paths, strict=True):
            bits = mode >> shift & 7
            for wanted, bit in PERMISSIONS.items():
                assert os.access(path, wanted, effective_ids=True) == bool(bits & bit), f"{path} {wanted}"
            for flags, bit in ((os.O_RDONLY, 4), (os.O_WRONLY, 2)):
                if directory and flags == os.O_WRONLY:
                    continue
                if bits & bit:
                    os.close(os.open(path, flags))
                else:
                    fails(errno.EACCES, os.open, path, flags)

    outsider = User("outsider", 61003, 61003)
    member = User("member", 61004, 61004, (TEAM,))
    for user, shift in ((ALICE, 6), (member, 3), (outsider, 0)):
        run(user, partial(check, shift))


@as_root
def test_a_directory_without_x_hides_what_is_below(place: Path) -> None:
    directory = owned(place / "d", ALICE, 0o755, directory=True)
    for name in ("file", "other"):
        owned(directory / name, ALICE, 0o644)
    directory.chmod(0o600)
    for call in (os.stat, os.unlink, os.readlink, os.listdir):
        refused(ALICE, errno.EACCES, call, directory / "file")
    refused(ALICE, errno.EACCES, os.rename, directory / "file", directory / "new")
    refused(ALICE, errno.EACCES, os.stat, directory / "missing")
    assert sorted(run(ALICE, partial(os.listdir, directory))) == ["file", "other"]
    directory.chmod(0o300)
    refused(ALICE, errno.EACCES, os.listdir, directory)
    run(ALICE, partial(os.unlink, directory / "file"))


@as_root
def test_names_change_only_in_writable_directories(place: Path) -> None:
    directory = owned(place / "d", ALICE, 0o755, directory=True)
    owned(directory / "file", BOB, 0o666)
    for call in (os.mkdir, os.mknod, os.mkfifo):
        refused(BOB, errno.EACCES, call, directory / "new")
    refused(BOB, errno.EACCES, os.symlink, "x", directory / "new")
    refused(BOB, errno.EACCES, os.link, directory / "file", directory / "new")
    refused(BOB, errno.EACCES, os.unlink, directory / "file")
    refused(BOB, errno.EACCES, os.open, directory / "new", os.O_CREAT | os.O_WRONLY)
    refused(BOB, errno.EACCES, os.rename, directory / "file", directory / "new")
    run(BOB, (directory / "file").read_bytes)


@as_root
def test_existence_comes_before_permission_to_make(place: Path) -> None:
    directory = owned(place / "d", ALICE, 0o755, directory=True)
    owned(directory / "file", ALICE, 0o644)
    refused(BOB, errno.EEXIST, os.mkdir, directory / "file")
    refused(BOB, errno.EEXIST, os.symlink, "x", directory / "file")
    refused(BOB, errno.EACCES, os.unlink, directory / "file")
    refused(BOB, errno.ENOENT, os.unlink, directory / "missing")


@as_root
def test_sticky_directories(place: Path) -> None:
    """There a name goes or moves only by the file's owner, the directory's, or root."""
    directory = owned(place / "tmp", User("third", 61005, 61005), 0o1777, directory=True)
    (directory / "sub").mkdir()
    os.chown(directory / "sub", ALICE.uid, ALICE.gid)
    for name in ("a", "b"):
        owned(directory / name, ALICE, 0o666)
    owned(directory / "bobs", BOB, 0o666)
    refused(BOB, errno.EPERM, os.unlink, directory / "a")
    refused(BOB, errno.EPERM, os.rmdir, directory / "sub")
    refused(BOB, errno.EPERM, os.rename, directory / "a", directory / "c")
    refused(BOB, errno.EPERM, os.rename, directory / "bobs", directory / "a")
    refused(BOB, errno.EPERM, renameat2, directory / "bobs", directory / "a", EXCHANGE)
    run(ALICE, partial(os.rename, directory / "a", directory / "c"))
    run(ALICE, partial(os.unlink, directory / "c"))
    run(User("third", 61005, 61005), partial(os.unlink, directory / "b"))
    os.unlink(directory / "bobs")
    run(ALICE, partial(os.rmdir, directory / "sub"))


@as_root
def test_a_directory_of_others_cannot_be_moved_into_another(place: Path) -> None:
    """Its `..` would change: that takes the right to write it."""
    for name in ("from", "to"):
        owned(place / name, BOB, 0o777, directory=True)
    moving = owned(place / "from" / "d", ALICE, 0o755, directory=True)
    refused(BOB, errno.EACCES, os.rename, moving, place / "to" / "d")
    run(BOB, partial(os.rename, moving, place / "from" / "e"))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777, 0o137])
def test_umask(place: Path, umask: int) -> None:
    os.umask(umask)
    os.mkdir(place / "directory", 0o1777)
    os.close(os.open(place / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkfifo(place / "fifo", 0o666)
    os.mknod(place / "node", 0o666)
    os.symlink("x", place / "link")
    assert mode_of(place / "directory") == 0o1777 & ~umask
    for name in ("file", "fifo", "node"):
        assert mode_of(place / name) == 0o666 & ~umask
    assert mode_of(place / "link") == 0o777


def test_a_new_file_belongs_to_who_made_it(place: Path) -> None:
    for number, call in enumerate((os.mkdir, os.mknod, os.mkfifo, partial(os.symlink, "x"))):
        call(place / str(number))
        found = (place / str(number)).lstat()
        assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())


@as_root
def test_setgid_directories_hand_their_group_down(place: Path) -> None:
    directory = owned(place / "d", ALICE, 0o2777, TEAM, directory=True)
    run(BOB, partial(os.mkdir, directory / "sub"))
    run(BOB, partial(os.mknod, directory / "file"))
    run(BOB, partial(os.symlink, "x", directory / "link"))
    for name in ("sub", "file", "link"):
        assert (directory / name).lstat().st_gid == TEAM
    assert mode_of(directory / "sub") == 0o2755
    assert mode_of(directory / "file") == 0o600
    os.mkdir(place / "plain")
    os.rename(place / "plain", directory / "plain")
    assert (directory / "plain").stat().st_gid == 0
    assert mode_of(directory / "plain") == 0o755


@as_root
def test_setgid_files_are_not_made_by_strangers_to_the_group(place: Path) -> None:
    directory = owned(place / "d", ALICE, 0o2777, TEAM, directory=True)

    def make(name: str) -> None:
        os.umask(0)
        os.close(os.open(directory / name, os.O_CREAT | os.O_WRONLY, 0o2775))

    run(BOB, partial(make, "stranger"))
    run(ALICE, partial(make, "member"))
    assert mode_of(directory / "stranger") == 0o775
    assert mode_of(directory / "member") == 0o2775


@as_root
def test_rights_are_checked_when_a_file_is_opened(place: Path) -> None:
    path = owned(place / "file", ALICE, 0o600)

    def keep_writing() -> None:
        with path.open("r+b", buffering=0) as file:
            path.chmod(0)
            file.write(b"still allowed")
            assert os.pread(file.fileno(), 5, 0) == b"still"
        fails(errno.EACCES, os.open, path, os.O_RDONLY)

    run(ALICE, keep_writing)


@as_root
def test_what_has_no_execution_bit_is_not_executed(place: Path) -> None:
    path = owned(place / "program", ALICE, 0o644)
    path.write_bytes(b"#!/bin/sh\nexit 7\n")
    for user in (ALICE, User("root", 0, 0)):
        refused(user, errno.EACCES, os.execv, path, [str(path)])
    path.chmod(0o711)
    refused(ALICE if os.geteuid() else BOB, errno.EACCES, os.open, path, os.O_RDONLY)
    path.chmod(0o755)
    child = os.spawnv(os.P_NOWAIT, path, [str(path)])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@as_root
def test_a_set_user_id_program_runs_as_its_owner(place: Path) -> None:
    program = place / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)

    def effective() -> str:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.dup2(writer, 1)
            os.execv(program, ["id", "-u"])
        os.close(writer)
        with os.fdopen(reader) as answer:
            said = answer.read().strip()
        os.waitpid(child, 0)
        return said

    assert run(ALICE, effective) == "0"


@as_root
def test_what_runs_is_not_written(place: Path) -> None:
    program = place / "sleep"
    program.write_bytes(Path("/usr/bin/sleep").read_bytes())
    program.chmod(0o755)
    child = os.spawnv(os.P_NOWAIT, program, ["sleep", "600"])
    try:
        while Path(f"/proc/{child}/exe").readlink() != program:
            pass
        fails(errno.ETXTBSY, os.open, program, os.O_WRONLY)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@as_root
@pytest.mark.parametrize("identity", [65535, 65536, 2**31 - 1, 2**31, 2**32 - 2])
def test_ids_of_32_bits(place: Path, identity: int) -> None:
    path = owned(place / "file", User("x", identity, identity), 0o600)
    assert (path.stat().st_uid, path.stat().st_gid) == (identity, identity)
    owned(place / "open", User("x", 0, 0), 0o777, directory=True)
    run(User("x", identity, identity), partial(os.mkdir, place / "open" / "d"))
    assert (place / "open" / "d").stat().st_uid == identity
