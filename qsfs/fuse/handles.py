"""File handles: numbers that say by themselves which inode they belong to and how it is written.

A handle is the inode number, shifted, and a bit that says whether every WRITE is made durable
before it is answered.  So there is no table to keep, and no handle that means nothing.
"""

from __future__ import annotations

_DURABLE = 1
_SHIFT = 1


def make_handle(inode: int, durable: bool) -> int:
    """The handle of an open file (or directory: never durable)."""
    return inode << _SHIFT | (_DURABLE if durable else 0)


def inode_of(handle: int) -> int:
    """The inode that a handle belongs to."""
    return handle >> _SHIFT


def is_durable(handle: int) -> bool:
    """Whether a WRITE through the handle must be durable before it is answered."""
    return bool(handle & _DURABLE)
