"""The tree of names: inodes and directory entries, and the rows they are made of.

An entry lies under (parent, name) and a second time under (parent, cookie), in the order in which
`readdir` lists a directory.  Cookies count up in each directory and are never given to another
name, so a listing goes on where it stopped whatever was added or removed meanwhile.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

from qsfs.errors import Corrupt
from qsfs.filesystem.interfaces import Change, Contents, Store
from qsfs.filesystem.posix import PosixError, kind
from qsfs.store.schema import ROOT_INODE, Entry, Inode, Table, split_u64_pair, u64, u64_pair

FIRST_COOKIE = 3
"""Cookies below are those of `.` (1) and `..` (2)."""

_MAX_DEPTH = 1_000_000


class Tree:
    """Looks up inodes, entries and paths; adds and removes entries within a change."""

    def __init__(self, store: Store, contents: Contents) -> None:
        self.store = store
        self.contents = contents
        self._directory_names: dict[int, bytes] = {}

    # inodes

    def inode(self, number: int) -> Inode:
        """The live inode; ESTALE if there is none."""
        inode = self.store.inode(number)
        if inode is None:
            raise PosixError(errno.ESTALE)
        return inode

    def directory(self, number: int) -> Inode:
        """The live inode of a directory; ESTALE or ENOTDIR."""
        inode = self.inode(number)
        if not stat.S_ISDIR(inode.mode):
            raise PosixError(errno.ENOTDIR)
        return inode

    def living_directory(self, number: int) -> Inode:
        """A directory that may get entries; ENOENT if it was removed."""
        inode = self.directory(number)
        if inode.nlink == 0:
            raise PosixError(errno.ENOENT)
        return inode

    # entries

    def find(self, parent: int, name: bytes) -> Entry | None:
        """The entry `name`, or None."""
        row = self.store.get(Table.ENTRIES, u64(parent) + name)
        return None if row is None else Entry.decode(row)

    def entry(self, parent: int, name: bytes) -> Entry:
        """The entry `name`; ENOENT."""
        entry = self.find(parent, name)
        if entry is None:
            raise PosixError(errno.ENOENT)
        return entry

    def child(self, parent: int, name: bytes, entry: Entry) -> Inode:
        """The inode that an entry names; raises `Corrupt` if there is none."""
        inode = self.store.inode(entry.inode)
        if inode is None:
            raise Corrupt(f"entry {name!r} of inode {parent} names inode {entry.inode}, which does not exist")
        if stat.S_ISDIR(inode.mode):
            self._directory_names[inode.number] = name
        return inode

    def is_empty(self, number: int) -> bool:
        """Whether a directory has no entries."""
        return next(iter(self.store.scan(Table.ENTRIES, u64(number), u64(number + 1))), None) is None

    def entries(self, number: int, after: int = 0) -> Iterator[tuple[int, bytes, Entry]]:
        """Cookie, name and entry of a directory's entries with cookies above `after`, in order.

        Nothing may be changed while the iterator is in use.
        """
        prefix = u64(number)
        start = u64_pair(number, max(after + 1, FIRST_COOKIE))
        for key, name in self.store.scan(Table.COOKIES, start, u64(number + 1)):
            row = self.store.get(Table.ENTRIES, prefix + name)
            if row is None:
                raise Corrupt(f"inode {number}: cookie row for {name!r} without an entry; run 'qsfs fsck'")
            yield split_u64_pair(key)[1], name, Entry.decode(row)

    # changes

    def add(self, change: Change, parent: int, name: bytes, inode: int, mode: int, cookie: int) -> None:
        """Adds an entry; the caller moves the directory's `next_cookie` past `cookie`."""
        change.put(Table.ENTRIES, u64(parent) + name, Entry(inode, cookie, kind(mode)).encode())
        change.put(Table.COOKIES, u64_pair(parent, cookie), name)
        if stat.S_ISDIR(mode):
            self._directory_names[inode] = name

    def drop(self, change: Change, parent: int, name: bytes, entry: Entry) -> None:
        """Removes an entry."""
        change.delete(Table.ENTRIES, u64(parent) + name)
        change.delete(Table.COOKIES, u64_pair(parent, entry.cookie))
        self._directory_names.pop(entry.inode, None)

    # paths

    def name_of(self, directory: Inode) -> bytes | None:
        """The name of a directory in its parent; None if it was removed."""
        prefix = u64(directory.parent)
        name = self._directory_names.get(directory.number)
        if name is not None:
            row = self.store.get(Table.ENTRIES, prefix + name)
            if row is not None and Entry.decode(row).inode == directory.number:
                return name
        for key, row in self.store.scan(Table.ENTRIES, prefix, u64(directory.parent + 1)):
            if Entry.decode(row).inode == directory.number:
                name = key[len(prefix) :]
                self._directory_names[directory.number] = name
                return name
        return None

    def path(self, number: int) -> bytes | None:
        """The path of a directory from the root, without a leading `/`; None if it hangs nowhere."""
        parts: list[bytes] = []
        while number != ROOT_INODE:
            inode = self.store.inode(number)
            if inode is None or len(parts) > _MAX_DEPTH:
                return None
            name = self.name_of(inode)
            if name is None:
                return None
            parts.append(name)
            number = inode.parent
        return b"/".join(reversed(parts))

    def path_in(self, parent: int, name: bytes) -> bytes | None:
        """The path of the entry `name` of a directory; None if that hangs nowhere."""
        path = self.path(parent)
        if path is None:
            return None
        return path + b"/" + name if path else name

    def is_within(self, number: int, ancestor: int) -> bool:
        """Whether directory `number` is `ancestor` or lies below it."""
        while number != ancestor:
            inode = self.store.inode(number)
            if inode is None or number == inode.parent:
                return False
            number = inode.parent
        return True

    def forget_name(self, number: int) -> None:
        """Lets go of what is remembered of a directory that the kernel has forgotten."""
        self._directory_names.pop(number, None)
