"""Running time of a local store: seconds for which its mounts have owned the file system, all added up.

Monotonic time of one mount after the other, recorded in LMDB; never the wall clock, which may jump.  So what
is waited for by it has taken at least as long in truth: mounts of one store never overlap, and what a
crash keeps from being recorded, a machine that is off, or one that sleeps, only makes it longer.
"""

from __future__ import annotations

from collections.abc import Container

from qsfs.clock import Clock
from qsfs.errors import QsfsError
from qsfs.format import schema
from qsfs.format.head import HeadRef, Owner
from qsfs.store.store import Store

RUNNING_KEY = b"running-time"
"""LOCAL row: msgpack array of schema 1, nanoseconds, and the epoch and mount id of the owner that counted them."""
RECORD_SECONDS = 600.0
"""How often it is recorded at least, while something waits for it: a crash loses at most that much."""

_SCHEMA = 1


class RunningTime:
    """The running time of one store, for one mount that owns.  `resume` says whether earlier mounts count.

    Before that, and without, it begins at 0.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._begun = self._noted = clock.monotonic()
        self._before_ns = 0
        self._owner = Owner(0, bytes(16))

    def resume(self, owner: Owner, newest: HeadRef | None, ours: Container[HeadRef]) -> bool:
        """Goes on from what was recorded, for `owner`; False if it begins anew.

        It goes on if `newest`, the head that this mount took over, is one of `ours`, or was written by the owner
        that recorded it: then nobody else has owned the file system since.
        """
        self._owner = owner
        found = self._recorded()
        goes_on = found is not None and newest is not None and (newest in ours or newest.owner == found[1])
        self._before_ns = found[0] if found is not None and goes_on else 0
        return goes_on

    def _recorded(self) -> tuple[int, Owner] | None:
        row = self._store.local(RUNNING_KEY)
        if row is None:
            return None
        try:
            fields = schema.record(row, _SCHEMA, 4, "running time of the local store")
            return fields.integer(0), Owner(fields.integer(0), fields.binary())
        except QsfsError:
            # Nothing depends on it but how long is waited.
            return None

    @property
    def seconds(self) -> float:
        """The running time now."""
        return self._before_ns / 1e9 + self._clock.monotonic() - self._begun

    @property
    def due(self) -> bool:
        """Whether it was not recorded for so long that it should be, if anything waits."""
        return self._clock.monotonic() - self._noted >= RECORD_SECONDS

    def note(self) -> None:
        """Records it with the next commit."""
        self._noted = self._clock.monotonic()
        row = [_SCHEMA, int(self.seconds * 1e9), self._owner.epoch, self._owner.mount_id]
        self._store.set_local(RUNNING_KEY, schema.pack(row))
