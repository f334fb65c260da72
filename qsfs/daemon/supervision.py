"""Background work that must not take the mount along when it fails."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 1.0
_LAST_PAUSE_SECONDS = 60.0


async def supervised(work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` until it returns or is cancelled; after an unexpected error it is begun again.

    Every failure is logged with its traceback; the pauses between them grow.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - the mount outlives bugs of its background work
            _log.exception("background work failed; it begins again in %g s", pause)
            await trio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)
        else:
            return
