"""File handles: numbers that say by themselves which inode they belong to and how it is used.

A handle is the inode number, shifted, and bits that say what its requests do.  So there is no table to
keep, and no handle that means nothing.
"""

from __future__ import annotations

_UNCACHED = 1
_SYNCED = 2
_MARKS_ACCESS = 4
_SHIFT = 3


def make_handle(inode: int, *, uncached: bool = False, synced: bool = False, marks_access: bool = False) -> int:
    """The handle of an open file or directory."""
    bits = (_UNCACHED if uncached else 0) | (_SYNCED if synced else 0) | (_MARKS_ACCESS if marks_access else 0)
    return inode << _SHIFT | bits


def inode_of(handle: int) -> int:
    """The inode that a handle belongs to."""
    return handle >> _SHIFT


def is_uncached(handle: int) -> bool:
    """Whether the kernel keeps nothing of what is written through the handle."""
    return bool(handle & _UNCACHED)


def is_durable(handle: int) -> bool:
    """Whether a WRITE through the handle must be durable before it is answered."""
    return bool(handle & (_UNCACHED | _SYNCED))


def marks_access(handle: int) -> bool:
    """Whether a READ through the handle sets the access time if it is due."""
    return bool(handle & _MARKS_ACCESS)
