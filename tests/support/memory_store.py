"""The store's and the contents' interface in plain dictionaries: the model beside the real ones.

Nothing here is durable, bounded or quick; it is short enough to be right by reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qsfs.clock import Clock, FixedClock
from qsfs.filesystem.needs import Need, NeedPages
from qsfs.store.schema import PAGE, Inode, InodeFlag, Table, u64

_PATCHABLE = {
    *("mode", "uid", "gid", "nlink", "rdev", "flags", "next_cookie", "parent"),
    *("atime_ns", "mtime_ns", "ctime_ns"),
}


class MemoryChange:
    """Collects the steps of one change."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.steps: list[Callable[[], None]] = []
        self.data_of: list[int] = []

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        self.steps.append(lambda: self.store.rows[table].__setitem__(key, value))

    def delete(self, table: Table, key: bytes) -> None:
        self.steps.append(lambda: self.store.rows[table].pop(key, None) and None)

    def create(self, inode: Inode) -> None:
        made = dataclasses.replace(inode, size=0, allocated=0)
        self.steps.append(lambda: self.store.inodes.__setitem__(made.number, made))

    def patch(self, number: int, **fields: int) -> None:
        assert set(fields) <= _PATCHABLE, fields

        def step() -> None:
            for name, value in fields.items():
                setattr(self.store.inodes[number], name, value)

        self.steps.append(step)

    def remove(self, number: int) -> None:
        self.steps.append(lambda: self.store.remove(number))

    def with_data(self, number: int) -> None:
        self.data_of.append(number)


class MemoryStore:
    """A store whose changes are applied at once and forgotten with the process."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or FixedClock()
        self.rows: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}
        self.inodes: dict[int, Inode] = {}
        self.data: dict[int, dict[int, bytes]] = {}
        self.changes: list[MemoryChange] = []
        self.need: Need | None = None
        self._last_inode = 1

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self.rows[table].get(key)

    def scan(
        self, table: Table, start: bytes, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        rows = self.rows[table]
        before = dict(rows)
        for key in sorted((k for k in rows if start <= k and (stop is None or k < stop)), reverse=reverse):
            assert rows == before, "the store was changed while it was scanned"
            yield key, rows[key]

    def inode(self, number: int) -> Inode | None:
        return self.inodes.get(number)

    def allocate_inode(self) -> int:
        self._last_inode += 1
        return self._last_inode

    @contextmanager
    def change(self) -> Iterator[MemoryChange]:
        if self.need is not None:
            need, self.need = self.need, None
            raise need
        change = MemoryChange(self)
        yield change
        for step in change.steps:
            step()
        self.changes.append(change)
        del self.changes[:-100]

    def remove(self, number: int) -> None:
        self.inodes.pop(number, None)
        self.data.pop(number, None)
        for table in (Table.SYMLINKS, Table.ORPHANS):
            self.rows[table].pop(u64(number), None)
        for key in [key for key in self.rows[Table.XATTRS] if key.startswith(u64(number))]:
            del self.rows[Table.XATTRS][key]


@dataclass(frozen=True)
class MemoryAttributes:
    size: int
    allocated: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class MemoryContents:
    """Whole pages in dictionaries; a file with atomic sync only notes that it was written."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.open_count: dict[int, int] = {}
        self.uncovered: set[int] = set()
        self.shrinking = False
        self.need: Need | None = None
        self.need_stays = False

    def _check(self, inode: Inode) -> None:
        need = self.need
        if need is not None and (not isinstance(need, NeedPages) or need.inode in (0, inode.number)):
            if not self.need_stays:
                self.need = None
            raise need

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        self._check(inode)
        end = min(offset + size, inode.size)
        if offset >= end:
            return b""
        pages = self.store.data.get(inode.number, {})
        first = offset // PAGE
        joined = b"".join(pages.get(page, bytes(PAGE)) for page in range(first, (end - 1) // PAGE + 1))
        return joined[offset - first * PAGE : end - first * PAGE]

    def write(self, inode: Inode, offset: int, data: bytes | memoryview, *, times: bool = True) -> int:
        self._check(inode)
        pages = self.store.data.setdefault(inode.number, {})
        done = 0
        while done < len(data):
            page, start = divmod(offset + done, PAGE)
            part = bytes(data[done : done + PAGE - start])
            old = pages.get(page, bytes(PAGE))
            pages[page] = old[:start] + part + old[start + len(part) :]
            done += len(part)
        inode.size = max(inode.size, offset + len(data))
        self._changed(inode, times)
        return len(data)

    def truncate(self, inode: Inode, size: int) -> None:
        self._check(inode)
        pages = self.store.data.setdefault(inode.number, {})
        for page in [page for page in pages if page * PAGE >= size]:
            del pages[page]
        if size % PAGE and size // PAGE in pages:
            pages[size // PAGE] = pages[size // PAGE][: size % PAGE].ljust(PAGE, b"\0")
        inode.size = size
        self._changed(inode, times=True)

    def _changed(self, inode: Inode, times: bool) -> None:
        inode.allocated = len(self.store.data.get(inode.number, {}))
        if times:
            inode.mtime_ns = inode.ctime_ns = self.store.clock.time_ns()
        if inode.flags & InodeFlag.ATOMIC_SYNC and inode.number in self.open_count:
            self.uncovered.add(inode.number)

    def set_times(
        self, inode: Inode, atime_ns: int | None, mtime_ns: int | None, ctime_ns: int | None
    ) -> None:
        self._check(inode)
        inode.atime_ns = inode.atime_ns if atime_ns is None else atime_ns
        inode.mtime_ns = inode.mtime_ns if mtime_ns is None else mtime_ns
        inode.ctime_ns = inode.ctime_ns if ctime_ns is None else ctime_ns

    def accessed(self, inode: Inode, time_ns: int) -> None:
        inode.atime_ns = time_ns

    def stat(self, inode: Inode) -> MemoryAttributes:
        return MemoryAttributes(inode.size, inode.allocated, inode.atime_ns, inode.mtime_ns, inode.ctime_ns)

    def opened(self, inode: Inode) -> None:
        self.open_count[inode.number] = self.open_count.get(inode.number, 0) + 1

    def closed(self, inode: Inode) -> None:
        self._check(inode)
        self.open_count[inode.number] -= 1
        if not self.open_count[inode.number]:
            del self.open_count[inode.number]
            self.uncovered.discard(inode.number)

    def is_open(self, number: int) -> bool:
        return number in self.open_count

    def is_shrinking(self, number: int) -> bool:
        return self.shrinking

    def has_uncovered(self, number: int) -> bool:
        return number in self.uncovered

    def forget(self, number: int) -> None:
        self.uncovered.discard(number)
