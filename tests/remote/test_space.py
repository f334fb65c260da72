"""statfs: what still finds a place on the backends, not what they have in all."""

from __future__ import annotations

from pathlib import Path

import trio
from hypothesis import given
from hypothesis import strategies as st

from qsfs.daemon.space import DaemonSpace
from qsfs.filesystem.space import SpaceReport
from qsfs.remote.placement import largest_share
from qsfs.store.schema import BLOCK_SIZE, PAGE
from tests.remote.small_fs import SmallFs, noise

MIB = 1 << 20
K, M = 4, 2


def placed(free: list[int], n: int) -> int:
    """Packs of shards of one byte that find a place, the fullest backends first."""
    left, packs = sorted(free), 0
    while sum(count > 0 for count in left) >= n:
        left = sorted(count - (i >= len(left) - n) for i, count in enumerate(left))
        packs += 1
    return packs


@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 9))
def test_the_room_is_that_of_the_packs_that_find_a_place(free: list[int], n: int) -> None:
    assert largest_share(free, n) == placed(free, n)


class Asked:
    """A space whose backends have answered once, and what was sent to them since."""

    def __init__(self, fs: SmallFs) -> None:
        self.sent: dict[str, int] = {}
        self.fs = fs
        code = fs.world.code
        self.space = DaemonSpace(fs.store, fs.members, code, lambda name: self.sent.get(name, 0), lambda: False)

    async def report(self, *, again: bool = False) -> SpaceReport:
        if again:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.space.run)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        return self.space.report()


async def test_what_one_backend_has_more_than_the_others_is_not_shown(tmp_path: Path, autojump_clock) -> None:
    fs = await SmallFs.make(tmp_path / "fs", 6, k=K, m=M)
    for store in fs.world.data:
        store.limit_bytes = 10 * MIB
    asked = Asked(fs)
    even = await asked.report(again=True)
    assert 0.99 * K * 10 * MIB < even.free_bytes <= K * 10 * MIB
    fs.world.data[2].limit_bytes = 1000 * MIB
    assert (await asked.report(again=True)).free_bytes <= even.free_bytes + PAGE
    fs.world.data[2].limit_bytes = MIB
    low = await asked.report(again=True)
    assert 0.9 * K * MIB < low.free_bytes <= K * MIB
    assert low.total_bytes >= low.free_bytes
    fs.close()


async def test_a_backend_that_takes_nothing_has_no_room(tmp_path: Path, autojump_clock) -> None:
    fs = await SmallFs.make(tmp_path / "fs", 7, k=K, m=M)
    for store in fs.world.data:
        store.limit_bytes = 10 * MIB
    asked = Asked(fs)
    before = await asked.report(again=True)
    fs.world.data[0].locked = True
    after = await asked.report(again=True)
    assert after.free_bytes < before.free_bytes * 6.5 / 7
    assert 0.99 * K * 10 * MIB < after.free_bytes <= K * 10 * MIB
    fs.close()


async def test_what_is_written_takes_room_before_and_after_it_is_uploaded(tmp_path: Path, autojump_clock) -> None:
    fs = await SmallFs.make(tmp_path / "fs", 6, k=K, m=M)
    for store in fs.world.data:
        store.limit_bytes = 10 * MIB
    asked = Asked(fs)
    empty = await asked.report(again=True)
    data = noise(64 * BLOCK_SIZE)
    number = fs.create("file")
    fs.overwrite(number, 0, data)
    assert (await asked.report()).free_bytes <= empty.free_bytes - len(data)
    fs.commit()
    local = await asked.report()
    assert empty.free_bytes - 2 * len(data) < local.free_bytes <= empty.free_bytes - len(data)
    for member in fs.members:
        asked.sent[member.name] = len(data) // K
    sent = await asked.report()
    assert sent.free_bytes <= local.free_bytes - len(data) + PAGE
    assert sent.total_bytes >= empty.total_bytes - len(data)
    fs.close()
