"""Which pages applications read while they start: recorded at a start, and the last to be evicted.

A database that is opened reads the same pages each time, scattered over a file of which it then reads little
more.  Of the files whose policy makes them databases the pages that are read in the first minutes after a
mount are recorded: the kernel's cache is empty then, so each comes by here.  Afterwards they are kept in
the table START, and `remote/start_packs.py` packs them together.

What a start read replaces what is recorded of a file only if it is at least half as much, else it is added:
somebody who looks at a database with a tool does not undo what its node's start has shown.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from qsfs.clock import Clock
from qsfs.store.layers import Layers
from qsfs.store.schema import BLOCK_PAGES, InodeFlag, Table, split_u64_pair, u64_pair

_log = logging.getLogger(__name__)

DATABASE = int(InodeFlag.ATOMIC_SYNC | InodeFlag.WAIT)
"""A file with one of these flags is recorded."""

CHUNK_PAGES = 4096
"""Pages of one row: 16 MiB of a file."""
MOST_PAGES = 4 << 20
"""Pages that are recorded at most: what is known of them is in memory, some tens of MiB of it then."""
ROW_BYTES = CHUNK_PAGES // 8

_NUMBERS = 1024
_BLOCK_BITS = (1 << BLOCK_PAGES) - 1
_FIRST_BITS = sum(1 << bit for bit in range(0, CHUNK_PAGES, BLOCK_PAGES))


def blocks_in(bits: int) -> int:
    """How many blocks have a page among `bits` of a chunk."""
    return ((bits | bits >> 1 | bits >> 2 | bits >> 3) & _FIRST_BITS).bit_count()


def blocks_of(chunk: int, bits: int) -> Iterator[tuple[int, int]]:
    """The blocks, in order, that have pages among `bits` of a chunk, with the bits of these pages."""
    first = chunk * (CHUNK_PAGES // BLOCK_PAGES)
    for index, byte in enumerate(bits.to_bytes(ROW_BYTES, "little")):
        if byte & _BLOCK_BITS:
            yield first + 2 * index, byte & _BLOCK_BITS
        if byte >> BLOCK_PAGES:
            yield first + 2 * index + 1, byte >> BLOCK_PAGES


def bits_of(chunk: int, first: int, stop: int) -> int:
    """The pages [first, stop) of a file as bits of a chunk of it."""
    start = chunk * CHUNK_PAGES
    first, stop = max(first, start) - start, min(stop, start + CHUNK_PAGES) - start
    return ((1 << stop - first) - 1) << first if stop > first else 0


class _Numbers:
    """A set of inode numbers, in which a number takes little more than a bit: they lie close together."""

    def __init__(self) -> None:
        self._words: dict[int, int] = {}

    def add(self, number: int) -> None:
        word, bit = divmod(number, _NUMBERS)
        self._words[word] = self._words.get(word, 0) | 1 << bit

    def __contains__(self, number: int) -> bool:
        word, bit = divmod(number, _NUMBERS)
        return bool(self._words.get(word, 0) >> bit & 1)


@dataclass(slots=True)
class _Window:
    """What is read of one file in its first minutes; nothing is added once they are `over`."""

    until: float
    chunks: dict[int, int] = field(default_factory=dict)
    pages: int = 0
    blocks: int = 0
    over: bool = False


@dataclass(slots=True)
class _File:
    """What is recorded of one file; `seeded`: only from packs, no start of this store was recorded to its end."""

    chunks: dict[int, int] = field(default_factory=dict)
    pages: int = 0
    seeded: bool = False


class StartPages:
    """The pages of one store that are read at a start.  Nothing is recorded, or known, before `begin`.

    `version` counts the changes of what is recorded, `pages` the recorded pages, `full` is whether more was read
    than may be, `seconds` how long a file is recorded.  More may be recorded than the cache can keep: the chunks
    that come first are kept, the others only packed.
    """

    def __init__(self, layers: Layers, clock: Clock) -> None:
        self.version = 0
        self.pages = 0
        self.full = False
        self.seconds = 0.0
        self._layers = layers
        self._clock = clock
        self._most_blocks = 0
        self._left = MOST_PAGES
        self._kept: set[tuple[int, int]] = set()
        self._kept_blocks = 0
        self._files: dict[int, _File] = {}
        # In the order in which they end.  A plain dict finds its first item only behind all that were removed before.
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._window_blocks = 0
        self._ending: Iterator[None] = iter(())
        self._opened = _Numbers()
        self._unopened: OrderedDict[int, None] = OrderedDict()
        self._unsaved: set[tuple[int, int]] = set()

    def begin(self, seconds: float, most_blocks: int) -> None:
        """Loads what is recorded, and records each database for `seconds` from the first read of it on (0: never).

        So many blocks at most are kept from eviction.
        """
        self.seconds = seconds
        self._most_blocks = most_blocks
        for key, row in self._layers.scan(Table.START, b"", None):
            inode, chunk = split_u64_pair(key)
            self._put(inode, chunk, int.from_bytes(row, "little"))

    # recording

    def note(self, inode: int, first: int, pages: int) -> None:
        """Takes note that an application read `pages` pages of a database."""
        window = self._windows.get(inode)
        if window is None:
            if not self.seconds or inode in self._opened:
                return
            window = self._open(inode)
        if window.over or self.full:
            return
        chunks = window.chunks
        stop = first + pages
        while first < stop:
            chunk, bit = divmod(first, CHUNK_PAGES)
            here = min(stop - first, CHUNK_PAGES - bit)
            old = chunks.get(chunk, 0)
            new = old | ((1 << here) - 1) << bit
            if new != old:
                more = (new ^ old).bit_count()
                self._left -= more
                if self._left < 0:
                    self._stop()
                    return
                window.pages += more
                blocks = blocks_in(new) - blocks_in(old)
                window.blocks += blocks
                self._window_blocks += blocks
                chunks[chunk] = new
            first += here

    def _open(self, inode: int) -> _Window:
        self._opened.add(inode)
        self._unopened.pop(inode, None)
        window = self._windows[inode] = _Window(self._clock.monotonic() + self.seconds)
        return window

    def _stop(self) -> None:
        """Ends all recording of this mount."""
        self.full = True
        _log.info("more is read at the start than is recorded for the next one: the first %d pages are", MOST_PAGES)

    @property
    def recording(self) -> bool:
        """Whether a file is being recorded."""
        return bool(self._windows)

    def end_due(self, most: int) -> bool:
        """Ends the recording of files whose time is over, in at most `most` steps; True when none is left."""
        return self._end_some(float("inf") if self.full else self._clock.monotonic(), most)

    def end_all(self, most: int | None = None) -> bool:
        """Ends all recording, at once if `most` is not given: what was read so far is taken for all of it."""
        return self._end_some(float("inf"), most)

    def _end_some(self, now: float, most: int | None) -> bool:
        """A step takes over one chunk, or goes on to the next file."""
        left = float("inf") if most is None else most
        while left > 0:
            if next(self._ending, True) and not self._end_next(now):
                return True
            left -= 1
        return False

    def _end_next(self, now: float) -> bool:
        """Begins to end the recording of the next file; False if there is none whose time is over."""
        for inode, window in self._windows.items():
            if window.until > now:
                break
            self._ending = self._end(inode, window)
            return True
        return False

    def _end(self, inode: int, window: _Window) -> Iterator[None]:
        """Takes over what was read of a file, chunk by chunk."""
        window.over = True
        file = self._files.get(inode, _File())
        replaced = 2 * window.pages >= file.pages
        if replaced:
            # First, so that what was read takes its place among what is kept.
            for chunk in list(file.chunks):
                if chunk not in window.chunks:
                    self._change(inode, chunk, 0)
                    yield
        for chunk, bits in window.chunks.items():
            self._change(inode, chunk, bits if replaced else bits | self._bits(inode, chunk))
            yield
        if inode in self._files:
            self._files[inode].seeded = False
        self._window_blocks -= window.blocks
        del self._windows[inode]
        yield from self._forget_surplus()

    def _forget_surplus(self) -> Iterator[None]:
        """Forgets chunks of files that nobody has opened since the mount, while too much is recorded."""
        while self.pages > MOST_PAGES and self._unopened:
            inode = next(iter(self._unopened))
            for chunk in list(self._files[inode].chunks):
                if self.pages <= MOST_PAGES or inode not in self._unopened:
                    break
                self._change(inode, chunk, 0)
                yield

    def seed(self, inode: int, first: int, pages: int) -> int:
        """Records pages that lie in a pack of such pages, for a store that was restored; how many of them are then.

        Once it has a record of its own of the file, that is better than what another's start has read.  All are taken
        for recorded where nothing is ever.
        """
        if not self.seconds:
            return pages
        file = self._files.get(inode)
        chunks = range(first // CHUNK_PAGES, (first + pages - 1) // CHUNK_PAGES + 1)
        if file is not None and not file.seeded:
            return sum(
                (self._bits(inode, chunk) & bits_of(chunk, first, first + pages)).bit_count() for chunk in chunks
            )
        for chunk in chunks:
            self._change(inode, chunk, self._bits(inode, chunk) | bits_of(chunk, first, first + pages))
        self._files[inode].seeded = True
        return pages

    def drop(self, inode: int, most: int) -> bool:
        """Forgets at most `most` chunks of a file; True when nothing of it is left."""
        file = self._files.get(inode, _File())
        for chunk in list(islice(file.chunks, most)):
            self._change(inode, chunk, 0)
        return inode not in self._files

    def _change(self, inode: int, chunk: int, bits: int) -> None:
        """Records these pages of a chunk, and no others."""
        if bits != self._bits(inode, chunk):
            self._put(inode, chunk, bits)
            self._unsaved.add((inode, chunk))
            self.version += 1

    def _put(self, inode: int, chunk: int, bits: int) -> None:
        file = self._files.get(inode)
        if file is None:
            file = self._files[inode] = _File()
            if inode not in self._opened:
                self._unopened[inode] = None
        old = file.chunks.pop(chunk, 0)
        file.pages += bits.bit_count() - old.bit_count()
        self.pages += bits.bit_count() - old.bit_count()
        if bits:
            file.chunks[chunk] = bits
        elif not file.chunks:
            del self._files[inode]
            self._unopened.pop(inode, None)
        self._choose(inode, chunk, old, bits)

    def _choose(self, inode: int, chunk: int, old: int, bits: int) -> None:
        """Keeps a chunk whose pages were `old` and are `bits` from eviction if there is room for all of its blocks."""
        if (inode, chunk) in self._kept:
            self._kept.remove((inode, chunk))
            self._kept_blocks -= blocks_in(old)
        blocks = blocks_in(bits)
        if blocks and self._kept_blocks + blocks <= self._most_blocks:
            self._kept.add((inode, chunk))
            self._kept_blocks += blocks

    def _bits(self, inode: int, chunk: int) -> int:
        file = self._files.get(inode)
        return 0 if file is None else file.chunks.get(chunk, 0)

    def save(self, most: int) -> bool:
        """Puts at most `most` rows that changed into the open group; True when none is left."""
        for _ in range(min(most, len(self._unsaved))):
            inode, chunk = self._unsaved.pop()
            key = u64_pair(inode, chunk)
            bits = self._bits(inode, chunk)
            if bits:
                self._layers.put(Table.START, key, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
            else:
                self._layers.delete(Table.START, key)
        return not self._unsaved

    # what is recorded

    def keeps(self, inode: int, block: int) -> bool:
        """Whether a block has a page that is recorded, or is being recorded, and is to be kept for that."""
        chunk, bit = divmod(block * BLOCK_PAGES, CHUNK_PAGES)
        if (inode, chunk) in self._kept and self._bits(inode, chunk) >> bit & _BLOCK_BITS:
            return True
        window = self._windows.get(inode)
        if window is None or self._window_blocks > self._most_blocks:
            return False
        return bool(window.chunks.get(chunk, 0) >> bit & _BLOCK_BITS)

    @property
    def files(self) -> list[int]:
        """The files of which anything is recorded, in order."""
        return sorted(self._files)

    def chunks(self, inode: int) -> list[tuple[int, int]]:
        """The chunks of a file, in order, with the bits of their recorded pages."""
        return sorted(self._files.get(inode, _File()).chunks.items())

    @property
    def any(self) -> bool:
        """Whether anything is recorded, or being recorded."""
        return bool(self._files) or self.recording
