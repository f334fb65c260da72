"""System calls that Python does not offer."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2); raises `OSError`."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))


def msync(address: int, length: int) -> None:
    """msync(2) with MS_SYNC."""
    if _libc.msync(ctypes.c_void_p(address), ctypes.c_size_t(length), 4):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def hand_over(path: Path) -> None:
    """syncfs(2): the kernel hands over what it holds back for the mount at `path`, and no other."""
    directory = os.open(path, os.O_RDONLY)
    try:
        if _libc.syncfs(directory):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(directory)


def as_nobody(root: Path, action: Callable[[], int | None]) -> int:
    """Runs `action` in `root` as user and group 65534; returns its result or the errno it ended with."""
    return in_child(action, root)


def in_child(action: Callable[[], int | None], root: Path | None = None) -> int:
    """Runs `action` in a child; returns its result or the errno it ended with."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            if root is not None:
                os.chdir(root)
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            code = action() or 0
        except OSError as error:
            code = error.errno or 254
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
