"""File handles: numbers that say by themselves which inode they belong to and how it is used.

A handle is the inode number, shifted, and two bits: whether every WRITE is made durable before it is
answered, and whether a READ sets the access time if it is due.  So there is no table to keep, and no
handle that means nothing.
"""

from __future__ import annotations

_DURABLE = 1
_MARKS_ACCESS = 2
_SHIFT = 2


def make_handle(inode: int, durable: bool, marks_access: bool = False) -> int:
    """The handle of an open file, or of a directory."""
    return inode << _SHIFT | (_DURABLE if durable else 0) | (_MARKS_ACCESS if marks_access else 0)


def inode_of(handle: int) -> int:
    """The inode that a handle belongs to."""
    return handle >> _SHIFT


def is_durable(handle: int) -> bool:
    """Whether a WRITE through the handle must be durable before it is answered."""
    return bool(handle & _DURABLE)


def marks_access(handle: int) -> bool:
    """Whether a READ through the handle sets the access time if it is due."""
    return bool(handle & _MARKS_ACCESS)
