"""What a read-only mount knows of the newest published head: it looks again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from qsfs.clock import Clock
from qsfs.errors import QsfsError
from qsfs.format.erasure import CodeParams
from qsfs.format.head import HeadRef
from qsfs.remote.control import Records
from qsfs.remote.members import Members
from qsfs.remote.readable import Published, look
from qsfs.remote.survey import Timing

_log = logging.getLogger(__name__)


class Sightings:
    """The newest published head, as of the last look that succeeded.

    `seen_ns` is the time of that look; `error` is why the last look failed, "" if it did not.
    `watched`: the heads whose generations are shown.  Whether a generation has expired is judged by the
    head that was seen, never by what backends lack.
    """

    def __init__(
        self,
        members: Members,
        records: Records,
        code: CodeParams,
        clock: Clock,
        timing: Timing,
        first: Published,
    ) -> None:
        """`first` is the newest head that the start of the mount found."""
        self._members = members
        self._records = records
        self._code = code
        self._clock = clock
        self._timing = timing
        self._gone_since: dict[HeadRef, int] = {}
        self.watched: set[HeadRef] = set()
        self.newest = first
        self.seen_ns = clock.time_ns()
        self.error = ""
        self.on_newer: list[Callable[[], None]] = []

    async def run(self, seconds: float) -> None:
        """Looks every `seconds`, less a random half of that, until cancelled."""
        while True:
            await self.look()
            await trio.sleep(seconds * (0.5 + int.from_bytes(self._clock.random_bytes(2), "big") / 0x20000))

    async def look(self) -> None:
        """Looks once.  What is known stays as it is where too few backends answer."""
        try:
            seen = await look(self._members, self._records, self._code, self._clock, self._timing)
        except QsfsError as error:
            if not self.error:
                _log.info("the newest head is not known: %s", error)
            self.error = str(error)
            return
        self.error = seen.hidden
        self.seen_ns = self._clock.time_ns()
        if seen.ref > self.newest.ref:
            self._take(seen)
            for told in self.on_newer:
                told()
        elif seen.ref == self.newest.ref:
            self._take(seen)

    def _take(self, seen: Published) -> None:
        self.newest = seen
        for ref in self.watched:
            self.gone_since(ref)

    def gone_since(self, ref: HeadRef) -> int | None:
        """When (ns) it was first seen that the generation of `ref` is not kept any more; None: it is kept."""
        if self.newest.keeps(ref) or self.newest.ref < ref:
            return None
        return self._gone_since.setdefault(ref, self.seen_ns)

    def expired(self, ref: HeadRef) -> str:
        """Why data of the generation of `ref` may be gone for good, for people; "" while it is kept."""
        if self.gone_since(ref) is None:
            return ""
        return (
            f"generation {ref.generation} expired: generation {self.newest.ref.generation} is published and it is "
            "not kept any more, so its data were deleted; remount to read a newer one"
        )
