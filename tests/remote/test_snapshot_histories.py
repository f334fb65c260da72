"""Random histories of a machine that writes, snapshots, deletes, rolls back, and dies anywhere.

The model knows what was written before each snapshot was asked for and when it was reported.  After every
crash each snapshot that was reported, and not asked to be deleted, restores to exactly that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsfs import failpoints
from qsfs.remote.flush import Flusher
from tests.remote.flush_machine import FlushMachine, crash, restore
from tests.remote.flushing import VirtualClock, flushing, page
from tests.remote.harness import make_world
from tests.remote.test_rollback import local_files, roll_back
from tests.remote.test_snapshot_pins import create, pinned
from tests.support.virtual_time import virtual_time

Files = dict[str, bytes]

POINTS = (
    "flush.cut.sealed",
    "flush.packs.uploaded",
    "spool.head.before",
    "spool.head.stored",
    "test.head.stored",
    "test.head.at-one",
    "flush.head.sent",
    "flush.recorded",
    "flush.spool.cleared",
    "rollback.loaded",
    "rollback.left",
    "rollback.stored",
    "restore.derived",
    "rollback.built",
    "restore.renamed",
    "rollback.replaced",
    "rollback.published",
)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


class History:
    """One machine, and what must be true of it."""

    def __init__(self, machine: FlushMachine, seed: int) -> None:
        self.machine = machine
        self.chance = random.Random(seed)
        self.files: Files = {}
        self.must: dict[str, Files] = {}
        self.may: dict[str, list[Files]] = {}
        self.number = 0
        self.died = False
        self.trace: list[str] = []

    def note(self, what: str) -> None:
        self.trace.append(what)

    def arm(self) -> None:
        """Lets it die at some point, some time from now, or not at all."""
        failpoints.disarm_all()
        if self.chance.random() < 0.3:
            return
        point, left = self.chance.choice(POINTS), self.chance.randrange(1, 9)

        def die() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self.note(f"dies at {point}")
                self.died = True
                crash()

        failpoints.arm(point, die)

    def write(self) -> None:
        name, letter = self.chance.choice("abc"), self.chance.choice("uvwxyz")
        first, count = self.chance.randrange(6), self.chance.randrange(1, 20)
        machine = self.machine
        if name in self.files and self.chance.random() < 0.2:
            machine.unlink(name, self.inode_of(name))
            del self.files[name]
            return
        if name not in self.files:
            machine.create(name)
            self.files[name] = b""
        machine.write(self.inode_of(name), first, page(letter) * count)
        content = bytearray(self.files[name].ljust((first + count) * 4096, b"\0"))
        content[first * 4096 : (first + count) * 4096] = page(letter) * count
        self.files[name] = bytes(content)

    def inode_of(self, name: str) -> int:
        from qsfs.store.schema import ROOT_INODE, Entry, Table, u64

        row = self.machine.store.get(Table.ENTRIES, u64(ROOT_INODE) + name.encode())
        assert row is not None
        return Entry.decode(row).inode

    async def snapshot(self, flusher: Flusher) -> None:
        self.number += 1
        name = f"s{self.number}"
        self.may[name] = [dict(self.files)]
        self.note(f"creates {name}")
        await create(flusher, name)
        self.must[name] = self.may.pop(name)[0]

    async def delete(self, flusher: Flusher) -> None:
        names = [snapshot.name for snapshot in flusher.pinning.snapshots]
        if not names:
            return
        name = self.chance.choice(names)
        self.note(f"deletes {name}")
        self.may[name] = [self.must.pop(name)] if name in self.must else self.may[name]
        await flusher.pinning.unpin([name])
        del self.may[name]

    async def mount(self) -> None:
        """One run of the daemon: until it dies, or is stopped after a sync."""
        self.note("mounts")
        async with flushing(self.machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
            self.arm()
            for _ in range(self.chance.randrange(1, 8)):
                step = self.chance.random()
                if step < 0.5:
                    self.write()
                elif step < 0.7:
                    await flusher.sync()
                elif step < 0.9:
                    await self.snapshot(flusher)
                else:
                    await self.delete(flusher)
            await flusher.sync()

    async def roll(self) -> None:
        """A rollback, which may die."""
        names = sorted(self.must)
        if not names:
            return
        name = self.chance.choice(names)
        self.number += 1
        left = f"left{self.number}"
        self.note(f"rolls back to {name}, leaving {left}")
        # Nothing but what it leaves may be under that name, and it is there before anything changes.
        self.may[left] = [dict(self.files)]
        self.arm()
        await roll_back(self.machine, name, left)
        self.must[left] = self.may.pop(left)[0]
        self.files = dict(self.must[name])

    async def check(self) -> None:
        """All that is remembered is true; what is local and what is published are the same."""
        failpoints.disarm_all()
        self.note("is checked")
        async with flushing(self.machine, quiet_seconds=3600) as flusher:
            await flusher.sync()
            images = {name: image.files for name, image in pinned(self.machine.world).items()}
            for name, files in self.must.items():
                assert images.get(name) == files, f"{name} is not what was reported"
            for name, files in images.items():
                assert name in self.must or files in self.may[name], f"{name} holds what it never should"
            found = restore(self.machine.world).files
            assert found == local_files(self.machine)
            self.files = found


async def run(directory: Path, seed: int, rounds: int) -> None:
    with virtual_time() as clock:
        machine = FlushMachine(await make_world(6, k=2, m=2), directory)
        machine.clock = VirtualClock(clock)
        history = History(machine, seed)
        try:
            for _ in range(rounds):
                work = history.roll if history.chance.random() < 0.4 else history.mount
                before = dict(history.files)
                history.died = False
                try:
                    await work()
                except BaseException:
                    if not history.died:
                        raise
                expected = dict(history.files)
                await history.check()
                if not history.died:
                    assert history.files == expected
                elif work == history.roll:
                    possible = [before, *history.must.values()]
                    assert history.files in possible, "neither the old state nor a snapshot"
        except BaseException:
            print(f"seed {seed}:", " | ".join(history.trace))
            raise


@pytest.mark.parametrize("seed", range(6))
async def test_what_was_reported_is_there_whatever_died(tmp_path: Path, seed: int):
    """And what was rolled back to is what the snapshot held, page for page."""
    await run(tmp_path / "cache", seed, 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1100))
async def test_many_more(tmp_path: Path, seed: int):
    """The same, for long."""
    await run(tmp_path / "cache", seed, 14)
