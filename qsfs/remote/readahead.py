"""Who reads a file front to back, and what to fetch ahead of it.

What is fetched ahead comes in stretches that double.  The reader's first read in the newest stretch
begins the next one, so that about a whole stretch is always on its way while another is read.  A
read that finds its pages in the cache is not seen here: so the first extent of each stretch is
fetched and not installed.
"""

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
    """`start` and `stop` of the last read, the newest stretch ahead of it [`mark`, `ahead`) and its size."""

    start: int
    stop: int
    mark: int
    ahead: int
    stretch: int


class ReadAhead:
    """The last reads of each file, in pages."""

    def __init__(self) -> None:
        self._readers: OrderedDict[int, _Reader] = OrderedDict()

    def next(self, inode: int, first: int, count: int) -> tuple[int, int]:
        """Takes note of a read of `count` pages that are not here; returns first and last of those to fetch ahead.

        None are (both are equal) while a file is not read on from where the last read, or what was
        fetched ahead of it, ended.
        """
        reader = self._readers.pop(inode, None)
        stop = first + count
        if reader is None or not reader.start <= first <= max(reader.stop, reader.ahead) + _SLACK_PAGES:
            reader = _Reader(first, stop, stop, stop, 0)
            begin = stop
        else:
            begin = reader.ahead
            if first > reader.start and stop > reader.mark:
                begin = max(begin, stop)
                reader.stretch = min(MOST_PAGES, max(FIRST_PAGES, 2 * reader.stretch))
                reader.mark, reader.ahead = begin, begin + reader.stretch
            reader.start, reader.stop = max(first, reader.start), max(stop, reader.stop)
        self._readers[inode] = reader
        if len(self._readers) > _FILES:
            self._readers.popitem(last=False)
        return begin, reader.ahead
