"""Dropping the clean pages of a file that somebody names, by the rules of eviction, and why others stay."""

from __future__ import annotations

from collections import Counter
from enum import Enum

from qsfs.store.schema import BLOCK_PAGES, Inode, InodeFlag, PackRow, PackState, Table, u64
from qsfs.store.store import Store
from qsfs.store.survey import next_blocks


class Stays(Enum):
    """Why a page stays in the cache."""

    DIRTY = "dirty"
    LOCAL_ONLY = "local_only"
    PINNED = "pinned"
    NOT_FULL = "not_full"
    NOT_LOOKED = "not_looked"
    SHARES_BLOCK = "shares_block"


class Dropper:
    """Drops whole blocks, as eviction does; `dropped` and `stays` count pages."""

    def __init__(self, store: Store) -> None:
        self.dropped = 0
        self.stays: Counter[Stays] = Counter()
        self._store = store

    def step(self, inode: Inode, start: int, most: int) -> int | None:
        """Looks at some blocks of a file from `start` on; returns where to go on (None: that was all)."""
        numbers, behind = next_blocks(self._store, inode.number, start, most)
        known: dict[int, Stays | None] = {}
        for number in numbers:
            self._drop(inode, number, known)
        return behind

    def _drop(self, inode: Inode, number: int, known: dict[int, Stays | None]) -> None:
        state = self._store.blocks.state(inode.number, number)
        if state is None or not state.resident:
            return
        reasons = [
            self._why(inode, number * BLOCK_PAGES + i, bool(state.dirty & 1 << i), known)
            for i in range(BLOCK_PAGES)
            if state.resident & 1 << i
        ]
        if not any(reasons):
            self.dropped += self._store.blocks.evict(inode, number, state.resident)
            return
        self.stays.update(reason or Stays.SHARES_BLOCK for reason in reasons)

    def _why(self, inode: Inode, page: int, dirty: bool, known: dict[int, Stays | None]) -> Stays | None:
        if inode.flags & InodeFlag.LOCAL_ONLY:
            return Stays.LOCAL_ONLY
        if dirty:
            return Stays.DIRTY
        if inode.flags & (InodeFlag.PINNED | InodeFlag.PINNED_BY_HAND):
            return Stays.PINNED
        extent = self._store.blocks.remote_extent(inode.number, page)
        if extent is None:
            return Stays.DIRTY
        if extent.pack not in known:
            known[extent.pack] = self._why_pack(extent.pack)
        return known[extent.pack]

    def _why_pack(self, number: int) -> Stays | None:
        encoded = self._store.get(Table.PACKS, u64(number))
        row = None if encoded is None else PackRow.decode(encoded)
        if row is None or not row.state & PackState.FULL or not row.readable_on(self._store.backends):
            return Stays.NOT_FULL
        return None if row.state & PackState.LOOKED else Stays.NOT_LOOKED
