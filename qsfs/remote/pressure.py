"""Room in the cache: has pre-copy hurry where it is short, so that pages turn clean and may go."""

from __future__ import annotations

import logging
from collections.abc import Callable

from qsfs.remote.context import FlushContext
from qsfs.remote.ledger import Ledger
from qsfs.remote.precopy import PreCopier
from qsfs.store.schema import BLOCK_SIZE, Table
from qsfs.store.store import Store

_log = logging.getLogger(__name__)


def more_will_be_evictable(store: Store, ledger: Ledger) -> bool:
    """Whether pages that cannot be evicted yet become so with uploads, second looks and commits alone.

    What is not committed counts: data turn dirty with it, and eviction tries again once it knows of packs.
    """
    layers = store.layers
    if layers.view.count(Table.DIRTY) or ledger.looks_help:
        return True
    groups = (layers.open, layers.committing)
    return any(group.filled_blocks or group.rows[Table.PACKS] for group in groups if group is not None)


def room_may_come(store: Store, ledger: Ledger, *, enough_backends: bool, exhausted: bool) -> bool:
    """Whether who waits for room may get it by evictions to come.

    Pages in packs that are only written need nothing but time, until they are `exhausted` too; all others need
    `enough_backends`.
    """
    if ledger.incomplete and not exhausted:
        return True
    return enough_backends and more_will_be_evictable(store, ledger)


class Pressure:
    """Presses the pre-copier of one mount.

    `short` says whether the cache holds more than its high watermark; `busy` whether pre-copy is pressed for
    something else, which is then left to it.
    """

    def __init__(
        self,
        context: FlushContext,
        precopier: PreCopier,
        *,
        short: Callable[[], bool],
        busy: Callable[[], bool],
    ) -> None:
        self._context = context
        self._precopier = precopier
        self._short = short
        self._busy = busy
        self._alarmed = False

    async def see_to_room(self) -> None:
        """Has pre-copy make room where that is short, and says what that costs.  Raises `CacheError`."""
        short = self._short()
        if short and self._dirty_estimate >= self._worth_freeing:
            self._precopier.press("the cache is short of room", orphans_too=True)
        elif not self._busy():
            self._precopier.press("")
        self._alarm(short)
        if self._precopier.garbage:
            garbage, self._precopier.garbage = self._precopier.garbage, []
            await self._context.in_thread(lambda: self._context.spool.add_abandoned(garbage))

    @property
    def _dirty_estimate(self) -> int:
        """Bytes of committed blocks that have dirty pages."""
        return self._context.store.layers.view.count(Table.DIRTY) * BLOCK_SIZE

    @property
    def _worth_freeing(self) -> int:
        """Dirty bytes whose upload would let eviction get on."""
        limits = self._context.store.limits
        return limits.high_bytes - limits.low_bytes

    def _alarm(self, short: bool) -> None:
        """Says once that pages may go whose packs cannot become full."""
        if short and self._context.ledger.incomplete and not self._alarmed:
            _log.warning(
                "the cache is short of room and %d packs are not full: pages may be evicted whose packs have "
                "fewer shards than they should; bring the missing backends back",
                len(self._context.ledger.incomplete),
            )
        self._alarmed = short and bool(self._context.ledger.incomplete)
