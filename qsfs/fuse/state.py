"""Whether a mount accepts changes: writable, fenced by another owner, or failed."""

from __future__ import annotations

import errno
import logging

from qsfs.filesystem.posix import PosixError

log = logging.getLogger(__name__)


class MountState:
    """Starts writable; can become read-only for good.  The first reason is kept and shown."""

    def __init__(self) -> None:
        self._change_error = 0
        self.reason = ""

    @property
    def writable(self) -> bool:
        """Whether changes are accepted."""
        return self._change_error == 0

    def fence(self, reason: str) -> None:
        """Another mount owns the file system: names answer EROFS, WRITE and FSYNC EIO."""
        self._stop(errno.EROFS, reason)

    def fail(self, reason: str) -> None:
        """The local disk fails: every change answers EIO."""
        self._stop(errno.EIO, reason)

    def check_write(self) -> None:
        """Raises EIO once the mount is not writable: the application has been told that it succeeded."""
        if self._change_error:
            raise PosixError(errno.EIO)

    def check_change(self) -> None:
        """Raises EROFS once fenced, EIO once failed."""
        if self._change_error:
            raise PosixError(self._change_error)

    def _stop(self, error: int, reason: str) -> None:
        if not self._change_error:
            self._change_error = error
            self.reason = reason
            log.error("the mount is read-only from now on: %s", reason)


class ReadOnlyState:
    """Of a mount that was asked for read-only: every change answers EROFS, and that is no failure."""

    writable = False
    reason = ""

    def check_write(self) -> None:
        """Raises EROFS."""
        raise PosixError(errno.EROFS)

    def check_change(self) -> None:
        """Raises EROFS."""
        raise PosixError(errno.EROFS)
