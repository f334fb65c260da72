"""A backend in memory, for tests and simulation: the semantics and limits of a 0-db namespace.

`MemoryStore` is the namespace (what would survive on the server); any number of `MemoryBackend`
objects are its clients.  Latency is spent in `trio.sleep`, half before a call takes effect and
half after, so that a virtual clock drives it and a cancelled call may have taken effect or not.
"""

from __future__ import annotations

import contextlib
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import trio

from qsfs.backend.contract import BackendInfo, Buffer, ScanEntry, ScanPage, Session, check_key, check_value
from qsfs.clock import Clock, SystemClock
from qsfs.errors import BackendFull, BackendRefused, BackendUnavailable, WrongBackend

T = TypeVar("T")

Latency = Callable[[str, int], float]
"""Seconds that a call takes: called with the call's name and the bytes that it moves."""


@dataclass(frozen=True, slots=True)
class _Record:
    sequence: int
    value: bytes
    crc: int
    time_s: int


class MemoryStore:
    """The contents of one namespace.

    `limit_bytes` bounds live values (0: no bound), `disk_bytes` all that was ever appended, as a
    0-db that never compacts (0: no bound): then storing and deleting fail and reading goes on.
    `read_only` and `worm` are as in 0-db.  `page_entries` bounds the entries of a scan page.
    """

    def __init__(
        self,
        name: str = "memory/qsfs",
        *,
        clock: Clock | None = None,
        limit_bytes: int = 0,
        disk_bytes: int = 0,
        page_entries: int = 128,
    ) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.disk_bytes = disk_bytes
        self.page_entries = page_entries
        self.read_only = False
        self.worm = False
        self.locked = False
        self._clock = clock or SystemClock()
        self._records: dict[bytes, _Record] = {}
        self._order: list[tuple[int, bytes]] = []
        self._sequence = 0
        self._live_bytes = 0
        self._appended_bytes = 0

    def keys(self) -> list[bytes]:
        """Live keys, oldest first."""
        return sorted(self._records, key=lambda key: self._records[key].sequence)

    def peek(self, key: bytes) -> bytes | None:
        """The stored value, without any call."""
        record = self._records.get(key)
        return None if record is None else record.value

    def rot(self, key: bytes, change: Callable[[bytes], bytes]) -> None:
        """Replaces the stored bytes of `key` behind the store's back: its checksum stays as it was."""
        old = self._records[key]
        value = change(old.value)
        self._records[key] = _Record(old.sequence, value, old.crc, old.time_s)
        self._live_bytes += len(value) - len(old.value)

    def lose(self, key: bytes) -> None:
        """Forgets `key` as if it had never been stored; nothing happens if it is absent."""
        record = self._records.pop(key, None)
        if record is not None:
            self._live_bytes -= len(record.value)

    def clear(self) -> None:
        """Forgets everything: the namespace was created anew."""
        self._records.clear()
        self._order.clear()
        self._live_bytes = 0
        self._appended_bytes = 0

    def copy(self) -> MemoryStore:
        """An independent copy of the present state."""
        other = MemoryStore(
            self.name,
            clock=self._clock,
            limit_bytes=self.limit_bytes,
            disk_bytes=self.disk_bytes,
            page_entries=self.page_entries,
        )
        other.go_back_to(self)
        return other

    def go_back_to(self, earlier: MemoryStore) -> None:
        """Takes over the contents of `earlier`: a server that was restored from an old image."""
        self._records = dict(earlier._records)
        self._order = list(earlier._order)
        self._sequence = earlier._sequence
        self._live_bytes = earlier._live_bytes
        self._appended_bytes = earlier._appended_bytes

    def put(self, key: bytes, value: bytes) -> None:
        """Stores `value`; raises as `Session.set`."""
        old = self._records.get(key)
        self._refuse_write()
        if old is not None and self.worm:
            raise BackendRefused(f"backend {self.name}: the namespace is write-once and the key exists")
        if self.limit_bytes:
            replaced = 0 if old is None else len(old.value)
            if self._live_bytes + len(value) > self.limit_bytes + replaced:
                raise BackendFull(f"backend {self.name}: no room for {len(value)} bytes; raise its quota")
        if old is not None and old.value == value:
            return
        self._append(len(key) + len(value))
        self._sequence += 1
        self._records[key] = _Record(
            self._sequence, value, zlib.crc32(value), self._clock.time_ns() // 1_000_000_000
        )
        self._order.append((self._sequence, key))
        self._live_bytes += len(value) - (0 if old is None else len(old.value))

    def remove(self, key: bytes) -> bool:
        """Deletes `key`; raises as `Session.delete`."""
        self._refuse_write()
        if self.worm:
            raise BackendRefused(f"backend {self.name}: the namespace is write-once: nothing is deleted")
        if key not in self._records:
            return False
        self._append(len(key))
        self._live_bytes -= len(self._records.pop(key).value)
        return True

    def intact(self, key: bytes) -> bool | None:
        """Whether the value has the checksum it was stored with; `None` if absent."""
        record = self._records.get(key)
        return None if record is None else zlib.crc32(record.value) == record.crc

    def page(self, cursor: bytes | None, *, forward: bool) -> ScanPage:
        """The next page of a scan in either direction; raises `BackendRefused` for a foreign cursor."""
        if cursor is not None and (len(cursor) != 8 or int.from_bytes(cursor, "little") > self._sequence):
            raise BackendRefused(f"backend {self.name}: this scan cursor is not one of this backend")
        entries: list[ScanEntry] = []
        last = 0
        for sequence, key in self._from(cursor, forward=forward):
            record = self._records.get(key)
            if record is None or record.sequence != sequence:
                continue
            entries.append(ScanEntry(key, len(record.value), record.time_s))
            last = sequence
            if len(entries) == self.page_entries:
                break
        if not entries:
            return ScanPage(None, ())
        return ScanPage(last.to_bytes(8, "little"), tuple(entries))

    def info(self) -> BackendInfo:
        """Fill and limits."""
        disk_free = self.disk_bytes - self._appended_bytes if self.disk_bytes else 1 << 50
        quota_free = self.limit_bytes - self._live_bytes if self.limit_bytes else 1 << 50
        return BackendInfo(
            entries=len(self._records),
            data_bytes=self._live_bytes,
            limit_bytes=self.limit_bytes,
            disk_free_bytes=max(0, disk_free),
            free_bytes=max(0, min(disk_free, quota_free)),
            locked=self.locked,
            worm=self.worm,
        )

    def _from(self, cursor: bytes | None, *, forward: bool) -> Iterator[tuple[int, bytes]]:
        total = len(self._order)
        position = None if cursor is None else int.from_bytes(cursor, "little")
        if forward:
            start = 0 if position is None else bisect_right(self._order, position, key=_sequence_of)
            indexes = range(start, total)
        else:
            end = total if position is None else bisect_left(self._order, position, key=_sequence_of)
            indexes = range(end - 1, -1, -1)
        return (self._order[index] for index in indexes)

    def _refuse_write(self) -> None:
        if self.read_only:
            raise BackendRefused(f"backend {self.name}: the namespace is read-only for us; see its password")
        if self.locked:
            raise BackendUnavailable(f"backend {self.name}: the namespace is locked for now")

    def _append(self, size: int) -> None:
        if self.disk_bytes and self._appended_bytes + size > self.disk_bytes:
            raise BackendUnavailable(f"backend {self.name}: it cannot write now; its disk may be full")
        self._appended_bytes += size


def _sequence_of(item: tuple[int, bytes]) -> int:
    return item[0]


class _Calls:
    def __init__(self, store: MemoryStore, latency: Latency | float) -> None:
        self._store = store
        self._latency = latency
        self._closed = False

    @property
    def name(self) -> str:
        """The store's name."""
        return self._store.name

    async def get(self, key: bytes) -> bytes | None:
        """See `Session`."""
        check_key(self.name, key)
        record = self._store.peek(key)
        return await self._call("get", len(record or b""), lambda: self._store.peek(key))

    async def set(self, key: bytes, value: Buffer) -> None:
        """See `Session`."""
        check_value(self.name, key, value)
        content = bytes(value)
        await self._call("set", len(content), lambda: self._store.put(key, content))

    async def exists(self, key: bytes) -> bool:
        """See `Session`."""
        check_key(self.name, key)
        return await self._call("exists", 0, lambda: self._store.peek(key) is not None)

    async def check(self, key: bytes) -> bool | None:
        """See `Session`."""
        check_key(self.name, key)
        return await self._call("check", 0, lambda: self._store.intact(key))

    async def delete(self, key: bytes) -> bool:
        """See `Session`."""
        check_key(self.name, key)
        return await self._call("delete", 0, lambda: self._store.remove(key))

    async def scan(self, cursor: bytes | None = None) -> ScanPage:
        """See `Session`."""
        return await self._call("scan", 0, lambda: self._store.page(cursor, forward=True))

    async def rscan(self, cursor: bytes | None = None) -> ScanPage:
        """See `Session`."""
        return await self._call("rscan", 0, lambda: self._store.page(cursor, forward=False))

    async def info(self) -> BackendInfo:
        """See `Session`."""
        return await self._call("info", 0, self._store.info)

    async def _call(self, call: str, size: int, effect: Callable[[], T]) -> T:
        seconds = self._latency(call, size) if callable(self._latency) else self._latency
        await trio.sleep(seconds / 2)
        self._refuse_closed()
        result = effect()
        if seconds:
            await trio.sleep(seconds / 2)
        return result

    def _refuse_closed(self) -> None:
        if self._closed:
            raise BackendUnavailable(f"backend {self.name}: the connection is closed")


class MemorySession(_Calls):
    """One connection to a `MemoryStore`: calls wait for one another, and one that is cancelled breaks it."""

    def __init__(self, store: MemoryStore, latency: Latency | float = 0.0) -> None:
        super().__init__(store, latency)
        self._turn = trio.Lock()

    def break_off(self) -> None:
        """Makes this and every later call fail, as a lost connection does."""
        self._closed = True

    async def _call(self, call: str, size: int, effect: Callable[[], T]) -> T:
        async with self._turn:
            try:
                return await super()._call(call, size, effect)
            except trio.Cancelled:
                self._closed = True
                raise


class MemoryBackend(_Calls):
    """A client of a `MemoryStore`.  `latency`: seconds a call, or a function of call and bytes."""

    def __init__(self, store: MemoryStore | None = None, latency: Latency | float = 0.0) -> None:
        super().__init__(store or MemoryStore(), latency)
        self._expected: tuple[bytes, bytes] | None = None

    @property
    def store(self) -> MemoryStore:
        """The namespace behind this client."""
        return self._store

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """See `Backend`."""
        self._refuse_closed()
        self._recognise()
        session = MemorySession(self._store, self._latency)
        try:
            yield session
        finally:
            session.break_off()

    def expect(self, key: bytes, value: bytes | None) -> None:
        """See `Backend`.  Every call is taken for one on a new connection."""
        self._expected = None if value is None else (key, value)

    async def _call(self, call: str, size: int, effect: Callable[[], T]) -> T:
        def on_the_right_store() -> T:
            self._recognise()
            return effect()

        return await super()._call(call, size, on_the_right_store)

    def _recognise(self) -> None:
        if self._expected is not None and self._store.peek(self._expected[0]) != self._expected[1]:
            raise WrongBackend(f"backend {self.name}: it was re-created, emptied or swapped since it was asked last")

    async def aclose(self) -> None:
        """See `Backend`."""
        self._closed = True
        await trio.lowlevel.checkpoint()
