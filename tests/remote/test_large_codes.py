"""Codes from 1+1 to 20+80 and to n = 255, whole: what is said to be survived is survived, all else is refused.

Format, flush, restore and reading are those of a mount; see `tests.remote.whole`.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from trio.testing import MockClock

from qsfs.errors import DataLost, QuorumUnavailable, Unavailable
from qsfs.format.erasure import CodeParams
from qsfs.format.head import parse_head_key
from qsfs.format.shard import parse_shard_key
from qsfs.remote.gather import Gathering
from qsfs.remote.members import Member
from qsfs.remote.quorum import FleetAssessment
from qsfs.store.schema import PAGE
from tests.remote.small_fs import SmallFs, noise
from tests.remote.whole import WholeFleet

FILES = {"small": b"a few bytes", "large": noise(700_001), "empty": b""}
LATER = {"later": noise(300_003, 2)}
UNREACHABLE = r"connection refused|read from others|nothing is stored there until it shows its identity"


SMALL = [(1, 1, 2), (1, 1, 3), (2, 3, 7)]
LARGE = [(20, 80, 100), (200, 55, 255)]


def named(code: tuple[int, int, int]) -> str:
    k, m, count = code
    return f"{k}+{m} on {count}"


@pytest.fixture(params=[*SMALL, *LARGE], ids=named)
def whole(request, scratch: Path, clock: MockClock, expect_log) -> Iterator[WholeFleet]:
    expect_log(UNREACHABLE, optional=True)
    k, m, count = request.param
    with WholeFleet(count, CodeParams(k, k + m), scratch, clock) as fleet:
        yield fleet


async def written(whole: WholeFleet) -> FleetAssessment:
    """Formats, writes `FILES`, and publishes them in full packs; returns what the format said."""
    report = await whole.format()
    async with whole.mounted("first") as mount:
        for name, data in FILES.items():
            mount.write(name, data)
        assert await mount.sync() == "full"
    return report.assessment


def some(whole: WholeFleet, count: int, seed: int = 1) -> list[int]:
    """So many servers."""
    return random.Random(seed).sample(whole.numbers, count)


async def test_what_may_be_down_for_a_restore_with_proof_may_be_lost(whole: WholeFleet, clock):
    """The newest generation comes back elsewhere, proved to be the newest, and every byte can be read."""
    said = await written(whole)
    whole.down.update(some(whole, min(said.code.m, said.quorum.needed - 1)))
    report = await whole.restore("second")
    assert report.withstands >= 0
    assert await whole.read("second") == FILES


async def test_with_a_quorum_gone_nothing_is_proved_and_force_reads_what_m_losses_leave(whole: WholeFleet, clock):
    """A code may survive more than the proof does, as 20+80 on 100: then all is there, for who says so."""
    said = await written(whole)
    lost = some(whole, max(said.code.m, said.quorum.needed))
    whole.down.update(lost[: said.quorum.needed])
    with pytest.raises(QuorumUnavailable):
        await whole.restore("second")
    whole.down = set(lost[: said.code.m])
    report = await whole.restore("second", force=True)
    assert (report.withstands >= 0) == (said.code.m < said.quorum.needed)
    assert await whole.read("second") == FILES


async def only_written(whole: WholeFleet, said: FleetAssessment) -> list[int]:
    """Publishes `LATER` on as few servers as may be; returns those."""
    away = some(whole, said.down_while_publishing)
    async with whole.mounted("first") as mount:
        whole.down.update(away)
        for name, data in LATER.items():
            mount.write(name, data)
        await mount.sync()
    whole.down.clear()
    return [number for number in whole.numbers if number not in away]


async def test_a_generation_that_is_only_written_bears_the_losses_that_it_is_said_to(whole: WholeFleet, clock):
    """As many backends are down for it as flushing bears, and then come back with nothing of it."""
    said = await written(whole)
    holders = await only_written(whole, said)
    whole.down.update(holders[: said.code.write_quorum - said.code.k])
    report = await whole.restore("second")
    assert report.withstands >= 0
    assert await whole.read("second") == FILES | LATER


@pytest.mark.parametrize("whole", SMALL, ids=named, indirect=True)
async def test_one_loss_more_than_a_written_generation_bears_is_refused(whole: WholeFleet, clock):
    """Never an older generation in its place, and nothing half."""
    said = await written(whole)
    holders = await only_written(whole, said)
    whole.down.update(holders[: said.code.write_quorum - said.code.k + 1])
    with pytest.raises((DataLost, Unavailable, QuorumUnavailable)):
        await whole.restore("second")
    assert not (whole.config("second").cache.directory / "data.mdb").exists()


async def test_backends_that_lie_are_as_good_as_lost_and_no_worse(whole: WholeFleet, clock, expect_log):
    """Some are gone, others rot, forget, mix up, or went back to before the last generation: still all comes back."""
    expect_log(r"rotten|damaged|absent|another|not authentic", logging.WARNING, optional=True)
    said = await written(whole)
    images = {number: (whole.data[number].copy(), whole.control[number].copy()) for number in whole.numbers}
    async with whole.mounted("first") as mount:
        for name, data in LATER.items():
            mount.write(name, data)
        assert await mount.sync() == "full"
    wrong = some(whole, min(said.code.m, said.quorum.needed - 1))
    liars = wrong[: min(-(-len(wrong) // 2), max(1, said.quorum.may_be_stale))]
    whole.down.update(wrong[len(liars) :])
    for turn, number in enumerate(liars):
        data, control = whole.data[number], whole.control[number]
        shards = [key for key in list(data.keys()) if parse_shard_key(key)]
        if turn % 4 == 0:
            heads = [key for key in list(control.keys()) if parse_head_key(key)]
            for store, keys in ((data, shards), (control, heads)):
                for key in keys:
                    store.rot(key, lambda value: value[:-1] + bytes([value[-1] ^ 1]))
        elif turn % 4 == 1:
            for store, image in zip((data, control), images[number], strict=True):
                store.go_back_to(image)
        elif turn % 4 == 2:
            for key in shards:
                data.lose(key)
        else:
            values = [data.peek(key) or b"" for key in shards]
            for key, value in zip(shards, [*values[1:], values[0]], strict=True):
                data.rot(key, lambda _, value=value: value)
    report = await whole.restore("second")
    assert report.withstands >= 0
    assert await whole.read("second") == FILES | LATER


async def test_hunting_for_a_lost_pack_looks_at_each_question_a_few_times(
    scratch: Path, autojump_clock, monkeypatch, expect_log
):
    """20+80 on 100 backends: 9,000 questions are asked, some at a time, and the loop is not held up in between."""
    expect_log("absent; it is read from others", logging.WARNING, count=90)
    expect_log("all 100 backends answered, and of its 100 shards 90 are absent", logging.ERROR, count=1)
    fs = await SmallFs.make(scratch / "cache", 100, k=20, m=80)
    number = fs.remote_file("a", noise(8 * PAGE))
    for place, key in fs.shard_keys(1)[10:]:
        fs.world.data[place - 1].lose(key)
    looked_at: Counter[tuple[int, int]] = Counter()
    askable = Gathering._askable

    def counted(self: Gathering, shard: int, place: int) -> Member | None:
        looked_at[shard, place] += 1
        return askable(self, shard, place)

    monkeypatch.setattr(Gathering, "_askable", counted)
    async with fs.fetching() as fetcher:
        with pytest.raises(DataLost):
            await fetcher.fetch(number, 0, 8)
    fs.close()
    assert len(looked_at) >= 90 * 100, "each of the missing shards at each backend"
    assert looked_at.total() < 10 * 100 * 100
