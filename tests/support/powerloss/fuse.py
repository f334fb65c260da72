"""Serving a `Disk` through FUSE, and pulling its plug.

The kernel keeps no writeback cache here, so every `write(2)` arrives at once and every change of a shared
mapping when it is synced or written back; reads and mappings are cached and coherent (no direct_io).
`O_SYNC` and `O_DSYNC` writes are followed by an FSYNC of the kernel's own.  Locks are the kernel's.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import logging
import os
import signal
import stat
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from tests.support.powerloss.cut import CutReport
from tests.support.powerloss.disk import Disk
from tests.support.powerloss.node import Node

log = logging.getLogger("powerloss")

FOREVER = 86400.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass
class Trigger:
    """When the power goes: at the `at`-th request of a kind ("fsync" or "write") on files that match.

    Counting starts when it is armed.  `before` the request takes effect, or after; in both cases the
    program never gets its answer.
    """

    kind: str
    at: int
    before: bool = True
    match: str = "*"
    seed: str = "0"
    keep: str = "random"
    victims: tuple[int, ...] = ()
    seen: int = 0


@dataclass
class Fault:
    """Requests of a kind ("write", "fsync", "create", "any") on files that match fail with `number`.

    `remaining` counts down; negative means for ever.
    """

    kind: str
    number: int
    match: str = "*"
    remaining: int = -1


def _boundary(handler: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """Turns what a handler raises into what FUSE can answer."""

    @functools.wraps(handler)
    async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        operations = args[0]
        assert isinstance(operations, Operations)
        if operations.dead:
            raise pyfuse3.FUSEError(errno.EIO)
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return guarded


class Operations(pyfuse3.Operations):
    """The request handlers over one `Disk`."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self.disk = disk
        self.dead = False
        self.comes_back = False
        self.went = trio.Event()
        self.report: CutReport | None = None
        self.trigger: Trigger | None = None
        self.fault: Fault | None = None
        self.counts: dict[str, Counter[str]] = {"write": Counter(), "fsync": Counter()}

    def cut(self, seed: str, keep: str, victims: Sequence[int] = ()) -> CutReport:
        """The power goes; processes `victims` die with it."""
        for process in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.dead = True
        self.report = self.disk.cut(seed, keep)
        self.went.set()
        return self.report

    def _around(self, kind: str, node: Node, action: Callable[[], None]) -> None:
        """Runs `action`, a request of `kind`, unless a fault or a power cut comes in between."""
        self.counts[kind][node.label] += 1
        self._inject(kind, node)
        trigger = self.trigger
        if trigger is None or trigger.kind != kind or not fnmatch.fnmatch(node.label, trigger.match):
            action()
            return
        trigger.seen += 1
        due = trigger.seen == trigger.at
        if not (due and trigger.before):
            action()
        if due:
            self.cut(trigger.seed, trigger.keep, trigger.victims)
            raise pyfuse3.FUSEError(errno.EIO)

    def _inject(self, kind: str, node: Node) -> None:
        fault = self.fault
        if fault is None or fault.kind not in (kind, "any") or not fnmatch.fnmatch(node.label, fault.match):
            return
        if fault.remaining == 0:
            return
        fault.remaining -= 1
        raise pyfuse3.FUSEError(fault.number)

    def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.number
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = FOREVER
        entry.st_mode = node.mode
        entry.st_nlink = node.link_count
        entry.st_uid, entry.st_gid, entry.st_rdev = node.uid, node.gid, node.rdev
        entry.st_size = node.size
        entry.st_blksize = 4096
        entry.st_blocks = _blocks(node)
        entry.st_atime_ns = node.times["atime"]
        entry.st_mtime_ns = node.times["mtime"]
        entry.st_ctime_ns = node.times["ctime"]
        return entry

    def _known(self, node: Node) -> pyfuse3.EntryAttributes:
        node.lookups += 1
        return self._entry(node)

    def _new(self, parent: int, name: bytes, mode: int, ctx: Any, **more: Any) -> Node:
        directory = self.disk.nodes[parent]
        label = f"{directory.label}/{os.fsdecode(name)}".lstrip("/")
        self._inject("create", Node(0, mode, label=label))
        owner = (ctx.uid, directory.gid if directory.mode & stat.S_ISGID else ctx.gid)
        return self.disk.create(directory, name, mode, owner=owner, **more)

    @_boundary
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._known(self.disk.lookup(self.disk.nodes[parent_inode], name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            node = self.disk.nodes.get(number)
            if node is not None:
                node.lookups -= count
                if not self.dead:
                    self.disk.release(node)

    @_boundary
    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(self.disk.nodes[inode])

    @_boundary
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: Any,
    ) -> pyfuse3.EntryAttributes:
        node = self.disk.nodes[inode]
        changes = {
            name: value
            for name, wanted, value in (
                ("mode", fields.update_mode, attr.st_mode),
                ("uid", fields.update_uid, attr.st_uid),
                ("gid", fields.update_gid, attr.st_gid),
                ("atime", fields.update_atime, attr.st_atime_ns),
                ("mtime", fields.update_mtime, attr.st_mtime_ns),
            )
            if wanted
        }
        if fields.update_size:
            self._inject("write", node)
            self.disk.truncate(node, attr.st_size)
        if changes:
            self.disk.set_attributes(node, changes)
        return self._entry(node)

    @_boundary
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return self.disk.nodes[inode].target

    @_boundary
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        return self._known(self._new(parent_inode, name, mode & ~ctx.umask, ctx, rdev=rdev))

    @_boundary
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._known(self._new(parent_inode, name, stat.S_IFDIR | mode & ~ctx.umask, ctx))

    @_boundary
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        return self._known(self._new(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target))

    @_boundary
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self.disk.remove(self.disk.nodes[parent_inode], name, is_directory=False)

    @_boundary
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self.disk.remove(self.disk.nodes[parent_inode], name, is_directory=True)

    @_boundary
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        nodes = self.disk.nodes
        self.disk.rename(
            (nodes[parent_inode_old], name_old),
            (nodes[parent_inode_new], name_new),
            exchange=bool(flags & pyfuse3.RENAME_EXCHANGE),
            keep=bool(flags & pyfuse3.RENAME_NOREPLACE),
        )

    @_boundary
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        node = self.disk.nodes[inode]
        self.disk.link(node, self.disk.nodes[new_parent_inode], new_name)
        return self._known(node)

    @_boundary
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        node = self._new(parent_inode, name, stat.S_IFREG | mode & ~ctx.umask, ctx)
        node.opens += 1
        return pyfuse3.FileInfo(fh=node.number, keep_cache=True), self._known(node)

    @_boundary
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        node = self.disk.nodes[inode]
        if flags & os.O_TRUNC:
            self.disk.truncate(node, 0)
        node.opens += 1
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @_boundary
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self.disk.nodes[fh].read(off, size)

    @_boundary
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        node = self.disk.nodes[fh]
        self._around("write", node, lambda: self.disk.write(node, off, buf))
        return len(buf)

    @_boundary
    async def fsync(self, fh: int, datasync: bool) -> None:
        node = self.disk.nodes[fh]
        self._around("fsync", node, lambda: self.disk.fsync(node, data_only=datasync))

    @_boundary
    async def release(self, fh: int) -> None:
        node = self.disk.nodes[fh]
        node.opens -= 1
        self.disk.release(node)

    @_boundary
    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    @_boundary
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self.disk.nodes[fh]
        for name, cookie in list(directory.cookies.items()):
            if cookie > start_id:
                node = directory.children[name]
                if not pyfuse3.readdir_reply(token, name, self._entry(node), cookie):
                    break
                node.lookups += 1

    @_boundary
    async def releasedir(self, fh: int) -> None:
        pass

    @_boundary
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        node = self.disk.nodes[fh]
        self._around("fsync", node, lambda: self.disk.fsync(node))

    @_boundary
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        status = os.statvfs(self.disk.root.root)
        found = pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            setattr(found, f"f_{name}", getattr(status, f"f_{name}"))
        return found


def _blocks(node: Node) -> int:
    """Units of 512 bytes that it takes, as far as that is known before its pages reach the medium."""
    if not node.is_file:
        return 0
    held = os.fstat(node.descriptor).st_blocks if node.descriptor >= 0 else 0
    if node.descriptor < 0 and node.places:
        held = os.stat(node.path()).st_blocks
    return min(held + 8 * len(node.pages), -(-node.size // 4096) * 8)
