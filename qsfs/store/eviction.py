"""Eviction: which clean pages leave the cache, in about the order in which they were last used.

A hand goes round the block rows.  It takes blocks of clean pages whose packs were looked at a second
time and passes over what was used since its last rounds, and longest over what applications read while they
start; dirty, pinned and local-only pages never go.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsfs.store.block import block_key
from qsfs.store.schema import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    InodeFlag,
    PackRow,
    PackState,
    Table,
    split_u64_pair,
    u64,
)
from qsfs.store.store import Store

_KEPT = InodeFlag.LOCAL_ONLY | InodeFlag.PINNED | InodeFlag.PINNED_BY_HAND


@dataclass(frozen=True, slots=True)
class Evicted:
    """What one step did: blocks dropped, rows looked at, and whether the hand came round.

    `later_pages` are clean and on the backends, but must stay for now: their pack was not looked at
    again, or a page of their block is dirty.
    """

    blocks: int
    later_pages: int
    looked_at: int
    came_round: bool

    @property
    def bytes(self) -> int:
        """Bytes of the dropped blocks."""
        return self.blocks * BLOCK_SIZE


class Evictor:
    """The hand of one store.

    `all_remote`: of a read-only mount, which has no data of its own: whatever is clean may go at any time.
    """

    def __init__(self, store: Store, *, all_remote: bool = False) -> None:
        self._store = store
        self._all_remote = all_remote
        self._hand = b""

    def step(
        self, rows: int, blocks: int, *, recent_too: bool, written_will_do: bool, start_too: bool = False
    ) -> Evicted:
        """Looks at most at `rows` blocks and drops at most `blocks` of them.

        A block goes as a whole or stays: what is left of one takes as much room as all of it.
        `recent_too` takes what was used lately as well, `start_too` also what applications read while they start;
        `written_will_do` takes pages whose pack is written but cannot become full.
        """
        store = self._store
        start = None if start_too else store.start
        kept: dict[int, bool] = {}
        safe: dict[int, bool] = {}
        dropped = later = looked = 0
        for key, _ in store.layers.view.scan(Table.BLOCKS, self._hand, None):
            number, block = split_u64_pair(key)
            self._hand = key + b"\0"
            looked += 1
            if number not in kept:
                inode = store.inode(number)
                kept[number] = inode is None or (not self._all_remote and bool(inode.flags & _KEPT))
            if (
                not kept[number]
                and (recent_too or block_key(number, block) not in store.blocks.reader.used)
                and (start is None or not start.keeps(number, block))
            ):
                gone, held = self._evict(number, block, safe, written_will_do)
                dropped += gone
                later += held
            if looked >= rows or dropped >= blocks:
                return Evicted(dropped, later, looked, False)
        self._hand = b""
        store.blocks.reader.used.turn()
        return Evicted(dropped, later, looked, True)

    def _evict(
        self, number: int, block: int, safe: dict[int, bool], written_will_do: bool
    ) -> tuple[bool, int]:
        """Drops a block if all of its pages may go: whether it did, and the pages that may go later."""
        store = self._store
        state = store.blocks.state(number, block)
        inode = store.inode(number)
        if state is None or inode is None:
            return False, 0
        resident, held, all_safe = state.resident, 0, True
        for index in range(BLOCK_PAGES):
            if not resident & 1 << index:
                continue
            extent = None
            if not state.dirty & 1 << index:
                extent = store.blocks.remote_extent(number, block * BLOCK_PAGES + index)
            if extent is None:
                all_safe = False
                continue
            held += 1
            if extent.pack not in safe:
                safe[extent.pack] = self._is_safe(extent.pack, written_will_do)
            all_safe = all_safe and safe[extent.pack]
        if all_safe and store.blocks.evict(inode, block, resident):
            return True, 0
        return False, held

    def _is_safe(self, pack: int, written_will_do: bool) -> bool:
        if self._all_remote:
            return True
        row = self._store.get(Table.PACKS, u64(pack))
        if row is None:
            return False
        found = PackRow.decode(row)
        if not found.state & PackState.LOOKED or not found.readable_on(self._store.backends):
            return False
        return bool(found.state & PackState.FULL) or (written_will_do and found.written)
