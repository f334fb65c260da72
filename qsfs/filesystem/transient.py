"""Fetched pages for which the cache has no room: kept briefly in memory so that a read can end."""

from __future__ import annotations

from collections import OrderedDict

from qsfs.store.schema import ExtentRow

MOST_PAGES = 4096


class TransientPages:
    """A small bounded cache of pages, each valid for the extent that it came from only."""

    def __init__(self) -> None:
        self._pages: OrderedDict[tuple[int, int], tuple[tuple[int, int], bytes]] = OrderedDict()

    def put(self, inode: int, page: int, data: bytes, source: ExtentRow) -> None:
        """Keeps a page for a while."""
        self._pages[inode, page] = ((source.pack, source.ordinal), data)
        if len(self._pages) > MOST_PAGES:
            self._pages.popitem(last=False)

    def get(self, inode: int, page: int, extent: ExtentRow) -> bytes | None:
        """The page, if it was kept from this very extent."""
        kept = self._pages.get((inode, page))
        if kept is None or kept[0] != (extent.pack, extent.ordinal):
            return None
        return kept[1]

    def drop(self, inode: int) -> None:
        """Forgets the pages of a file."""
        for key in [key for key in self._pages if key[0] == inode]:
            del self._pages[key]
