"""The system calls of a case, each a method that says in plain values what came back.

An instance lives in a process whose root directory is the case's: paths are absolute, and no symlink leads
out.  Nothing is imported once the process has changed its root.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from typing import Any

NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2
PAGE = 4096
WHOLE = 256 << 10
"""Files up to so many bytes are compared whole, of longer ones the beginning and the end."""

_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100
_libc = ctypes.CDLL(None, use_errno=True)

Node = dict[str, Any]


class _TimeSpec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_long)]


class Calls:
    """One actor's calls and open files; a file is known by the number of its slot."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}

    # files

    def open(self, slot: int, path: bytes, flags: int, mode: int) -> None:
        self._files[slot] = os.open(path, flags | os.O_NONBLOCK, mode)

    def open_below(self, slot: int, directory: int, name: bytes, flags: int) -> None:
        self._files[slot] = os.open(name, flags | os.O_NONBLOCK, 0o666, dir_fd=self._files[directory])

    def close(self, slot: int) -> None:
        os.close(self._files.pop(slot))

    def pread(self, slot: int, offset: int, size: int) -> bytes:
        return os.pread(self._files[slot], size, offset)

    def pwrite(self, slot: int, offset: int, data: bytes) -> int:
        return os.pwrite(self._files[slot], data, offset)

    def write(self, slot: int, data: bytes) -> tuple[int, int]:
        return os.write(self._files[slot], data), os.lseek(self._files[slot], 0, os.SEEK_CUR)

    def read(self, slot: int, size: int) -> bytes:
        return os.read(self._files[slot], size)

    def seek_end(self, slot: int, offset: int) -> int:
        if stat.S_ISDIR(os.fstat(self._files[slot]).st_mode):
            # Where a directory ends is the file system's own business.
            return 0
        return os.lseek(self._files[slot], offset, os.SEEK_END)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._files[slot], size)

    def fsync(self, slot: int, data_only: bool) -> None:
        (os.fdatasync if data_only else os.fsync)(self._files[slot])

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._files[slot], mode)

    def fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self._files[slot], uid, gid)

    def copy(self, source: int, source_offset: int, target: int, offset: int, size: int) -> int:
        return os.copy_file_range(self._files[source], self._files[target], size, source_offset, offset)

    def map_read(self, slot: int, offset: int, size: int) -> bytes:
        with self._map(slot, offset + size, mmap.ACCESS_READ) as mapped:
            return mapped[offset : offset + size]

    def map_write(self, slot: int, offset: int, data: bytes, flush: bool) -> None:
        with self._map(slot, offset + len(data), mmap.ACCESS_WRITE) as mapped:
            mapped[offset : offset + len(data)] = data
            if flush:
                mapped.flush()

    def _map(self, slot: int, end: int, access: int) -> mmap.mmap:
        return mmap.mmap(self._files[slot], end, access=access)

    # names

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(path)

    def unlink(self, path: bytes) -> None:
        os.unlink(path)

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, path)

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(path)

    def link(self, old: bytes, new: bytes) -> None:
        os.link(old, new)

    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        _check(_libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, ctypes.c_uint(flags)))

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        os.mknod(path, mode, device)

    def listdir(self, path: bytes) -> list[bytes]:
        return sorted(os.listdir(path))

    # attributes

    def stat(self, path: bytes, follow: bool) -> tuple[int, ...]:
        return _shown(os.stat(path, follow_symlinks=follow))

    def access(self, path: bytes, mode: int) -> bool:
        return os.access(path, mode)

    def truncate(self, path: bytes, size: int) -> None:
        os.truncate(path, size)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(path, mode)

    def chown(self, path: bytes, uid: int, gid: int, follow: bool) -> None:
        os.chown(path, uid, gid, follow_symlinks=follow)

    def utimens(self, path: bytes, times: tuple[tuple[int, int], tuple[int, int]], follow: bool) -> Any:
        pair = (_TimeSpec * 2)(*times)
        _check(_libc.utimensat(_AT_FDCWD, path, pair, 0 if follow else _AT_SYMLINK_NOFOLLOW))
        found = os.stat(path, follow_symlinks=follow)
        return [
            shown
            for (_, part), shown in zip(times, (found.st_atime_ns, found.st_mtime_ns), strict=True)
            if part < OMIT
        ]

    # everything

    def tree(self) -> dict[bytes, Node]:
        """All there is, by path."""
        found = {b"/": _node(b"/")}
        waiting = [b"/"]
        while waiting:
            directory = waiting.pop()
            with os.scandir(directory) as entries:
                for entry in entries:
                    found[entry.path] = node = _node(entry.path)
                    if entry.is_dir(follow_symlinks=False) != stat.S_ISDIR(node["mode"]):
                        node["listed as"] = "another type"
                    if stat.S_ISDIR(node["mode"]):
                        waiting.append(entry.path)
        return found

    def opened(self) -> dict[int, Node]:
        """What the open files show, also those that no name leads to."""
        return {slot: self._opened(file) for slot, file in self._files.items()}

    def _opened(self, file: int) -> Node:
        shown = os.fstat(file)
        node = {"mode": shown.st_mode, "nlink": shown.st_nlink, "uid": shown.st_uid, "gid": shown.st_gid}
        if stat.S_ISREG(shown.st_mode):
            node["size"] = shown.st_size
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY:
                node["content"] = b"".join(contents(file, shown.st_size))
        return node

    def sync_opened(self) -> None:
        """Has the open files made durable, also those without a name."""
        for file in self._files.values():
            if stat.S_ISREG(os.fstat(file).st_mode):
                os.fsync(file)

    def sync_everything(self) -> None:
        """Has every file and all names made durable."""
        for path, node in self.tree().items():
            if stat.S_ISREG(node["mode"]):
                file = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        directory = os.open(b"/", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def rewrite_middles(self) -> None:
        """Writes one page in the middle of every file of some pages, so that what is around it stays as it was."""
        for path, node in self.tree().items():
            if stat.S_ISREG(node["mode"]) and 2 * PAGE < node["size"] <= WHOLE:
                file = os.open(path, os.O_WRONLY)
                try:
                    os.pwrite(file, b"middle! " * (PAGE // 8), node["size"] // 2 // PAGE * PAGE)
                finally:
                    os.close(file)

    def forget_everything(self) -> None:
        """The kernel forgets the pages of all files."""
        for path, node in self.tree().items():
            if stat.S_ISREG(node["mode"]):
                file = os.open(path, os.O_RDONLY | os.O_NOATIME)
                try:
                    os.fdatasync(file)
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(file)


def _check(result: int) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _shown(found: os.stat_result) -> tuple[int, ...]:
    """What two file systems must agree in."""
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev


def _node(path: bytes) -> Node:
    shown = os.lstat(path)
    mode, nlink, uid, gid, size, rdev = _shown(shown)
    node: Node = {"mode": mode, "nlink": nlink, "uid": uid, "gid": gid, "size": size, "rdev": rdev}
    node["ino"], node["mtime"], node["ctime"] = shown.st_ino, shown.st_mtime_ns, shown.st_ctime_ns
    if stat.S_ISLNK(mode):
        node["target"] = os.readlink(path)
    elif stat.S_ISREG(mode):
        file = os.open(path, os.O_RDONLY | os.O_NOATIME)
        try:
            node["content"] = b"".join(contents(file, size))
        finally:
            os.close(file)
    return node


def contents(file: int, size: int) -> Iterator[bytes]:
    """What is compared of an open file's bytes."""
    yield os.pread(file, WHOLE, 0)
    if size > WHOLE:
        yield os.pread(file, WHOLE, max(WHOLE, size - WHOLE))
