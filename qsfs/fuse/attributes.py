"""Fills pyfuse3's attribute objects.

pyfuse3 copies an object into its reply before anything else runs, so one object serves all
requests of a kind: building one costs more than filling it.
"""

from __future__ import annotations

import stat

import pyfuse3

from qsfs.filesystem.attributes import size_of
from qsfs.filesystem.namespace import Namespace
from qsfs.store.schema import PAGE, Inode

TIMEOUT_SECONDS = 3600.0
"""How long the kernel may keep names and attributes.  Nobody else changes them, so it is long."""

CHANGING_SECONDS = 0.1
"""The same of attributes that change by themselves: the blocks of a file whose truncation is being worked off.

Not zero: the kernel would ask before each write(2) to the file, thousands of times.
"""

_SECTORS = PAGE // 512


class AttributeFiller:
    """Describes inodes to the kernel."""

    def __init__(self, namespace: Namespace) -> None:
        self._tree = namespace.tree
        self._contents = namespace.tree.contents
        self._reply = pyfuse3.EntryAttributes()
        self._reply.entry_timeout = self._reply.attr_timeout = TIMEOUT_SECONDS
        self._changing = pyfuse3.EntryAttributes()
        self._changing.entry_timeout = TIMEOUT_SECONDS
        self._changing.attr_timeout = CHANGING_SECONDS
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = TIMEOUT_SECONDS

    def fill(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """The inode's attributes; valid until the next call."""
        reply = self._reply
        mode = inode.mode
        if stat.S_ISREG(mode) and self._contents.is_shrinking(inode.number):
            reply = self._changing
        reply.st_ino = inode.number
        reply.st_mode = mode
        reply.st_nlink = inode.nlink
        reply.st_uid = inode.uid
        reply.st_gid = inode.gid
        reply.st_rdev = inode.rdev
        if stat.S_ISREG(mode):
            data = self._contents.stat(inode)
            reply.st_size = data.size
            reply.st_blocks = min(data.allocated, -(-data.size // PAGE)) * _SECTORS
            reply.st_atime_ns = data.atime_ns
            reply.st_mtime_ns = data.mtime_ns
            reply.st_ctime_ns = data.ctime_ns
        else:
            size = size_of(self._tree, inode)
            reply.st_size = size
            reply.st_blocks = -(-size // 512)
            reply.st_atime_ns = inode.atime_ns
            reply.st_mtime_ns = inode.mtime_ns
            reply.st_ctime_ns = inode.ctime_ns
        return reply

    def absent(self) -> pyfuse3.EntryAttributes:
        """Says that a name does not exist, so that the kernel need not ask again."""
        return self._absent
