"""Applications that write for long what backends do not take as fast are slowed, so that a generation can be made.

A cut holds all of one committed state, and only so much may be dirty in it.  Who writes faster than the
uploads for as long as the cache has room is not held up; but for as long as that goes on there is no generation, and
what the machine's loss would cost grows without bound.  So after a while each byte that leaves allows half a byte
to be written, after twice that time a quarter, and so on, and what is dirty shrinks by the rest.  Uploads are what
such a load waits for in the end, and they go on at their full speed.
"""

from __future__ import annotations

import logging

from qsfs.remote.context import FlushContext

_log = logging.getLogger(__name__)

_MOST_HALVINGS = 10


class Slowdown:
    """Holds applications back while a cut has waited for longer than `after_seconds` (0: never) for uploads.

    Never while backends take too little for a pack to be written: in an outage applications go on, and it does not
    count as waiting.
    """

    def __init__(self, context: FlushContext, after_seconds: float) -> None:
        self._context = context
        self._after = after_seconds
        self._waited = 0.0
        self._at: float | None = None
        self._said = False

    @property
    def active(self) -> bool:
        """Whether applications are held back now."""
        return self._context.store.allowance.limited

    def uploaded(self, count: int, most: int) -> None:
        """A cut waits for uploads, and so many bytes have left since this was called last.

        `most`: how many bytes applications may have in store.
        """
        allowance = self._context.store.allowance
        now = self._context.clock.monotonic()
        before, self._at = self._at, now
        if self._outage:
            allowance.let_go()
            return
        self._waited += now - before if before is not None else 0.0
        if not self._after or self._waited < self._after:
            return
        if not self._said:
            self._said = True
            _log.warning(
                "applications have written faster than backends take it for %d s, so no generation could be made; "
                "until one can, writes are slowed to half of what is uploaded, and less if need be",
                self._waited,
            )
        allowance.hold_back()
        allowance.grant(count >> min(_MOST_HALVINGS, int(self._waited / self._after)), most)

    async def look(self) -> None:
        """Lets applications go on if backends take too little, whatever the cut waits for; to be called each second."""
        if self._at is not None and self._outage:
            self._at = self._context.clock.monotonic()
            self._context.store.allowance.let_go()

    def end(self) -> None:
        """A cut could be taken, or failed for another reason, or none will be."""
        self._waited, self._at, self._said = 0.0, None, False
        self._context.store.allowance.let_go()

    @property
    def _outage(self) -> bool:
        uploader = self._context.uploader
        return bool(uploader.waiting) or not uploader.enough_backends()
