"""The one interface of a backend: a namespace of write-once values under short keys.

A backend is a 0-db namespace, an in-memory store, or a wrapper of the same interface (retry,
limits, metrics, injected faults).  Three results are never confused: a value, positively absent
(`None`, `False`), and unknown (`BackendUnavailable`).

What every implementation promises:

- Calls raise only `BackendUnavailable`, `BackendRefused`, `BackendFull` and, where `expect` was
  called, `WrongBackend` (and trio's `Cancelled`).  The message names the backend.
- A call that is cancelled or runs out of time may or may not have taken effect, and leaves
  nothing half read for the next one.
- Storing a key that exists replaces its value; storing identical bytes succeeds and changes
  nothing (neither the order of scans nor the time).
- Values are not verified on the way: whoever reads authenticates.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from qsfs.errors import BackendRefused

Buffer = bytes | bytearray | memoryview
"""What a value may be given as."""

MAX_KEY_BYTES = 255
"""Longest key of a backend."""

MAX_VALUE_BYTES = 8 * 1024 * 1024
"""Longest value of a backend."""


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """One key met by a scan: its value's length in bytes and when it was stored (Unix seconds)."""

    key: bytes
    size: int
    time_s: int


@dataclass(frozen=True, slots=True)
class ScanPage:
    """Some entries of a scan, and the cursor after them.

    A page with entries has a cursor; the end is an empty page whose cursor is `None`.  A cursor
    stays valid: passing the last one again later yields what was stored since.  A backend that does
    not know a cursor (it is another one's, or the backend went back to an older state) raises
    `BackendRefused`: scan from the start then.
    """

    cursor: bytes | None
    entries: tuple[ScanEntry, ...]


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a backend says of itself.  Sizes in bytes; `limit_bytes` is 0 without a quota.

    `data_bytes` counts live values only: a 0-db uses more disk than that.  `free_bytes` is the
    smaller of what the quota leaves and `disk_free_bytes`.  `locked` means that writes fail.
    """

    entries: int
    data_bytes: int
    limit_bytes: int
    disk_free_bytes: int
    free_bytes: int
    locked: bool = False
    worm: bool = False


class Session(Protocol):
    """The calls of a backend.  As a session: all over one connection, one after the other.

    A session never reconnects: after a break every call raises `BackendUnavailable`.  What it
    answers was therefore read after what it acknowledged before.
    """

    @property
    def name(self) -> str:
        """`host:port/namespace`, for messages."""
        ...

    async def get(self, key: bytes) -> bytes | None:
        """The value of `key`; `None` if it is positively absent."""
        ...

    async def set(self, key: bytes, value: Buffer) -> None:
        """Stores `value` (empty is legal) under `key`; returns when it is acknowledged.

        Raises `BackendFull` if there is no room: then nothing was stored.
        """
        ...

    async def exists(self, key: bytes) -> bool:
        """Whether the backend lists `key`; says nothing of the value's health."""
        ...

    async def check(self, key: bytes) -> bool | None:
        """Whether the stored value matches the backend's own checksum; `None` if absent."""
        ...

    async def delete(self, key: bytes) -> bool:
        """Deletes `key`; `False` if it was absent."""
        ...

    async def scan(self, cursor: bytes | None = None) -> ScanPage:
        """Live keys after `cursor` in the order in which they were stored (`None`: from the oldest).

        A key stored again while a scan runs may be met twice.
        """
        ...

    async def rscan(self, cursor: bytes | None = None) -> ScanPage:
        """Live keys before `cursor`, newest first (`None`: from the newest)."""
        ...

    async def info(self) -> BackendInfo:
        """The backend's fill and limits; cheap enough to be the health probe."""
        ...


class Backend(Session, Protocol):
    """The calls over as many connections as the backend keeps; reconnects by itself."""

    def session(self) -> AbstractAsyncContextManager[Session]:
        """Opens one connection of its own for the time of an `async with` block."""
        ...

    def expect(self, key: bytes, value: bytes | None) -> None:
        """From now on a connection is used only if the namespace at its other end holds `value` under `key`.

        So a backend that was emptied, re-created or swapped between two calls is noticed before the
        second: it raises `WrongBackend`.  None expects nothing any more.
        """
        ...

    async def aclose(self) -> None:
        """Closes all connections.  Later calls raise `BackendUnavailable`."""
        ...


def check_key(name: str, key: bytes) -> None:
    """Raises `BackendRefused` unless `key` has 1 to 255 bytes."""
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise BackendRefused(f"backend {name}: a key has 1 to {MAX_KEY_BYTES} bytes, not {len(key)}")


def check_value(name: str, key: bytes, value: Buffer) -> None:
    """Raises `BackendRefused` unless `key` and `value` keep the limits of a backend."""
    check_key(name, key)
    if byte_length(value) > MAX_VALUE_BYTES:
        raise BackendRefused(
            f"backend {name}: a value has at most {MAX_VALUE_BYTES} bytes, not {byte_length(value)}"
        )


def byte_length(value: Buffer) -> int:
    """Bytes of `value`, also of a memoryview of wider items."""
    return value.nbytes if isinstance(value, memoryview) else len(value)
