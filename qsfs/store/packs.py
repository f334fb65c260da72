"""What a written pack changes in the local store: its row, extents, and pages that turn clean.

Everything goes through the open group and is judged by what that shows.  A page turns clean, and
gets its extent, where it is still resident dirty with the write number that was sealed; one that
was rewritten, truncated or removed meanwhile gets neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qsfs.store.runs import runs
from qsfs.store.schema import BLOCK_PAGES, PAGE, ExtentRow, InodeFlag, PackRow, PackState, Table, u64
from qsfs.store.store import NEXT_PACK, Store

STEP_RUNS = 128
"""Runs that are recorded between two looks at the rest of the world: about 3 ms where each is one page."""


@dataclass(frozen=True, slots=True)
class SealedRun:
    """Pages as they were sealed: `extent` is their row, `writes` the write number of each."""

    inode: int
    writes: tuple[int, ...]
    extent: ExtentRow


def steps(runs: Sequence[SealedRun]) -> Iterator[Sequence[SealedRun]]:
    """The runs of a pack in parts that do not hold up requests for long."""
    return (runs[begin : begin + STEP_RUNS] for begin in range(0, len(runs), STEP_RUNS))


def reserve_numbers(store: Store, count: int) -> range:
    """Takes `count` pack numbers that nothing else will have; they need not all be used."""
    first = store.counter(NEXT_PACK) + 1
    store.set_counter(NEXT_PACK, first + count - 1)
    return range(first, first + count)


def add_pack(store: Store, number: int, row: PackRow) -> None:
    """Adds a written pack.  Its `live` bytes grow with the extents that are recorded."""
    store.layers.put(Table.PACKS, u64(number), row.encode())
    store.extents.added(number)


def pack_row(store: Store, number: int) -> PackRow | None:
    """The row of a pack as of now, with the live bytes that its extents have now."""
    row = _stored_row(store, number)
    if row is None:
        return None
    return replace(row, live=max(0, row.live + store.extents.live_change(number)))


def _stored_row(store: Store, number: int) -> PackRow | None:
    """The row as it lies in the tables; its live bytes are brought up to date when the group is sealed."""
    row = store.get(Table.PACKS, u64(number))
    return None if row is None else PackRow.decode(row)


def set_placement(store: Store, number: int, placement: tuple[int, ...], now_ns: int) -> PackRow | None:
    """Records where the shards lie now; a pack that is changed has to be looked at again.

    Returns the row, or None if the pack is gone.
    """
    row = _stored_row(store, number)
    if row is None:
        return None
    state = row.state & ~PackState.FULL & ~PackState.LOOKED
    if -1 not in placement:
        state |= PackState.FULL
    row = replace(row, placement=placement, state=int(state), written_at_ns=now_ns, verified_at_ns=0)
    store.layers.put(Table.PACKS, u64(number), row.encode())
    return pack_row(store, number)


def set_looked(store: Store, number: int, placement: tuple[int, ...], now_ns: int) -> bool:
    """Records that a second look found every shard of `placement`; False if that is not where they are.

    With 0 for the time: that it found enough of them, see `PackRow.looked_at`.
    """
    row = _stored_row(store, number)
    if row is None or row.placement != placement:
        return False
    row = replace(row, state=row.state | PackState.LOOKED, verified_at_ns=now_ns)
    store.layers.put(Table.PACKS, u64(number), row.encode())
    return True


def set_start(store: Store, number: int, start: bool) -> bool:
    """Marks a pack as one whose pages are read at a start, or takes the mark away; whether that changed anything."""
    row = _stored_row(store, number)
    if row is None or bool(row.state & PackState.START) is start:
        return False
    row = replace(row, state=row.state ^ PackState.START)
    store.layers.put(Table.PACKS, u64(number), row.encode())
    return True


def move_run(store: Store, run: SealedRun) -> int:
    """Gives the pages of `run` its extent in the place of theirs; returns how many.

    Only those that are resident clean and still what was sealed: their bytes lie in both extents then.
    """
    inode = store.inode(run.inode)
    if inode is None or not inode.nlink or inode.flags & InodeFlag.LOCAL_ONLY:
        return 0
    first = run.extent.first
    moved = [page for page, write in enumerate(run.writes, first) if _is_clean(store, run.inode, page, write)]
    for start, stop in runs(moved):
        store.extents.insert(run.inode, run.extent.part(start, stop - start))
    # Nothing that applications changed: rewriting others earns no allowance by it.
    store.extents.recorded_bytes -= len(moved) * PAGE
    return len(moved)


def _is_clean(store: Store, inode: int, page: int, write_number: int) -> bool:
    """Whether a page is resident clean with this write number."""
    number, index = divmod(page, BLOCK_PAGES)
    state = store.blocks.state(inode, number)
    return (
        state is not None
        and bool(state.resident & ~state.dirty & 1 << index)
        and state.writes[index] == write_number
        and store.blocks.remote_extent(inode, page) is not None
    )


def record_run(store: Store, run: SealedRun) -> int:
    """Turns the pages of `run` clean that still may, and gives them its extent; returns how many."""
    inode = store.inode(run.inode)
    if inode is None:
        return 0
    cleaned = store.blocks.clean(inode, run.extent.first, run.writes)
    for start, stop in runs(cleaned):
        store.extents.insert(run.inode, run.extent.part(start, stop - start))
    return len(cleaned)
