"""After any stop the server starts, and what was whole and durable before is there."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qsfs.clock import FixedClock
from qsfs.zdb.instance import DEFAULT, Instance, InstanceOptions
from qsfs.zdb.namespace import Namespace, WriteFailed
from qsfs.zdb.record import FILE_HEADER, HEADER_BYTES, RECORD_MARK_BYTES, decode_record, encode_record
from qsfs.zdb.settings import Unusable

FILE_BYTES = 1 << 20


@pytest.fixture
def opened(scratch: Path):
    """Opens (again) the namespace of the test; closes it after the test without syncing."""
    last: list[Namespace] = []

    def open_again(*, durable: bool = False, file_bytes: int = FILE_BYTES, directory: str = "n") -> Namespace:
        for namespace in last:
            namespace.close(keep=False)
        last.clear()
        path = scratch / directory
        settings = {"clock": FixedClock(1), "file_bytes": file_bytes, "durable_appends": durable}
        make = Namespace.load if path.exists() else Namespace.create
        last.append(make(b"n", path, **settings))
        return last[0]

    yield open_again
    for namespace in last:
        namespace.close(keep=False)


async def contents(namespace: Namespace) -> dict[bytes, bytes]:
    return {entry.key: bytes(await namespace.value(entry)) for entry in namespace.index.after(None)}


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


async def test_everything_is_there_after_an_orderly_stop(opened):
    namespace = opened()
    for number in range(50):
        await namespace.put(b"%d" % number, b"v" * number)
    await namespace.put(b"7", b"again")
    await namespace.delete(b"8")
    before = await contents(namespace)
    order = [entry.key for entry in namespace.index.after(None)]
    namespace.close()
    after = opened()
    assert await contents(after) == before
    assert [entry.key for entry in after.index.after(None)] == order
    assert after.index.data_bytes == namespace.index.data_bytes


async def test_a_tail_torn_anywhere_is_cut_and_all_before_it_stays(opened, scratch, expect_log):
    expect_log("torn", logging.WARNING)
    namespace = opened()
    await namespace.put(b"kept", b"1" * 100)
    whole = (scratch / "n" / "d0").stat().st_size
    await namespace.put(b"torn", b"2" * 100)
    end = (scratch / "n" / "d0").stat().st_size
    namespace.close(keep=False)
    for size in range(whole + 1, end):
        shutil.copytree(scratch / "n", scratch / "copy")
        os.truncate(scratch / "copy" / "d0", size)
        after = opened(directory="copy")
        assert await contents(after) == {b"kept": b"1" * 100}, size
        assert (scratch / "copy" / "d0").stat().st_size == whole
        await after.put(b"next", b"3")
        assert await contents(opened(directory="copy")) == {b"kept": b"1" * 100, b"next": b"3"}
        shutil.rmtree(scratch / "copy")


@pytest.mark.parametrize("size", [0, 1, FILE_HEADER.size - 1])
async def test_a_torn_file_header_does_no_harm(opened, scratch, expect_log, size):
    expect_log("torn", logging.WARNING, optional=True)
    namespace = opened()
    await namespace.put(b"k", b"v")
    namespace.close(keep=False)
    os.truncate(scratch / "n" / "d0", size)
    after = opened()
    assert await contents(after) == {}
    await after.put(b"new", b"value")
    assert await contents(opened()) == {b"new": b"value"}


async def test_files_of_another_version_are_not_touched(opened, scratch):
    namespace = opened()
    await namespace.put(b"k", b"v")
    namespace.close()
    change(scratch / "n" / "d0", 8, b"\x02")
    before = (scratch / "n" / "d0").read_bytes()
    with pytest.raises(Unusable, match="version 2"):
        opened()
    assert (scratch / "n" / "d0").read_bytes() == before


async def test_a_torn_value_of_full_length_is_cut(opened, scratch, expect_log):
    """After a power cut the length may be on the disk without the bytes."""
    expect_log("cut the torn record", logging.WARNING, count=1)
    namespace = opened()
    await namespace.put(b"k", b"old")
    namespace.close()
    namespace = opened()
    await namespace.put(b"k", b"n" * 100)
    place = namespace.index.get(b"k").place[1]
    namespace.close(keep=False)
    change(scratch / "n" / "d0", place + HEADER_BYTES + 1, bytes(100))
    assert await contents(opened()) == {b"k": b"old"}


async def test_a_torn_value_before_a_whole_one_is_voided_for_good(opened, scratch, expect_log):
    """Pages reach the disk in any order: the acknowledged value must stand, at every later start too."""
    expect_log("voided the torn record", logging.WARNING, count=1)
    namespace = opened(durable=True)
    await namespace.put(b"k", b"acknowledged")
    place = namespace.index.get(b"k").place
    namespace._durable_appends = False
    await namespace.put(b"k", b"never acknowledged")
    torn = namespace.index.get(b"k").place[1]
    await namespace.put(b"other", b"whole")
    namespace.close(keep=False)
    change(scratch / "n" / "d0", torn + HEADER_BYTES + 1, bytes(18))
    for _ in range(3):
        after = opened()
        assert await contents(after) == {b"k": b"acknowledged", b"other": b"whole"}
        assert after.index.get(b"k").place == place
        await after.put(b"other", b"whole")
        after.close()


async def test_rot_in_a_durable_value_is_for_check_to_find(opened, scratch):
    namespace = opened(durable=True)
    await namespace.put(b"rotten", b"a" * 100)
    await namespace.put(b"sound", b"b" * 100)
    place = namespace.index.get(b"rotten").place[1]
    namespace.close()
    change(scratch / "n" / "d0", place + HEADER_BYTES + 6 + 50, b"X")
    after = opened()
    entry = after.index.get(b"rotten")
    assert not await after.is_whole(entry)
    assert bytes(await after.value(entry)) == b"a" * 50 + b"X" + b"a" * 49
    assert await after.is_whole(after.index.get(b"sound"))


@pytest.mark.parametrize("offset", [0, 2, 3, 4, 12, 30, HEADER_BYTES])
async def test_a_damaged_header_costs_only_its_own_record(opened, scratch, expect_log, offset):
    expect_log("skipped .* damaged bytes", logging.WARNING)
    namespace = opened()
    for key in (b"before", b"damaged", b"after", b"last"):
        await namespace.put(key, key * 50_000)
    place = namespace.index.get(b"damaged").place[1]
    namespace.close()
    path = scratch / "n" / "d0"
    change(path, place + offset, bytes([path.read_bytes()[place + offset] ^ 0x40]))
    for _ in range(2):
        after = opened(file_bytes=16 << 20)
        assert sorted(set(await contents(after)) - {b"more"}) == [b"after", b"before", b"last"]
        await after.put(b"more", b"x")
        after.close()
    assert (await contents(opened()))[b"more"] == b"x"


async def test_a_value_that_looks_like_records_is_never_taken_for_some(opened, scratch, expect_log):
    """A client knows the format but not the seed: searching a damaged file must not obey its values."""
    expect_log("skipped .* damaged bytes", logging.WARNING)
    namespace = opened()
    fake = encode_record(b"forged", b"", time_s=1, durable=0, seed=0)
    await namespace.put(b"bait", (fake + RECORD_MARK_BYTES) * 2000)
    await namespace.put(b"real", b"1")
    place = namespace.index.get(b"bait").place[1]
    namespace.close()
    change(scratch / "n" / "d0", place, b"\0\0")
    assert await contents(opened()) == {b"real": b"1"}


async def test_files_rotate_and_all_are_read_again(opened, scratch):
    namespace = opened(file_bytes=10_000)
    for number in range(40):
        await namespace.put(b"%d" % number, b"%d" % number * 1000)
    assert len(list((scratch / "n").glob("d*"))) > 3
    assert all(path.stat().st_size <= 10_000 for path in (scratch / "n").glob("d*"))
    await namespace.seal_rotated()
    before = await contents(namespace)
    order = [entry.key for entry in namespace.index.after(None)]
    namespace.close()
    after = opened(file_bytes=10_000)
    assert await contents(after) == before
    assert [entry.key for entry in after.index.after(None)] == order


async def test_a_value_larger_than_a_file_gets_one_of_its_own(opened, scratch):
    namespace = opened(file_bytes=10_000)
    await namespace.put(b"small", b"s")
    await namespace.put(b"large", b"l" * 50_000)
    await namespace.put(b"next", b"n")
    assert len(list((scratch / "n").glob("d*"))) == 3
    assert len((await contents(opened(file_bytes=10_000)))[b"large"]) == 50_000


async def test_a_rotated_file_that_was_not_sealed_is_checked(opened, scratch, expect_log):
    expect_log("voided the torn record", logging.WARNING, count=1)
    namespace = opened(file_bytes=10_000)
    await namespace.put(b"torn", b"t" * 6000)
    await namespace.put(b"whole", b"w" * 6000)
    assert namespace.has_unsealed
    namespace.close(keep=False)
    change(scratch / "n" / "d0", FILE_HEADER.size + HEADER_BYTES + 100, bytes(100))
    assert sorted(await contents(opened(file_bytes=10_000))) == [b"whole"]
    assert sorted(await contents(opened(file_bytes=10_000))) == [b"whole"]


@pytest.fixture
def file_limit() -> Callable[[int], None]:
    """Limits the size of every file that this process writes: the kernel then writes as much as fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_what_does_not_fit_on_the_disk_leaves_no_trace(opened, scratch, expect_log, file_limit):
    expect_log("cannot write", logging.ERROR)
    namespace = opened()
    await namespace.put(b"a", b"1" * 1000)
    size = (scratch / "n" / "d0").stat().st_size
    file_limit(size + 500)
    for value in (b"2" * 1000, b"3" * 100_000):
        with pytest.raises(WriteFailed):
            await namespace.put(b"b", value)
        assert (scratch / "n" / "d0").stat().st_size == size, "a partial record must be cut off"
    await namespace.put(b"c", b"fits")
    file_limit((scratch / "n" / "d0").stat().st_size)
    with pytest.raises(WriteFailed):
        await namespace.delete(b"a")
    assert await contents(namespace) == {b"a": b"1" * 1000, b"c": b"fits"}
    file_limit(resource.RLIM_INFINITY)
    await namespace.put(b"b", b"now")
    expected = {b"a": b"1" * 1000, b"b": b"now", b"c": b"fits"}
    assert await contents(namespace) == expected
    namespace.close()
    assert await contents(opened()) == expected


async def test_a_file_that_cannot_be_made_is_asked_for_again(opened, scratch, expect_log, file_limit):
    expect_log("cannot write", logging.ERROR)
    namespace = opened()
    file_limit(3)
    with pytest.raises(WriteFailed):
        await namespace.put(b"a", b"1")
    file_limit(resource.RLIM_INFINITY)
    await namespace.put(b"a", b"1")
    assert await contents(opened()) == {b"a": b"1"}


async def test_a_failed_fsync_is_never_answered_with_success(opened, expect_log, monkeypatch):
    expect_log("cannot write", logging.ERROR)
    namespace = opened(durable=True)
    await namespace.put(b"a", b"1")

    def fail(descriptor: int) -> None:
        raise OSError(5, "injected")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(WriteFailed):
        await namespace.put(b"b", b"2")
    with pytest.raises(WriteFailed):
        await namespace.put(b"b", b"2")
    monkeypatch.undo()
    number = namespace.active_file
    await namespace.put(b"c", b"3")
    assert namespace.active_file > number, "appends go to another file after a failed fsync"


def test_a_namespace_with_damaged_settings_is_left_alone(scratch, expect_log):
    """Without its settings its password is unknown: nobody may enter it, and nothing is overwritten."""
    expect_log("out of service", logging.ERROR, count=1)
    instance = Instance.open(scratch / "i", InstanceOptions(), FixedClock())
    instance.create(b"n")
    instance.close()
    settings = scratch / "i" / "namespaces" / "n" / "settings"
    settings.write_bytes(settings.read_bytes().replace(b"true", b"fals"))
    instance = Instance.open(scratch / "i", InstanceOptions(), FixedClock())
    assert sorted(instance.namespaces) == [DEFAULT]
    assert instance.is_taken(b"n")
    instance.close()


def test_a_record_header_says_all_that_was_put_into_it():
    head = encode_record(b"key", b"value", time_s=7, durable=99, seed=5)
    record = decode_record(memoryview(head), 1000, 5)
    assert record is not None
    assert (record.key, record.value_length, record.time_s, record.durable) == (b"key", 5, 7, 99)
    assert record.value_offset == 1000 + HEADER_BYTES + 3
    assert record.end == record.value_offset + 5
    assert decode_record(memoryview(head), 1000, 6) is None
    for position in range(len(head)):
        damaged = bytearray(head)
        damaged[position] ^= 1
        assert decode_record(memoryview(damaged), 1000, 5) is None
