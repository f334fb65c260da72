"""What an operation may ask for before it can be done.

A `Need` is raised before anything was changed.  The caller (a FUSE handler, a test) satisfies it
and repeats the operation from the start.
"""

from __future__ import annotations


class Need(Exception):
    """Base: the operation cannot go on yet, and has changed nothing."""


class NeedPages(Need):
    """`count` pages from page `first` of inode `inode` are remote only and must be fetched."""

    def __init__(self, inode: int, first: int, count: int) -> None:
        super().__init__(inode, first, count)
        self.inode = inode
        self.first = first
        self.count = count


class NeedRoom(Need):
    """The open group, or the cache, is full: wait for a commit, an upload or an eviction."""
