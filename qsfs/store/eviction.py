"""Eviction: which clean pages leave the cache, in about the order in which they were last used.

A hand goes round the block rows.  It takes clean pages whose pack was looked at a second time and
passes over what was used since its last rounds; dirty, pinned and local-only pages never go.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsfs.store.group import block_key
from qsfs.store.schema import (
    BLOCK_PAGES,
    PAGE,
    InodeFlag,
    PackRow,
    PackState,
    Table,
    split_u64_pair,
    u64,
)
from qsfs.store.store import Store

_KEPT = InodeFlag.LOCAL_ONLY | InodeFlag.PINNED


@dataclass(frozen=True, slots=True)
class Evicted:
    """What one step did: pages dropped, rows looked at, and whether the hand came round."""

    pages: int
    looked_at: int
    came_round: bool


class Evictor:
    """The hand of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hand = b""

    def step(self, rows: int, pages: int, *, recent_too: bool, written_will_do: bool) -> Evicted:
        """Looks at most at `rows` blocks and drops at most about `pages` pages.

        `recent_too` takes what was used lately as well; `written_will_do` takes pages whose pack is
        written but cannot become full.
        """
        store = self._store
        kept: dict[int, bool] = {}
        safe: dict[int, bool] = {}
        dropped = looked = 0
        for key, _ in store.layers.view.scan(Table.BLOCKS, self._hand, None):
            number, block = split_u64_pair(key)
            self._hand = key + b"\0"
            looked += 1
            if number not in kept:
                inode = store.inode(number)
                kept[number] = inode is None or bool(inode.flags & _KEPT)
            if not kept[number] and (recent_too or block_key(number, block) not in store.blocks.used):
                dropped += self._evict(number, block, safe, written_will_do)
            if looked >= rows or dropped >= pages:
                return Evicted(dropped, looked, False)
        self._hand = b""
        store.blocks.used.turn()
        return Evicted(dropped, looked, True)

    def _evict(self, number: int, block: int, safe: dict[int, bool], written_will_do: bool) -> int:
        store = self._store
        state = store.blocks.state(number, block)
        inode = store.inode(number)
        if state is None or inode is None:
            return 0
        candidates = state.resident & ~state.dirty
        bits = 0
        for index in range(BLOCK_PAGES):
            if not candidates & 1 << index:
                continue
            extent = store.blocks.remote_extent(number, block * BLOCK_PAGES + index)
            if extent is None:
                continue
            if extent.pack not in safe:
                safe[extent.pack] = self._is_safe(extent.pack, written_will_do)
            if safe[extent.pack]:
                bits |= 1 << index
        return store.blocks.evict(inode, block, bits) if bits else 0

    def _is_safe(self, pack: int, written_will_do: bool) -> bool:
        row = self._store.get(Table.PACKS, u64(pack))
        if row is None:
            return False
        state = PackRow.decode(row).state
        return bool(state & PackState.LOOKED) and (bool(state & PackState.FULL) or written_will_do)


def bytes_of(evicted: Evicted) -> int:
    """Bytes of page data that a step dropped."""
    return evicted.pages * PAGE
