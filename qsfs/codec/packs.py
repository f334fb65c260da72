"""Reads the packs of an archive from its shard files, one after the other, each judged by itself.

The shards of a pack lie at one offset in all files.  Where the next pack begins follows from their size, which any
good shard tells; it is guessed from a header, so that threads can work ahead, and put right if the guess was wrong.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from qsfs.codec.survey import Found, ShardFile
from qsfs.errors import Corrupt, FormatMismatch
from qsfs.format.archive import INODE, LABEL_SIZE, pack_bytes
from qsfs.format.erasure import Code
from qsfs.format.extent import PackRef
from qsfs.format.pack import open_body
from qsfs.format.shard import HEADER_SIZE, OVERHEAD, Shard, open_shard, peek_shard
from qsfs.format.units import PAGE


@dataclass(slots=True)
class PackRead:
    """What came of one pack.

    `data` are its plain bytes, None if fewer than k shards are good; `shards` the good ones by number; `wrong`
    what is wrong with each file that has no good shard here; `shard_size` None if no good shard told it.
    """

    position: int
    offset: int
    data: bytes | None = None
    ref: PackRef | None = None
    shards: dict[int, memoryview] = field(default_factory=dict)
    wrong: list[tuple[ShardFile, str]] = field(default_factory=list)

    @property
    def shard_size(self) -> int | None:
        """Bytes of payload of each shard, authenticated."""
        return None if self.ref is None else self.ref.shard_size


class PackReader:
    """Reads and verifies packs of one archive.  Safe to share between threads."""

    def __init__(self, found: Found, *, thorough: bool) -> None:
        """`thorough`: every shard is read, not only as many as are needed.  Raises as `Code`."""
        self._found = found
        self._thorough = thorough
        self._code = Code(found.archive.code)
        self._size = pack_bytes(found.archive.code)

    @property
    def code(self) -> Code:
        """The archive's code."""
        return self._code

    def everything(self, threads: int | None = None) -> Generator[PackRead, None, None]:
        """All packs in order, up to the first after which nothing can be found any more; close it before the files."""
        workers = threads or os.cpu_count() or 1
        packs = self._found.archive.manifest.packs
        waiting: deque[tuple[int, Future[PackRead]]] = deque()
        position, offset = 0, LABEL_SIZE
        pool = ThreadPoolExecutor(workers)
        try:
            while True:
                while position < packs and len(waiting) <= workers:
                    claimed = self.claimed_size(position, offset)
                    if claimed is None and waiting:
                        # Perhaps only the guess is wrong that led here; what is being read will tell.
                        break
                    waiting.append((claimed or 0, pool.submit(self.read, position, offset, claimed)))
                    if claimed is None:
                        break
                    position, offset = position + 1, offset + OVERHEAD + claimed
                if not waiting:
                    return
                claimed, future = waiting.popleft()
                result = future.result()
                yield result
                if result.shard_size is None:
                    return
                if result.shard_size != claimed:
                    for _, ahead in waiting:
                        ahead.cancel()
                    waiting.clear()
                    position = result.position + 1
                    offset = result.offset + OVERHEAD + result.shard_size
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def claimed_size(self, position: int, offset: int) -> int | None:
        """The size of the shards at `offset` as the first plausible header has it."""
        return next(self._claims(position, offset), None)

    def read(self, position: int, offset: int, claimed: int | None) -> PackRead:
        """Reads one pack.  What files hold never raises anything."""
        result = PackRead(position, offset)
        tried: set[int] = set()
        for size in (claimed, *self._claims(position, offset)):
            if size is None or size in tried:
                continue
            tried.add(size)
            result = self._read(position, offset, size)
            if result.ref is not None:
                break
        if result.ref is None and not tried:
            result.wrong = [(file, "no shard is to be found") for file in self._found.files]
        return self._decoded(result)

    def _claims(self, position: int, offset: int) -> Iterator[int]:
        """Sizes that headers at `offset` claim: first those of this pack, then any of this archive."""
        others: list[int] = []
        for file in self._found.files:
            header = file.read(HEADER_SIZE, offset)
            claim = None if isinstance(header, str) else peek_shard(header)
            if claim is None or claim.fsid != self._found.archive.keys.fsid:
                continue
            if claim.owner_epoch == position:
                yield claim.shard_size
            else:
                others.append(claim.shard_size)
        yield from others

    def _read(self, position: int, offset: int, size: int) -> PackRead:
        result = PackRead(position, offset)
        for file in self._found.files:
            if not self._thorough and len(result.shards) >= self._code.params.k:
                break
            value = file.read(size + OVERHEAD, offset)
            if isinstance(value, str):
                result.wrong.append((file, value))
                continue
            shard = self._open(value, position)
            if isinstance(shard, str):
                result.wrong.append((file, shard))
            elif result.ref is not None and shard.ref != result.ref:
                result.wrong.append((file, "of another encoding"))
            else:
                result.ref = shard.ref
                result.shards[shard.number] = shard.payload
        return result

    def _open(self, value: bytes, position: int) -> Shard | str:
        code = self._code.params
        try:
            shard = open_shard(value, self._found.archive.keys)
        except (Corrupt, FormatMismatch):
            claim = peek_shard(value)
            if claim is not None and claim.fsid != self._found.archive.keys.fsid:
                return "of another archive"
            return "rotten"
        if (shard.k, shard.n, shard.codec) != (code.k, code.n, code.codec):
            return "of another code"
        if shard.ref.owner_epoch != position:
            return f"out of place (it belongs to pack {shard.ref.owner_epoch})"
        return shard

    def _decoded(self, result: PackRead) -> PackRead:
        if result.ref is None or len(result.shards) < self._code.params.k:
            return result
        try:
            result.data = self._plain(result, result.ref)
        except (Corrupt, FormatMismatch):
            # Authentic shards that are no pack of this place: only a holder of the key can make them.
            result.data = None
        return result

    def _plain(self, result: PackRead, ref: PackRef) -> bytes:
        manifest = self._found.archive.manifest
        page = result.position * self._size // PAGE
        parts: list[bytes] = []
        for entry, data in open_body(self._found.archive.keys, ref, b"".join(self._code.decode(result.shards))):
            if (entry.inode, entry.first_page) != (INODE, page):
                raise Corrupt(f"pack {result.position}: holds pages of another place")
            page += entry.pages
            parts.append(data)
        plain = b"".join(parts)
        length = min(self._size, manifest.length - result.position * self._size)
        if len(plain) != -(-length // PAGE) * PAGE or plain[length:].strip(b"\0"):
            raise Corrupt(f"pack {result.position}: does not have the length that it must have")
        return plain[:length]
