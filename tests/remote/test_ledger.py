"""When a written pack is looked at a second time."""

from __future__ import annotations

from dataclasses import replace

from qsfs.clock import FixedClock
from qsfs.format.extent import PackKind, PackRef
from qsfs.remote.ledger import Ledger
from qsfs.remote.packing import row_of
from qsfs.store.schema import PackRow

DELAY = 120.0
WRITTEN_NS = 1_700_000_000 * 10**9


class At(FixedClock):
    """A machine that has just been started, at a wall time in seconds after the pack was written."""

    def __init__(self, seconds: float) -> None:
        super().__init__(7)
        self.seconds = seconds
        self.running = 0.0

    def time_ns(self) -> int:
        return WRITTEN_NS + int(self.seconds * 1e9)

    def monotonic(self) -> float:
        return self.running


def written() -> PackRow:
    ref = PackRef(bytes(16), bytes(32), PackKind.DATA, 1, 1, 100, 100)
    return row_of(ref, (0, 1, 2), WRITTEN_NS)


def due_after(clock: At) -> float:
    ledger = Ledger(clock, DELAY)
    assert ledger.next_look_seconds is None
    ledger.note(1, written())
    told = ledger.next_look_seconds
    while not ledger.due(1, written_too=False):
        clock.running += 1
    assert told == clock.running
    assert ledger.next_look_seconds == 0
    return clock.running


def test_the_wait_goes_on_over_a_restart() -> None:
    """Else a cache full of what was written before it stands still for all of the wait, after each."""
    assert due_after(At(0)) == DELAY
    assert due_after(At(100)) == DELAY - 100
    assert due_after(At(100_000)) == 0


def test_a_clock_that_was_set_back_makes_the_wait_no_longer() -> None:
    assert due_after(At(-100_000)) == DELAY


def test_packs_that_cannot_be_looked_at_hold_up_no_other() -> None:
    """A backend is away, with a shard of each of very many packs: one that it has nothing of comes to its turn."""
    clock = At(0)
    ledger = Ledger(clock, DELAY)
    for number in range(1000):
        ledger.note(number, written())
    ledger.note(5000, written())
    clock.running = DELAY
    seen: set[int] = set()
    for _ in range(60):
        clock.running += 1
        for number in ledger.due(32, written_too=True):
            seen.add(number)
            ledger.later(number, 30)
    assert 5000 in seen


def test_no_look_is_due_of_a_pack_that_is_lost():
    """It would find too few shards each time, before all others; who comes back is looked at as ever."""
    clock = At(DELAY)
    ledger = Ledger(clock, DELAY)
    ledger.note(1, replace(written(), placement=(-1, -1, 2), shard_size=50))
    assert ledger.lost == {1} and not ledger.lost_metadata
    clock.running += DELAY
    assert not ledger.due(9, written_too=True) and ledger.next_look_seconds is None and not ledger.looks_help
    ledger.note(1, replace(written(), shard_size=50))
    assert not ledger.lost and ledger.looks_help
    clock.running += DELAY
    assert ledger.due(9, written_too=True) == [1]
    ledger.note(2, replace(written(), kind=PackKind.METADATA, placement=(-1, -1, -1)))
    assert ledger.lost == ledger.lost_metadata == {2}
    ledger.forget(2)
    assert not ledger.lost and not ledger.lost_metadata
