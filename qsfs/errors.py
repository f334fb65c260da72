"""Every error that qsfs raises on purpose: who must act, and with what exit code.

Three results are never confused: `BackendUnavailable` (unknown), `NotFound` (known to be
absent) and `Corrupt` (there, but not what was written).  Each class carries the exit code that
the command line returns for it; `docs/errors.md` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class QsfsError(Exception):
    """Base of all expected errors.  The message says what happened, to what, and what to do next."""

    exit_code: ClassVar[int] = 1


class ConfigError(QsfsError):
    """The configuration cannot be used.  The operator mends the file or the option named."""

    exit_code: ClassVar[int] = 3


class KeyFileError(QsfsError):
    """The key file is missing, unreadable, malformed, or opens no key slot of this file system."""

    exit_code: ClassVar[int] = 4


class BackendError(QsfsError):
    """Base of what a backend can answer besides a result."""

    exit_code: ClassVar[int] = 5


class BackendUnavailable(BackendError):
    """No answer, or a passing fault: whether the key exists is unknown.  Retry, or ask others."""


class BackendRefused(BackendError):
    """The backend answered and will not do it: password, permission, namespace, mode, limit."""

    exit_code: ClassVar[int] = 6


class BackendFull(BackendError):
    """The backend has no room for this value.  The operator adds room; nothing was stored."""

    exit_code: ClassVar[int] = 7


class QuorumUnavailable(BackendError):
    """Too few backends answered for what was asked.  Nothing was decided; retry when they return."""


class Unavailable(BackendError):
    """Data on the backends did not come in time, or the wait for them was ended.  They may still come."""


class DataLost(QsfsError):
    """More shards of a pack are positively absent or corrupt than its parity can replace."""

    exit_code: ClassVar[int] = 21


class GenerationExpired(QsfsError):
    """A read-only mount's generation is not kept any more and its data are gone.  Remount a newer one."""

    exit_code: ClassVar[int] = 22


class MayHaveExpired(QsfsError):
    """Data of a read-only mount's generation are gone, and the head that says whether that was due cannot be read."""

    exit_code: ClassVar[int] = 25


class NotFound(QsfsError):
    """Positively absent: the one who would hold it answered that it does not exist."""

    exit_code: ClassVar[int] = 8


class Corrupt(QsfsError):
    """Bytes that fail their checksum or authentication: as good as absent, never returned."""

    exit_code: ClassVar[int] = 8


class FormatMismatch(QsfsError):
    """Data of a foreign kind or of a newer version.  Nothing was changed."""

    exit_code: ClassVar[int] = 9


class Fenced(QsfsError):
    """Another mount owns the file system.  This one must not publish or delete any more."""

    exit_code: ClassVar[int] = 10


class StaleCache(QsfsError):
    """The local state is not the newest: a cloned or rolled-back machine, or one taken over from."""

    exit_code: ClassVar[int] = 11


class AlreadyFormatted(QsfsError):
    """The backends hold a file system already.  Refused unless its id is named."""

    exit_code: ClassVar[int] = 12


class MountError(QsfsError):
    """The mount point, the kernel or a second daemon stands in the way of a mount."""

    exit_code: ClassVar[int] = 13


class CacheError(QsfsError):
    """The local cache directory cannot be used: locked, missing, too small, damaged."""

    exit_code: ClassVar[int] = 14


class DependencyMissing(QsfsError):
    """A program, device or library that qsfs needs is not installed."""

    exit_code: ClassVar[int] = 15


class NotRunning(QsfsError):
    """No daemon answers on the control socket."""

    exit_code: ClassVar[int] = 16


class DeadlineExceeded(QsfsError):
    """What was waited for did not come in time.  It may still come."""

    exit_code: ClassVar[int] = 17


class SplitHeads(QsfsError):
    """Two heads of one owner, neither descending from the other: a clone ran.  A person must choose.

    `digests`: those of the heads to choose from, in hexadecimal.
    """

    exit_code: ClassVar[int] = 18

    def __init__(self, message: str, digests: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.digests = tuple(digests)


class LimitExceeded(QsfsError):
    """What was asked for is larger than the format or a backend can hold.  Nothing was written."""

    exit_code: ClassVar[int] = 19


class WrongBackend(BackendError):
    """What answers is not the backend that the fleet names: swapped, re-created or emptied."""

    exit_code: ClassVar[int] = 20


class KeyConflict(QsfsError):
    """Two commands changed the key slots at the same time; at most one of the changes holds."""

    exit_code: ClassVar[int] = 24


class QsfsBug(QsfsError):
    """An assertion of qsfs itself failed.  Please report it with the log."""

    exit_code: ClassVar[int] = 70


def error_of(name: str, message: str) -> QsfsError:
    """The error class called `name` with `message`, as a daemon reported it; `QsfsError` if unknown."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, QsfsError):
        return kind(message)
    return QsfsError(message)
