"""Rewriting packs of which little lives, and small ones: what lives is marked dirty, and flushing packs it anew.

The old pack is dead once the new one is recorded, and is deleted as every dead one.  `rewrite_choice` says which packs
are worth it, `anew` marks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from qsfs.errors import BackendError, Corrupt, DataLost, FormatMismatch
from qsfs.format.extent import ExtentEntry
from qsfs.remote.anew import Anew
from qsfs.remote.context import FlushContext
from qsfs.remote.dead_packs import read_index
from qsfs.remote.rewrite_choice import Candidates, Choice
from qsfs.remote.shards import ShardReader
from qsfs.remote.stored import StoredPack
from qsfs.store.packs import pack_row
from qsfs.store.schema import PAGE

_log = logging.getLogger(__name__)

MARKED_BYTES = 32 << 20
"""Bytes of pages that are on their way at a time: they cannot be evicted, and the next cut has to take them."""
_LONGEST_SECONDS = 600.0
_HEADS = 2
"""Heads after which nothing that was marked before is still to be uploaded: the cut of the first may be under way."""
_READ_SECONDS = 60.0
_A_STEP = 64
"""Extents between two looks at whether the open group is full."""


@dataclass(frozen=True, slots=True)
class _Marked:
    """A pack whose pages were marked: how many bytes, until when they are waited for, and until which head."""

    choice: Choice
    size: int
    until: float
    heads: int


class Rewriter:
    """Rewrites packs, a few at a time, while the cache has room and enough backends answer.

    `share` is the part of a pack's size below which its live bytes make it worth that, at most a half; 0: nothing is
    rewritten.  `most_bytes` bounds what is on its way.
    """

    def __init__(
        self,
        context: FlushContext,
        reader: ShardReader,
        *,
        share: float,
        short_of_room: Callable[[], bool],
        most_bytes: int,
    ) -> None:
        self.rewritten_packs = 0
        self.rewritten_bytes = 0
        self._context = context
        self._reader = reader
        self._anew = Anew(context, reader)
        self._share = share
        self._short_of_room = short_of_room
        limits = context.store.limits
        self._most_bytes = min(most_bytes, MARKED_BYTES, (limits.high_bytes - limits.low_bytes) // 2)
        self._marked: dict[int, _Marked] = {}
        self._heads = 0
        self._candidates = Candidates(
            lambda number: pack_row(context.store, number), pack_bytes=context.sealer.pack_bytes, share=share
        )

    def take_over(self, thin: Iterable[int]) -> None:
        """Takes in the packs of which little lived when the mount began."""
        self._candidates.thinned(dict.fromkeys(thin, 1.0), self._context.clock.monotonic())

    def published(self) -> None:
        """Takes note that a head was published."""
        self._heads += 1

    def report(self) -> dict[str, int]:
        """How many packs are thin and small, how many were rewritten, and the bytes of their pages."""
        return {
            "thin_packs": self._candidates.thin,
            "small_packs": self._candidates.small,
            "rewritten_packs": self.rewritten_packs,
            "rewritten_bytes": self.rewritten_bytes,
        }

    async def work(self) -> None:
        """Begins with the next packs, unless enough is on its way."""
        context = self._context
        self._take_in()
        self._settle()
        if not self._share or self._short_of_room() or not context.uploader.enough_backends():
            return
        room = self._most_bytes - sum(marked.size for marked in self._marked.values())
        if room <= 0:
            return
        now, wall_ns = context.clock.monotonic(), context.clock.time_ns()
        for choice in self._candidates.choose(room, now, wall_ns, one_at_least=not self._marked):
            await self._rewrite(choice)

    def _take_in(self) -> None:
        extents, ledger = self._context.store.extents, self._context.ledger
        self._candidates.thinned(extents.thinned, self._context.clock.monotonic())
        extents.thinned.clear()
        self._candidates.grew(sorted(ledger.small))
        ledger.small.clear()
        self._candidates.recorded(extents.recorded_bytes)

    def _settle(self) -> None:
        """Lets go of packs whose pages have all been uploaded, and of those that took too long."""
        now = self._context.clock.monotonic()
        for number, marked in list(self._marked.items()):
            row = pack_row(self._context.store, number)
            if row is None or not row.live:
                self.rewritten_packs += 1
                self._candidates.gone(number)
            elif now < marked.until or self._heads < marked.heads:
                continue
            elif marked.choice.small:
                self._candidates.tried(marked.choice, now)
            del self._marked[number]

    async def _rewrite(self, choice: Choice) -> None:
        """Brings what lives of a pack into the cache, and marks it dirty."""
        context, number = self._context, choice.number
        marked = 0
        try:
            with trio.fail_after(_READ_SECONDS):
                pack = StoredPack.of_row(choice.row, context.sealer.code.params)
                entries = await read_index(self._reader, pack, context.sealer.keys)
                if choice.small or await self._is_thin(choice, entries):
                    for index, entry in enumerate(entries):
                        if not index % _A_STEP:
                            await context.committer.room()
                        marked += await self._anew.mark(number, pack, entry, self._short_of_room)
                        await trio.lowlevel.checkpoint()
        except (trio.TooSlowError, BackendError, DataLost, Corrupt, FormatMismatch) as error:
            why = "it was not read in time" if isinstance(error, trio.TooSlowError) else error
            _log.info("pack %s: is not rewritten, which is tried again: %s", choice.row.pack_id.hex(), why)
        now = context.clock.monotonic()
        self.rewritten_bytes += marked * PAGE
        self._candidates.marked(marked * PAGE)
        if not choice.small or not marked:
            self._candidates.tried(choice, now)
        if marked:
            self._marked[number] = _Marked(choice, marked * PAGE, now + _LONGEST_SECONDS, self._heads + _HEADS)

    async def _is_thin(self, choice: Choice, entries: Sequence[ExtentEntry]) -> bool:
        """Whether as little lives of a pack as was thought: its row counts plain bytes, its index knows sealed ones."""
        sealed = 0.0
        for index, entry in enumerate(entries):
            if not index % _A_STEP:
                await trio.lowlevel.checkpoint()
            pages = sum(row.pages for row in self._anew.rows(choice.number, entry))
            sealed += entry.sealed_length * pages / max(1, entry.pages)
        density = sealed / max(1, choice.row.live)
        self._candidates.density(choice.number, density)
        return self._candidates.is_thin(choice.row, density)
