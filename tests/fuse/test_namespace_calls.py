"""The system calls on names, as a program makes them, with the codes it gets."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from tests.fuse.calls import EXCHANGE, NOREPLACE, WHITEOUT, renameat2

pytestmark = pytest.mark.mount


def fails(code, operation, *arguments, **keywords):
    with pytest.raises(OSError) as caught:
        operation(*arguments, **keywords)
    assert caught.value.errno == code, caught.value


def test_a_tree_is_made_listed_and_removed(root):
    (root / "a" / "b").mkdir(parents=True)
    for number in range(300):
        (root / "a" / f"file {number}").write_bytes(b"%d" % number)
    assert len(os.listdir(root / "a")) == 301
    assert sorted(p.name for p in root.rglob("*")) == sorted(["a", "b", *(f"file {n}" for n in range(300))])
    assert all((root / "a" / f"file {n}").read_bytes() == b"%d" % n for n in range(300))
    for number in range(300):
        (root / "a" / f"file {number}").unlink()
    (root / "a" / "b").rmdir()
    (root / "a").rmdir()
    assert os.listdir(root) == []


@pytest.mark.parametrize("relatime", [True, False])
def test_the_type_of_a_mount_names_qsfs(make_mount, relatime):
    root = make_mount(relatime=relatime).path
    line = next(x for x in Path("/proc/self/mounts").read_text().splitlines() if f" {root} " in x)
    assert line.split()[0] == "qsfs"
    assert line.split()[2] == "fuse.qsfs"
    options = set(line.split()[3].split(","))
    assert {"relatime" if relatime else "noatime", "default_permissions", "allow_other"} <= options
    assert not {"nodev", "nosuid"} & options


def test_codes_of_names(root):
    (root / "f").touch()
    (root / "d").mkdir()
    (root / "d" / "x").touch()
    fails(errno.EEXIST, os.mkdir, root / "f")
    fails(errno.EEXIST, os.open, root / "f", os.O_CREAT | os.O_EXCL)
    fails(errno.ENOENT, os.unlink, root / "nothing")
    fails(errno.ENOENT, os.rmdir, root / "nothing")
    fails(errno.ENOENT, os.open, root / "nothing" / "f", os.O_CREAT)
    fails(errno.ENOTDIR, os.rmdir, root / "f")
    fails(errno.ENOTDIR, os.open, root / "f" / "x", os.O_CREAT)
    fails(errno.ENOTEMPTY, os.rmdir, root / "d")
    fails(errno.EISDIR, os.unlink, root / "d")
    fails(errno.EISDIR, os.open, root / "d", os.O_WRONLY)
    fails(errno.EPERM, os.link, root / "d", root / "l")
    fails(errno.EEXIST, os.link, root / "f", root / "d")
    fails(errno.EINVAL, os.rename, root / "d", root / "d" / "e")
    fails(errno.ENOTDIR, os.rename, root / "d", root / "f")
    fails(errno.EISDIR, os.rename, root / "f", root / "d")
    fails(errno.ENOTEMPTY, os.rename, (root / "e").mkdir() or root / "e", root / "d")
    fails(errno.EXDEV, os.link, root / "f", root.parent / "l")
    fails(errno.ENOTEMPTY, os.rmdir, root / "d" / ".." / "d")
    fails(errno.EINVAL, os.readlink, root / "f")
    os.symlink("loop", root / "loop")
    fails(errno.ELOOP, os.stat, root / "loop")


def test_names_of_any_bytes_up_to_255(root):
    for name in (b"\xff\xfe", b"a" * 255, b" \n\t", "ß".encode() * 127):
        path = os.path.join(os.fsencode(root), name)
        with open(path, "w+b") as file:
            file.write(name)
            assert name in os.listdir(os.fsencode(root))
            file.seek(0)
            assert file.read() == name
    for length in (256, 1000, 2000):
        fails(errno.ENAMETOOLONG, os.stat, root / ("a" * length))
        fails(errno.ENAMETOOLONG, os.mkdir, root / ("a" * length))
    assert os.statvfs(root).f_namemax == 255


def test_symlinks(root):
    target = "t" * 4095
    os.symlink(target, root / "long")
    assert os.readlink(root / "long") == target
    assert os.lstat(root / "long").st_size == 4095
    fails(errno.ENAMETOOLONG, os.symlink, target + "t", root / "longer")
    (root / "f").write_text("behind")
    os.symlink("f", root / "s")
    assert (root / "s").read_text() == "behind"
    os.unlink(root / "s")
    assert (root / "f").exists()


def test_special_files(root):
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 300))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(root / "socket"))
        assert stat.S_ISSOCK(os.stat(root / "socket").st_mode)
    assert stat.S_ISFIFO(os.stat(root / "fifo").st_mode)
    assert os.stat(root / "device").st_rdev == os.makedev(1, 300)
    assert os.stat(root / "block").st_rdev == os.makedev(259, 70000)
    reader = os.open(root / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(root / "fifo", os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 10) == b"through"
    os.close(reader)
    os.close(writer)


def test_hard_links_share_everything(root):
    (root / "a").write_text("one")
    os.link(root / "a", root / "b")
    (root / "b").write_text("another")
    assert (root / "a").read_text() == "another"
    assert (os.stat(root / "a").st_ino, os.stat(root / "a").st_nlink) == (os.stat(root / "b").st_ino, 2)
    os.unlink(root / "a")
    assert os.stat(root / "b").st_nlink == 1
    os.chmod(root / "b", 0o600)
    assert stat.S_IMODE(os.stat(root / "b").st_mode) == 0o600


def test_link_counts_of_directories(root):
    assert os.stat(root).st_nlink == 2
    (root / "a").mkdir()
    (root / "a" / "b").mkdir()
    assert [os.stat(p).st_nlink for p in (root, root / "a", root / "a" / "b")] == [3, 3, 2]
    os.rename(root / "a" / "b", root / "b")
    assert [os.stat(p).st_nlink for p in (root, root / "a", root / "b")] == [4, 2, 2]
    os.rmdir(root / "b")
    assert os.stat(root).st_nlink == 3


def test_rename_replaces_in_one_step(root):
    (root / "old").write_text("old")
    (root / "new").write_text("new")
    with open(root / "old") as kept:
        os.rename(root / "new", root / "old")
        assert kept.read() == "old"
        assert os.fstat(kept.fileno()).st_nlink == 0
    assert (root / "old").read_text() == "new"
    assert os.listdir(root) == ["old"]


def test_rename_flags(root):
    (root / "a").write_text("a")
    (root / "b").write_text("b")
    (root / "d").mkdir()
    (root / "d" / "x").touch()
    fails(errno.EEXIST, renameat2, root / "a", root / "b", NOREPLACE)
    renameat2(root / "a", root / "c", NOREPLACE)
    renameat2(root / "b", root / "c", EXCHANGE)
    assert ((root / "b").read_text(), (root / "c").read_text()) == ("a", "b")
    renameat2(root / "b", root / "d", EXCHANGE)
    assert (root / "d").read_text() == "a"
    assert (root / "b" / "x").exists()
    fails(errno.ENOENT, renameat2, root / "b", root / "none", EXCHANGE)
    fails(errno.EINVAL, renameat2, root / "b", root / "c", NOREPLACE | EXCHANGE)
    fails(errno.EINVAL, renameat2, root / "c", root / "e", WHITEOUT)
    assert sorted(os.listdir(root)) == ["b", "c", "d"]


def test_an_unlinked_file_lives_while_it_is_open(root, mount):
    with open(root / "f", "w+b") as file:
        file.write(b"before")
        file.flush()
        os.unlink(root / "f")
        assert not (root / "f").exists()
        file.write(b" and after")
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        assert file.read() == b"before and after"
        assert os.fstat(file.fileno()).st_nlink == 0
        os.ftruncate(file.fileno(), 3)
        assert os.fstat(file.fileno()).st_size == 3
        assert len(mount.command("inodes")) == 2
    os.listdir(root)
    assert mount.command("settled")
    assert mount.command("inodes") == [1]


def test_a_removed_directory_lives_while_it_is_open(root):
    (root / "d").mkdir()
    handle = os.open(root / "d", os.O_RDONLY)
    os.rmdir(root / "d")
    assert os.listdir(handle) == []
    fails(errno.ENOENT, os.open, "f", os.O_CREAT, dir_fd=handle)
    os.close(handle)


def test_a_listing_shows_what_stays_once_while_the_rest_changes(root):
    stays = {f"stay-{number:04}" for number in range(500)}
    for number, name in enumerate(sorted(stays)):
        (root / name).touch()
        (root / f"go-{number:04}").touch()
    seen: list[str] = []
    with os.scandir(root) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 2 and number < 600:
                (root / f"go-{number // 2:04}").unlink(missing_ok=True)
                (root / f"new-{number:04}").touch()
    assert sorted(name for name in seen if name.startswith("stay")) == sorted(stays)
    assert len(seen) == len(set(seen))


def test_a_listing_has_dot_and_dot_dot(root):
    (root / "d").mkdir()
    libc_names = os.popen(f"ls -ai {root / 'd'}").read().split()
    assert libc_names == [str(os.stat(root / "d").st_ino), ".", str(os.stat(root).st_ino), ".."]


def test_removing_while_listing_empties_a_large_directory(root):
    (root / "d").mkdir()
    for number in range(1000):
        (root / "d" / str(number)).touch()
    for entry in os.scandir(root / "d"):
        os.unlink(entry.path)
    os.rmdir(root / "d")


def test_a_fast_alternation_of_names_is_never_stale(root):
    """The kernel keeps names, and names that do not exist, for an hour: each change must undo that."""
    for _ in range(50):
        assert not (root / "f").exists()
        (root / "f").write_text("x")
        assert (root / "f").exists()
        os.rename(root / "f", root / "g")
        assert not (root / "f").exists()
        os.link(root / "g", root / "f")
        assert os.stat(root / "g").st_nlink == 2
        os.unlink(root / "g")
        os.unlink(root / "f")
        os.mkdir(root / "f")
        os.rmdir(root / "f")
