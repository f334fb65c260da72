"""Layer 3: extents against packs, blocks against extents, pages against their checksums, counts.

All three tables are walked once, side by side, in order of their inodes.  Mended are: page bytes
that rotted and lie in a pack too (dropped, so that they are fetched again), clean pages that lie
nowhere else (marked dirty), the dirty index, and counts.
"""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, TypeVar

from qsfs.errors import Corrupt
from qsfs.format.extent import PackKind
from qsfs.fsck.mends import Mends
from qsfs.fsck.pages import PageCheck
from qsfs.fsck.report import Finding, Layer, Report, Severity
from qsfs.fsck.rows import decode_inode, decoded, truncations_of
from qsfs.store.environment import ReadView
from qsfs.store.schema import (
    PAGE,
    BlockRow,
    ExtentRow,
    Inode,
    PackRow,
    PackState,
    Table,
    is_cut,
    plain_u64,
    read_plain_u64,
    split_u64,
    split_u64_pair,
    u64,
    u64_pair,
)
from qsfs.store.store import NEXT_INODE, NEXT_PACK

T = TypeVar("T")

_CODECS = (0, 1)


def check_extents(view: ReadView, report: Report, mends: Mends | None) -> None:
    """Checks all files' data; with `mends`, also collects what a repair can put right."""
    _Check(view, report, mends).run()


class FileExtents:
    """The extents of one file, walked forward: `holds` is asked for pages in ascending order."""

    def __init__(self, rows: Iterator[ExtentRow]) -> None:
        self._rows = rows
        self._row = next(rows, None)
        self.pages = 0
        self._count()

    def holds(self, page: int) -> bool:
        """Whether an extent holds `page`."""
        while self._row is not None and self._row.first + self._row.pages <= page:
            self._step()
        return self._row is not None and self._row.first <= page

    def drain(self) -> None:
        """Walks the rest, so that all are checked and counted."""
        while self._row is not None:
            self._step()

    def _step(self) -> None:
        self._row = next(self._rows, None)
        self._count()

    def _count(self) -> None:
        if self._row is not None:
            self.pages += self._row.pages


class _Check:
    def __init__(self, view: ReadView, report: Report, mends: Mends | None) -> None:
        self._view = view
        self._report = report
        self._mends = mends
        self._pages = PageCheck(view, report, mends)
        self._packs: dict[int, PackRow] = {}
        self._live: defaultdict[int, int] = defaultdict(int)

    def run(self) -> None:
        self._read_packs()
        self._check_files()
        self._check_live()
        self._check_values()
        self._check_dirty_index()
        self._check_truncations()
        self._check_counters()

    def _error(
        self,
        kind: str,
        message: str,
        subject: dict[str, object],
        severity: Severity = Severity.ERROR,
    ) -> Finding:
        return self._report.add(Layer.EXTENTS, kind, message, subject, severity)

    # packs

    def _read_packs(self) -> None:
        ids: dict[bytes, int] = {}

        def pack_of(_: bytes, row: bytes) -> PackRow:
            return PackRow.decode(row)

        for key, pack in decoded(self._view, Table.PACKS, 8, pack_of):
            number = split_u64(key)
            self._packs[number] = pack
            self._report.checked["pack rows"] += 1
            name = pack.pack_id.hex()
            subject: dict[str, object] = {"pack": name, "number": number}
            other = ids.setdefault(pack.pack_id, number)
            if other != number:
                self._error("pack-twice", f"pack {name}: has two rows, {other} and {number}", subject)
            size, body, n = pack.shard_size, pack.body_length, len(pack.placement)
            if (
                pack.kind not in (PackKind.DATA, PackKind.METADATA)
                or not size
                or body % size
                or not 1 <= body // size <= n <= 256
            ):
                self._error("pack-sizes", f"pack {name} (row {number}): its kind or sizes cannot be", subject)
            stored = [place for place in pack.placement if place >= 0]
            if pack.state & PackState.FULL and len(stored) < n:
                self._error(
                    "pack-full",
                    f"pack {name}: counts as full with {len(stored)} of {n} shards stored",
                    subject,
                )
            if len(set(stored)) < len(stored):
                self._error(
                    "pack-crowded",
                    f"pack {name}: several of its shards lie on one backend; losing that loses them all",
                    subject,
                    Severity.WARNING,
                )

    def _check_live(self) -> None:
        for number, pack in self._packs.items():
            live = self._live.get(number, 0)
            if pack.kind != PackKind.DATA or pack.live == live:
                continue
            finding = self._error(
                "pack-live",
                f"pack {pack.pack_id.hex()}: says {pack.live} live bytes, its extents have {live}",
                {"pack": pack.pack_id.hex(), "number": number},
            )
            if self._mends is not None:
                row = replace(pack, live=live).encode()
                self._mends.add((finding,), (Table.PACKS, u64(number), row))

    # files

    def _check_files(self) -> None:
        inodes = _Ahead(self._inodes())
        blocks = _Ahead(self._blocks())
        extents = _Ahead(self._extents())
        while True:
            heads = [ahead.key for ahead in (inodes, blocks, extents) if ahead.key is not None]
            if not heads:
                return
            number = min(heads)
            inode = next(inodes.take(number), None)
            self._check_file(number, inode, blocks.take(number), extents.take(number))

    def _inodes(self) -> Iterator[tuple[int, Inode]]:
        for key, inode in decoded(self._view, Table.INODES, 8, decode_inode):
            yield split_u64(key), inode

    def _blocks(self) -> Iterator[tuple[int, tuple[int, BlockRow]]]:
        def block_of(_: bytes, row: bytes) -> BlockRow:
            return BlockRow.decode(row)

        for key, row in decoded(self._view, Table.BLOCKS, 16, block_of):
            inode, number = split_u64_pair(key)
            yield inode, (number, row)

    def _extents(self) -> Iterator[tuple[int, ExtentRow]]:
        def extent_of(key: bytes, row: bytes) -> ExtentRow:
            return ExtentRow.decode(int.from_bytes(key[8:], "big"), row)

        for key, row in decoded(self._view, Table.EXTENTS, 16, extent_of):
            yield split_u64(key), row

    def _check_file(
        self,
        number: int,
        inode: Inode | None,
        blocks: Iterator[tuple[int, BlockRow]],
        extents: Iterator[ExtentRow],
    ) -> None:
        pending = truncations_of(self._view, number)
        size = inode.size if inode is not None else 0
        end = -(-size // PAGE)
        furthest = -1

        def watched(rows: Iterator[ExtentRow]) -> Iterator[ExtentRow]:
            nonlocal furthest
            for row in self._checked_extents(number, rows):
                last = row.first + row.pages - 1
                if not is_cut(pending, last, row.write_number):
                    furthest = max(furthest, last)
                yield row

        held = FileExtents(watched(extents))
        resident_only = 0
        for block, row in blocks:
            self._report.checked["blocks"] += 1
            only, last = self._pages.check(inode, number, block, row, held.holds, pending)
            resident_only += only
            furthest = max(furthest, last)
        held.drain()
        if inode is None:
            pages = resident_only + held.pages
            if pages and not pending:
                self._error(
                    "data-of-nothing",
                    f"inode {number}: is gone but has {pages} pages, and nothing removes them",
                    {"inode": number},
                )
            return
        if not stat.S_ISREG(inode.mode):
            if resident_only or held.pages:
                self._error("data-of-no-file", f"inode {number}: is no file but has data", {"inode": number})
            return
        if furthest >= end:
            self._error(
                "past-end",
                f"inode {number}: has data past its end of {size} bytes, up to page {furthest}; "
                "they would come back if it grew",
                {"inode": number, "page": furthest},
            )
        allocated = held.pages + resident_only
        if inode.allocated != allocated:
            finding = self._error(
                "allocated",
                f"inode {number}: says {inode.allocated} allocated pages, has {allocated}",
                {"inode": number},
            )
            if self._mends is not None:
                right = replace(inode, allocated=allocated).encode()
                self._mends.add((finding,), (Table.INODES, u64(number), right))

    def _checked_extents(self, inode: int, rows: Iterator[ExtentRow]) -> Iterator[ExtentRow]:
        end = 0
        for row in rows:
            self._report.checked["extents"] += 1
            subject: dict[str, object] = {"inode": inode, "page": row.first, "number": row.pack}
            where = f"inode {inode}, extent at page {row.first}"
            sealed_pages = row.plain_length // PAGE
            if (
                not row.pages
                or row.plain_length % PAGE
                or row.skip > row.first
                or row.skip + row.pages > sealed_pages
                or row.codec not in _CODECS
            ):
                self._error("extent-shape", f"{where}: its numbers cannot be: {row}", subject)
            if row.first < end:
                self._error("extent-overlap", f"{where}: overlaps the one before it", subject)
            end = max(end, row.first + row.pages)
            pack = self._packs.get(row.pack)
            if pack is None:
                if self._view.get(Table.PACKS, u64(row.pack)) is None:
                    self._error(
                        "extent-pack",
                        f"{where}: lies in pack number {row.pack}, which is unknown; its {row.pages} pages "
                        "can only be read while they are local",
                        subject,
                    )
            elif pack.kind != PackKind.DATA or row.offset + row.sealed_length > pack.body_length:
                self._error("extent-pack", f"{where}: does not fit into pack {pack.pack_id.hex()}", subject)
            self._live[row.pack] += row.pages * PAGE
            yield row

    # the rest

    def _check_values(self) -> None:
        for key, _ in self._view.scan(Table.VALUES, b"", None):
            if len(key) == 16 and self._view.get(Table.BLOCKS, key) is None:
                inode, block = split_u64_pair(key)
                finding = self._error(
                    "value-without-block",
                    f"inode {inode}, block {block}: has bytes of which nothing is recorded",
                    {"inode": inode, "block": block},
                )
                if self._mends is not None:
                    self._mends.add((finding,), (Table.VALUES, key, None))

    def _check_dirty_index(self) -> None:
        for key, row in self._block_rows():
            if row.dirty and self._view.get(Table.DIRTY, key) is None:
                inode, block = split_u64_pair(key)
                finding = self._error(
                    "dirty-index",
                    f"inode {inode}, block {block}: is dirty and not indexed: it would never be uploaded",
                    {"inode": inode, "block": block},
                )
                self._mend_index(finding, key, b"")
        for key, _ in self._view.scan(Table.DIRTY, b"", None):
            if len(key) != 16:
                continue
            stored = self._view.get(Table.BLOCKS, key)
            try:
                dirty = stored is not None and bool(BlockRow.decode(stored).dirty)
            except Corrupt:
                continue
            if not dirty:
                inode, block = split_u64_pair(key)
                finding = self._error(
                    "dirty-index",
                    f"inode {inode}, block {block}: is indexed as dirty and is not",
                    {"inode": inode, "block": block},
                )
                self._mend_index(finding, key, None)

    def _mend_index(self, finding: Finding, key: bytes, value: bytes | None) -> None:
        """Where the block's row is mended, its index is mended with it."""
        if self._mends is not None:
            changes = () if key in self._pages.touched else ((Table.DIRTY, key, value),)
            self._mends.add((finding,), *changes)

    def _block_rows(self) -> Iterator[tuple[bytes, BlockRow]]:
        for inode, (number, row) in self._blocks():
            yield u64_pair(inode, number), row

    def _check_truncations(self) -> None:
        for key, _ in self._view.scan(Table.TRUNCATIONS, b"", None):
            if len(key) == 8:
                self._report.checked["pending truncations"] += 1

    def _check_counters(self) -> None:
        last_inode = next(self._view.scan(Table.INODES, b"", None, reverse=True), None)
        highest = {
            NEXT_INODE: split_u64(last_inode[0]) if last_inode and len(last_inode[0]) == 8 else 0,
            NEXT_PACK: max(self._packs, default=0),
        }
        for name, least in highest.items():
            row = self._view.get(Table.COUNTERS, name)
            value = read_plain_u64(bytes(row)) if row is not None and len(row) == 8 else 0
            if value < least:
                finding = self._error(
                    "counter",
                    f"counter {name.decode()}: stands at {value}, but {least} is in use: it would come again",
                    {"counter": name.decode()},
                )
                if self._mends is not None:
                    self._mends.add((finding,), (Table.COUNTERS, name, plain_u64(least)))


class _Ahead(Generic[T]):
    """Rows in order of their inodes, of which the next inode is known: `key`, None at the end."""

    def __init__(self, rows: Iterator[tuple[int, T]]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    @property
    def key(self) -> int | None:
        """The inode of the next row."""
        return None if self._next is None else self._next[0]

    def take(self, inode: int) -> Iterator[T]:
        """The rows of this inode, if it is the next."""
        while self._next is not None and self._next[0] == inode:
            value = self._next[1]
            self._next = next(self._rows, None)
            yield value
