"""What a mount answers to a drill: whether its local pages are those that were read from the backends.

A drill sends, for each extent that it read, the checksums of its pages.  A local page with the same
bytes is the same; other bytes are wrong where this mount has the page from that very extent, unchanged,
and a later version elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import trio
from xxhash import xxh3_64_intdigest

from qsfs.errors import Corrupt, QsfsError
from qsfs.format.head import HeadRef
from qsfs.health.drill_rows import sum_of
from qsfs.store.schema import BLOCK_PAGES, PackRow, Table, split_u64, u64
from qsfs.store.store import Store

MOST_EXTENTS = 256
"""Extents in one request."""
MOST_ROWS = 1024
"""Rows in one request."""
_MOST_PAGES = 1 << 12
_ROWS_A_STEP = 32


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


async def compare_rows(
    store: Store, base: HeadRef | None, generation: HeadRef, rows: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """Compares rows of names and attributes, each a table, a key in hex and a checksum in hex.

    What is not the same counts as `changed`, or is named in `differ` where it cannot have changed: `base`, the
    newest generation of this mount, is the drill's, and no change mark says that the row changed since.
    """
    same = changed = 0
    differ: list[str] = []
    if len(rows) > MOST_ROWS:
        raise QsfsError("a drill's request is too large")
    for index, (number, text, wanted) in enumerate(rows):
        table, key = Table(number), bytes.fromhex(text)
        row = _row(store, table, key)
        if row is not None and sum_of(table, key, row) == int(wanted, 16):
            same += 1
        elif base != generation or _is_marked(store, table, key):
            changed += 1
        else:
            differ.append(f"{table.name.lower()}, key {text}: {'missing' if row is None else 'another row'}")
        if index % _ROWS_A_STEP == _ROWS_A_STEP - 1:
            await trio.lowlevel.checkpoint()
    return {"same": same, "changed": changed, "differ": differ}


def _row(store: Store, table: Table, key: bytes) -> bytes | None:
    if table is not Table.INODES:
        return store.get(table, key)
    inode = store.inode(split_u64(key))
    return None if inode is None else inode.encode()


def _is_marked(store: Store, table: Table, key: bytes) -> bool:
    for group in (store.layers.open, store.layers.committing):
        if group is not None and (
            key in group.rows[table] or (table is Table.INODES and split_u64(key) in group.inodes)
        ):
            return True
    return store.layers.view.get(Table.CHANGED, bytes((table,)) + key) is not None


def _compare_page(
    store: Store, inode: int, page: int, pack: bytes, ordinal: int, wanted: int
) -> tuple[str, str]:
    """Which count a page goes to, or why it differs."""
    row = store.blocks.remote_extent(inode, page)
    number, index = divmod(page, BLOCK_PAGES)
    state = store.blocks.state(inode, number)
    if state is None or not state.resident & 1 << index:
        return ("changed" if row is None else "remote"), ""
    try:
        data = store.blocks.pages(inode, page, 1)[0]
    except Corrupt as error:
        return "", str(error)
    if data is None:
        return "changed", ""
    # A cut and an upload ahead of it may have put the same page into two packs.
    if xxh3_64_intdigest(data) == wanted:
        return "same", ""
    if row is None or row.ordinal != ordinal or _pack_id(store, row.pack) != pack or state.dirty & 1 << index:
        return "changed", ""
    return "", "other bytes"


def _pack_id(store: Store, number: int) -> bytes | None:
    row = store.get(Table.PACKS, u64(number))
    return None if row is None else PackRow.decode(row).pack_id
