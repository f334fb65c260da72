"""A preallocated file of whole sectors that is written past the kernel's page cache.

A buffered append that ends within a page makes the kernel read that page first if it no longer caches
it, and copies the bytes once more.  Where the file system or the device cannot write single sectors
directly, the page cache is used after all: nothing but speed depends on it.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

SECTOR = 512
DISK_FAILED = "see to the cache's disk, its free room above all, and mount again"
"""What to do where the cache's disk does not take what must be durable."""

_CHUNK = 256 << 10


class SectorFile:
    """One file of a fixed size; all its blocks are written, so that a write changes no metadata.

    Raises `OSError` as the system calls do.  Not thread-safe.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Opens or creates `path`, durably, and gives it `size` bytes, a multiple of `SECTOR`."""
        self._chunk = mmap.mmap(-1, _CHUNK)
        self._view = memoryview(self._chunk)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            old = os.fstat(file).st_size
            zeros = bytes(1 << 20)
            for offset in range(old - old % SECTOR, size, len(zeros)):
                os.pwrite(file, zeros[: size - offset], offset)
            if old > size:
                os.ftruncate(file, size)
            os.fsync(file)
            _sync_directory(path.parent)
            direct = self._open_direct(path)
        except OSError:
            os.close(file)
            raise
        self._file = file if direct is None else direct
        if direct is not None:
            os.close(file)

    def _open_direct(self, path: Path) -> int | None:
        """The file opened past the page cache, None where single sectors cannot be had that way."""
        try:
            file = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return None
            raise
        try:
            os.preadv(file, [self._view[:SECTOR]], SECTOR)
        except OSError as error:
            os.close(file)
            if error.errno == errno.EINVAL:
                return None
            raise
        return file

    def write(self, data: bytes, offset: int) -> None:
        """Writes `data` at `offset`, both whole sectors.  What a short write leaves out is written again."""
        done = 0
        while done < len(data):
            here = min(_CHUNK, len(data) - done)
            self._view[:here] = memoryview(data)[done : done + here]
            written = os.pwrite(self._file, self._view[:here], offset + done)
            if written < SECTOR:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += written - written % SECTOR

    def flush(self) -> None:
        """Returns when everything written is durable."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
        self._view.release()
        self._chunk.close()


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
