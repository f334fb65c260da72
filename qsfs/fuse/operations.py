"""Request handlers: they translate between pyfuse3 and the file system, and nothing else.

No handler awaits anything inside a file-system operation, and none suspends at all unless it
waits for durability or for what an operation needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ModeT, XAttrNameT

from qsfs import failpoints
from qsfs.filesystem.attributes import SET_IDS, AttributeChange
from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.needs import Need, NeedRoom
from qsfs.filesystem.posix import MAX_NAME, PosixError
from qsfs.fuse.attributes import AttributeFiller
from qsfs.fuse.boundary import RequestCounts, request, translate, wait_for
from qsfs.fuse.handles import inode_of, is_durable, is_uncached, make_handle, marks_access
from qsfs.fuse.interfaces import Durability, Space, State, Waiter
from qsfs.store.schema import PAGE, ROOT_INODE, Inode, InodeFlag

_WRITE_THROUGH = int(InodeFlag.WRITE_THROUGH)
_MARKS_NOTHING = os.O_WRONLY | os.O_NOATIME
_READ_AGAIN_BYTES = 128 << 10
"""Files that one READ holds."""

AttributesChanged = Callable[[int], None]


class Operations(pyfuse3.Operations):
    """One mount's request handlers.

    `attributes_changed` is told the number of an inode whose attributes changed without the kernel
    having asked for it; it must not block (see `qsfs.fuse.session`).
    """

    supports_dot_lookup = True
    enable_writeback_cache = True

    def __init__(
        self,
        namespace: Namespace,
        waiter: Waiter,
        durability: Durability,
        space: Space,
        state: State,
        *,
        xattr: bool = False,
        relatime: bool = False,
        attributes_changed: AttributesChanged = lambda number: None,
        attributes: AttributeFiller | None = None,
    ) -> None:
        super().__init__()
        self.enable_acl = xattr
        self.counts = RequestCounts()
        self.waiter = waiter
        self.attributes_changed = attributes_changed
        self._namespace = namespace
        self._contents = namespace.tree.contents
        self._references = namespace.references
        self._durability = durability
        self._space = space
        self._state = state
        self._xattr = xattr
        self._relatime = relatime
        self._collecting = False
        self._attributes = attributes or AttributeFiller(namespace)
        self.initialized = trio.Event()

    def init(self) -> None:
        """The kernel and libfuse agree on the session; the answer goes out before any task runs."""
        self.initialized.set()

    # names

    @request
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Finds a name; one that does not exist is answered so that the kernel remembers it."""
        inode = self._namespace.lookup(parent_inode, name)
        if inode is None:
            return self._attributes.absent()
        return self._known(inode)

    @request
    async def readlink(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileNameT:
        """A symlink's target."""
        target = self._namespace.readlink(inode)
        if self._relatime:
            self._was_read(self._namespace.inode(inode))
        return target

    @request
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A new file, device, FIFO or socket."""
        self._check_room()
        inode = self._namespace.mknod(parent_inode, name, mode, rdev, ctx)
        return self._known(inode)

    @request
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A new directory."""
        self._check_room()
        inode = self._namespace.mkdir(parent_inode, name, mode, ctx)
        return self._known(inode)

    @request
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """A new symlink."""
        self._check_room()
        inode = self._namespace.symlink(parent_inode, name, target, ctx)
        return self._known(inode)

    @request
    async def link(
        self,
        inode: InodeT,
        new_parent_inode: InodeT,
        new_name: FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """One more name."""
        self._check_room()
        return self._known(self._namespace.link(inode, new_parent_inode, new_name))

    @request
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> None:
        """Removes a name."""
        self._check_change()
        self._namespace.unlink(parent_inode, name)

    @request
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> None:
        """Removes an empty directory."""
        self._check_change()
        self._namespace.rmdir(parent_inode, name)

    @request
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Renames, without replacing, or exchanges."""
        self._check_change()
        self._namespace.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Gives lookup counts back.  pyfuse3 lets nothing escape here, not even `FUSEError`."""
        with contextlib.suppress(pyfuse3.FUSEError):
            await self._forget(inode_list)

    @request
    async def _forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        self._references.forget(inode_list)
        await self._collect()

    # attributes

    @request
    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """What stat shows."""
        return self._attributes.fill(self._namespace.inode(inode))

    @request
    async def setattr(
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """chmod, chown, utimens, truncate; with no field: the kernel asks to drop the set-id bits."""
        self._check_change()
        wanted = AttributeChange(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
            keeps_set_ids=ctx.uid == 0,
        )
        changed = self._namespace.set_attributes(inode, wanted)
        if fh is not None and is_uncached(fh) and wanted.size is not None:
            await self._durability.sync(changed.number, True)
        return self._attributes.fill(changed)

    @request
    async def access(self, inode: InodeT, mode: ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """Answered once: the kernel checks permissions itself (`default_permissions`)."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @request
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The usable size, from memory."""
        report = self._space.report()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = PAGE
        data.f_blocks = report.total_bytes // PAGE
        data.f_bfree = data.f_bavail = report.free_bytes // PAGE
        data.f_files = report.files + report.free_files
        data.f_ffree = data.f_favail = report.free_files
        data.f_namemax = MAX_NAME
        return data

    # extended attributes: ENOSYS once turns them off until the next mount

    @request
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """An extended attribute's value."""
        self._check_xattr()
        return self._namespace.get_xattr(inode, name)

    @request
    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[XAttrNameT]:
        """The names of all extended attributes; those of root (`trusted.`) for root only."""
        self._check_xattr()
        names = self._namespace.list_xattrs(inode)
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    @request
    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Sets an extended attribute."""
        self._check_xattr()
        self._check_room()
        self._namespace.set_xattr(inode, name, value, keeps_set_gid=self._keeps_set_gid(inode, ctx))

    @request
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        """Removes an extended attribute."""
        self._check_xattr()
        self._check_change()
        self._namespace.remove_xattr(inode, name)

    # files

    @request
    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """A new file, opened."""
        self._check_room()
        inode = self._namespace.create(parent_inode, name, mode, ctx)
        answer = self._file_info(inode, flags, False), self._known(inode)
        self._contents.opened(inode)
        return answer

    @request
    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Opens a file; O_APPEND is the kernel's, and what may be read or written too.

        Nobody hears of a read from the kernel's cache.  So where a read will set the access time, the
        kernel is to ask for a small file again; a large one is not worth that.
        """
        opened = self._namespace.inode(inode)
        if not stat.S_ISREG(opened.mode):
            raise PosixError(errno.EISDIR if stat.S_ISDIR(opened.mode) else errno.ENXIO)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            self._check_change()
        if flags & os.O_TRUNC:
            self._namespace.set_attributes(inode, AttributeChange(size=0, keeps_set_ids=ctx.uid == 0))
        reads = self._relatime and not flags & _MARKS_NOTHING and self._namespace.access_is_due(opened)
        answer = self._file_info(opened, flags, reads)
        if reads and not flags & os.O_RDWR and opened.size <= _READ_AGAIN_BYTES:
            answer.keep_cache = False
        self._contents.opened(opened)
        return answer

    @request
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Reads; also through a write-only handle, which the kernel uses to fill its pages."""
        inode = self._namespace.inode(inode_of(fh))
        data = self._contents.read(inode, off, size)
        if marks_access(fh):
            self._was_read(inode)
        return data

    @request
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Writes; never refused for lack of room.

        The times of a cached file are the kernel's: it sends them (SETATTR) after the pages, and has
        shown them to applications already.  It also says (SETATTR) who may not keep set-id bits; of a
        write that it does not cache nobody knows who made it.
        """
        self._state.check_write()
        inode = self._namespace.inode(inode_of(fh))
        uncached = is_uncached(fh)
        written = self._contents.write(inode, off, buf, times=uncached)
        if uncached and inode.mode & SET_IDS and self._namespace.written(inode):
            self.attributes_changed(inode.number)
        if is_durable(fh):
            await self._durability.sync(inode.number, True)
        failpoints.hit("fuse.write")
        return written

    @request
    async def flush(self, fh: FileHandleT) -> None:
        """Answered once: close still sends the pages first, and there is nothing else to do."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @request
    async def release(self, fh: FileHandleT) -> None:
        """The last close of a handle."""
        inode = self._namespace.inode(inode_of(fh))
        try:
            self._contents.closed(inode)
        finally:
            self._references.closed(inode.number)
            await self._collect()

    @request
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Returns when the file is durable.  Never ENOSYS: the kernel would not ask again."""
        self._state.check_write()
        await self._durability.sync(inode_of(fh), datasync)
        failpoints.hit("fuse.fsync")

    # directories

    @request
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        """Opens a directory."""
        self._namespace.tree.directory(inode)
        return make_handle(inode)

    @request
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Lists from cookie `start_id` on, with attributes, as much as fits.

        What an error leaves of the answer is sent: the kernel has references to all that it holds, and
        gets the error, if it stays, when it asks for the next entry.
        """
        fill, looked_up = self._attributes.fill, self._references.looked_up
        if self._relatime and not start_id:
            self._was_read(self._namespace.inode(inode_of(fh)))
        answered = False
        try:
            for cookie, name, inode in self._namespace.list_directory(inode_of(fh), start_id):
                if not pyfuse3.readdir_reply(token, name, fill(inode), cookie):
                    return
                answered = True
                if cookie > 2:
                    looked_up(inode.number)
        except BaseException as error:
            if not answered:
                raise
            if not isinstance(error, Need):
                translate(self.counts, "readdir", error, (fh, start_id))

    @request
    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing was kept."""

    @request
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Returns when all namespace operations received so far are durable."""
        self._state.check_write()
        await self._durability.sync_namespace()

    def is_root(self, fh: FileHandleT) -> bool:
        """Whether a handle is one of the root directory."""
        return inode_of(fh) == ROOT_INODE

    # inside

    def _known(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """The answer that gives the kernel one more reference; counted once nothing can fail any more."""
        attributes = self._attributes.fill(inode)
        self._references.looked_up(inode.number)
        return attributes

    def _file_info(self, inode: Inode, flags: int, marks_access: bool) -> pyfuse3.FileInfo:
        """The answer to an open with `flags`.

        The kernel sends no FSYNC after an asynchronous write with O_DIRECT and O_DSYNC.
        """
        uncached = bool(inode.flags & _WRITE_THROUGH)
        synced = bool(flags & os.O_DIRECT and flags & os.O_DSYNC)
        handle = make_handle(inode.number, uncached=uncached, synced=synced, marks_access=marks_access)
        return pyfuse3.FileInfo(fh=handle, direct_io=uncached, keep_cache=not uncached)

    def _was_read(self, inode: Inode) -> None:
        """Sets the access time where it is due; the kernel asks for it again.

        Not while the group is full: no read waits for room, and a later one sets it too.
        """
        if self._state.writable and not self._space.group_is_full():
            self._namespace.accessed(inode)

    def _keeps_set_gid(self, number: InodeT, ctx: pyfuse3.RequestContext) -> bool:
        """Whether an ACL leaves the setgid bit; the flag by which the kernel says so is not passed on."""
        inode = self._namespace.inode(number)
        if ctx.uid == 0 or not inode.mode & stat.S_ISGID or inode.gid == ctx.gid:
            return True
        try:
            return inode.gid in pyfuse3.get_sup_groups(ctx.pid)
        except OSError:
            return False

    def _check_change(self) -> None:
        """Before a change of any kind, also one that is never refused for lack of room."""
        self._state.check_change()
        if self._space.group_is_full():
            raise NeedRoom

    def _check_room(self) -> None:
        self._check_change()
        if not self._space.has_room():
            raise PosixError(errno.ENOSPC)

    def _check_xattr(self) -> None:
        if not self._xattr:
            raise pyfuse3.FUSEError(errno.ENOSYS)

    async def _collect(self) -> None:
        """Removes what nobody uses any more; a mount that cannot leaves it to the next.

        Much of that waits between two groups, once for all who call meanwhile.
        """
        if self._collecting or not self._state.writable:
            return
        self._collecting = True
        try:
            while self._references.collect(self._space.group_is_full) and self._space.group_is_full():
                await wait_for(self, "collect", NeedRoom())
        finally:
            self._collecting = False
