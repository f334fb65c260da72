"""What atomic-sync files wrote since their last sync: seen by reads, by nothing else.

A file's uncovered writes move to the open group, under new write numbers, when they are covered
(module `contents` says when).  Until then a crash drops them wholly.  Pages beyond the memory bound
spill (`store.spill`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qsfs.store.schema import PAGE, Inode


@dataclass(slots=True)
class Uncovered:
    """The uncovered writes of one file.

    `cut` is the first page that an uncovered truncation dropped of the covered data, or None;
    `fresh` counts pages that were holes before; `since` is running time in seconds.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    atime_ns: int
    since: float
    pages: dict[int, bytes] = field(default_factory=dict)
    cut: int | None = None
    fresh: int = 0

    @classmethod
    def of(cls, inode: Inode, now: float) -> Uncovered:
        """A file of which nothing is uncovered yet."""
        return cls(inode.size, inode.mtime_ns, inode.ctime_ns, inode.atime_ns, now)

    @property
    def memory_bytes(self) -> int:
        """Bytes of pages in memory."""
        return len(self.pages) * PAGE

    def hides(self, page: int) -> bool:
        """Whether the covered data's `page` is cut off by an uncovered truncation."""
        return self.cut is not None and page >= self.cut
