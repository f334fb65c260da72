"""statfs: what still finds a place on the backends, not what they have in all."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qsfs.daemon.space import DaemonSpace
from qsfs.filesystem.space import SpaceReport
from qsfs.remote import capacity
from qsfs.remote.capacity import largest_share
from qsfs.remote.members import Member
from qsfs.remote.placement import assign, group_count, score
from qsfs.store.schema import BLOCK_SIZE, PAGE
from tests.remote.small_fs import SmallFs, noise
from tests.remote.test_placement import entry

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
    assert largest_share([[room] for room in free], n) == placed(free, n)


@given(
    st.lists(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=8), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(0, 40),
)
def test_each_step_fills_some_backend_however_unequal_groups_are(
    groups: list[list[int]], n: int, bits: int
) -> None:
    """`df` is answered between two requests: it may take no more steps than there are backends."""
    rooms = [[room >> bits for room in group] for group in groups]
    with mock.patch.object(capacity, "_step", wraps=capacity._step) as step:
        share = largest_share(rooms, n)
    assert step.call_count <= sum(map(len, rooms)) + 1
    assert n * share <= sum(map(sum, rooms))


def test_rooms_of_which_rounding_left_a_byte_end() -> None:
    assert largest_share([[474, 33, 509, 70], [611, 58, 165, 588, 372, 209, 131]], 6) > 400


ROOMS = {
    "two sizes": ([500] * 6 + [250] * 6, [""] * 12, 10),
    "one is small": ([500] * 11 + [25], [""] * 12, 10),
    "one is full": ([500] * 11 + [0], [""] * 12, 10),
    "a small group": ([300] * 8 + [100] * 4, ["a"] * 4 + ["b"] * 4 + ["c"] * 4, 10),
    "a group that is soon full": ([300] * 10 + [30] * 10, ["a"] * 10 + ["b"] * 10, 10),
    "groups of all sizes": ([300, 500, 200, 400] * 4, ["a"] * 6 + ["b"] * 6 + ["c"] * 4, 10),
    "as many as shards": ([90, 300, 300, 300, 300], [""] * 5, 5),
}


@pytest.mark.parametrize(("free", "groups", "n"), ROOMS.values(), ids=ROOMS)
def test_packs_are_placed_in_the_room_that_is_shown(free: list[int], groups: list[str], n: int) -> None:
    """By what places them: about so many, whatever backends and groups have in all."""
    by_group: dict[str, list[int]] = {}
    for number, (room, group) in enumerate(zip(free, groups, strict=True)):
        by_group.setdefault(group or str(number), []).append(room)
    shown = largest_share(list(by_group.values()), n)
    assert 0.85 * shown <= placed_by_placement(free, groups, n) <= 1.05 * shown


def placed_by_placement(free: list[int], groups: list[str], n: int) -> int:
    """Packs of shards of one byte that `assign` finds n places for, the room of the last step known."""
    left, packs, source = list(free), 0, random.Random(1)
    members = [
        cast("Member", SimpleNamespace(number=number, entry=entry(number, group)))
        for number, group in enumerate(groups)
    ]
    while len(takers := [member for member in members if left[member.number]]) >= n:
        pack = source.randbytes(16)
        ranked = sorted(takers, key=lambda m: -score(pack, m.entry.identity, left[m.number]))
        for member in assign(range(n), ranked, [], n=n, groups=group_count(members)).values():
            left[member.number] -= 1
        packs += 1
    return packs


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
    fs.world.data[0].locked = False
    draining = next(iter(fs.members))
    draining.entry = dataclasses.replace(draining.entry, state="draining")
    assert (await asked.report(again=True)).free_bytes == after.free_bytes
    assert 0.99 * K * 10 * MIB < after.free_bytes <= K * 10 * MIB
    fs.close()


async def test_a_full_backend_leaves_the_room_of_the_others(tmp_path: Path, autojump_clock) -> None:
    """Also below n: then no pack finds its n places, however much the others have."""
    fs = await SmallFs.make(tmp_path / "fs", 7, k=K, m=M)
    for store in fs.world.data:
        store.limit_bytes = 10 * MIB
    asked = Asked(fs)
    fs.world.data[0].limit_bytes = 1
    assert 0.99 * K * 10 * MIB < (await asked.report(again=True)).free_bytes <= K * 10 * MIB
    fs.world.data[1].limit_bytes = 1
    full = await asked.report(again=True)
    assert full.free_bytes <= K * PAGE and full.total_bytes >= full.free_bytes
    fs.close()


async def test_what_is_not_known_is_taken_from_what_is(tmp_path: Path, autojump_clock) -> None:
    """No backend: the cache's own room.  Some: the others count as they do on average, so df is not of a few."""
    fs = await SmallFs.make(tmp_path / "fs", 8, k=K, m=M)
    for number, store in enumerate(fs.world.data):
        store.limit_bytes = (10 + number % 2) * MIB
    asked = Asked(fs)
    limits = fs.store.limits
    none = await asked.report()
    assert limits.full_bytes - PAGE < none.total_bytes <= limits.full_bytes
    assert 0 < none.free_bytes <= limits.full_bytes - fs.store.used_bytes
    for backend in list(fs.backends.values())[2:]:
        backend.down = True
    some = await asked.report(again=True)
    for backend in fs.backends.values():
        backend.down = False
    whole = await asked.report(again=True)
    assert abs(some.free_bytes - whole.free_bytes) < 0.05 * whole.free_bytes
    for backend in fs.backends.values():
        backend.down = True
    assert await asked.report(again=True) == whole, "who answered once is known"
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
