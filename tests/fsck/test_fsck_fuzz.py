"""fsck never raises, whatever the damage: random rows and values, and random bytes of the file."""

from __future__ import annotations

import random
import shutil

import pytest
import trio

from qsfs.fsck.check import fsck
from qsfs.store.schema import Table
from tests.fsck.conftest import Checked
from tests.remote.small_fs import LIMITS

pytestmark = pytest.mark.filterwarnings("error")


def damage(value: bytes, source: random.Random) -> bytes:
    """Bytes that were something once."""
    kind = source.randrange(6)
    if kind == 0 or not value:
        return source.randbytes(source.randrange(80))
    if kind == 1:
        return value[: source.randrange(len(value))]
    if kind == 2:
        return value + source.randbytes(source.randrange(1, 20))
    if kind == 3:
        return bytes(len(value))
    if kind == 4:
        return b"\xff" * len(value)
    at = source.randrange(len(value))
    return value[:at] + bytes([value[at] ^ 1 << source.randrange(8)]) + value[at + 1 :]


def damage_rows(checked: Checked, source: random.Random) -> None:
    """Changes, adds, moves and deletes some rows of some tables."""

    def change(environment, txn):
        for _ in range(source.randrange(1, 30)):
            table = source.choice(list(Table))
            database = environment.databases[table]
            with txn.cursor(database) as cursor:
                rows = [(bytes(key), bytes(value)) for key, value in cursor]
            if not rows or source.random() < 0.1:
                key = source.randbytes(source.choice([1, 3, 7, 8, 9, 15, 16, 17, 100, 511]))
                txn.put(key, source.randbytes(source.randrange(200)), db=database)
                continue
            key, value = source.choice(rows)
            what = source.randrange(4)
            if what == 0:
                txn.delete(key, db=database)
            elif what == 1:
                moved = damage(key, source)[:511] or b"\0"
                txn.put(moved, value, db=database)
            else:
                txn.put(key, damage(value, source), db=database)

    checked.edit(change)


@pytest.mark.parametrize("seed", range(40))
async def test_random_rows(checked: Checked, seed: int):
    source = random.Random(seed)
    damage_rows(checked, source)
    report = await checked.fsck()
    assert report.exit_code & ~(4 | 8) == 0
    assert not [reason for reason in report.failures if "wholly" in reason]
    report.to_json()
    list(report.sentences())
    await checked.fsck(repair=True)
    again = await checked.fsck(repair=True)
    last = await checked.fsck(repair=True)
    assert last.count() <= again.count()


@pytest.mark.parametrize("seed", range(6))
async def test_random_rows_and_backends(checked: Checked, seed: int, expect_log):
    expect_log(r"", optional=True)
    source = random.Random(1000 + seed)
    damage_rows(checked, source)
    for store in checked.fs.world.data:
        for key in list(store.keys()):
            if source.random() < 0.15:
                store.rot(key, lambda value: damage(value, source))
            elif source.random() < 0.05:
                store.lose(key)
    for options in ({}, {"deep": True}, {"deep": True, "repair": True}):
        report = await checked.fsck(remote=True, **options)
        assert report.exit_code in range(16)


@pytest.mark.parametrize("seed", range(20))
async def test_random_bytes_of_the_file(checked: Checked, seed: int):
    """LMDB's own pages among them: the verifier must see it before LMDB walks there."""
    source = random.Random(2000 + seed)
    path = checked.directory / "data.mdb"
    data = bytearray(path.read_bytes())
    for _ in range(source.choice([1, 3, 30, 300])):
        at = source.randrange(len(data))
        length = source.choice([1, 1, 8, 100])
        data[at : at + length] = source.randbytes(len(data[at : at + length]))
    if source.random() < 0.2:
        del data[source.randrange(len(data)) :]
    path.write_bytes(bytes(data))
    report = await checked.fsck()
    assert report.exit_code & ~(4 | 8) == 0
    report = await checked.fsck(repair=True)
    assert report.exit_code in range(16)


async def test_an_empty_file_and_a_directory_in_its_place(checked: Checked, scratch):
    path = checked.directory / "data.mdb"
    path.write_bytes(b"")
    assert (await checked.fsck()).exit_code & (4 | 8)
    path.unlink()
    path.mkdir()
    assert (await checked.fsck()).exit_code & (4 | 8)
    shutil.rmtree(path)
    report = await fsck(scratch / "nowhere", LIMITS, clock=checked.fs.clock, backends=None)
    assert report.exit_code == 8
    await trio.lowlevel.checkpoint()
