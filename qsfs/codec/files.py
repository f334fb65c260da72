"""Files that appear whole under their name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qsfs.clock import Clock
from qsfs.errors import ConfigError, QsfsError
from qsfs.format.units import Buffer

_FLUSHING_THREADS = 32


@contextlib.contextmanager
def told(path: Path | str, doing: str) -> Iterator[None]:
    """Turns what the operating system answers into a `QsfsError` that names `path` and what was being done."""
    try:
        yield
    except OSError as error:
        raise QsfsError(f"{path}: {doing}: {error.strerror or error}") from error


class NewFile:
    """A file that is written under a temporary name beside `path`, and gets its own at the end."""

    def __init__(self, path: Path, clock: Clock, *, mode: int = 0o666, force: bool = False) -> None:
        """Raises `ConfigError` where `path` exists and may not be replaced, `QsfsError` where it cannot be made."""
        self.path = path
        self._force = force
        if path.is_dir():
            raise ConfigError(f"{path}: is a directory; name a file")
        if not force and os.path.lexists(path):
            raise self._exists()
        self._aside = path.with_name(f".{path.name[:40]}.{clock.random_bytes(6).hex()}.partial")
        with told(self._aside, "cannot be made"):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._handle = os.open(self._aside, flags, mode)
        self._position = 0

    def write(self, data: Buffer) -> None:
        """Appends `data`."""
        view = memoryview(data)
        with told(self._aside, "cannot be written; it was removed"):
            while view:
                done = os.pwrite(self._handle, view, self._position)
                self._position += done
                view = view[done:]

    def write_at(self, data: Buffer, offset: int) -> None:
        """Writes `data` at `offset`, which is before the end."""
        position, self._position = self._position, offset
        self.write(data)
        self._position = position

    def skip(self, count: int) -> None:
        """Leaves `count` bytes for `write_at`."""
        self._position += count

    def flush(self) -> None:
        """Makes the contents durable."""
        with told(self._aside, "cannot be made durable; it was removed"):
            os.fsync(self._handle)

    def set_attributes(self, mode: int, mtime_ns: int) -> None:
        """The permission bits and the time of change (0: now) that the finished file has."""
        with told(self._aside, "cannot get its mode and time"):
            os.fchmod(self._handle, mode)
            if mtime_ns:
                os.utime(self._handle, ns=(mtime_ns, mtime_ns))

    def publish(self) -> None:
        """Gives the file its name, durably.  `ConfigError` if one has appeared there and may not be replaced."""
        with told(self.path, "cannot be put in place"):
            try:
                if self._force:
                    raise OSError(errno.EPERM, "")
                os.link(self._aside, self.path)
            except FileExistsError:
                raise self._exists() from None
            except OSError as error:
                # Some file systems of removable disks have no links.
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                if not self._force and os.path.lexists(self.path):
                    raise self._exists() from None
                self._aside.rename(self.path)
            flush_directory(self.path.parent)

    def close(self) -> None:
        """Ends it; what was not published goes."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            self._aside.unlink(missing_ok=True)

    def _exists(self) -> ConfigError:
        return ConfigError(f"{self.path}: exists; choose another name, or --force to replace it")


class NewFiles:
    """Several such files that appear together: all are whole and durable before the first gets its name."""

    def __init__(self, paths: Sequence[Path], clock: Clock, *, mode: int = 0o666, force: bool = False) -> None:
        """Raises as `NewFile`."""
        self._force = force
        self.files: list[NewFile] = []
        try:
            for path in paths:
                self.files.append(NewFile(path, clock, mode=mode, force=force))
        except BaseException:
            self.close()
            raise

    def publish(self) -> None:
        """Makes all durable, side by side since they may lie on as many disks, then names them.

        Where one cannot get its name, those that have got theirs go again; with force they stay, and the error
        names them: what they replaced is gone already.
        """
        with ThreadPoolExecutor(min(_FLUSHING_THREADS, len(self.files))) as pool:
            list(pool.map(NewFile.flush, self.files))
        for done, file in enumerate(self.files):
            try:
                file.publish()
            except BaseException as error:
                paths = [published.path for published in self.files[:done]]
                if not self._force:
                    for path in paths:
                        path.unlink(missing_ok=True)
                elif paths and isinstance(error, QsfsError):
                    kept = ", ".join(map(str, paths))
                    raise QsfsError(f"{error}; whole and in place already: {kept}") from error
                raise

    def close(self) -> None:
        """Ends all; what was not published goes."""
        for file in self.files:
            file.close()


def flush_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
