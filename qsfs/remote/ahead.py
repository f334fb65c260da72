"""What is uploaded ahead of a cut when a cut could not seal all of it at once."""

from __future__ import annotations

import trio

from qsfs.remote.context import FlushContext
from qsfs.remote.generation import Generations
from qsfs.remote.metadata import MetadataUpload
from qsfs.remote.precopy import PreCopier
from qsfs.remote.slowdown import Slowdown
from qsfs.store.schema import Table
from qsfs.store.snapshot import CommittedState, Want

_POLL_SECONDS = 0.5
_LAST_POLL_SECONDS = 10.0
_LITTLE_PACKS = 4
"""Packs' worth of dirty bytes that need not be uploaded ahead of a cut."""


class Ahead:
    """Uploads so much, in place of the cut, that the cut becomes small enough.

    `slowdown` holds applications back where that does not come to an end; who takes the cut ends it.
    """

    def __init__(self, context: FlushContext, precopier: PreCopier, slow_writers_seconds: float) -> None:
        self._context = context
        self._precopier = precopier
        self.slowdown = Slowdown(context, slow_writers_seconds)

    async def pages(self, most_bytes: int) -> None:
        """Has pre-copy take everything until so little is dirty that a cut of `most_bytes` can be made.

        What pre-copy takes it reads, seals and sends at the same time, and a cut one after the other: so
        it goes on beyond what a cut may seal, for as long as that gets it much further: that is less and
        less is dirty.
        """
        context = self._context
        self._precopier.press("more is dirty than a cut may seal", orphans_too=False)
        enough, little = most_bytes // 2, min(most_bytes // 2, _LITTLE_PACKS * context.sealer.pack_bytes)
        before = self._precopier.bytes_recorded
        pause = _POLL_SECONDS
        blocks, gained = self._dirty_blocks, 0
        while True:
            with trio.move_on_after(pause):
                # Of who gets nowhere it is no news that nothing is under way.
                await (self._precopier.drained.wait() if gained else trio.sleep_forever())
            await context.committer.commit()
            self._precopier.kick()
            recorded = self._precopier.bytes_recorded
            # Nothing leaves in an outage, which may take days.
            pause = _POLL_SECONDS if recorded > before else min(_LAST_POLL_SECONDS, 2 * pause)
            gained, before = recorded - before, recorded
            self.slowdown.uploaded(gained, little)
            last, blocks = blocks, self._dirty_blocks
            goal = little if gained >= little and blocks < last else enough
            if await context.in_thread(lambda: self._dirty_bytes(goal)) <= goal:  # noqa: B023 (awaited at once)
                return

    @property
    def _dirty_blocks(self) -> int:
        return self._context.store.layers.view.count(Table.DIRTY)

    def _dirty_bytes(self, most: int) -> int:
        with CommittedState(self._context.store.environment, self._context.clock) as state:
            return state.dirty_bytes(most, Want(1))

    async def rows(self, generations: Generations) -> None:
        """Uploads the rows that changed so far, so that the cut reads only what changes after."""
        floor, packs = generations.pre_delta or (0, ())
        upload = MetadataUpload(self._context, floor)
        generations.pre_delta = None
        more = await upload.run()
        generations.pre_delta = (upload.complete_to, (*packs, *more))
