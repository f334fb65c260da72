"""One append-only data file: appended whole or not at all, read at any place, made durable in groups."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import trio

from qsfs.zdb.record import (
    FILE_HEADER,
    FILE_MAGIC,
    FORMAT_VERSION,
    SEAL,
    Content,
    encode_record,
)
from qsfs.zdb.settings import sync_directory

_MISS_ERRNOS = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class DataFile:
    """A data file of a namespace.

    `size` is where the next record goes, `durable` the length known to be on the disk.  `failed`
    is set once the file can no longer be trusted to take appends; what it holds stays readable.
    Errors are `OSError`.
    """

    def __init__(self, path: Path, number: int, descriptor: int, size: int) -> None:
        self.path = path
        self.number = number
        self.size = size
        self.durable = 0
        self.failed = False
        self._descriptor = descriptor
        self._pins = 0
        self._closing = False
        self._syncing = False
        self._waiters = trio.lowlevel.ParkingLot()

    @classmethod
    def create(cls, directory: Path, number: int) -> Self:
        """A new, empty file `d<number>`; leaves nothing behind when it fails."""
        path = directory / f"d{number}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            file = cls(path, number, descriptor, 0)
            file.begin()
            sync_directory(directory)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return file

    @classmethod
    def open(cls, path: Path, number: int) -> Self:
        """An existing file, with all its bytes."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return cls(path, number, descriptor, os.fstat(descriptor).st_size)

    def begin(self) -> None:
        """Writes the header of an empty file."""
        header = FILE_HEADER.pack(FILE_MAGIC, FORMAT_VERSION, self.number)
        if os.pwrite(self._descriptor, header, 0) != len(header):
            raise OSError(errno.ENOSPC, "short write of a file header", str(self.path))
        self.size = len(header)

    @property
    def empty(self) -> bool:
        """Whether nothing was appended yet."""
        return self.size <= FILE_HEADER.size

    def append(self, head: bytes, value: Content = b"") -> int:
        """Appends `head` and `value`; returns where they begin.

        If they do not fit, what was written of them is cut off again before `OSError` is raised.
        """
        offset = self.size
        length = len(head) + len(value)
        try:
            written = os.pwritev(self._descriptor, [head, value] if value else [head], offset)
            while written < length:
                rest = memoryview(bytes(head) + bytes(value))[written:]
                count = os.pwrite(self._descriptor, rest, offset + written)
                if count == 0:
                    raise OSError(errno.ENOSPC, "short write", str(self.path))
                written += count
        except OSError:
            self._roll_back()
            raise
        self.size = offset + length
        return offset

    def overwrite(self, offset: int, content: bytes) -> None:
        """Replaces bytes that were appended before; only recovery does this."""
        os.pwrite(self._descriptor, content, offset)

    def cut(self, size: int) -> None:
        """Forgets all from `size` on; only recovery does this."""
        os.ftruncate(self._descriptor, size)
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only at the end of the file."""
        return os.pread(self._descriptor, length, offset)

    async def read_exactly(self, offset: int, length: int) -> bytes | bytearray:
        """`length` bytes at `offset`, in a thread if the kernel would have to wait for the disk."""
        content = bytearray(length)
        try:
            if os.preadv(self._descriptor, [content], offset, os.RWF_NOWAIT) == length:
                return content
        except OSError as failure:
            if failure.errno not in _MISS_ERRNOS:
                raise
        with self._pinned():
            cold = await trio.to_thread.run_sync(os.pread, self._descriptor, length, offset)
        if len(cold) != length:
            raise OSError(errno.EIO, f"{length} bytes wanted at {offset}, {len(cold)} there", str(self.path))
        return cold

    async def make_durable(self, size: int) -> None:
        """Returns once the first `size` bytes are on the disk; callers share one fsync."""
        while self.durable < size:
            if self.failed:
                raise OSError(errno.EIO, "an earlier fsync failed", str(self.path))
            if self._syncing:
                await self._waiters.park()
                continue
            self._syncing = True
            target = self.size
            try:
                with self._pinned():
                    await trio.to_thread.run_sync(os.fdatasync, self._descriptor)
                self.durable = max(self.durable, target)
            except OSError:
                self.failed = True
                raise
            finally:
                self._syncing = False
                self._waiters.unpark_all()

    def sync(self) -> None:
        """Puts all that was appended on the disk."""
        os.fdatasync(self._descriptor)
        self.durable = self.size

    def seal(self, seed: int) -> None:
        """Notes at the end of the file how much of it is durable, to spare the next start its check."""
        if not self.failed:
            self.append(encode_record(b"", b"", time_s=0, durable=self.durable, seed=seed, flags=SEAL))

    def close(self) -> None:
        """Closes the file as soon as no thread uses it."""
        self._closing = True
        if self._pins == 0 and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[None]:
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1
            if self._closing:
                self.close()

    def _roll_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self.size)
        except OSError:
            self.failed = True

