"""Layer 3, the local pages of a block: bytes against checksums, states against extents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from xxhash import xxh3_64_intdigest

from qsfs.fsck.mends import Mends
from qsfs.fsck.report import Finding, Layer, Report
from qsfs.store.environment import ReadView
from qsfs.store.schema import (
    BLOCK_PAGES,
    PAGE,
    VALUE_SIZE,
    BlockRow,
    Inode,
    InodeFlag,
    Table,
    Truncation,
    is_cut,
    u64_pair,
)


class PageCheck:
    """Checks blocks one by one; with `mends`, collects what can be put right."""

    def __init__(self, view: ReadView, report: Report, mends: Mends | None) -> None:
        self._view = view
        self._report = report
        self._mends = mends
        self.touched: set[bytes] = set()
        """Keys of the blocks whose rows will be mended, and with them their index."""

    def check(
        self,
        inode: Inode | None,
        number: int,
        block: int,
        row: BlockRow,
        held: Callable[[int], bool],
        pending: tuple[Truncation, ...],
    ) -> tuple[int, int]:
        """Checks block `block` of inode `number`.

        `held` says whether an extent holds a page; it is asked in ascending order.  Returns how many
        resident pages no extent holds, and the last page that is no hole (-1: none).
        """
        value = self._view.get(Table.VALUES, u64_pair(number, block))
        local_only = inode is not None and bool(inode.flags & InodeFlag.LOCAL_ONLY)
        alone, last = 0, -1
        drop = mark = 0
        findings: list[Finding] = []
        for index in range(BLOCK_PAGES):
            bit = 1 << index
            if not row.resident & bit:
                continue
            page = block * BLOCK_PAGES + index
            remote = held(page)
            alone += not remote
            if is_cut(pending, page, row.writes[index]):
                continue
            last = page
            self._report.checked["pages"] += 1
            dirty = bool(row.dirty & bit)
            problem = _problem(value, row, index)
            if problem:
                found = self._damage(number, page, problem, mendable=remote and not dirty)
                if remote and not dirty:
                    drop |= bit
                    findings.append(found)
            elif not dirty and not remote and not local_only and inode is not None:
                mark |= bit
                findings.append(
                    self._report.add(
                        Layer.EXTENTS,
                        "clean-nowhere",
                        f"inode {number}, page {page}: counts as uploaded, but it lies in no pack, only here",
                        {"inode": number, "page": page},
                    )
                )
        if self._mends is not None and findings:
            self.touched.add(u64_pair(number, block))
            self._mend(self._mends, number, block, row, drop, mark, findings)
        return alone, last

    def _damage(self, inode: int, page: int, problem: str, *, mendable: bool) -> Finding:
        if mendable:
            return self._report.add(
                Layer.EXTENTS,
                "page-rot",
                f"inode {inode}, page {page}: {problem}; a pack holds it: --repair drops it here, and it is "
                "fetched again",
                {"inode": inode, "page": page},
            )
        return self._report.add(
            Layer.EXTENTS,
            "page-lost",
            f"inode {inode}, page {page}: {problem}, and no pack holds what it was; reading it is an error",
            {"inode": inode, "page": page},
        )

    @staticmethod
    def _mend(
        mends: Mends, inode: int, block: int, row: BlockRow, drop: int, mark: int, findings: list[Finding]
    ) -> None:
        key = u64_pair(inode, block)
        new = replace(row, resident=row.resident & ~drop, dirty=row.dirty | mark)
        if not new.resident:
            mends.add(
                tuple(findings),
                (Table.BLOCKS, key, None),
                (Table.VALUES, key, None),
                (Table.DIRTY, key, None),
            )
            return
        index = b"" if new.dirty else None
        mends.add(tuple(findings), (Table.BLOCKS, key, new.encode()), (Table.DIRTY, key, index))


def _problem(value: memoryview | None, row: BlockRow, index: int) -> str | None:
    if value is None or len(value) != VALUE_SIZE:
        return "its local bytes are gone"
    page: bytes | memoryview = value[index * PAGE : (index + 1) * PAGE]
    if index == BLOCK_PAGES - 1:
        page = bytes(page) + row.tail
    if xxh3_64_intdigest(page) != row.sums[index]:
        return "its local bytes fail their checksum"
    return None
