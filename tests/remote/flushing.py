"""A flusher at work on a machine, on a virtual clock, and what tests look for afterwards.

    async with flushing(machine, cut_seconds=5) as flusher:
        machine.write(machine.create("a"), 0, page("x"))
        await flusher.sync()
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio
from trio.testing import MockClock

from qsfs.clock import FixedClock
from qsfs.config import FlushConfig
from qsfs.errors import Fenced
from qsfs.format.shard import parse_shard_key
from qsfs.remote.context import FlushContext
from qsfs.remote.flush import Flusher
from qsfs.store.schema import PAGE, ExtentRow, PackRow, Table
from qsfs.store.store import Store
from tests.remote.flush_machine import DirectReader, FlushMachine
from tests.remote.harness import World


class VirtualClock(FixedClock):
    """Running time is a virtual clock that worker threads may read too."""

    def __init__(self, clock: MockClock) -> None:
        super().__init__(3)
        self._clock = clock

    def monotonic(self) -> float:
        return self._clock.current_time()

    def time_ns(self) -> int:
        return super().time_ns() + int(self._clock.current_time() * 1e9)


@contextlib.asynccontextmanager
async def flushing(
    machine: FlushMachine,
    context_of: Callable[[FlushMachine], FlushContext] = lambda machine: machine.context,
    **settings: float,
) -> AsyncIterator[Flusher]:
    """A flusher at work on a mounted machine."""
    config = FlushConfig(**{"cut_seconds": 30.0, "quiet_seconds": 5.0, **settings})  # type: ignore[arg-type]
    fenced: list[Fenced] = []
    async with machine.mounted(), trio.open_nursery() as nursery:
        flusher = Flusher(
            context_of(machine),
            config,
            machine.publisher,
            machine.first,
            DirectReader(machine.world),
            on_fenced=fenced.append,
        )
        machine.fenced = fenced  # type: ignore[attr-defined]
        await nursery.start(flusher.run)
        yield flusher
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    """Lets virtual time pass until something is so; the test's time limit says when it never is."""
    while not condition():
        await trio.sleep(1)


def page(letter: str) -> bytes:
    return letter.encode() * PAGE


def pack_rows(machine: FlushMachine) -> dict[int, PackRow]:
    rows = machine.store.scan(Table.PACKS, b"", None)
    return {int.from_bytes(key, "big"): PackRow.decode(row) for key, row in rows}


def stored_packs(world: World) -> set[bytes]:
    """The ids of the packs of which some backend has a shard."""
    keys = [key for store in world.data for key in list(store.keys())]
    return {named.pack_id for key in keys if (named := parse_shard_key(key))}


class RowsAStep(trio.abc.Instrument):
    """How many extents of a store were looked at, at most, before other tasks had a turn."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self._rows = 0
        overlapping = store.extents.overlapping

        def counted(inode: int, first: int, stop: int) -> Iterator[ExtentRow]:
            for row in overlapping(inode, first, stop):
                self._rows += 1
                self.most = max(self.most, self._rows)
                yield row

        monkeypatch.setattr(store.extents, "overlapping", counted)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._rows = 0
