"""Attributes: what stat shows, and chmod, chown, utimens and truncate."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

from qsfs.filesystem.posix import MAX_FILE_SIZE, PosixError, check_id, clamp_time, without_set_ids
from qsfs.filesystem.tree import Tree
from qsfs.filesystem.xattrs import change_mode_acl
from qsfs.store.schema import Inode, Table, u64

SET_IDS = stat.S_ISUID | stat.S_ISGID
_DIRECTORY_SIZE = 4096
_DAY_NS = 24 * 3600 * 10**9


@dataclass(slots=True)
class AttributeChange:
    """What a setattr sets; None stays as it is.  Times are nanoseconds since 1970.

    With nothing set but perhaps `ctime_ns` it takes the set-id bits away: that is how the kernel
    announces a write by someone who may not keep them.  `keeps_set_ids` says that the caller may
    (CAP_FSETID), which counts for a truncation; a chown takes them from anybody.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    keeps_set_ids: bool = False

    @property
    def nothing(self) -> bool:
        """Whether nothing is set at all: a chown(-1, -1) of what is no regular file, which counts as a change."""
        given = (self.mode, self.uid, self.gid, self.size, self.atime_ns, self.mtime_ns, self.ctime_ns)
        return given == (None,) * len(given)


def size_of(tree: Tree, inode: Inode) -> int:
    """The size that stat shows of anything but a regular file."""
    if stat.S_ISDIR(inode.mode):
        return _DIRECTORY_SIZE
    if stat.S_ISLNK(inode.mode):
        return len(tree.store.get(Table.SYMLINKS, u64(inode.number)) or b"")
    return 0


def set_attributes(tree: Tree, number: int, wanted: AttributeChange) -> Inode:
    """Changes attributes and returns the inode.

    Raises EISDIR or EINVAL for a truncate of what is no regular file, EFBIG, EINVAL for ids.
    """
    inode = tree.inode(number)
    regular = stat.S_ISREG(inode.mode)
    for identity in (wanted.uid, wanted.gid):
        if identity is not None:
            check_id(identity)
    if wanted.size is not None:
        _check_size(inode, wanted.size)
        if wanted.size != tree.contents.stat(inode).size:
            tree.contents.truncate(inode, wanted.size)
    times_given = wanted.atime_ns is not None or wanted.mtime_ns is not None
    if regular and (times_given or wanted.ctime_ns is not None):
        tree.contents.set_times(
            inode,
            None if wanted.atime_ns is None else clamp_time(wanted.atime_ns),
            None if wanted.mtime_ns is None else clamp_time(wanted.mtime_ns),
            tree.store.clock.time_ns() if wanted.ctime_ns is None else clamp_time(wanted.ctime_ns),
        )
    mode = _mode(inode, wanted)
    fields: dict[str, int] = {}
    if mode != inode.mode or wanted.mode is not None:
        fields["mode"] = mode
    if wanted.uid is not None:
        fields["uid"] = wanted.uid
    if wanted.gid is not None:
        fields["gid"] = wanted.gid
    if not regular and wanted.atime_ns is not None:
        fields["atime_ns"] = clamp_time(wanted.atime_ns)
    if not regular and wanted.mtime_ns is not None:
        fields["mtime_ns"] = clamp_time(wanted.mtime_ns)
    if fields or (not regular and (wanted.ctime_ns is not None or wanted.nothing)):
        fields["ctime_ns"] = (
            tree.store.clock.time_ns() if wanted.ctime_ns is None else clamp_time(wanted.ctime_ns)
        )
        with tree.store.change() as change:
            change.patch(number, **fields)
            if wanted.mode is not None:
                change_mode_acl(tree, change, inode, mode)
    return inode


def access_is_due(tree: Tree, inode: Inode) -> bool:
    """Whether a read sets the access time (relatime): if it is not newer than both other times, or a day old."""
    atime = inode.atime_ns
    if atime <= inode.mtime_ns or atime <= inode.ctime_ns:
        return True
    return tree.store.clock.time_ns() - atime >= _DAY_NS


def mark_access(tree: Tree, inode: Inode) -> None:
    """Sets the access time after a read."""
    now = tree.store.clock.time_ns()
    if stat.S_ISREG(inode.mode):
        tree.contents.accessed(inode, now)
        return
    with tree.store.change() as change:
        change.patch(inode.number, atime_ns=now)


def drop_set_ids(tree: Tree, inode: Inode) -> bool:
    """Takes the set-id bits of a file away that was written; returns whether there were any."""
    mode = without_set_ids(inode.mode)
    if mode == inode.mode:
        return False
    with tree.store.change() as change:
        change.patch(inode.number, mode=mode, ctime_ns=tree.store.clock.time_ns())
    return True


def _mode(inode: Inode, wanted: AttributeChange) -> int:
    if wanted.mode is not None:
        return stat.S_IFMT(inode.mode) | stat.S_IMODE(wanted.mode)
    if stat.S_ISDIR(inode.mode):
        return inode.mode
    kept = False
    if wanted.uid is None and wanted.gid is None:
        times_given = wanted.atime_ns is not None or wanted.mtime_ns is not None
        kept = times_given if wanted.size is None else wanted.keeps_set_ids
    return inode.mode if kept else without_set_ids(inode.mode)


def _check_size(inode: Inode, size: int) -> None:
    if stat.S_ISDIR(inode.mode):
        raise PosixError(errno.EISDIR)
    if not stat.S_ISREG(inode.mode) or size < 0:
        raise PosixError(errno.EINVAL)
    if size > MAX_FILE_SIZE:
        raise PosixError(errno.EFBIG)
