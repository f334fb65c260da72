"""Extended attributes, and the ACLs among them."""

from __future__ import annotations

import errno
import stat

from qsfs.filesystem import acl
from qsfs.filesystem.interfaces import Change
from qsfs.filesystem.posix import PosixError
from qsfs.filesystem.tree import Tree
from qsfs.store.schema import Inode, Table, u64

MAX_XATTR_NAME = 255
MAX_XATTR_VALUE = 65536
MAX_XATTR_LIST = 65536
"""What listxattr(2) can return: names with their terminating zeros."""

_PREFIXES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)


def get_xattr(tree: Tree, number: int, name: bytes) -> bytes:
    """The value of an attribute; ENODATA if it is not set, EOPNOTSUPP if it cannot be."""
    value = tree.store.get(Table.XATTRS, u64(number) + name)
    if value is None:
        _check_name(name)
        raise PosixError(errno.ENODATA)
    return value


def list_xattrs(tree: Tree, number: int) -> list[bytes]:
    """The names of all attributes, in order."""
    prefix = u64(number)
    return [key[len(prefix) :] for key, _ in tree.store.scan(Table.XATTRS, prefix, u64(number + 1))]


def set_xattr(tree: Tree, number: int, name: bytes, value: bytes, keeps_set_gid: bool = True) -> None:
    """Sets an attribute.  An access ACL sets the mode with it, and is not stored if the mode says it all."""
    inode = tree.inode(number)
    _check_name(name)
    if len(value) > MAX_XATTR_VALUE:
        raise PosixError(errno.E2BIG)
    mode = inode.mode
    stored: bytes | None = value
    if name in _ACLS:
        entries = acl.decode(value)
        if name == acl.ACCESS:
            mode = acl.mode_of(entries, mode)
            if not keeps_set_gid:
                mode &= ~stat.S_ISGID
            stored = None if acl.is_minimal(entries) else value
        elif not stat.S_ISDIR(inode.mode):
            raise PosixError(errno.EACCES)
    key = u64(number) + name
    if stored is not None and tree.store.get(Table.XATTRS, key) is None:
        names = list_xattrs(tree, number)
        if sum(map(len, names)) + len(names) + len(name) + 1 > MAX_XATTR_LIST:
            raise PosixError(errno.ENOSPC)
    with tree.store.change() as change:
        if stored is None:
            change.delete(Table.XATTRS, key)
        else:
            change.put(Table.XATTRS, key, stored)
        change.patch(number, mode=mode, ctime_ns=tree.store.clock.time_ns())


def remove_xattr(tree: Tree, number: int, name: bytes) -> None:
    """Removes an attribute; ENODATA if it is not set (an ACL that is not there: nothing to do)."""
    tree.inode(number)
    key = u64(number) + name
    if tree.store.get(Table.XATTRS, key) is None:
        _check_name(name)
        if name in _ACLS:
            return
        raise PosixError(errno.ENODATA)
    with tree.store.change() as change:
        change.delete(Table.XATTRS, key)
        change.patch(number, ctime_ns=tree.store.clock.time_ns())


def change_mode_acl(tree: Tree, change: Change, inode: Inode, mode: int) -> None:
    """Within a chmod: the access ACL follows the mode."""
    key = u64(inode.number) + acl.ACCESS
    value = tree.store.get(Table.XATTRS, key)
    if value is not None:
        change.put(Table.XATTRS, key, acl.encode(acl.with_mode(acl.decode(value), mode)))


def inherited(tree: Tree, directory: Inode, mode: int, umask: int) -> tuple[int, dict[bytes, bytes]]:
    """The mode and ACL attributes of a new inode in a directory, whose default ACL replaces the umask."""
    if stat.S_ISLNK(mode):
        return mode, {}
    value = tree.store.get(Table.XATTRS, u64(directory.number) + acl.DEFAULT)
    if value is None:
        return mode & ~umask, {}
    entries, mode = acl.inherit(acl.decode(value), mode)
    attributes = {} if acl.is_minimal(entries) else {acl.ACCESS: acl.encode(entries)}
    if stat.S_ISDIR(mode):
        attributes[acl.DEFAULT] = value
    return mode, attributes


def _check_name(name: bytes) -> None:
    if not name or len(name) > MAX_XATTR_NAME:
        raise PosixError(errno.ERANGE)
    if name not in _ACLS and not name.startswith(_PREFIXES):
        raise PosixError(errno.EOPNOTSUPP)
