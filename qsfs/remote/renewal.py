"""Keeping what heads list short: merges of deltas, and ranges that are read anew, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

import trio

from qsfs.errors import QsfsError
from qsfs.remote.chain import Merge, Renewal
from qsfs.remote.context import FlushContext
from qsfs.remote.generation import Generations
from qsfs.remote.merge import MergeUpload
from qsfs.remote.metadata import RefreshUpload, range_bytes
from qsfs.remote.shards import ShardReader

_log = logging.getLogger(__name__)


class Renewer:
    """Begins a renewal after each generation that wants one; what fails is tried again after another."""

    def __init__(
        self, context: FlushContext, reader: ShardReader, ratio: float, lost: Callable[[], Set[bytes]] = frozenset
    ) -> None:
        """`ratio`: how much of the snapshot deltas may weigh before ranges are read anew.

        `lost` gives the ids of metadata packs of which backends have too few shards: what they held is read anew.
        """
        self._context = context
        self._reader = reader
        self._ratio = ratio
        self._lost = lost
        self._merge_failed = False
        self.problem = ""

    def begin(self, generations: Generations, nursery: trio.Nursery) -> None:
        """Starts what is due in `nursery`, unless a renewal is under way or waits to be listed."""
        if generations.renewal is not None:
            return
        chain, lost = generations.chain, self._lost()
        refresh = chain.next_refresh(self._ratio, range_bytes(self._context.sealer), lost)
        merge = None if chain.needing(lost) else chain.next_merge()
        # Deltas that cannot be read are replaced with what they are needed for.
        renewal = (refresh or merge) if self._merge_failed else (merge or refresh)
        if renewal is not None:
            generations.renewal = renewal
            nursery.start_soon(self._renew, generations, renewal)

    async def _renew(self, generations: Generations, renewal: Renewal) -> None:
        try:
            if isinstance(renewal, Merge):
                self._merge_failed = True
                await MergeUpload(self._context, renewal, self._reader).run()
                self._merge_failed = False
            else:
                await RefreshUpload(self._context, renewal).run()
        except QsfsError as error:
            if str(error) != self.problem:
                _log.warning("metadata were not written anew, which is tried again: %s", error)
            self.problem = str(error)
            generations.renewal = None
        else:
            self.problem = ""
