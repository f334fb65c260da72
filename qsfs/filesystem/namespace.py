"""The namespace: names, inodes and their attributes, by POSIX's rules.

Every operation is synchronous, checks everything first and then makes one change, so it happens
wholly or not at all.  It raises `PosixError` with the code that the application gets, or a `Need`
before it has changed anything.  Permissions and the sticky bit are the kernel's.

Times: an operation sets mtime and ctime as POSIX says; of a read only its caller knows (`accessed`).
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable, Iterator

from qsfs.filesystem import attributes, xattrs
from qsfs.filesystem.attributes import AttributeChange
from qsfs.filesystem.interfaces import Change, Contents, Store
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.policy_keeper import PolicyKeeper
from qsfs.filesystem.posix import (
    MAX_LINKS,
    MAX_SYMLINK,
    Caller,
    PosixError,
    check_id,
    check_name,
)
from qsfs.filesystem.references import References
from qsfs.filesystem.rename import Renames
from qsfs.filesystem.tree import Tree
from qsfs.store.schema import ROOT_INODE, Inode, Table, u64

_MODE = 0o7777
_KINDS = frozenset((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK))


def make_root(store: Store, caller: Caller, mode: int = 0o755) -> None:
    """Gives a new file system its root directory."""
    now = store.clock.time_ns()
    with store.change() as change:
        change.create(
            Inode(
                ROOT_INODE,
                stat.S_IFDIR | mode,
                caller.uid,
                caller.gid,
                nlink=2,
                atime_ns=now,
                mtime_ns=now,
                ctime_ns=now,
                parent=ROOT_INODE,
            )
        )


class Namespace:
    """All operations on names and attributes of one file system."""

    def __init__(self, store: Store, contents: Contents, policies: Policies | None = None) -> None:
        """Needs a store with a root; call `remove_orphans` before the first operation of a mount."""
        self.tree = Tree(store, contents)
        self.references = References(self.tree)
        self.policies = PolicyKeeper(self.tree, policies or Policies())
        self._renames = Renames(self.tree, self.references, self.policies)
        self._store = store

    # looking

    def inode(self, number: int) -> Inode:
        """The live inode; ESTALE if there is none."""
        return self.tree.inode(number)

    def lookup(self, parent: int, name: bytes) -> Inode | None:
        """The inode that a name stands for, also `.` and `..`; None if there is no such name."""
        directory = self.tree.directory(parent)
        if name == b".":
            return directory
        if name == b"..":
            return self.tree.inode(directory.parent)
        check_name(name)
        entry = self.tree.find(parent, name)
        return None if entry is None else self.tree.child(parent, name, entry)

    def readlink(self, number: int) -> bytes:
        """A symlink's target; EINVAL for anything else."""
        if not stat.S_ISLNK(self.tree.inode(number).mode):
            raise PosixError(errno.EINVAL)
        target = self._store.get(Table.SYMLINKS, u64(number))
        return b"" if target is None else target

    def list_directory(self, number: int, after: int) -> Iterator[tuple[int, bytes, Inode]]:
        """Cookie, name and inode of the entries behind cookie `after` (0: from the start), in order.

        Begins with `.` and `..`; a removed directory lists nothing.  Nothing may be changed while the
        iterator is in use.
        """
        directory = self.tree.directory(number)
        if directory.nlink == 0:
            return
        if after < 1:
            yield 1, b".", directory
        if after < 2:
            yield 2, b"..", self.tree.inode(directory.parent)
        for cookie, name, entry in self.tree.entries(number, after):
            yield cookie, name, self.tree.child(number, name, entry)

    # making

    def create(self, parent: int, name: bytes, mode: int, caller: Caller) -> Inode:
        """A new, empty regular file."""
        return self._make(parent, name, stat.S_IFREG | mode & _MODE, caller)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Inode:
        """A new file of any kind but directory and symlink; EINVAL for those."""
        file_kind = stat.S_IFMT(mode) or stat.S_IFREG
        if file_kind not in _KINDS:
            raise PosixError(errno.EINVAL)
        device = rdev if file_kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        if not 0 <= device < 2**32:
            raise PosixError(errno.EINVAL)
        return self._make(parent, name, file_kind | mode & _MODE, caller, rdev=device)

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Inode:
        """A new directory."""
        return self._make(parent, name, stat.S_IFDIR | mode & _MODE, caller)

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Inode:
        """A new symlink; ENOENT for an empty target, ENAMETOOLONG above 4095 bytes."""
        if len(target) > MAX_SYMLINK:
            raise PosixError(errno.ENAMETOOLONG)
        if not target:
            raise PosixError(errno.ENOENT)
        return self._make(parent, name, stat.S_IFLNK | 0o777, caller, target=target)

    def link(self, number: int, parent: int, name: bytes) -> Inode:
        """One more name for an inode: EPERM for a directory, ENOENT once it has no name, EMLINK."""
        directory = self.tree.living_directory(parent)
        check_name(name)
        inode = self.tree.inode(number)
        if stat.S_ISDIR(inode.mode):
            raise PosixError(errno.EPERM)
        if self.tree.find(parent, name) is not None:
            raise PosixError(errno.EEXIST)
        if inode.nlink == 0:
            raise PosixError(errno.ENOENT)
        if inode.nlink >= MAX_LINKS:
            raise PosixError(errno.EMLINK)
        flags = self.policies.for_link(inode, parent, name)
        now = self._store.clock.time_ns()
        with self._store.change() as change:
            self._add(change, directory, name, number, inode.mode, now)
            change.patch(number, nlink=inode.nlink + 1, flags=flags, ctime_ns=now)
            self.policies.note(change)
        return inode

    # removing and moving

    def unlink(self, parent: int, name: bytes) -> None:
        """Removes the name of anything but a directory (EISDIR)."""
        directory = self.tree.directory(parent)
        if name in (b".", b".."):
            raise PosixError(errno.EISDIR)
        check_name(name)
        entry = self.tree.entry(parent, name)
        inode = self.tree.child(parent, name, entry)
        if stat.S_ISDIR(inode.mode):
            raise PosixError(errno.EISDIR)
        flags = self.policies.for_unlink(inode, parent, name)
        now = self._store.clock.time_ns()
        with self._store.change() as change:
            self.tree.drop(change, parent, name, entry)
            change.patch(directory.number, mtime_ns=now, ctime_ns=now)
            change.patch(inode.number, nlink=inode.nlink - 1, flags=flags, ctime_ns=now)
            if inode.nlink == 1:
                self.policies.gone(inode.number)
                self.references.unnamed(change, inode)
            self.policies.note(change)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Removes an empty directory: ENOTDIR, ENOTEMPTY, EINVAL for `.`, ENOTEMPTY for `..`."""
        if name == b".":
            raise PosixError(errno.EINVAL)
        if name == b"..":
            raise PosixError(errno.ENOTEMPTY)
        directory = self.tree.directory(parent)
        check_name(name)
        entry = self.tree.entry(parent, name)
        inode = self.tree.child(parent, name, entry)
        if not stat.S_ISDIR(inode.mode):
            raise PosixError(errno.ENOTDIR)
        if not self.tree.is_empty(inode.number):
            raise PosixError(errno.ENOTEMPTY)
        now = self._store.clock.time_ns()
        with self._store.change() as change:
            self.tree.drop(change, parent, name, entry)
            change.patch(directory.number, nlink=directory.nlink - 1, mtime_ns=now, ctime_ns=now)
            change.patch(inode.number, nlink=0, ctime_ns=now)
            self.references.unnamed(change, inode)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> None:
        """rename(2), or renameat2(2) with RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2)."""
        self._renames.rename(parent, name, new_parent, new_name, flags)

    # attributes

    def set_attributes(self, number: int, wanted: AttributeChange) -> Inode:
        """chmod, chown, utimens, truncate; returns the inode."""
        return attributes.set_attributes(self.tree, number, wanted)

    def written(self, inode: Inode) -> bool:
        """After a write: takes the set-id bits away; returns whether there were any."""
        return attributes.drop_set_ids(self.tree, inode)

    def access_is_due(self, inode: Inode) -> bool:
        """Whether a read sets the access time, by relatime's rule."""
        return attributes.access_is_due(self.tree, inode)

    def accessed(self, inode: Inode) -> None:
        """After a read: sets the access time if it is due."""
        if attributes.access_is_due(self.tree, inode):
            attributes.mark_access(self.tree, inode)

    def get_xattr(self, number: int, name: bytes) -> bytes:
        """The value of an extended attribute; ENODATA."""
        return xattrs.get_xattr(self.tree, number, name)

    def list_xattrs(self, number: int) -> list[bytes]:
        """The names of all extended attributes."""
        return xattrs.list_xattrs(self.tree, number)

    def set_xattr(self, number: int, name: bytes, value: bytes, *, keeps_set_gid: bool = True) -> None:
        """Sets an extended attribute: E2BIG, ERANGE, EOPNOTSUPP, ENOSPC above the list's size.

        An access ACL takes the setgid bit away unless the caller `keeps_set_gid`: is in the group or root.
        """
        xattrs.set_xattr(self.tree, number, name, value, keeps_set_gid)

    def remove_xattr(self, number: int, name: bytes) -> None:
        """Removes an extended attribute; ENODATA."""
        xattrs.remove_xattr(self.tree, number, name)

    # references

    def forget(self, counts: Iterable[tuple[int, int]]) -> None:
        """Gives lookup counts back; follow with `references.collect`."""
        self.references.forget(counts)

    def remove_orphans(self) -> int:
        """At mount: removes what a former mount left without a name; returns how many inodes."""
        return self.references.remove_orphans()

    # inside

    def _make(
        self, parent: int, name: bytes, mode: int, caller: Caller, rdev: int = 0, target: bytes | None = None
    ) -> Inode:
        directory = self.tree.living_directory(parent)
        check_name(name)
        if self.tree.find(parent, name) is not None:
            raise PosixError(errno.EEXIST)
        check_id(caller.uid)
        check_id(caller.gid)
        is_directory = stat.S_ISDIR(mode)
        if is_directory and directory.nlink >= MAX_LINKS:
            raise PosixError(errno.EMLINK)
        gid = caller.gid
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID if is_directory else 0
        mode, acls = xattrs.inherited(self.tree, directory, mode, caller.umask)
        flags = 0
        if stat.S_ISREG(mode):
            flags = self.policies.for_new(parent, name)
        elif is_directory:
            flags = self.policies.for_new_directory(parent)
        number = self._store.allocate_inode()
        now = self._store.clock.time_ns()
        with self._store.change() as change:
            change.create(
                Inode(
                    number,
                    mode,
                    caller.uid,
                    gid,
                    nlink=2 if is_directory else 1,
                    rdev=rdev,
                    flags=flags,
                    atime_ns=now,
                    mtime_ns=now,
                    ctime_ns=now,
                    parent=parent if is_directory else 0,
                )
            )
            if target is not None:
                change.put(Table.SYMLINKS, u64(number), target)
            for attribute, value in acls.items():
                change.put(Table.XATTRS, u64(number) + attribute, value)
            self._add(change, directory, name, number, mode, now)
        return self.tree.inode(number)

    def _add(self, change: Change, directory: Inode, name: bytes, number: int, mode: int, now: int) -> None:
        cookie = directory.next_cookie
        self.tree.add(change, directory.number, name, number, mode, cookie)
        change.patch(
            directory.number,
            nlink=directory.nlink + int(stat.S_ISDIR(mode)),
            next_cookie=cookie + 1,
            mtime_ns=now,
            ctime_ns=now,
        )
