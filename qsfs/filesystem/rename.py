"""Rename: plain, without replacing, and exchanging two names."""

from __future__ import annotations

import errno
import stat

from qsfs.filesystem.interfaces import Change
from qsfs.filesystem.policy_keeper import PolicyKeeper
from qsfs.filesystem.posix import MAX_LINKS, PosixError, check_name, kind
from qsfs.filesystem.references import References
from qsfs.filesystem.tree import Tree
from qsfs.store.schema import Entry, Inode, Table, u64

NOREPLACE = 1
EXCHANGE = 2

_DOTS = (b".", b"..")


_Place = tuple[Inode, bytes, Entry, Inode]
"""Directory, name, entry and inode."""


class Renames:
    """Moves entries; each call is one change."""

    def __init__(self, tree: Tree, references: References, keeper: PolicyKeeper) -> None:
        self._tree = tree
        self._references = references
        self._keeper = keeper

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """rename(2) and renameat2(2).  Raises their error codes; `flags` may be NOREPLACE or EXCHANGE."""
        if flags not in (0, NOREPLACE, EXCHANGE):
            raise PosixError(errno.EINVAL)
        if name in _DOTS or new_name in _DOTS:
            raise PosixError(errno.EBUSY)
        check_name(name)
        check_name(new_name)
        old_directory = self._tree.living_directory(parent)
        new_directory = self._tree.living_directory(new_parent)
        entry = self._tree.entry(parent, name)
        source = self._tree.child(parent, name, entry)
        place = (old_directory, name, entry, source)
        target_entry = self._tree.find(new_parent, new_name)
        if stat.S_ISDIR(source.mode) and self._tree.is_within(new_parent, source.number):
            raise PosixError(errno.EINVAL)
        if flags == EXCHANGE:
            if target_entry is None:
                raise PosixError(errno.ENOENT)
            other = self._tree.child(new_parent, new_name, target_entry)
            self._exchange(place, (new_directory, new_name, target_entry, other))
            return
        if target_entry is None:
            self._move(place, new_directory, new_name, None, None)
            return
        if flags == NOREPLACE:
            raise PosixError(errno.EEXIST)
        if target_entry.inode == entry.inode:
            return
        target = self._tree.child(new_parent, new_name, target_entry)
        self._check_replace(source, target, old_directory)
        self._move(place, new_directory, new_name, target_entry, target)

    def _check_replace(self, source: Inode, target: Inode, old_directory: Inode) -> None:
        if stat.S_ISDIR(target.mode):
            if not stat.S_ISDIR(source.mode):
                raise PosixError(errno.EISDIR)
            if self._tree.is_within(old_directory.number, target.number):
                raise PosixError(errno.ENOTEMPTY)
            if not self._tree.is_empty(target.number):
                raise PosixError(errno.ENOTEMPTY)
        elif stat.S_ISDIR(source.mode):
            raise PosixError(errno.ENOTDIR)

    def _move(
        self,
        old: _Place,
        new_directory: Inode,
        new_name: bytes,
        target_entry: Entry | None,
        target: Inode | None,
    ) -> None:
        old_directory, name, entry, source = old
        is_directory = stat.S_ISDIR(source.mode)
        across = old_directory.number != new_directory.number
        replaced_directory = target is not None and stat.S_ISDIR(target.mode)
        gained = int(is_directory and across) - int(replaced_directory)
        if new_directory.nlink + gained > MAX_LINKS:
            raise PosixError(errno.EMLINK)
        old_place, new_place = (old_directory.number, name), (new_directory.number, new_name)
        flags = self._keeper.for_rename(source, old_place, new_place)
        target_flags = 0
        if target is not None:
            target_flags = self._keeper.for_unlink(target, new_directory.number, new_name)
        now = self._tree.store.clock.time_ns()
        with self._tree.store.change() as change:
            self._tree.drop(change, old_directory.number, name, entry)
            if target is not None and target_entry is not None:
                # The name keeps its cookie, so that a listing under way shows it exactly once.
                cookie = target_entry.cookie
                self._tree.drop(change, new_directory.number, new_name, target_entry)
                self._lose_name(change, target, target_flags, now)
            else:
                cookie = new_directory.next_cookie
            self._tree.add(change, new_directory.number, new_name, source.number, source.mode, cookie)
            next_cookie = max(cookie + 1, new_directory.next_cookie)
            if across:
                lost = int(is_directory)
                change.patch(
                    old_directory.number, nlink=old_directory.nlink - lost, mtime_ns=now, ctime_ns=now
                )
            change.patch(
                new_directory.number,
                nlink=new_directory.nlink + gained,
                mtime_ns=now,
                ctime_ns=now,
                next_cookie=next_cookie,
            )
            self._moved(change, source, flags, new_directory.number, now)
            if target is not None and stat.S_ISREG(source.mode):
                change.with_data(source.number)
            self._keeper.note(change)

    def _exchange(self, one: _Place, two: _Place) -> None:
        (one_directory, one_name, one_entry, one_inode) = one
        (two_directory, two_name, two_entry, two_inode) = two
        if one_entry.inode == two_entry.inode:
            return
        if stat.S_ISDIR(two_inode.mode) and self._tree.is_within(one_directory.number, two_inode.number):
            raise PosixError(errno.EINVAL)
        across = one_directory.number != two_directory.number
        shift = int(stat.S_ISDIR(two_inode.mode)) - int(stat.S_ISDIR(one_inode.mode)) if across else 0
        if max(one_directory.nlink + shift, two_directory.nlink - shift) > MAX_LINKS:
            raise PosixError(errno.EMLINK)
        one_place, two_place = (one_directory.number, one_name), (two_directory.number, two_name)
        one_flags = self._keeper.for_rename(one_inode, one_place, two_place)
        two_flags = self._keeper.for_rename(two_inode, two_place, one_place)
        now = self._tree.store.clock.time_ns()
        with self._tree.store.change() as change:
            self._name(change, one_place, one_entry.cookie, two_inode)
            self._name(change, two_place, two_entry.cookie, one_inode)
            change.patch(one_directory.number, nlink=one_directory.nlink + shift, mtime_ns=now, ctime_ns=now)
            if across:
                change.patch(
                    two_directory.number, nlink=two_directory.nlink - shift, mtime_ns=now, ctime_ns=now
                )
            self._moved(change, one_inode, one_flags, two_directory.number, now)
            self._moved(change, two_inode, two_flags, one_directory.number, now)
            for inode in (one_inode, two_inode):
                if stat.S_ISREG(inode.mode):
                    change.with_data(inode.number)
            self._keeper.note(change)

    def _name(self, change: Change, place: tuple[int, bytes], cookie: int, inode: Inode) -> None:
        """Lets an existing name, with its cookie, name another inode."""
        row = Entry(inode.number, cookie, kind(inode.mode)).encode()
        change.put(Table.ENTRIES, u64(place[0]) + place[1], row)

    def _moved(self, change: Change, inode: Inode, flags: int, parent: int, now: int) -> None:
        if not stat.S_ISDIR(inode.mode):
            change.patch(inode.number, flags=flags, ctime_ns=now)
            return
        change.patch(inode.number, parent=parent, ctime_ns=now)
        self._keeper.directory_moved(change, inode.number)

    def _lose_name(self, change: Change, inode: Inode, flags: int, now: int) -> None:
        if stat.S_ISDIR(inode.mode) or inode.nlink == 1:
            change.patch(inode.number, nlink=0, ctime_ns=now)
            self._keeper.gone(inode.number)
            self._references.unnamed(change, inode)
        else:
            change.patch(inode.number, nlink=inode.nlink - 1, flags=flags, ctime_ns=now)
