"""Fetch against backends that are slow, lie, lose, flap and hang, on a virtual clock.

While at most m of them misbehave, no read fails; whatever they do, no wrong byte is installed; and
once they behave again everything comes.
"""

from __future__ import annotations

import random

import pytest
import trio

from qsfs.backend.faults import Faults, with_faults
from qsfs.backend.memory import MemoryBackend
from qsfs.errors import DataLost, Unavailable
from qsfs.remote.members import Member, Members
from qsfs.store.schema import PAGE, InodeFlag
from tests.remote.simulation import repeatable
from tests.remote.small_fs import SmallFs, noise

PAGES = 60


class Simulation:
    """One file system whose backends are replaced by faulty ones."""

    def __init__(self, fs: SmallFs, seed: int) -> None:
        self.fs = fs
        self.random = random.Random(seed)
        self.faults = {number: Faults(seed=seed * 100 + number) for number in fs.backends}
        self.contents: dict[int, bytes] = {}
        self.failed = 0
        self.reads = 0
        fs.members = Members(
            Member(
                member.entry,
                with_faults(
                    MemoryBackend(fs.world.data[member.number - 1], latency=self.latency),
                    self.faults[member.number],
                ),
                member.control,
                fs.clock,
                identified=True,
            )
            for member in fs.members
        )

    def latency(self, call: str, size: int) -> float:
        return self.random.choice((0.001, 0.002, 0.005, 0.02, 0.3))

    def misbehave(self, numbers: list[int]) -> None:
        """Gives these backends faults, and none to the others."""
        r = self.random
        for number, faults in self.faults.items():
            for name in ("hang", "fail", "flip", "truncate", "slow"):
                setattr(faults, name, 0.0)
            faults.down, faults.flap = False, None
            if number not in numbers:
                continue
            kind = r.choice(("down", "flap", "hang", "fail", "flip", "truncate", "slow"))
            if kind == "down":
                faults.down = True
            elif kind == "flap":
                faults.flap = (r.uniform(0.5, 20), r.uniform(0.5, 20))
            elif kind == "slow":
                faults.slow = r.uniform(0.5, 50)
            else:
                setattr(faults, kind, r.choice((0.2, 0.7, 1.0)))

    async def read(self, fetcher) -> None:
        """One reader, as an application has it: fetch until the pages are there."""
        r = self.random
        number = r.choice(list(self.contents))
        first = r.randrange(PAGES)
        count = min(PAGES - first, r.choice((1, 1, 4, 20, PAGES)))
        self.reads += 1
        for _ in range(50):
            try:
                await fetcher.fetch(number, first, count)
            except (Unavailable, DataLost):
                self.failed += 1
                return
            if None not in self.fs.read(number, first, count):
                break
        else:
            raise AssertionError("a fetch that returned did not bring its pages")
        self.check(number)

    def check(self, number: int) -> None:
        for page, data in enumerate(self.fs.read(number, 0, PAGES)):
            assert data is None or data == self.contents[number][page * PAGE : (page + 1) * PAGE]

    def evict(self) -> None:
        for number in self.contents:
            self.fs.evict(number)


async def simulate(fs: SmallFs, seed: int, most_bad: int) -> Simulation:
    repeatable(seed)
    simulation = Simulation(fs, seed)
    r = simulation.random
    for i in range(3):
        data = noise(PAGES * PAGE, seed * 10 + i)
        number = fs.remote_file(
            f"f{i}", data, extent_pages=r.choice((1, 4, 16)), extents_in_pack=r.choice((2, 8))
        )
        simulation.contents[number] = data
    if r.random() < 0.5:
        with fs.store.change() as change:
            change.patch(next(iter(simulation.contents)), flags=int(InodeFlag.WAIT))
    async with fs.fetching() as fetcher:
        for _ in range(6):
            bad = r.sample(sorted(simulation.faults), r.randrange(most_bad + 1))
            simulation.misbehave(bad)
            async with trio.open_nursery() as nursery:
                for _ in range(r.randrange(1, 12)):
                    nursery.start_soon(simulation.read, fetcher)
                await trio.sleep(r.uniform(0, 300))
                if most_bad > fs.world.code.m:
                    simulation.misbehave([])
            simulation.evict()
        simulation.misbehave([])
        await trio.sleep(120)
        failed = simulation.failed
        for number in simulation.contents:
            await fetcher.fetch(number, 0, PAGES)
            simulation.check(number)
            assert None not in fs.read(number, 0, PAGES)
        assert simulation.failed == failed
        assert len(fetcher.waits) == 0 and len(fetcher.reader.watch) == 0
    return simulation


@pytest.mark.parametrize("seed", range(25))
async def test_with_up_to_m_bad_backends_no_read_fails(scratch, autojump_clock, expect_log, seed):
    expect_log(r"read from others|has been waiting", optional=True)
    fs = await SmallFs.make(scratch / "cache", 7, k=3, m=2)
    simulation = await simulate(fs, seed, most_bad=2)
    assert simulation.reads and not simulation.failed
    fs.close()


@pytest.mark.parametrize("seed", range(25))
async def test_with_more_no_wrong_byte_is_read_and_all_comes_back(scratch, autojump_clock, expect_log, seed):
    expect_log(r"read from others|has been waiting|not here after|is lost", optional=True)
    fs = await SmallFs.make(scratch / "cache", 7, k=3, m=2)
    await simulate(fs, 10_000 + seed, most_bad=7)
    fs.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 2000))
@pytest.mark.parametrize("most_bad", [2, 7])
async def test_many_more(scratch, autojump_clock, expect_log, seed, most_bad):
    expect_log(r"read from others|has been waiting|not here after|is lost", optional=True)
    fs = await SmallFs.make(scratch / "cache", 7, k=3, m=2)
    simulation = await simulate(fs, seed, most_bad)
    assert most_bad > 2 or not simulation.failed
    fs.close()
