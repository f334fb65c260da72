"""What would be lost with this machine: everything that no published head names.

Counted from what the store says, so that it is right after a remount too.  Every figure is an upper
bound: a page that was uploaded and rewritten counts twice, a block that is dirty in part as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.remote.exposure_age import ExposureAge
from qsfs.remote.ledger import Ledger
from qsfs.store.environment import Environment
from qsfs.store.group import Group
from qsfs.store.schema import BLOCK_SIZE, PAGE, ExtentRow, Table, split_u64_pair
from qsfs.store.snapshot import CommittedState
from qsfs.store.store import Store

ROW_BYTES = 256
"""What a changed row of metadata counts as: more than nearly all of them take."""
_STEP_SECONDS = 0.1
_NAMESPACE = (
    Table.INODES,
    Table.ENTRIES,
    Table.XATTRS,
    Table.SYMLINKS,
    Table.EXTENTS,
    Table.TRUNCATIONS,
)


def unpublished_bytes(environment: Environment, clock: Clock, start: bytes) -> tuple[int, bytes | None]:
    """Bytes of clean pages that no published head names, from change mark `start` on, for about 0.1 s.

    Returns them and the mark to go on from (None: that was all).  For a worker thread.
    """
    table = bytes((Table.EXTENTS,))
    total = 0
    until = clock.monotonic() + _STEP_SECONDS
    with CommittedState(environment, clock) as state:
        for mark, _ in state.view.scan(Table.CHANGED, start or table, bytes((Table.EXTENTS + 1,))):
            row = state.view.get(Table.EXTENTS, mark[1:])
            if row is not None:
                total += ExtentRow.decode(split_u64_pair(mark[1:])[1], bytes(row)).pages * PAGE
            if clock.monotonic() >= until:
                return total, mark + b"\0"
    return total, None


class Exposure:
    """Counts what is not safe yet.  `recorded` gives the bytes that turned clean since this mount began.

    `age` is to be told of generations.
    """

    def __init__(self, store: Store, ledger: Ledger, clock: Clock, recorded: Callable[[], int]) -> None:
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._recorded = recorded
        self._from_before: int | None = None
        self._published = 0
        self.age = ExposureAge(clock)

    async def begin(self) -> None:
        """Reads once what an earlier mount uploaded and no published head names."""
        if self._from_before is not None:
            return
        total = 0
        position: bytes | None = b""
        while position is not None:
            start = position
            size, position = await trio.to_thread.run_sync(
                lambda: unpublished_bytes(self._store.environment, self._clock, start)  # noqa: B023
            )
            total += size
        self._from_before = total
        self.age.look(self.coverable_bytes, None)

    @property
    def uploaded(self) -> int:
        """All bytes uploaded ahead of cuts; a cut that is taken later names them."""
        return (self._from_before or 0) + self._recorded()

    def published(self, uploaded: int) -> None:
        """Takes note that a published head names what had been uploaded then."""
        self._published = uploaded

    @property
    def local_bytes(self) -> int:
        """Bytes of file data that not even this machine's disk has for good."""
        return sum(group.bytes for group in self._groups) + self.uncovered_bytes

    @property
    def uncovered_bytes(self) -> int:
        """Bytes of atomic-sync files that were written since their last sync: no cut can hold them."""
        spilled = self._store.layers.view.count(Table.SPILL_BLOCKS) * BLOCK_SIZE
        return spilled + self._store.promised_bytes()

    @property
    def _groups(self) -> list[Group]:
        layers = self._store.layers
        return [group for group in (layers.open, layers.committing) if group is not None]

    @property
    def data_bytes(self) -> int:
        """Bytes of file data that are lost with this machine, as an upper bound."""
        dirty = self._store.layers.view.count(Table.DIRTY) * BLOCK_SIZE
        return dirty + self.uploaded - self._published + self.local_bytes

    @property
    def rows(self) -> int:
        """Rows of metadata that changed; 0 where all that changed is bookkeeping of packs."""
        layers = self._store.layers
        rows = sum(map(_namespace_rows, self._groups))
        if any(
            next(layers.view.scan(Table.CHANGED, bytes((table,)), bytes((table + 1,))), None) is not None
            for table in _NAMESPACE
        ):
            rows += layers.view.count(Table.CHANGED)
        return rows

    @property
    def coverable_bytes(self) -> int:
        """Bytes, of data and of changed rows, that are lost with this machine and that a cut may hold."""
        return self.data_bytes + self.rows * ROW_BYTES - self.uncovered_bytes

    def report(self, base_ns: int | None, *, packs_known: bool) -> dict[str, dict[str, Any]]:
        """Bytes and seconds by class; `base_ns` is the time of the last published cut.

        No class has less, or younger, than the one before it.  `full` is missing until all packs are known.
        """
        local = self.local_bytes + sum(map(_namespace_rows, self._groups)) * ROW_BYTES
        # Of bookkeeping alone nothing is lost; a file that was cut off since its last sync has no bytes.
        loses = local or self._store.promised_since() is not None
        local_age = self._store.undurable_seconds() or 0.0 if loses else 0.0
        exposed, age = self.age.look(self.coverable_bytes, base_ns)
        written = max(local, exposed + self.uncovered_bytes)
        written_age = max(local_age, age)
        found: dict[str, dict[str, Any]] = {
            "local": {"bytes": local, "age": local_age},
            "written": {"bytes": written, "age": written_age, "rows": self.rows},
        }
        if packs_known:
            found["full"] = {
                "bytes": written + self._ledger.incomplete_bytes,
                "age": max(written_age, self._ledger.incomplete_seconds),
            }
        return found


def _namespace_rows(group: Group) -> int:
    return len(group.inodes) + sum(len(group.rows[table]) for table in _NAMESPACE)
