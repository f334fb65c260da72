"""What the store of one generation can take over from those of others that are here: contents of the same extents.

An extent of a pack never changes, so wherever two generations name the same one at the same place of a file its
pages are the same.  Nothing else is taken over: not by age, name or checksum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qsfs.errors import CacheError, Corrupt
from qsfs.remote.stored import entry_of
from qsfs.store.packs import pack_row
from qsfs.store.schema import BLOCK_PAGES, BLOCK_SIZE, ExtentRow
from qsfs.store.store import Store


@dataclass(frozen=True, slots=True)
class Donor:
    """The store of a generation that is not shown any more; the higher its tag the newer it is."""

    store: Store
    directory: Path
    tag: int


class Inheritance:
    """Takes over into `store`.  `donors` gives the other stores, those first that are likely to have it.

    `pages` counts what was taken over.
    """

    def __init__(self, store: Store) -> None:
        self.donors: Callable[[], Iterable[Store]] = tuple
        self.pages = 0
        self._store = store

    def take(self, inode: int, first: int, count: int) -> bool:
        """Takes over what there is of the extents that hold remote-only pages of [first, first + count).

        Stops where there is no room for more at once.  Returns whether all those pages are here now.
        """
        store, stop = self._store, first + count
        live = store.inode(inode)
        if live is None or not any(True for _ in self.donors()):
            return False
        complete = True
        for row in list(store.extents.overlapping(inode, first, stop)):
            if not store.blocks.remote_blocks(inode, row, first, stop):
                continue
            blocks = row.pages // BLOCK_PAGES + 2
            if store.group_is_full() or store.expected_bytes() + blocks * BLOCK_SIZE > store.limits.full_bytes:
                return False
            data = next(filter(None, (self._from(donor, inode, row) for donor in self.donors())), None)
            if data is None:
                complete = False
            else:
                self.pages += store.blocks.install(live, row.first, data, row)
        return complete

    def _from(self, donor: Store, inode: int, row: ExtentRow) -> bytes | None:
        """All pages of an extent row, if they are there; what is damaged there, rows or pages, is not."""
        with contextlib.suppress(Corrupt, CacheError):
            if self._same(donor, inode, row):
                pages = donor.blocks.pages(inode, row.first, row.pages)
                if None not in pages:
                    return b"".join(page for page in pages if page is not None)
        return None

    def _same(self, donor: Store, inode: int, row: ExtentRow) -> bool:
        """Whether the very same extent lies there, all over the pages of `row`."""
        wanted, page, stop = entry_of(inode, row), row.first, row.first + row.pages
        for other in donor.extents.overlapping(inode, row.first, stop):
            if other.pack != row.pack or other.first > page or entry_of(inode, other) != wanted:
                return False
            page = other.first + other.pages
        if page < stop:
            return False
        ours, theirs = pack_row(self._store, row.pack), pack_row(donor, row.pack)
        return ours is not None and theirs is not None and ours.pack_id == theirs.pack_id
