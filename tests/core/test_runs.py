"""A long read sees what reads of single pages see, whatever state and layer each page is in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import random
from pathlib import Path

import pytest

from qsfs.store import prefetch, reading
from qsfs.store.reading import LocalDamage
from qsfs.store.schema import BLOCK_PAGES, PAGE, Table, u64_pair
from tests.core.machine import Machine

PAGES = 64


def single(machine: Machine, number: int, first: int, count: int) -> bytes:
    return b"".join(machine.page(number, first + i) for i in range(count))


def run(machine: Machine, number: int, first: int, count: int) -> bytes:
    return machine.contents.read(machine.inode(number), first * PAGE, count * PAGE)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_read_is_its_single_reads(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    machine = Machine(tmp_path)
    number = machine.create("file")
    machine.write(number, 0, choose.randbytes(PAGES * PAGE))
    for _ in range(12):
        first = choose.randrange(PAGES)
        size = choose.randrange(1, PAGES - first + 1)
        what = choose.randrange(5)
        if what == 0:
            machine.write(number, first, choose.randbytes(size * PAGE))
        elif what == 1:
            machine.truncate(number, first)
            machine.truncate(number, PAGES)
        elif what == 2:
            machine.write(number, first, choose.randbytes(PAGE))
        else:
            machine.commit()
        for _ in range(5):
            begin = choose.randrange(PAGES)
            count = choose.randrange(1, PAGES - begin + 1)
            assert run(machine, number, begin, count) == single(machine, number, begin, count)
    machine.close()


def test_a_damaged_page_in_a_long_read_is_named_and_never_returned(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    number = machine.create("file")
    machine.write(number, 0, random.Random(1).randbytes(PAGES * PAGE))
    machine.commit()
    key = u64_pair(number, 7)
    environment = machine.store.environment
    for change, page in (
        (lambda value: bytes([value[0] ^ 1]) + value[1:], 0),
        (lambda value: value[:-1] + bytes([value[-1] ^ 1]), BLOCK_PAGES - 1),
        (lambda value: value[:-1], 0),
    ):
        with environment.write() as txn:
            right = bytes(txn.get(key, db=environment.databases[Table.VALUES]))
            txn.put(key, change(right), db=environment.databases[Table.VALUES])
        machine.store.layers.renew_view()
        with pytest.raises(LocalDamage) as caught:
            run(machine, number, 0, PAGES)
        assert caught.value.page == 7 * BLOCK_PAGES + page
        assert run(machine, number, 32, 32) == single(machine, number, 32, 32)
        with environment.write() as txn:
            txn.put(key, right, db=environment.databases[Table.VALUES])
        machine.store.layers.renew_view()
    assert run(machine, number, 0, PAGES) == random.Random(1).randbytes(PAGES * PAGE)
    machine.close()


def test_reads_that_follow_each_other_are_read_ahead_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for what a stream reads next, at the place where its values lie, and no more often."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        reading, "read_ahead", lambda value, skip, size: asked.append((prefetch.address(value) + skip, size))
    )
    machine = Machine(tmp_path)
    number = machine.create("file")
    machine.write(number, 0, random.Random(1).randbytes(PAGES * PAGE))
    machine.commit()
    keys = [u64_pair(number, block) for block in range(PAGES // BLOCK_PAGES)]
    places = [prefetch.address(value) for _, value in machine.store.layers.view.get_all(Table.VALUES, keys)]
    run(machine, number, 0, 16)
    assert asked == [(places[0], 32 * PAGE)]
    run(machine, number, 16, 16)
    assert asked[1:] == [(places[8], 16 * PAGE)]
    run(machine, number, 32, 16)
    assert asked[2:] == [(places[12], 16 * PAGE)]
    run(machine, number, 0, 16)
    assert asked[3:] == [(places[0], 32 * PAGE)]
    machine.close()


def test_reading_ahead_needs_no_right_guess() -> None:
    """The address is the value's, and one behind the end of the map does no harm."""
    content = bytearray(3 * PAGE)
    exact = ctypes.addressof(ctypes.c_char.from_buffer(content))
    assert prefetch.address(memoryview(content)[5:]) == exact + 5
    with contextlib.closing(mmap.mmap(-1, PAGE)) as mapped:
        view = memoryview(mapped).toreadonly()
        prefetch.read_ahead(view, 0, 1 << 40)
        prefetch.read_ahead(view, 1 << 46, PAGE)
        assert view[:PAGE] == bytes(PAGE)
        view.release()
