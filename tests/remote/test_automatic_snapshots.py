"""Automatic snapshots of a flushing machine, on a virtual clock."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from qsfs.config import SnapshotsConfig
from qsfs.daemon.automatic import AutomaticSnapshots
from qsfs.remote.flush import Flusher
from tests.remote.flush_machine import FlushMachine
from tests.remote.flushing import flushing, page
from tests.remote.harness import World
from tests.remote.test_snapshot_pins import create, pinned

HOUR = 3600.0
CONFIG = SnapshotsConfig(every_seconds=HOUR, keep_last=0, hourly=2, daily=0, weekly=0)


def automatic(machine: FlushMachine, flusher: Flusher, config: SnapshotsConfig = CONFIG) -> AutomaticSnapshots:
    return AutomaticSnapshots(config, flusher.pinning, machine.clock, trio.lowlevel.checkpoint)


async def test_one_is_made_every_hour_and_old_ones_go(world: World, machine: FlushMachine, clock: MockClock):
    """What a person named stays, older as it is; each holds what was there when it was made."""
    async with flushing(machine, cut_seconds=86400, quiet_seconds=86400) as flusher, trio.open_nursery() as nursery:
        a = machine.create("a")
        machine.write(a, 0, page("0"))
        await create(flusher, "mine")
        nursery.start_soon(automatic(machine, flusher).run)
        for hour in "123":
            await trio.sleep(HOUR / 2)
            machine.write(a, 0, page(hour))
            await trio.sleep(HOUR / 2)
        await trio.sleep(600)
        images = pinned(world)
        assert len(images) == 3
        assert images.pop("mine").files == {"a": page("0")}
        assert sorted(image.files["a"][:1] for image in images.values()) == [b"2", b"3"]
        nursery.cancel_scope.cancel()


async def test_a_mount_makes_one_only_when_it_is_due(machine: FlushMachine, clock: MockClock):
    """Neither at each start, nor an hour late where the last one was made by the mount before."""
    async with flushing(machine, cut_seconds=86400) as flusher, trio.open_nursery() as nursery:
        nursery.start_soon(automatic(machine, flusher).run)
        await trio.sleep(10)
        assert len(flusher.pinning.snapshots) == 1
        nursery.cancel_scope.cancel()
    for minutes, expected in ((30, 1), (10, 1), (21, 2)):
        await trio.sleep(minutes * 60)
        async with flushing(machine, cut_seconds=86400) as flusher, trio.open_nursery() as nursery:
            nursery.start_soon(automatic(machine, flusher).run)
            await trio.sleep(10)
            assert len(flusher.pinning.snapshots) == expected
            nursery.cancel_scope.cancel()


async def test_what_the_kernel_holds_is_in_it(world: World, machine: FlushMachine, clock: MockClock):
    """The kernel hands over what programs have written before the cut, not after it."""
    async with flushing(machine, cut_seconds=86400, quiet_seconds=86400) as flusher:

        async def hand_over() -> None:
            machine.write(machine.create("late"), 0, page("l"))
            await trio.lowlevel.checkpoint()

        await AutomaticSnapshots(CONFIG, flusher.pinning, machine.clock, hand_over).make()
        (image,) = pinned(world).values()
        assert image.files == {"late": page("l")}


async def test_it_ends_with_flushing_and_makes_none_where_none_are_wanted(machine: FlushMachine, clock: MockClock):
    """Quietly: a daemon that stops has nothing to complain of."""
    async with flushing(machine) as flusher:
        await automatic(machine, flusher, SnapshotsConfig()).run()
        for backend in machine.backends:
            backend.down = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(automatic(machine, flusher).run)
            await trio.sleep(10)
            await flusher.stop(5)
        assert flusher.pinning.snapshots == []
