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
from collections.abc import Iterator
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Window:
    """What is read of one file in its first minutes; `chunks` is None once they are over."""

    until: float
    chunks: dict[int, int] | None = field(default_factory=dict)


class StartPages:
    """The pages of one store that are read at a start.  Nothing is recorded, or known, before `begin`.

    `version` counts the changes of what is recorded, `full` is whether more was read than may be.  More may be
    recorded than the cache can keep: the first chunks of the first files are kept, the others only packed.
    """

    def __init__(self, layers: Layers, clock: Clock) -> None:
        self.version = 0
        self.full = False
        self._layers = layers
        self._clock = clock
        self._seconds = 0.0
        self._most_blocks = 0
        self._left = MOST_PAGES
        self._kept: set[tuple[int, int]] = set()
        self._kept_blocks = 0
        self._window_blocks = 0
        self._files: dict[int, dict[int, int]] = {}
        self._windows: dict[int, _Window] = {}
        self._unsaved: set[tuple[int, int]] = set()

    def begin(self, seconds: float, most_blocks: int) -> None:
        """Loads what is recorded, and records each database for `seconds` from the first read of it on (0: never).

        So many blocks at most are kept from eviction.
        """
        for key, row in self._layers.scan(Table.START, b"", None):
            inode, chunk = split_u64_pair(key)
            self._files.setdefault(inode, {})[chunk] = int.from_bytes(row, "little")
        self._seconds = seconds
        self._most_blocks = most_blocks
        self._choose_kept()

    # recording

    def note(self, inode: int, first: int, count: int) -> None:
        """Takes note that an application read `count` pages of a database."""
        window = self._windows.get(inode)
        if window is None:
            window = self._open(inode)
        chunks = window.chunks
        if chunks is None:
            return
        stop = first + count
        while first < stop:
            chunk, bit = divmod(first, CHUNK_PAGES)
            here = min(stop - first, CHUNK_PAGES - bit)
            old = chunks.get(chunk, 0)
            new = old | ((1 << here) - 1) << bit
            if new != old:
                self._left -= (new ^ old).bit_count()
                if self._left < 0:
                    self._stop()
                    return
                self._window_blocks += blocks_in(new) - blocks_in(old)
                chunks[chunk] = new
            first += here

    def _open(self, inode: int) -> _Window:
        window = self._windows[inode] = _Window(self._clock.monotonic() + self._seconds)
        if not self._seconds or self.full:
            window.chunks = None
        return window

    def _stop(self) -> None:
        """Ends all recording of this mount."""
        self.full = True
        _log.info("more is read at the start than is recorded for the next one: the first %d pages are", MOST_PAGES)
        self.end_all()

    @property
    def recording(self) -> bool:
        """Whether a file is being recorded."""
        return any(window.chunks is not None for window in self._windows.values())

    def end_due(self) -> None:
        """Ends the recording of the files whose time is over."""
        now = self._clock.monotonic()
        for inode, window in self._windows.items():
            if window.chunks is not None and now >= window.until:
                self._end(inode, window)

    def end_all(self) -> None:
        """Ends all recording: what was read so far is taken for all of it."""
        for inode, window in self._windows.items():
            if window.chunks is not None:
                self._end(inode, window)

    def _end(self, inode: int, window: _Window) -> None:
        found, window.chunks = window.chunks or {}, None
        old = self._files.get(inode, {})
        if 2 * _count(found) < _count(old):
            found = {chunk: found.get(chunk, 0) | old.get(chunk, 0) for chunk in found.keys() | old.keys()}
        if found == old:
            return
        self._unsaved.update((inode, chunk) for chunk in found.keys() | old.keys())
        self._files[inode] = found
        self.version += 1
        self._forget_surplus()
        self._choose_kept()

    def _forget_surplus(self) -> None:
        """Forgets files that nobody has opened since the mount, while too much is recorded."""
        surplus = self.pages - MOST_PAGES
        for inode in [inode for inode in self._files if inode not in self._windows]:
            if surplus <= 0:
                return
            surplus -= _count(self._files[inode])
            self.drop(inode)

    def _choose_kept(self) -> None:
        """Chooses the chunks whose blocks are kept."""
        self._kept, self._kept_blocks = set(), 0
        for inode in self.files:
            for chunk, bits in self.chunks(inode):
                self._keep(inode, chunk, blocks_in(bits))

    def _keep(self, inode: int, chunk: int, blocks: int) -> None:
        """Keeps a chunk with so many blocks, or so many more of one that is kept, if there is room."""
        if (inode, chunk) in self._kept or self._kept_blocks + blocks <= self._most_blocks:
            self._kept.add((inode, chunk))
            self._kept_blocks += blocks

    def seed(self, inode: int, first: int, count: int) -> None:
        """Records pages that lie in a pack of such pages: for a store that was restored."""
        if not self._seconds:
            return
        chunks = self._files.setdefault(inode, {})
        for chunk in range(first // CHUNK_PAGES, (first + count - 1) // CHUNK_PAGES + 1):
            old = chunks.get(chunk, 0)
            new = old | bits_of(chunk, first, first + count)
            if new != old:
                chunks[chunk] = new
                self._unsaved.add((inode, chunk))
                self._keep(inode, chunk, blocks_in(new) - blocks_in(old))
                self.version += 1

    def drop(self, inode: int) -> None:
        """Forgets a file."""
        chunks = self._files.pop(inode, None)
        if chunks:
            self._unsaved.update((inode, chunk) for chunk in chunks)
            self.version += 1

    def save(self, most: int) -> bool:
        """Puts at most `most` rows that changed into the open group; True when none is left."""
        for _ in range(min(most, len(self._unsaved))):
            inode, chunk = self._unsaved.pop()
            key = u64_pair(inode, chunk)
            bits = self._files.get(inode, {}).get(chunk, 0)
            if bits:
                self._layers.put(Table.START, key, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
            else:
                self._layers.delete(Table.START, key)
        return not self._unsaved

    # what is recorded

    def keeps(self, inode: int, block: int) -> bool:
        """Whether a block has a page that is recorded, or is being recorded, and is to be kept for that."""
        chunk, bit = divmod(block * BLOCK_PAGES, CHUNK_PAGES)
        if (inode, chunk) in self._kept and self._files.get(inode, {}).get(chunk, 0) >> bit & _BLOCK_BITS:
            return True
        window = self._windows.get(inode)
        if window is None or not window.chunks or self._window_blocks > self._most_blocks:
            return False
        return bool(window.chunks.get(chunk, 0) >> bit & _BLOCK_BITS)

    @property
    def files(self) -> list[int]:
        """The files of which anything is recorded, in order."""
        return sorted(self._files)

    def chunks(self, inode: int) -> list[tuple[int, int]]:
        """The chunks of a file, in order, with the bits of their recorded pages."""
        return sorted((chunk, bits) for chunk, bits in self._files.get(inode, {}).items() if bits)

    @property
    def any(self) -> bool:
        """Whether anything is recorded, or being recorded."""
        return bool(self._files) or self.recording

    @property
    def pages(self) -> int:
        """How many pages are recorded."""
        return sum(_count(chunks) for chunks in self._files.values())


def _count(chunks: dict[int, int]) -> int:
    return sum(bits.bit_count() for bits in chunks.values())
