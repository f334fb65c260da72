"""POSIX's error codes and limits, as the namespace raises and keeps them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Protocol

MAX_NAME = 255
"""Bytes of a name."""

MAX_SYMLINK = 4095
"""Bytes of a symlink's target."""

MAX_LINKS = 2**31 - 1
"""Links of one inode."""

MAX_ID = 2**32 - 1
"""Users and groups are 32 bits wide; the largest number means "no change" and belongs to nobody."""

MAX_FILE_SIZE = 2**63 - 1
"""Bytes of a file."""

_TIMES = (-(2**63), 2**63 - 1)


class PosixError(OSError):
    """An operation that ends with the error code `errno`, as the application will see it."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code, message or os.strerror(code))


class Caller(Protocol):
    """Who asks: the ids that a new inode gets, and the mode bits that it must not."""

    @property
    def uid(self) -> int:
        """The user."""

    @property
    def gid(self) -> int:
        """The group."""

    @property
    def umask(self) -> int:
        """The mode bits that a new inode does not get, unless a default ACL says otherwise."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A `Caller` made of plain numbers."""

    uid: int = 0
    gid: int = 0
    umask: int = 0


def check_name(name: bytes) -> None:
    """Refuses what cannot be the name of an entry: EINVAL, EEXIST for `.` and `..`, ENAMETOOLONG."""
    if len(name) > MAX_NAME:
        raise PosixError(errno.ENAMETOOLONG)
    if name in (b".", b".."):
        raise PosixError(errno.EEXIST)
    if not name or b"/" in name or b"\0" in name:
        raise PosixError(errno.EINVAL)


def check_id(number: int) -> None:
    """Refuses a user or group that does not fit: EINVAL."""
    if not 0 <= number < MAX_ID:
        raise PosixError(errno.EINVAL)


def clamp_time(time_ns: int) -> int:
    """The nearest time that a row can hold (years 1677 to 2262)."""
    return min(max(time_ns, _TIMES[0]), _TIMES[1])


def without_set_ids(mode: int) -> int:
    """The mode that a file has after a write, truncate or chown by anybody.

    The set-group-id bit without group execution does not raise anyone's rights and stays.
    """
    mode &= ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return mode


def kind(mode: int) -> int:
    """The type bits of a mode, as an `Entry` holds them."""
    return mode >> 12
