"""What a read-only mount knows of the newest published head: it looks again and again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import trio

from qsfs.clock import Clock
from qsfs.errors import GenerationExpired, MayHaveExpired, QsfsError
from qsfs.format.erasure import CodeParams
from qsfs.format.head import HeadRef
from qsfs.remote.control import Records
from qsfs.remote.members import Members
from qsfs.remote.readable import Published, look
from qsfs.remote.survey import Timing

_log = logging.getLogger(__name__)

_FRESH_SECONDS = 10.0
"""How old a look may be by which data that are gone are judged."""


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
        rejected: frozenset[HeadRef] = frozenset(),
    ) -> None:
        """`first` is the newest head that the start of the mount found, `rejected` are those that a person chose
        against.
        """
        self._members = members
        self._records = records
        self._code = code
        self._clock = clock
        self._timing = timing
        self._rejected = rejected
        self._gone_since: dict[HeadRef, int] = {}
        self.watched: set[HeadRef] = set()
        self.newest = first
        self.seen_ns = clock.time_ns()
        self.error = ""
        self._looked = -math.inf
        self._turn = trio.Lock()
        self.on_newer: list[Callable[[], None]] = []

    async def run(self, seconds: float) -> None:
        """Looks every `seconds`, less a random half of that, until cancelled."""
        while True:
            await self.look()
            await trio.sleep(seconds * (0.5 + int.from_bytes(self._clock.random_bytes(2), "big") / 0x20000))

    async def look(self) -> None:
        """Looks once.  What is known stays as it is where too few backends answer."""
        async with self._turn:
            await self._look()
            self._looked = self._clock.monotonic()

    async def _look(self) -> None:
        try:
            seen = await look(
                self._members, self._records, self._code, self._clock, self._timing, rejected=self._rejected
            )
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

    async def expired(self, ref: HeadRef) -> QsfsError | None:
        """What it means that data of the generation of `ref` are gone: `GenerationExpired`, or None: damage.

        Looks again first, unless it has just done so: what was known is from before.  `MayHaveExpired` where the
        newest head cannot be read, so that nobody can tell.
        """
        if self.gone_since(ref) is None:
            await self._look_unless_fresh()
        if self.gone_since(ref) is not None:
            return GenerationExpired(
                f"generation {ref.generation} expired: generation {self.newest.ref.generation} is published and it is "
                "not kept any more, so its data were deleted; remount to read a newer one"
            )
        if self.error:
            return MayHaveExpired(
                f"generation {ref.generation} may have expired: its data are gone, and the newest head could not be "
                f"read ({self.error}); remount to read a newer one, with a key that opens it"
            )
        return None

    async def _look_unless_fresh(self) -> None:
        """Of many that ask at once the first one looks."""
        async with self._turn:
            if self._clock.monotonic() >= self._looked + _FRESH_SECONDS:
                await self._look()
                self._looked = self._clock.monotonic()
