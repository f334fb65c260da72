"""What a store remembers of its dead packs, so that their retention time goes on over a restart.

Rows of LOCAL, one for each dead pack that a published generation does not name any more.  They are bookkeeping
of time and nothing else: whoever deletes looks at everything else anew.  A store that was restored or rolled back
has none.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qsfs.clock import Clock
from qsfs.store.environment import Environment
from qsfs.store.schema import Table, split_u64, u64
from qsfs.store.snapshot import CommittedState

DEATH_PREFIX = b"dead:"
_END = b"dead;"
_ROW = struct.Struct("<B16sQQ")
_VERSION = 1
_NOT_YET = 2**64 - 1
_STEP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of a dead pack: the first generation without it, and since when no kept one may name it.

    `since` is running time in seconds (see `running`), None until then.
    """

    pack_id: bytes
    without: int
    since: float | None

    def encode(self) -> bytes:
        """The row: version u8 = 1, pack id, generation u64, running time in nanoseconds u64 (2^64 - 1: not yet)."""
        since = _NOT_YET if self.since is None else int(self.since * 1e9)
        return _ROW.pack(_VERSION, self.pack_id, self.without, since)

    @classmethod
    def decode(cls, row: bytes) -> Death | None:
        """What a row says; None for one of no known form, of which nothing but time is lost."""
        if len(row) != _ROW.size or row[0] != _VERSION:
            return None
        _, pack_id, without, since = _ROW.unpack(row)
        return cls(pack_id, without, None if since == _NOT_YET else since / 1e9)


def death_key(number: int) -> bytes:
    """The key in LOCAL of pack `number`."""
    return DEATH_PREFIX + u64(number)


@dataclass(frozen=True, slots=True)
class DeathsRead:
    """Some of the rows, by pack number (None: a row of no known form), and where the next ones begin."""

    found: tuple[tuple[int, Death | None], ...]
    resume: bytes | None


def read_deaths(environment: Environment, clock: Clock, start: bytes = DEATH_PREFIX) -> DeathsRead:
    """Reads rows from `start` on for about a tenth of a second, on a worker thread."""
    found: list[tuple[int, Death | None]] = []
    until = clock.monotonic() + _STEP_SECONDS
    with CommittedState(environment, clock) as state:
        for key, row in state.view.scan(Table.LOCAL, start, _END):
            if len(key) == len(DEATH_PREFIX) + 8:
                found.append((split_u64(key[len(DEATH_PREFIX) :]), Death.decode(bytes(row))))
            if clock.monotonic() >= until:
                return DeathsRead(tuple(found), key + b"\0")
    return DeathsRead(tuple(found), None)
