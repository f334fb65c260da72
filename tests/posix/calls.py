"""System calls that Python does not offer, and short words for what cases say often."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Callable
from typing import Any

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38
AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = -100, 0x100, 0x400, 0x1000
MAX_SIZE = (1 << 63) - 1

libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = ctypes.c_void_p
libc.readdir64.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p

Name = str | bytes | os.PathLike[str]


class TimeSpec(ctypes.Structure):
    """A struct timespec."""

    _fields_ = [("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_long)]


def check(result: int) -> int:
    """The result of a C call; raises `OSError` if it is -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def fails(code: int | tuple[int, ...], call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """`call` must fail with `code` (or one of them)."""
    codes = code if isinstance(code, tuple) else (code,)
    wanted = " or ".join(errno.errorcode[each] for each in codes)
    try:
        result = call(*arguments, **named)
    except OSError as error:
        assert error.errno in codes, f"{errno.errorcode[error.errno or 0]} instead of {wanted}"
    else:
        raise AssertionError(f"returned {result!r} instead of {wanted}")


def renameat2(old: Name, new: Name, flags: int) -> None:
    """renameat2(2)."""
    check(libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)))


def utimensat(path: Name, times: tuple[tuple[int, int], tuple[int, int]] | None, *, follow: bool = True) -> None:
    """utimensat(2); `times` are (seconds, nanoseconds) of atime and mtime, None for now."""
    pair = None if times is None else (TimeSpec * 2)(*times)
    flags = 0 if follow else AT_SYMLINK_NOFOLLOW
    check(libc.utimensat(AT_FDCWD, os.fsencode(path), pair, flags))


def fallocate(file: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), as the kernel answers it: libc emulates nothing."""
    check(libc.fallocate64(file, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def link_following(old: Name, new: Name) -> None:
    """linkat(2) of what a symlink names; `os.link` never follows."""
    check(libc.linkat(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW))


def msync(address: int, length: int) -> None:
    """msync(2) with MS_SYNC."""
    check(libc.msync(ctypes.c_void_p(address), ctypes.c_size_t(length), 4))


def syncfs(path: Name) -> None:
    """syncfs(2) of the file system that holds `path`."""
    file = os.open(path, os.O_RDONLY)
    try:
        check(libc.syncfs(file))
    finally:
        os.close(file)


def lock(kind: int, start: int = 0, length: int = 0) -> bytes:
    """A struct flock."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


def write_asynchronously(file: int, buffer: mmap.mmap, offset: int) -> int:
    """io_submit(2) of one write of a whole buffer, and io_getevents(2); what the write gave."""
    setup, destroy, get_events, submit = (0, 1, 4, 2) if platform.machine() == "aarch64" else (206, 207, 208, 209)
    context = ctypes.c_ulong()
    check(libc.syscall(setup, 1, ctypes.byref(context)))
    start = ctypes.c_char.from_buffer(buffer)
    request = ctypes.create_string_buffer(
        struct.pack("<QIIHHIQQqQII", 0, 0, 0, 1, 0, file, ctypes.addressof(start), len(buffer), offset, 0, 0, 0)
    )
    event = ctypes.create_string_buffer(32)
    try:
        check(libc.syscall(submit, context, 1, (ctypes.c_void_p * 1)(ctypes.addressof(request))))
        check(libc.syscall(get_events, context, 1, 1, event, None))
    finally:
        del start
        libc.syscall(destroy, context)
    return int(struct.unpack("<QQqq", event.raw)[2])


class Directory:
    """An open directory stream: opendir(3), readdir(3), telldir(3), seekdir(3)."""

    def __init__(self, path: Name) -> None:
        self._stream = ctypes.c_void_p(libc.opendir(os.fsencode(path)))
        if not self._stream:
            check(-1)

    def read(self) -> bytes | None:
        """The next name; None at the end."""
        entry = libc.readdir64(self._stream)
        # d_ino, d_off, d_reclen, d_type, then the name
        return ctypes.string_at(entry + 19) if entry else None

    def tell(self) -> int:
        """Where it stands."""
        return int(libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        """Back to where `tell` was."""
        libc.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        """To the start."""
        libc.rewinddir(self._stream)

    def rest(self) -> list[bytes]:
        """All names from here on but `.` and `..`."""
        names = []
        while (name := self.read()) is not None:
            names.append(name)
        return [name for name in names if name not in (b".", b"..")]

    def close(self) -> None:
        """closedir(3)."""
        libc.closedir(self._stream)
