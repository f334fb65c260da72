"""The mount lock: one process at a time works on a cache directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from qsfs.errors import CacheError, MountError


def require_access(directory: Path) -> None:
    """Raises `CacheError` if the cache directory is there and this user may not work in it."""
    try:
        there = directory.is_dir()
    except PermissionError:
        there = True
    if there and not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise CacheError(f"{directory}: permission denied; be the user who made it")


class CacheLock:
    """An exclusive lock on `mount.lock`, held until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        """Takes the lock.  Raises `MountError` if another process has it, `CacheError` if it cannot."""
        require_access(directory)
        path = directory / "mount.lock"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror}; is the cache directory there?") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            raise MountError(
                f"{directory}: in use by process {owner}; a file system has one mount at a time "
                "('qsfs umount' ends it)"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets others in."""
        os.close(self._file)


def holder(directory: Path) -> int | None:
    """The process that holds the lock of a cache directory, or None if nobody does.  `CacheError`."""
    require_access(directory)
    try:
        file = os.open(directory / "mount.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(file, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    else:
        return None
    finally:
        os.close(file)
