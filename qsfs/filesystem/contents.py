"""The bytes of files: read, write, truncate, times; atomic sync; all synchronous.

A page is looked for in this order: uncovered in memory, uncovered but spilled, the store's layers;
then it is remote only (`NeedPages`) or a hole.  Bytes behind the end of a file are zero in every
page that is kept, so that extending a file never brings old bytes back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

from qsfs.filesystem.needs import NeedPages, NeedRoom
from qsfs.filesystem.transient import TransientPages
from qsfs.filesystem.uncovered import Held, Uncovered
from qsfs.store.block import ZERO_PAGE
from qsfs.store.reading import LocalDamage
from qsfs.store.replay import log_of
from qsfs.store.schema import PAGE, Inode, InodeFlag, Page
from qsfs.store.start import DATABASE
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

_ATOMIC_SYNC = int(InodeFlag.ATOMIC_SYNC)
_LONG_WRITE = 256 << 10


@dataclass(frozen=True, slots=True)
class DataAttributes:
    """Size in bytes, pages that are not holes, times in nanoseconds, as the application sees them."""

    size: int
    allocated: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Contents:
    """The contents of all files of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uncovered: dict[int, Uncovered] = {}
        self._held = Held()
        store.promised_bytes = lambda: self._held.promised_bytes
        store.promised_since = self.oldest_uncovered
        self._opened: dict[int, int] = {}
        self.transient = TransientPages()

    # attributes

    def stat(self, inode: Inode) -> DataAttributes:
        """Size, allocation and times, uncovered writes included."""
        u = self._uncovered.get(inode.number)
        if u is None:
            return DataAttributes(
                inode.size, inode.allocated, inode.atime_ns, inode.mtime_ns, inode.ctime_ns
            )
        ctime = max(u.ctime_ns, inode.ctime_ns)
        return DataAttributes(u.size, inode.allocated + u.fresh, u.atime_ns, u.mtime_ns, ctime)

    def set_times(
        self,
        inode: Inode,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
    ) -> None:
        """Sets the times that are given; they belong to the data and are covered with them."""
        u = self._uncovered_of(inode)
        target: Uncovered | Inode = inode if u is None else u
        if atime_ns is not None:
            target.atime_ns = atime_ns
        if mtime_ns is not None:
            target.mtime_ns = mtime_ns
        if ctime_ns is not None:
            target.ctime_ns = ctime_ns
        if u is None:
            self._store.touch_data(inode)
        else:
            self._wrote_uncovered(inode, u)

    def accessed(self, inode: Inode, time_ns: int) -> None:
        """Sets the access time, which belongs to no sync: it never waits to be covered."""
        u = self._uncovered.get(inode.number)
        if u is not None:
            u.atime_ns = time_ns
        inode.atime_ns = time_ns
        self._store.touch_data(inode)

    # reading

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`, fewer at the end of the file.

        Raises `NeedPages` for what is remote only, `Corrupt` where local bytes are damaged and no
        backend can replace them.
        """
        u = self._uncovered.get(inode.number)
        end = min(offset + size, inode.size if u is None else u.size)
        if offset >= end:
            return b""
        first, last = offset // PAGE, (end - 1) // PAGE
        if first == last:
            page = self._pages(inode, u, first, 1)[0]
            if inode.flags & DATABASE and page is not ZERO_PAGE:
                self._store.start.note(inode.number, first, 1)
            start = offset - first * PAGE
            if end - offset == PAGE and isinstance(page, bytes):
                return page
            return bytes(page[start : start + end - offset])
        joined = None
        if u is None and not self._store.spill.any(inode.number):
            joined = self._store.blocks.reader.run(inode.number, first, last - first + 1)
        if joined is None:
            joined = b"".join(self._pages(inode, u, first, last - first + 1))
        if inode.flags & DATABASE:
            self._store.start.note(inode.number, first, last - first + 1)
        if len(joined) == end - offset:
            return joined
        return joined[offset - first * PAGE : end - first * PAGE]

    def _pages(self, inode: Inode, u: Uncovered | None, first: int, count: int) -> list[Page]:
        found = self._covered_pages(inode, first, count)
        number = inode.number
        spill = self._store.spill
        if u is not None or spill.any(number):
            for i in range(count):
                found[i] = self._upper_page(number, u, first + i, found[i], number in spill.covered)
        return self._fill(inode, u, first, found)

    def _covered_pages(self, inode: Inode, first: int, count: int) -> list[Page | None]:
        while True:
            try:
                return self._store.blocks.pages(inode.number, first, count)
            except LocalDamage as damage:
                if not self._store.blocks.drop_damaged(inode, damage.page):
                    raise
                _log.warning("%s; it is clean and will be fetched from the backends", damage)

    def _upper_page(
        self, number: int, u: Uncovered | None, page: int, below: Page | None, covered: bool
    ) -> Page | None:
        """The page as the layers above the store's blocks have it; `below` is what those have.

        Spilled pages lie above an uncovered truncation, unless they are `covered`: then below it.
        """
        if u is not None and page in u.pages:
            return u.pages[page]
        spilled = self._store.spill.page(number, page)
        if spilled is not None and not covered:
            return spilled
        if u is not None and u.hides(page):
            return None
        return below if spilled is None else spilled

    def _fill(self, inode: Inode, u: Uncovered | None, first: int, found: list[Page | None]) -> list[Page]:
        """Replaces None by zeros for holes; raises `NeedPages` for a run that is remote only."""
        if None not in found:
            return cast("list[Page]", found)
        number, pages = inode.number, []
        has_extents = self._store.extents.any(number)
        for i, data in enumerate(found):
            page = first + i
            if data is None and has_extents and not (u is not None and u.hides(page)):
                extent = self._store.blocks.remote_extent(number, page)
                if extent is not None:
                    data = self.transient.get(number, page, extent)
                    if data is None:
                        raise NeedPages(number, page, self._missing(inode, found, i))
            pages.append(ZERO_PAGE if data is None else data)
        return pages

    def _missing(self, inode: Inode, found: list[Page | None], index: int) -> int:
        count = 1
        while index + count < len(found) and found[index + count] is None:
            count += 1
        return count

    # writing

    def write(
        self, inode: Inode, offset: int, data: bytes | memoryview, *, times: bool = True
    ) -> int:
        """Writes `data` at `offset`; returns its length.  Sets mtime and ctime if `times`.

        Raises `NeedPages` where a page that is remote only is written in part, `NeedRoom` while
        there is none.
        """
        if not data:
            return 0
        if len(data) >= _LONG_WRITE:
            self._store.turns.give_way()
        u = self._uncovered_of(inode)
        if self.must_wait():
            raise NeedRoom
        end = offset + len(data)
        first, last = offset // PAGE, (end - 1) // PAGE
        head, tail = offset - first * PAGE, end - last * PAGE
        whole = memoryview(data)
        if head or tail != PAGE:
            before = bytes(self._page(inode, u, first)[:head]) if head else b""
            after = bytes(self._page(inode, u, last)[tail:]) if tail != PAGE else b""
            whole = memoryview(b"".join((before, data, after)))
        self._store.allowance.spend(len(data))
        target: Uncovered | Inode = inode if u is None else u
        if times:
            target.mtime_ns = target.ctime_ns = self._store.clock.time_ns()
        if u is not None:
            self._put_uncovered(inode, u, first, whole)
            u.size = max(u.size, end)
            self._wrote_uncovered(inode, u)
            return len(data)
        self._store.put_pages(inode, first, whole, self._store.next_write())
        inode.size = max(inode.size, end)
        log_of(self._store.layers.open, inode.number).touched = self._store.write_number
        return len(data)

    def must_wait(self) -> bool:
        """Whether a write must wait for a commit, an eviction or uploads."""
        store = self._store
        if store.group_is_full() or store.allowance.used_up:
            return True
        self._spill_if_full()
        if self._held.memory_bytes > 2 * store.limits.uncovered_bytes:
            return True
        return store.expected_bytes() >= store.limits.full_bytes

    def _page(self, inode: Inode, u: Uncovered | None, page: int) -> Page:
        """One whole page, zeros where nothing was written; raises `NeedPages`."""
        size = inode.size if u is None else u.size
        if page * PAGE >= size:
            return ZERO_PAGE
        return self._pages(inode, u, page, 1)[0]

    def truncate(self, inode: Inode, size: int) -> None:
        """Sets the size; what is cut off never comes back.  Raises `NeedPages` to cut a remote page."""
        u = self._uncovered_of(inode)
        old = inode.size if u is None else u.size
        edge = None
        if size < old and size % PAGE:
            page = self._page(inode, u, size // PAGE)
            edge = None if page is ZERO_PAGE else bytes(page[: size % PAGE]).ljust(PAGE, b"\0")
        first = -(-size // PAGE)
        now = self._store.clock.time_ns()
        if u is not None:
            self._truncate_uncovered(inode, u, size, first if size < old else None)
            if edge is not None:
                self._put_uncovered(inode, u, size // PAGE, memoryview(edge))
            u.mtime_ns = u.ctime_ns = now
            self._wrote_uncovered(inode, u)
            return
        inode.mtime_ns = inode.ctime_ns = now
        if size < old:
            self.transient.drop(inode.number)
            self._store.truncate_data(inode, first, size)
            if edge is not None:
                self._store.put_pages(inode, size // PAGE, memoryview(edge), self._store.next_write())
        inode.size = size
        self._store.touch_data(inode)

    # atomic sync

    def _uncovered_of(self, inode: Inode) -> Uncovered | None:
        """The uncovered writes of a file that writes go to, or None for a file without atomic sync.

        Of a file of which nothing is uncovered they are new ones, which `_wrote_uncovered` takes in.
        """
        u = self._uncovered.get(inode.number)
        if u is None and inode.flags & _ATOMIC_SYNC:
            u = Uncovered.of(inode, self._store.clock.monotonic(), self._held)
        return u

    def _wrote_uncovered(self, inode: Inode, u: Uncovered) -> None:
        """After a change: it is uncovered until a sync, or covered at once if nobody has the file open."""
        self._uncovered[inode.number] = u
        if inode.number not in self._opened:
            self.cover(inode)

    def _put_uncovered(self, inode: Inode, u: Uncovered, first: int, data: memoryview) -> None:
        blocks, extents = self._store.blocks, self._store.extents
        for i in range(len(data) // PAGE):
            page = first + i
            if page not in u.pages:
                held = blocks.reader.is_resident(inode.number, page) or self._store.spill.has(inode.number, page)
                if not held and extents.at(inode.number, page) is None:
                    u.fresh += 1
            u.put(page, bytes(data[i * PAGE : (i + 1) * PAGE]))

    def _truncate_uncovered(self, inode: Inode, u: Uncovered, size: int, first: int | None) -> None:
        u.size = size
        if first is None:
            return
        u.cut = first if u.cut is None else min(u.cut, first)
        gone = [page for page in u.pages if page >= first]
        for page in gone:
            u.take(page)
        u.fresh = max(0, u.fresh - len(gone))
        if inode.number not in self._store.spill.covered:
            self._store.spill.cut(inode.number, first)

    def _spill_if_full(self) -> None:
        """Moves the uncovered pages of the largest files to the spill until memory is within its bound."""
        store = self._store
        held, most = self._held, store.limits.uncovered_bytes
        while held.memory_bytes > most and not store.group_is_full():
            free = [n for n in self._uncovered if n not in store.spill.covered]
            number = max(free, key=lambda n: self._uncovered[n].memory_bytes, default=None)
            u = self._uncovered.get(number) if number is not None else None
            if number is None or u is None or not u.pages:
                return
            for page in sorted(u.pages):
                store.spill.put(number, page, u.take(page))
                if store.group_is_full() or held.memory_bytes <= most // 2:
                    break

    def cover(self, inode: Inode) -> None:
        """Makes a file's uncovered writes part of the open group, in one step, under new write numbers."""
        u = self._uncovered.get(inode.number)
        if u is None:
            return
        store = self._store
        moving = inode.number in store.spill.covered
        if u.cut is not None:
            # Spilled pages of this cover were written after the truncation; those of the last were not.
            store.truncate_data(inode, u.cut, u.size, cut_spill=moving)
        if u.pages:
            number = store.next_write()
            for page, data in u.pages.items():
                store.spill.drop_pages(inode.number, page, 1)
                store.put_pages(inode, page, data, number)
        if not moving:
            store.cover_spilled(inode, store.next_write())
        inode.size = u.size
        inode.atime_ns, inode.mtime_ns = u.atime_ns, u.mtime_ns
        inode.ctime_ns = max(u.ctime_ns, inode.ctime_ns)
        store.touch_data(inode)
        # Last: had anything above failed, all of it would still be uncovered, and be covered again.
        del self._uncovered[inode.number]
        u.forget()

    def uncovered_pages(self, number: int) -> int:
        """Uncovered pages of the file in memory; those that were spilled are not counted."""
        uncovered = self._uncovered.get(number)
        return 0 if uncovered is None else len(uncovered.pages)

    def has_uncovered(self, number: int) -> bool:
        """Whether anything of the file is uncovered."""
        return number in self._uncovered

    def uncovered(self) -> list[int]:
        """The inodes of which something is uncovered."""
        return list(self._uncovered)

    def oldest_uncovered(self) -> float | None:
        """Running time at which the oldest uncovered write was made, or None."""
        return min((u.since for u in self._uncovered.values()), default=None)

    def largest_uncovered(self) -> tuple[Inode, int] | None:
        """The file of which most is uncovered, and how many bytes; not one that is still being moved."""
        store = self._store
        sizes = {
            number: u.memory_bytes + store.spill.bytes_of(number)
            for number, u in self._uncovered.items()
            if number not in store.spill.covered
        }
        number = max(sizes, key=lambda n: sizes[n], default=None)
        inode = store.inode(number) if number is not None else None
        if number is None or inode is None or not sizes[number]:
            return None
        return inode, sizes[number]

    def opened(self, inode: Inode) -> None:
        """One more handle is open."""
        self._opened[inode.number] = self._opened.get(inode.number, 0) + 1

    def closed(self, inode: Inode) -> None:
        """One handle less; the last close covers an atomic-sync file."""
        left = self._opened.get(inode.number, 0) - 1
        if left > 0:
            self._opened[inode.number] = left
            return
        self._opened.pop(inode.number, None)
        self.cover(inode)

    def is_open(self, number: int) -> bool:
        """Whether any handle of the file is open."""
        return number in self._opened

    def is_shrinking(self, number: int) -> bool:
        """Whether a truncation is still being worked off, so that `allocated` goes down by itself."""
        return number in self._store.blocks.pending

    def forget(self, number: int) -> None:
        """Drops what is uncovered of a file that goes away."""
        u = self._uncovered.pop(number, None)
        if u is not None:
            u.forget()
        self.transient.drop(number)
