"""What atomic-sync files wrote since their last sync: seen by reads, by nothing else.

A file's uncovered writes move to the open group, under new write numbers, when they are covered
(module `contents` says when).  Until then a crash drops them wholly.  Pages beyond the memory bound
spill (`store.spill`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qsfs.store.schema import BLOCK_PAGES, BLOCK_SIZE, PAGE, Inode


@dataclass(slots=True)
class Held:
    """What the uncovered writes of all files hold in memory: pages, and the blocks in which those lie."""

    pages: int = 0
    blocks: int = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of the pages."""
        return self.pages * PAGE

    @property
    def promised_bytes(self) -> int:
        """Bytes of LMDB that the pages take at most once they are covered or spilled."""
        return self.blocks * BLOCK_SIZE


@dataclass(slots=True)
class Uncovered:
    """The uncovered writes of one file.

    `cut` is the first page that an uncovered truncation dropped of the covered data, or None;
    `fresh` counts pages that were holes before; `since` is running time in seconds. Pages come and go
    by `put` and `take`, which keep `held`.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    atime_ns: int
    since: float
    held: Held
    pages: dict[int, bytes] = field(default_factory=dict)
    cut: int | None = None
    fresh: int = 0
    _blocks: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, inode: Inode, now: float, held: Held) -> Uncovered:
        """A file of which nothing is uncovered yet."""
        return cls(inode.size, inode.mtime_ns, inode.ctime_ns, inode.atime_ns, now, held)

    def put(self, page: int, data: bytes) -> None:
        """Holds a page, in place of an older one."""
        if page not in self.pages:
            block = page // BLOCK_PAGES
            pages = self._blocks.get(block, 0)
            self._blocks[block] = pages + 1
            self.held.pages += 1
            if not pages:
                self.held.blocks += 1
        self.pages[page] = data

    def take(self, page: int) -> bytes:
        """Holds a page no longer, and returns it."""
        data = self.pages.pop(page)
        block = page // BLOCK_PAGES
        pages = self._blocks.pop(block)
        self.held.pages -= 1
        if pages > 1:
            self._blocks[block] = pages - 1
        else:
            self.held.blocks -= 1
        return data

    def forget(self) -> None:
        """Holds nothing any more."""
        self.held.pages -= len(self.pages)
        self.held.blocks -= len(self._blocks)
        self.pages, self._blocks = {}, {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of pages in memory."""
        return len(self.pages) * PAGE

    def hides(self, page: int) -> bool:
        """Whether the covered data's `page` is cut off by an uncovered truncation."""
        return self.cut is not None and page >= self.cut
