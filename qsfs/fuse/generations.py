"""Request handlers of a mount that follows: each generation has its own, and inodes say whose they are.

The kernel knows an inode of generation number `tag` as tag << 40 | inode, and the root as 1 in all of them.  So
no inode ever shows other attributes or bytes than before, and the kernel may keep both for long.  Only what
hangs at the root changes with a move, and the kernel asks for that each time: a path walk that begins after
a move sees the new generation, and nothing has to be invalidated.  Files and directories that are open stay
in the generation in which they were opened.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, XAttrNameT

from qsfs.filesystem.namespace import Namespace
from qsfs.fuse.attributes import TIMEOUT_SECONDS, AttributeFiller
from qsfs.fuse.boundary import RequestCounts
from qsfs.fuse.operations import AttributesChanged, Operations
from qsfs.store.schema import ROOT_INODE, Inode

TAG_SHIFT = 40
MOST_INODES = 1 << TAG_SHIFT
MOST_TAGS = 1 << (63 - TAG_SHIFT)
"""Generations that one mount can show; numbers are never used again, since the kernel may remember them."""


class TaggedAttributes(AttributeFiller):
    """Describes the inodes of one generation.  `at_root`: the entries that are described hang at the root."""

    def __init__(self, namespace: Namespace, tag: int) -> None:
        super().__init__(namespace)
        self._tag = tag << TAG_SHIFT
        self.at_root = False

    def fill(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """As `AttributeFiller.fill`."""
        reply = super().fill(inode)
        root = inode.number == ROOT_INODE
        if not root:
            reply.st_ino |= self._tag
        if reply is self._reply:
            reply.attr_timeout = 0.0 if root else TIMEOUT_SECONDS
        reply.entry_timeout = 0.0 if self.at_root or root else TIMEOUT_SECONDS
        return reply

    def absent(self) -> pyfuse3.EntryAttributes:
        """As `AttributeFiller.absent`."""
        reply = super().absent()
        reply.entry_timeout = 0.0 if self.at_root else TIMEOUT_SECONDS
        return reply


class Generation:
    """One generation that the kernel may know.  `handles` counts what is open in it."""

    def __init__(self, tag: int, namespace: Namespace) -> None:
        self.tag = tag
        self.namespace = namespace
        self.attributes = TaggedAttributes(namespace, tag)
        self.handles = 0
        self.operations: Operations

    @property
    def known(self) -> int:
        """How many of its inodes the kernel has references to, at most: the root is in all generations."""
        return self.namespace.references.known


class GenerationOperations(pyfuse3.Operations):
    """The request handlers of all generations of one mount.  Nothing here waits: the inner handlers do."""

    supports_dot_lookup = True
    enable_writeback_cache = True

    def __init__(self, *, xattr: bool) -> None:
        super().__init__()
        self.enable_acl = xattr
        self.counts = RequestCounts()
        self.initialized = trio.Event()
        self.attributes_changed: AttributesChanged = lambda number: None
        self.current: Generation
        self._generations: dict[int, Generation] = {}
        self._handles: dict[int, tuple[Generation, FileHandleT]] = {}
        self._next_handle = 1

    def show(self, generation: Generation) -> None:
        """Makes a generation the one that path walks see from now on; at once, between two requests."""
        generation.operations.counts = self.counts
        self._generations[generation.tag] = generation
        self.current = generation

    def forget_generation(self, generation: Generation) -> None:
        """What the kernel still knows of a generation is stale from now on; nothing may be open in it."""
        del self._generations[generation.tag]

    def init(self) -> None:
        """The kernel and libfuse agree on the session."""
        self.initialized.set()

    # names and attributes

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Finds a name in the generation of its directory; at the root, in the current one."""
        of, parent = self._of(parent_inode)
        of.attributes.at_root = parent == ROOT_INODE
        return await of.operations.lookup(parent, name, ctx)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Gives lookup counts back to the generations that gave them."""
        counts: dict[int, list[tuple[InodeT, int]]] = {}
        for inode, count in inode_list:
            counts.setdefault(inode >> TAG_SHIFT, []).append((InodeT(inode & MOST_INODES - 1), count))
        for tag, of in counts.items():
            generation = self._generations.get(tag)
            if generation is not None:
                await generation.operations.forget(of)

    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """What stat shows."""
        of, number = self._of(inode)
        of.attributes.at_root = False
        return await of.operations.getattr(number, ctx)

    async def readlink(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileNameT:
        """A symlink's target."""
        of, number = self._of(inode)
        return await of.operations.readlink(number, ctx)

    async def access(self, inode: InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """Answered once: the kernel checks permissions itself."""
        return await self.current.operations.access(inode, mode, ctx)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The usable size, from memory."""
        return await self.current.operations.statfs(ctx)

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """An extended attribute's value."""
        of, number = self._of(inode)
        return await of.operations.getxattr(number, name, ctx)

    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[XAttrNameT]:
        """The names of all extended attributes."""
        of, number = self._of(inode)
        return await of.operations.listxattr(number, ctx)

    # what is open

    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Opens a file in its generation, which stays until it is closed."""
        of, number = self._of(inode)
        answer = await of.operations.open(number, flags, ctx)
        answer.fh = self._opened(of, answer.fh)
        return answer

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Reads in the generation in which the file was opened."""
        of, inner = self._handle(fh)
        return await of.operations.read(inner, off, size)

    async def flush(self, fh: FileHandleT) -> None:
        """Answered once."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: FileHandleT) -> None:
        """The last close of a handle."""
        of, inner = self._closed(fh)
        await of.operations.release(inner)

    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        """Opens a directory in its generation: a listing is of one generation."""
        of, number = self._of(inode)
        return self._opened(of, await of.operations.opendir(number, ctx))

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Lists in the generation in which the directory was opened."""
        of, inner = self._handle(fh)
        of.attributes.at_root = of.operations.is_root(inner)
        await of.operations.readdir(inner, start_id, token)

    async def releasedir(self, fh: FileHandleT) -> None:
        """The last close of a directory."""
        of, inner = self._closed(fh)
        await of.operations.releasedir(inner)

    # inside

    def _of(self, inode: int) -> tuple[Generation, InodeT]:
        """The generation of an inode and its number there; ESTALE where that is not shown any more."""
        if inode == ROOT_INODE:
            return self.current, InodeT(inode)
        generation = self._generations.get(inode >> TAG_SHIFT)
        if generation is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return generation, InodeT(inode & MOST_INODES - 1)

    def _opened(self, generation: Generation, inner: FileHandleT) -> FileHandleT:
        handle = FileHandleT(self._next_handle)
        self._next_handle += 1
        self._handles[handle] = generation, inner
        generation.handles += 1
        return handle

    def _handle(self, handle: FileHandleT) -> tuple[Generation, FileHandleT]:
        try:
            return self._handles[handle]
        except KeyError:
            raise pyfuse3.FUSEError(errno.EBADF) from None

    def _closed(self, handle: FileHandleT) -> tuple[Generation, FileHandleT]:
        found = self._handle(handle)
        del self._handles[handle]
        found[0].handles -= 1
        return found
