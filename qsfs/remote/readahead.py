"""Who reads a file front to back, and how much further to fetch for it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

FIRST_PAGES = 128
MOST_PAGES = 2048
"""8 MiB: two packs' worth of a sequential file."""
_FILES = 4096
_SLACK_PAGES = 64


@dataclass(slots=True)
class _Reader:
    start: int
    expected: int
    ahead: int
    window: int


class ReadAhead:
    """The last reads of each file, in pages."""

    def __init__(self) -> None:
        self._readers: OrderedDict[int, _Reader] = OrderedDict()

    def next(self, inode: int, first: int, count: int) -> tuple[int, int]:
        """Takes note of a fetch of `count` pages; returns first page and number of those to fetch ahead.

        None are while a file is not read on from where the last fetch, or what was fetched ahead
        of it, ended.  The window doubles with each fetch that is.
        """
        reader = self._readers.pop(inode, None)
        stop = first + count
        if reader is None or not reader.start < first <= reader.expected + _SLACK_PAGES:
            reader = _Reader(first, stop, stop, 0)
        elif stop <= reader.expected:
            reader.start = first
        else:
            reader.window = min(MOST_PAGES, max(FIRST_PAGES, 2 * reader.window))
            reader.ahead = max(reader.ahead, stop)
            reader.start, reader.expected = first, stop + reader.window
        self._readers[inode] = reader
        if len(self._readers) > _FILES:
            self._readers.popitem(last=False)
        start = reader.ahead
        reader.ahead = max(start, reader.expected)
        return start, reader.ahead - start
