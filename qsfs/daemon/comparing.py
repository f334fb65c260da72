"""What a mount answers to a drill: whether its local pages are those that were read from the backends.

A drill sends, for each extent that it read, the checksums of its pages.  A page is compared where
this mount still has it from that very extent and holds its bytes; everything else is said as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import trio
from xxhash import xxh3_64_intdigest

from qsfs.errors import Corrupt, QsfsError
from qsfs.store.schema import BLOCK_PAGES, PackRow, Table, u64
from qsfs.store.store import Store

MOST_EXTENTS = 256
"""Extents in one request."""
_MOST_PAGES = 1 << 12


async def compare(store: Store, extents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Compares extents, one after the other, with other requests in between.

    Each has `inode`, `first`, `pack` (id in hex), `ordinal` and `sums` (hex).  The answer counts pages:
    `same`, `remote` (not local here), `changed` (another version, or gone), and names in `differ` those whose
    bytes differ.  Raises `QsfsError` for a request that is none.
    """
    counts = {"same": 0, "remote": 0, "changed": 0}
    differ: list[dict[str, Any]] = []
    for number, extent in enumerate(extents):
        try:
            inode, first, ordinal = int(extent["inode"]), int(extent["first"]), int(extent["ordinal"])
            pack, sums = bytes.fromhex(extent["pack"]), [int(text, 16) for text in extent["sums"]]
        except (KeyError, TypeError, ValueError):
            raise QsfsError("a drill's request cannot be read: it comes from another version of qsfs") from None
        if number >= MOST_EXTENTS or len(sums) > _MOST_PAGES:
            raise QsfsError("a drill's request is too large")
        for index, wanted in enumerate(sums):
            what, why = _compare_page(store, inode, first + index, pack, ordinal, wanted)
            if why:
                differ.append({"inode": inode, "page": first + index, "why": why})
            else:
                counts[what] += 1
            if index % BLOCK_PAGES == BLOCK_PAGES - 1:
                await trio.lowlevel.checkpoint()
    return {**counts, "differ": differ}


def _compare_page(
    store: Store, inode: int, page: int, pack: bytes, ordinal: int, wanted: int
) -> tuple[str, str]:
    """Which count a page goes to, or why it differs."""
    row = store.blocks.remote_extent(inode, page)
    if row is None or row.ordinal != ordinal or _pack_id(store, row.pack) != pack:
        return "changed", ""
    number, index = divmod(page, BLOCK_PAGES)
    state = store.blocks.state(inode, number)
    if state is None or not state.resident & 1 << index:
        return "remote", ""
    if state.dirty & 1 << index:
        return "changed", ""
    try:
        data = store.blocks.pages(inode, page, 1)[0]
    except Corrupt as error:
        return "", str(error)
    if data is None:
        return "remote", ""
    return ("same", "") if xxh3_64_intdigest(data) == wanted else ("", "other bytes")


def _pack_id(store: Store, number: int) -> bytes | None:
    row = store.get(Table.PACKS, u64(number))
    return None if row is None else PackRow.decode(row).pack_id
