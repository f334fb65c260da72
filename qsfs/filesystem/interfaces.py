"""What the namespace asks of the store and of file contents; `qsfs.store` and `contents` provide it.

Tests provide the same in plain dictionaries, so that the rules of the namespace are checked without
a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from qsfs.clock import Clock
from qsfs.store.schema import Inode, Table


class Change(Protocol):
    """One namespace operation, applied wholly at the end of `with store.change()`."""

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Sets a row."""

    def delete(self, table: Table, key: bytes) -> None:
        """Deletes a row; harmless if there is none."""

    def create(self, inode: Inode) -> None:
        """Adds an inode."""

    def patch(self, number: int, **fields: int) -> None:
        """Sets single fields of an inode, never its size or allocation."""

    def remove(self, number: int) -> None:
        """Removes an inode with its symlink, xattrs, orphan row and data."""

    def with_data(self, number: int) -> None:
        """Journals the file's covered data along with the change."""


class Store(Protocol):
    """Rows and live inodes.  Reads inside a change do not see it: validate first, then change."""

    @property
    def clock(self) -> Clock:
        """Where times come from."""

    def get(self, table: Table, key: bytes) -> bytes | None:
        """A row, or None."""

    def scan(
        self, table: Table, start: bytes, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop in order; nothing may change meanwhile."""

    def inode(self, number: int) -> Inode | None:
        """The one live object of an inode; changed only through `Change.patch`."""

    def allocate_inode(self) -> int:
        """A number that no inode has had."""

    def change(self) -> AbstractContextManager[Change]:
        """One operation, applied at the end of the block; nothing if an exception leaves it."""


class DataAttributes(Protocol):
    """A file's size, allocated pages and times as the application sees them."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def allocated(self) -> int:
        """Pages that are not holes."""

    @property
    def atime_ns(self) -> int:
        """Last access, as far as it was set."""

    @property
    def mtime_ns(self) -> int:
        """Last change of the data."""

    @property
    def ctime_ns(self) -> int:
        """Last change of data or inode."""


class Contents(Protocol):
    """What regular files hold.  Every call may raise a `Need` before it has changed anything."""

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end of the file."""

    def write(self, inode: Inode, offset: int, data: bytes, *, times: bool = True) -> int:
        """Writes all of `data`; returns its length.  Without `times` somebody else sets mtime and ctime."""

    def truncate(self, inode: Inode, size: int) -> None:
        """Sets the size and the times that go with it."""

    def set_times(
        self, inode: Inode, atime_ns: int | None, mtime_ns: int | None, ctime_ns: int | None
    ) -> None:
        """Sets the given times."""

    def accessed(self, inode: Inode, time_ns: int) -> None:
        """Sets the access time, which belongs to no sync: it never waits to be covered."""

    def stat(self, inode: Inode) -> DataAttributes:
        """Size, pages and times, with what is not covered yet."""

    def opened(self, inode: Inode) -> None:
        """Counts one more open handle."""

    def closed(self, inode: Inode) -> None:
        """Counts one handle less; the last close covers a file with atomic sync."""

    def is_open(self, number: int) -> bool:
        """Whether a handle is open."""

    def is_shrinking(self, number: int) -> bool:
        """Whether a truncation is still being worked off, so that `allocated` goes down by itself."""

    def forget(self, number: int) -> None:
        """Drops what is uncovered of a file that was removed."""

    def has_uncovered(self, number: int) -> bool:
        """Whether anything of a file with atomic sync is not covered."""
