"""What a flushing machine leaves behind after any crash: fsck finds it sound, a restore gives its last cut.

The machine, its crashes and the model of what it published are those of `flush_history`; restore,
fetch and fsck are the real ones.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qsfs.clock import FixedClock
from qsfs.filesystem.transient import TransientPages
from qsfs.format.erasure import Code
from qsfs.format.fleet import FleetEntry
from qsfs.format.head import HeadRef, OwnerRecord, head_key, parse_head_key, seal_owner_record
from qsfs.fsck.check import Backends, fsck
from qsfs.fsck.report import Report
from qsfs.remote.fetch import Fetcher
from qsfs.remote.reader import PackReader
from qsfs.remote.restore import restore
from qsfs.remote.survey import Timing
from qsfs.store.schema import PAGE, ROOT_INODE, Entry, Table, u64
from qsfs.store.store import Store
from tests.remote.flush_history import FlushHistory, Model
from tests.remote.flush_machine import LIMITS, FlushMachine, newest_head
from tests.remote.harness import World, make_world
from tests.remote.small_fs import SECRET, add_superblock, candidates_of

TIMING = Timing(attempt=5.0, retry=0.01, retry_most=0.02, grace=0.2)


async def history_of(directory: Path, seed: int) -> FlushHistory:
    world = await make_world(5, k=2, m=2)
    history = FlushHistory(world, directory, seed)
    await history.run(mounts=3, steps=40)
    return history


def add_owner_records(world: World) -> None:
    """The records of all owners that have sent heads: that machine leaves them to other tests."""
    owners = {named.ref.owner for key in list(world.control[0].keys()) if (named := parse_head_key(key))}
    for owner in owners:
        key, value = seal_owner_record(
            OwnerRecord(world.keys.fsid, owner, 0, "host"), world.keys, world.clock
        )
        for store in world.control:
            store.put(key, value)


def assert_sound(report: Report) -> None:
    """Nothing is wrong but that a head that reached few backends has not been spread (no publisher here)."""
    wrong = [finding.message for finding in report.findings if finding.kind != "copy-missing"]
    assert not wrong and not report.failures, list(report.sentences())


async def restored_files(
    world: World, directory: Path, down: tuple[FleetEntry, ...] = ()
) -> dict[str, bytes]:
    """All files of a restored store, read through real fetches."""
    machine = FlushMachine(world, directory)
    machine.store = Store(directory, LIMITS, machine.clock)
    store = machine.store

    class Room:
        async def room(self) -> None:
            group = store.seal()
            store.commit(group)
            store.committed(group)

    members = machine.members()
    for entry in down:
        machine.backends[entry.number - 1].down = True
    reader = PackReader(members, world.keys, Code(world.code))
    fetcher = Fetcher(store, reader, Room(), TransientPages(), deadline_seconds=20)
    found = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(fetcher.run)
        for key, row in list(store.scan(Table.ENTRIES, u64(ROOT_INODE), u64(ROOT_INODE + 1))):
            number = Entry.decode(row).inode
            inode = store.inode(number)
            assert inode is not None
            pages = -(-inode.size // PAGE)
            await fetcher.fetch(number, 0, pages)
            parts = [bytes(page) if page else bytes(PAGE) for page in store.blocks.pages(number, 0, pages)]
            found[key[8:].decode()] = b"".join(parts)[: inode.size]
        nursery.cancel_scope.cancel()
    store.close()
    return found


def expected(history: FlushHistory, ref: HeadRef) -> Model:
    """What the model says a head shows."""
    cut = history.cuts.get((ref.owner.epoch, ref.generation))
    if cut is not None:
        return cut
    # The head with which a mount took over shows what its predecessor's showed.
    older = [cut for (_, generation), cut in history.cuts.items() if generation == ref.generation]
    return older[-1] if older else Model()


async def check(history: FlushHistory, scratch: Path) -> None:
    world = history.world
    add_superblock(world)
    add_owner_records(world)
    clock = FixedClock(5)

    def backends() -> Backends:
        return Backends(candidates_of(world), SECRET, TIMING)

    report = await fsck(history.machine.directory, LIMITS, clock=clock, backends=backends(), deep=True)
    assert_sound(report)

    lost = world.fleet.entries[history.random.randrange(5) :][:2]
    target = scratch / "restored"
    target.mkdir()
    restored = await restore(
        candidates_of(world, down=tuple(entry.number for entry in lost)),
        secret=SECRET,
        directory=target,
        limits=LIMITS,
        clock=clock,
        timing=TIMING,
        force=True,
    )
    newest = newest_head(world)
    assert newest is not None
    key = head_key(world.keys.fsid, newest[0])
    holders = sum(store.peek(key) is not None for store in world.control)
    # One that was sent and never published may lie on the lost backends only.
    assert restored.base == newest[0] or holders <= len(lost)
    report = await fsck(target, LIMITS, clock=clock, backends=backends(), deep=True)
    assert_sound(report)
    assert await restored_files(world, target, lost) == expected(history, restored.base).visible()


@pytest.mark.parametrize("seed", range(12))
def test_after_any_crash_the_last_cut_is_restored_and_all_is_sound(scratch: Path, seed: int) -> None:
    history = trio.run(partial(history_of, scratch / "cache", seed), clock=MockClock(autojump_threshold=0))
    try:
        trio.run(check, history, scratch)
    except BaseException:
        print(f"seed {seed}:", " | ".join(history.trace))
        raise


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_more(scratch: Path, seed: int) -> None:
    history = trio.run(partial(history_of, scratch / "cache", seed), clock=MockClock(autojump_threshold=0))
    trio.run(check, history, scratch)
