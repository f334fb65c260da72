"""The floor: an empty pyfuse3 file system in memory, to judge qsfs by.

It does nothing but answer: pyfuse3's request loop as installed, writeback cache, page cache kept,
timeouts of a day, the same kernel settings as a qsfs mount.  Its fsync appends 4 KiB to a file on
disk and waits for `fdatasync`, the least that any durable fsync costs.  What it reaches is what
Python and FUSE leave; qsfs can only come close, or find a shorter loop.

    floor.py MOUNTPOINT APPEND_FILE      prints "ready" when mounted; ends on SIGTERM, on unmount,
                                         and with the process that started it
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pyfuse3
import trio

CHUNK = 128 << 10
TIMEOUT = 86400
ZEROS = bytes(1 << 20)
PR_SET_PDEATHSIG = 1


class Node:
    """One inode: attributes, and either contents by chunk or entries by name."""

    def __init__(self, number: int, mode: int, ctx: pyfuse3.RequestContext | None) -> None:
        now = time.time_ns()
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(number)
        attributes.st_mode = pyfuse3.ModeT(mode)
        attributes.st_nlink = 2 if stat.S_ISDIR(mode) else 1
        attributes.st_uid = ctx.uid if ctx else os.getuid()
        attributes.st_gid = ctx.gid if ctx else os.getgid()
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = now
        attributes.st_blksize = 4096
        attributes.entry_timeout = attributes.attr_timeout = TIMEOUT
        self.attributes = attributes
        self.chunks: dict[int, bytearray] = {}
        self.entries: dict[bytes, int] = {}
        self.target = b""
        self.lookups = 0


class Floor(pyfuse3.Operations):
    """Namespace and contents in dictionaries."""

    enable_writeback_cache = True

    def __init__(self, append_file: Path) -> None:
        super().__init__()
        self.nodes = {pyfuse3.ROOT_INODE: Node(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755, None)}
        self.last = int(pyfuse3.ROOT_INODE)
        self.log = os.open(append_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self.record = os.urandom(4096)
        self.no_entry = pyfuse3.EntryAttributes()
        self.no_entry.st_ino = pyfuse3.InodeT(0)
        self.no_entry.entry_timeout = TIMEOUT

    def _add(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Node:
        entries = self.nodes[parent].entries
        if name in entries:
            raise pyfuse3.FUSEError(errno.EEXIST)
        self.last += 1
        node = Node(self.last, mode, ctx)
        node.lookups = 1
        self.nodes[self.last] = node
        entries[name] = self.last
        return node

    def _remove(self, parent: int, name: bytes) -> None:
        number = self.nodes[parent].entries.pop(name, None)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        node = self.nodes[number]
        is_directory = stat.S_ISDIR(node.attributes.st_mode)
        node.attributes.st_nlink = 0 if is_directory else node.attributes.st_nlink - 1
        self._drop(number, node)

    def _drop(self, number: int, node: Node) -> None:
        if node.lookups <= 0 and node.attributes.st_nlink == 0:
            self.nodes.pop(number, None)

    async def lookup(self, parent, name, ctx):
        number = self.nodes[parent].entries.get(name)
        if number is None:
            return self.no_entry
        node = self.nodes[number]
        node.lookups += 1
        return node.attributes

    async def forget(self, inode_list):
        for number, count in inode_list:
            node = self.nodes.get(number)
            if node is not None:
                node.lookups -= count
                self._drop(number, node)

    async def getattr(self, inode, ctx):
        return self.nodes[inode].attributes

    async def setattr(self, inode, attr, fields, fh, ctx):
        node = self.nodes[inode]
        mine = node.attributes
        if fields.update_size:
            self._truncate(node, attr.st_size)
        if fields.update_mode:
            mine.st_mode = attr.st_mode
        if fields.update_uid:
            mine.st_uid = attr.st_uid
        if fields.update_gid:
            mine.st_gid = attr.st_gid
        if fields.update_mtime:
            mine.st_mtime_ns = attr.st_mtime_ns
        if fields.update_ctime:
            mine.st_ctime_ns = attr.st_ctime_ns
        if fields.update_atime:
            mine.st_atime_ns = attr.st_atime_ns
        return mine

    def _truncate(self, node: Node, size: int) -> None:
        if size < node.attributes.st_size:
            edge, rest = divmod(size, CHUNK)
            for index in [index for index in node.chunks if index > edge or (index == edge and not rest)]:
                del node.chunks[index]
            if edge in node.chunks:
                node.chunks[edge][rest:] = bytes(CHUNK - rest)
        node.attributes.st_size = size
        node.attributes.st_blocks = len(node.chunks) * (CHUNK // 512)

    async def mkdir(self, parent, name, mode, ctx):
        return self._add(parent, name, stat.S_IFDIR | (mode & ~ctx.umask), ctx).attributes

    async def mknod(self, parent, name, mode, rdev, ctx):
        return self._add(parent, name, mode & ~ctx.umask, ctx).attributes

    async def symlink(self, parent, name, target, ctx):
        node = self._add(parent, name, stat.S_IFLNK | 0o777, ctx)
        node.target = target
        node.attributes.st_size = len(target)
        return node.attributes

    async def readlink(self, inode, ctx):
        return self.nodes[inode].target

    async def link(self, inode, new_parent, new_name, ctx):
        node = self.nodes[inode]
        self.nodes[new_parent].entries[new_name] = inode
        node.attributes.st_nlink += 1
        node.lookups += 1
        return node.attributes

    async def create(self, parent, name, mode, flags, ctx):
        node = self._add(parent, name, stat.S_IFREG | (mode & ~ctx.umask), ctx)
        return pyfuse3.FileInfo(fh=node.attributes.st_ino, keep_cache=True), node.attributes

    async def unlink(self, parent, name, ctx):
        self._remove(parent, name)

    async def rmdir(self, parent, name, ctx):
        number = self.nodes[parent].entries.get(name)
        if number is not None and self.nodes[number].entries:
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        self._remove(parent, name)

    async def rename(self, parent_old, name_old, parent_new, name_new, flags, ctx):
        moved = self.nodes[parent_old].entries.get(name_old)
        if moved is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if name_new in self.nodes[parent_new].entries:
            self._remove(parent_new, name_new)
        del self.nodes[parent_old].entries[name_old]
        self.nodes[parent_new].entries[name_new] = moved

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        for index, (name, number) in enumerate(list(self.nodes[fh].entries.items())[start_id:], start_id + 1):
            node = self.nodes[number]
            if not pyfuse3.readdir_reply(token, name, node.attributes, index):
                break
            node.lookups += 1

    async def read(self, fh, off, size):
        node = self.nodes[fh]
        size = max(0, min(size, node.attributes.st_size - off))
        index, start = divmod(off, CHUNK)
        if start + size <= CHUNK:
            chunk = node.chunks.get(index)
            return memoryview(chunk)[start : start + size] if chunk is not None else ZEROS[:size]
        parts = []
        while size > 0:
            index, start = divmod(off, CHUNK)
            count = min(size, CHUNK - start)
            chunk = node.chunks.get(index)
            parts.append(memoryview(chunk)[start : start + count] if chunk is not None else ZEROS[:count])
            off += count
            size -= count
        return b"".join(parts)

    async def write(self, fh, off, buf):
        node = self.nodes[fh]
        view = memoryview(buf)
        done, total = 0, len(view)
        while done < total:
            index, start = divmod(off + done, CHUNK)
            count = min(total - done, CHUNK - start)
            chunk = node.chunks.get(index)
            if chunk is None:
                chunk = node.chunks[index] = bytearray(CHUNK)
            chunk[start : start + count] = view[done : done + count]
            done += count
        node.attributes.st_size = max(node.attributes.st_size, off + total)
        return total

    async def fsync(self, fh, datasync):
        os.write(self.log, self.record)
        os.fdatasync(self.log)

    async def fsyncdir(self, fh, datasync):
        os.write(self.log, self.record)
        os.fdatasync(self.log)

    async def release(self, fh):
        pass

    async def releasedir(self, fh):
        pass

    async def flush(self, fh):
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def access(self, inode, mode, ctx):
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def getxattr(self, inode, name, ctx):
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def statfs(self, ctx):
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = answer.f_bfree = answer.f_bavail = 1 << 30
        answer.f_files = answer.f_ffree = answer.f_favail = 1 << 30
        answer.f_namemax = 255
        return answer


def tune(mountpoint: Path) -> None:
    """What a qsfs mount sets too, where it may (root)."""
    minor = os.minor(mountpoint.stat().st_dev)
    for file, value in (
        (f"/sys/class/bdi/0:{minor}/read_ahead_kb", "1024"),
        (f"/sys/fs/fuse/connections/{minor}/max_background", "64"),
    ):
        with contextlib.suppress(OSError):
            Path(file).write_text(value)


async def serve(mountpoint: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal)
        nursery.start_soon(announce, mountpoint)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def announce(mountpoint: Path) -> None:
    await trio.to_thread.run_sync(tune, mountpoint)
    sys.stdout.write("ready\n")
    sys.stdout.flush()


async def stop_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            pyfuse3.terminate()
            return


def main() -> int:
    if len(sys.argv) != 3:
        sys.stderr.write("usage: floor.py MOUNTPOINT APPEND_FILE\n")
        return 2
    # However the one who started it dies, no mount is left.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    mountpoint, append_file = Path(sys.argv[1]), Path(sys.argv[2])
    options = set(pyfuse3.default_options) | {"fsname=floor", "subtype=floor"}
    pyfuse3.init(Floor(append_file), str(mountpoint), options)
    try:
        trio.run(serve, mountpoint)
    finally:
        pyfuse3.close(unmount=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
