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

    Never while backends take too little for a pack to be written: in an outage applications go on.
    """

    def __init__(self, context: FlushContext, after_seconds: float) -> None:
        self._context = context
        self._after = after_seconds
        self._since: float | None = None
        self._said = False

    @property
    def active(self) -> bool:
        """Whether applications are held back now."""
        return self._context.store.allowance.limited

    def uploaded(self, count: int, most: int) -> None:
        """A cut waits for uploads, and so many bytes have left since this was called last.

        `most`: how many bytes applications may have in store.
        """
        context, allowance = self._context, self._context.store.allowance
        now = context.clock.monotonic()
        if self._since is None:
            self._since = now
        outage = bool(context.uploader.waiting) or not context.uploader.enough_backends()
        if not self._after or outage or now - self._since < self._after:
            if allowance.limited:
                allowance.let_go()
            return
        if not self._said:
            self._said = True
            _log.warning(
                "applications have written faster than backends take it for %d s, so no generation could be made; "
                "until one can, writes are slowed to half of what is uploaded, and less if need be",
                now - self._since,
            )
        allowance.hold_back()
        halvings = min(_MOST_HALVINGS, int((now - self._since) / self._after))
        allowance.grant(count >> halvings, most)

    def end(self) -> None:
        """A cut could be taken, or none will be."""
        self._since, self._said = None, False
        if self._context.store.allowance.limited:
            self._context.store.allowance.let_go()
