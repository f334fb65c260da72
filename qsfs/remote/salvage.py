"""Uploading anew what is still local of packs that have fewer shards than they need.

Backends that lost what they had acknowledged may leave a pack of which nothing can be read.  Its pages are not gone
while the cache holds them: until the second look has found a pack whole none is evicted.  They are marked
dirty, and the next cut or pre-copy has them in another pack.  Of a metadata pack the ranges that need it are read anew
from the local tables (`renewal.py`).  Which extents lie in such a pack is found by reading
all of them, in steps on a worker thread: it is that rare.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable

import trio

from qsfs.format.extent import PackKind
from qsfs.remote.context import FlushContext
from qsfs.store.packs import pack_row
from qsfs.store.reading import LocalDamage
from qsfs.store.redirty import redirty
from qsfs.store.schema import ExtentRow, Inode, Table, split_u64_pair
from qsfs.store.snapshot import CommittedState

_log = logging.getLogger(__name__)

_STEP_SECONDS = 0.1


class Salvage:
    """What is done about packs that are `lost`, whose numbers are added there; each once in a mount.

    `salvaged_pages` counts the pages that were marked dirty; `metadata` are the ids of metadata packs among them,
    whose rows are all in the local tables.
    """

    def __init__(self, context: FlushContext) -> None:
        self.lost: set[int] = set()
        self.metadata: set[bytes] = set()
        self.salvaged_pages = 0
        self._context = context
        self._done: set[int] = set()

    async def work(self) -> None:
        """Deals with the packs that became known as lost since the last call."""
        extents = self._context.store.extents
        new = (number for number in self.lost - self._done if not extents.in_work(number))
        lost = frozenset(number for number in new if not self._is_metadata(number))
        if not lost:
            return
        # What lies in them may have been recorded just now.
        await self._context.committer.commit()
        found: Counter[int] = Counter()
        position: bytes | None = b""
        while position is not None:
            start = position
            some, position = await self._context.in_thread(lambda: self._extents(start, lost))  # noqa: B023
            for inode, row in some:
                await self._context.committer.room()
                found[row.pack] += self._mark(inode, row)
                await trio.lowlevel.checkpoint()
        self._done |= lost
        self.salvaged_pages += found.total()
        for number in sorted(lost):
            self._tell(number, found[number])

    def _is_metadata(self, number: int) -> bool:
        row = pack_row(self._context.store, number)
        if row is None or row.kind != PackKind.METADATA:
            return False
        self._done.add(number)
        self.metadata.add(row.pack_id)
        _log.warning(
            "metadata pack %s has fewer shards than it needs: until its rows are written anew, which begins now, "
            "nothing can be restored without this machine", row.pack_id.hex(),
        )  # fmt: skip
        return True

    def _extents(self, start: bytes, lost: frozenset[int]) -> tuple[list[tuple[int, ExtentRow]], bytes | None]:
        """For a worker thread: extents in `lost` packs, as of the last commit, and where to go on."""
        context = self._context
        found = []
        until = context.clock.monotonic() + _STEP_SECONDS
        with CommittedState(context.store.environment, context.clock) as state:
            for key, value in state.view.scan(Table.EXTENTS, start, None):
                inode, first = split_u64_pair(key)
                row = ExtentRow.decode(first, bytes(value))
                if row.pack in lost:
                    found.append((inode, row))
                if context.clock.monotonic() >= until:
                    return found, key + b"\0"
        return found, None

    def _mark(self, number: int, row: ExtentRow) -> int:
        """How many pages of an extent were marked; only what still lies in it, and whose local bytes are right."""
        store = self._context.store
        inode = store.inode(number)
        if inode is None:
            return 0
        now = [
            here
            for here in store.extents.overlapping(number, row.first, row.first + row.pages)
            if (here.pack, here.ordinal) == (row.pack, row.ordinal)
        ]
        return sum(redirty(store.blocks, inode, part) for row in now for part in self._right(inode, row))

    def _right(self, inode: Inode, row: ExtentRow) -> Iterable[ExtentRow]:
        """The row, or each page of it whose local bytes are not damaged."""
        blocks = self._context.store.blocks
        with contextlib.suppress(LocalDamage):
            blocks.pages(inode.number, row.first, row.pages)
            return [row]
        right = []
        for page in range(row.first, row.first + row.pages):
            try:
                blocks.pages(inode.number, page, 1)
            except LocalDamage as damage:
                _log.error("%s, and its pack is lost: it cannot be uploaded anew", damage)
            else:
                right.append(row.part(page, 1))
        return right

    def _tell(self, number: int, pages: int) -> None:
        row = pack_row(self._context.store, number)
        if row is not None and not row.unnamed_since_ns:
            _log.warning(
                "pack %s has fewer shards than it needs: %d of its pages are local and are uploaded anew; what else "
                "lives in it is named by 'qsfs fsck --deep'", row.pack_id.hex(), pages,
            )  # fmt: skip
