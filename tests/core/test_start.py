"""What a database reads while it starts is recorded, outlives mounts, and is the last to be evicted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from qsfs.errors import CacheError, FormatMismatch
from qsfs.store import start
from qsfs.store.environment import Environment
from qsfs.store.eviction import Evictor
from qsfs.store.schema import BLOCK_PAGES, LOCAL_SCHEMA_VERSION, PAGE, Table
from qsfs.store.start import CHUNK_PAGES, bits_of, blocks_in, blocks_of
from tests.core.machine import LIMITS, Machine, page

SECONDS = 60.0
MOST_BLOCKS = 100
SCATTERED = [0, 3, 4, 17, 130, CHUNK_PAGES - 1, CHUNK_PAGES]


class Starting(Machine):
    """A machine that records what databases read."""

    most_blocks = MOST_BLOCKS

    def open(self) -> None:
        super().open()
        self.store.start.begin(SECONDS, self.most_blocks)

    def remount(self) -> None:
        """A clean stop, and the next mount."""
        self.store.start.end_all()
        self.save()
        self.crash()

    def save(self) -> None:
        while not self.store.start.save(1):
            pass
        self.commit()

    def recorded(self, number: int) -> list[int]:
        found = []
        for chunk, bits in self.store.start.chunks(number):
            for block, some in blocks_of(chunk, bits):
                found += [block * BLOCK_PAGES + i for i in range(BLOCK_PAGES) if some & 1 << i]
        return found

    def database(self, pages: list[int], name: str = "a.lmdb") -> int:
        number = self.create(name, atomic=True, opened=False)
        for index in pages:
            self.write(number, index, page(chr(97 + index % 26)))
        self.commit()
        return number


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Starting]:
    machine = Starting(tmp_path)
    yield machine
    machine.close()


def test_what_a_database_reads_at_its_start_is_known_to_the_next_mount(machine: Starting):
    number = machine.database([*SCATTERED, 50, 51])
    machine.remount()
    for index in SCATTERED:
        machine.page(number, index)
    machine.remount()
    assert machine.recorded(number) == SCATTERED
    assert machine.store.start.pages == len(SCATTERED)


def test_only_the_first_minutes_count_and_only_what_is_read(machine: Starting):
    """Neither what is read later, nor holes, nor what a write reads."""
    number = machine.database([1, 5, 40])
    machine.remount()
    machine.page(number, 1)
    machine.page(number, 20)
    machine.write_at(number, 5 * PAGE + 1, b"x")
    machine.clock.advance(SECONDS)
    assert machine.store.start.recording
    assert machine.store.start.end_due(10)
    assert not machine.store.start.recording
    machine.page(number, 40)
    machine.remount()
    assert machine.recorded(number) == [1]


def test_a_read_of_many_pages_is_recorded_whole_across_chunks(machine: Starting):
    first = CHUNK_PAGES - 3
    number = machine.database(list(range(first, first + 6)))
    machine.remount()
    machine.contents.read(machine.inode(number), first * PAGE, 6 * PAGE)
    machine.remount()
    assert machine.recorded(number) == list(range(first, first + 6))


def test_files_that_are_no_databases_are_not_recorded(machine: Starting):
    number = machine.create("a.log")
    machine.write(number, 0, page("a"))
    machine.page(number, 0)
    machine.remount()
    assert not machine.store.start.files


def test_a_look_at_a_database_does_not_undo_what_its_start_has_shown(machine: Starting):
    number = machine.database([*SCATTERED, 50])
    for index in SCATTERED:
        machine.page(number, index)
    machine.remount()
    machine.page(number, 50)
    machine.remount()
    assert machine.recorded(number) == sorted([*SCATTERED, 50])


def test_another_start_replaces_the_last(machine: Starting):
    """Else what is recorded would grow with every change of the database."""
    number = machine.database([*SCATTERED, 50, 60, 70])
    for index in SCATTERED:
        machine.page(number, index)
    machine.remount()
    later = [0, 50, 60, 70]
    for index in later:
        machine.page(number, index)
    machine.remount()
    assert machine.recorded(number) == later
    machine.remount()
    assert machine.recorded(number) == later


def test_no_more_is_recorded_than_may_be(machine: Starting, monkeypatch: pytest.MonkeyPatch):
    old = machine.database([0, 4, 8, 12], "old.lmdb")
    number = machine.database(list(range(0, 400, 4)), "new.lmdb")
    for index in (0, 4, 8, 12):
        machine.page(old, index)
    monkeypatch.setattr(start, "MOST_PAGES", 10)
    machine.remount()
    for index in range(0, 400, 4):
        machine.page(number, index)
    assert machine.store.start.full
    machine.remount()
    assert machine.recorded(number) == list(range(0, 40, 4)), "the first ones"
    assert machine.recorded(old) == [], "which nothing read in this mount"


def test_of_files_that_nobody_opened_only_what_is_too_much_is_forgotten(
    machine: Starting, monkeypatch: pytest.MonkeyPatch
):
    for number in (7, 8):
        machine.store.start.seed(number, 0, 1)
        machine.store.start.seed(number, CHUNK_PAGES, 1)
        machine.store.start.seed(number, 2 * CHUNK_PAGES, 1)
    machine.remount()
    starts = machine.store.start
    monkeypatch.setattr(start, "MOST_PAGES", 5)
    starts.note(8, 0, 2)
    starts.note(9, 0, 1)
    starts.end_all()
    assert starts.pages == 5
    assert [len(starts.chunks(number)) for number in (7, 8, 9)] == [2, 1, 1]
    assert machine.recorded(8) == [0, 1] and machine.recorded(9) == [0]


class Counting:
    """Counts in how many chunks blocks are counted: the cost of choosing what is kept."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, bits: int) -> int:
        self.calls += 1
        return blocks_in(bits)


def test_many_files_end_together_a_few_at_a_time_and_at_the_same_cost_each(
    machine: Starting, monkeypatch: pytest.MonkeyPatch
):
    """Requests wait meanwhile: neither a call nor all of them may take longer with the square of the files."""
    files = 1000
    starts = machine.store.start
    for number in range(files):
        starts.note(number, number % 7, 1)
    machine.clock.advance(SECONDS)
    counting = Counting()
    monkeypatch.setattr(start, "blocks_in", counting)
    calls = 1
    while not starts.end_due(10):
        calls += 1
        assert len(starts.files) <= 10 * calls
    assert starts.files == list(range(files)) and starts.pages == files
    assert files / 10 <= calls <= files, "it goes on where it was"
    assert counting.calls <= 4 * files
    assert not starts.recording


def test_little_is_known_of_files_whose_time_is_over(machine: Starting):
    """Only that it is, so that they are not recorded again: a mount may read any number of them."""
    starts = machine.store.start
    files = 4000
    for number in range(files):
        starts.note(number, 0, 1)
    starts.end_all()
    for number in range(files):
        assert starts.drop(number, 1)
        starts.note(number, 0, 1)
    assert not starts.recording and not starts.any
    assert not starts._windows and not starts._unopened
    assert len(starts._opened._words) <= files / 500


def test_nothing_is_known_where_nothing_is_recorded(tmp_path: Path):
    """Where that is switched off, and in images, where it never begins."""
    machine = Machine(tmp_path)
    starts = machine.store.start
    for seconds in (None, 0.0):
        if seconds is not None:
            starts.begin(seconds, MOST_BLOCKS)
        for number in range(100):
            starts.note(number, 0, 1)
        assert not starts.recording and not starts._windows and not starts._opened._words
    machine.close()


def test_one_large_file_ends_in_steps(machine: Starting):
    """What is read meanwhile comes too late, and what was read stays kept until it is taken over."""
    starts = machine.store.start
    chunks = 50
    for chunk in range(chunks):
        starts.note(7, chunk * CHUNK_PAGES, 1)
    machine.clock.advance(SECONDS)
    assert not starts.end_due(10)
    starts.note(7, chunks * CHUNK_PAGES, 1)
    assert 0 < len(starts.chunks(7)) <= 10 and starts.recording
    assert all(starts.keeps(7, chunk * CHUNK_PAGES // BLOCK_PAGES) for chunk in range(chunks))
    while not starts.end_due(10):
        pass
    assert starts.chunks(7) == [(chunk, 1) for chunk in range(chunks)]
    assert all(starts.keeps(7, chunk * CHUNK_PAGES // BLOCK_PAGES) for chunk in range(chunks))


def test_an_unmount_ends_what_had_begun_to_end(machine: Starting):
    starts = machine.store.start
    for number in (7, 8):
        for chunk in range(5):
            starts.note(number, chunk * CHUNK_PAGES, 1)
    machine.clock.advance(SECONDS)
    assert not starts.end_due(3)
    starts.note(9, 0, 1)
    assert not starts.end_all(3)
    while not starts.end_all(3):
        pass
    assert [len(starts.chunks(number)) for number in (7, 8, 9)] == [5, 5, 1]
    assert starts.pages == 11


def test_a_record_of_its_own_is_better_than_what_lies_in_packs(machine: Starting):
    """Else a start pack that is not read any more would be recorded again with each fetch of it."""
    starts = machine.store.start
    starts.seed(7, 0, 8)
    starts.seed(7, 100, 8)
    assert starts.pages == 16, "nothing else is known yet"
    starts.note(7, 8, 22)
    assert starts.seed(7, 200, 8) == 8
    assert starts.pages == 24
    starts.end_all()
    assert starts.seed(7, 300, 8) == 0 and starts.seed(7, 26, 8) == 4
    assert machine.recorded(7) == list(range(8, 30))
    machine.remount()
    machine.store.start.seed(7, 300, 8)
    assert machine.recorded(7) == list(range(8, 30))


def test_a_file_that_is_forgotten_makes_room_for_others(machine: Starting):
    """The share that is kept from eviction counts what is recorded, not what once was."""
    starts = machine.store.start
    starts.seed(7, 0, MOST_BLOCKS * BLOCK_PAGES)
    starts.seed(8, 0, 1)
    assert starts.keeps(7, 0) and not starts.keeps(8, 0)
    assert starts.drop(7, 1)
    starts.seed(8, BLOCK_PAGES, 1)
    assert starts.keeps(8, 0) and starts.keeps(8, 1)


def test_what_is_found_in_packs_keeps_no_more_than_the_share(machine: Starting):
    """Neither what a kept chunk gains nor a chunk that was refused before is kept beyond it."""
    starts = machine.store.start
    half = MOST_BLOCKS // 2

    def kept() -> int:
        return sum(starts.keeps(number, block) for number in (7, 8) for block in range(CHUNK_PAGES // BLOCK_PAGES))

    starts.seed(7, 0, half * BLOCK_PAGES)
    starts.seed(8, 0, (half + 1) * BLOCK_PAGES)
    starts.seed(8, (half + 1) * BLOCK_PAGES, BLOCK_PAGES)
    assert kept() == half, "a chunk is kept whole or not at all"
    for block in range(half, MOST_BLOCKS + 5):
        starts.seed(7, block * BLOCK_PAGES, BLOCK_PAGES)
        assert kept() <= MOST_BLOCKS


@pytest.mark.parametrize("while_recorded", [False, True])
def test_no_more_is_kept_from_eviction_than_its_share(tmp_path: Path, while_recorded: bool):
    """The rest is packed, too, but goes like any other: the cache must stay fit for what runs after the start."""
    machine = Starting(tmp_path)
    machine.most_blocks = 10
    machine.crash()
    chunk = CHUNK_PAGES // BLOCK_PAGES
    pages = [*range(0, 32, BLOCK_PAGES), *range(CHUNK_PAGES, CHUNK_PAGES + 32, BLOCK_PAGES)]
    number = machine.database(pages)
    for index in pages:
        machine.page(number, index)
    keeps = machine.store.start.keeps
    if while_recorded:
        assert not any(keeps(number, page // BLOCK_PAGES) for page in pages), "it is not known yet which to keep"
    machine.store.start.end_all()
    assert machine.recorded(number) == pages
    assert all(keeps(number, block) for block in range(8))
    assert not any(keeps(number, chunk + block) for block in range(8))
    machine.store.start.seed(number + 1, 0, 2 * BLOCK_PAGES)
    assert keeps(number + 1, 0) and keeps(number + 1, 1), "there was room for two"
    machine.store.start.seed(number + 1, CHUNK_PAGES, 1)
    assert not keeps(number + 1, chunk)
    machine.close()


def test_a_file_that_is_forgotten_leaves_no_rows(machine: Starting):
    number = machine.database(SCATTERED)
    for index in SCATTERED:
        machine.page(number, index)
    machine.remount()
    assert machine.store.start.drop(number, 100)
    machine.save()
    assert next(machine.store.scan(Table.START, b"", None), None) is None


def test_a_row_of_recorded_pages_is_what_the_documentation_says_byte_by_byte(machine: Starting):
    """A golden vector, written and read: bitmaps, little-endian, without the zeros at their end, for each chunk."""
    number = machine.database(SCATTERED)
    for index in SCATTERED:
        machine.page(number, index)
    machine.remount()
    key = number.to_bytes(8, "big")
    first = bytes.fromhex("190002") + bytes(13) + b"\x04" + bytes(494) + b"\x80"
    rows = [(key + bytes(8), first), (key + bytes(7) + b"\x01", b"\x01")]
    assert list(machine.store.scan(Table.START, b"", None)) == rows
    assert machine.recorded(number) == SCATTERED


def clean_start(machine: Starting) -> tuple[int, int]:
    """Two blocks that may be evicted, of which the second was read at a start; the file and that block."""
    number = machine.database(list(range(8)))
    machine.upload(number, range(8), together=True)
    machine.commit()
    machine.crash()
    machine.page(number, 6)
    return number, 1


@pytest.mark.parametrize("remounted", [False, True])
def test_recorded_blocks_go_last(machine: Starting, remounted: bool):
    """Also while they are still being recorded."""
    number, kept = clean_start(machine)
    if remounted:
        machine.remount()

    def evict(start_too: bool) -> int:
        step = Evictor(machine.store).step
        done = step(100, 100, recent_too=True, written_will_do=True, start_too=start_too)
        machine.commit()
        return done.blocks

    assert evict(False) == 1
    assert machine.store.blocks.state(number, kept) is not None
    assert machine.store.blocks.state(number, 0) is None
    assert evict(True) == 1
    assert machine.store.blocks.state(number, kept) is None


# older stores


def make_old(directory: Path, version: int = 1) -> None:
    """Makes a store what an older qsfs left: without the table, with its schema's number."""
    with lmdb.open(str(directory), map_size=LIMITS.map_bytes, max_dbs=64) as environment:
        table = environment.open_db(b"start")
        local = environment.open_db(b"local")
        with environment.begin(write=True) as txn:
            txn.drop(table, delete=True)
            txn.put(b"schema", version.to_bytes(4, "little"), db=local)


def schema(directory: Path) -> int:
    with lmdb.open(str(directory), map_size=LIMITS.map_bytes, max_dbs=64) as environment:
        local = environment.open_db(b"local")
        with environment.begin() as txn:
            return int.from_bytes(txn.get(b"schema", db=local), "little")


def test_a_store_of_the_first_schema_is_mounted_and_gets_the_table(machine: Starting):
    number = machine.database(SCATTERED)
    machine.close()
    make_old(machine.directory)
    readonly = Environment(machine.directory, LIMITS.map_bytes, readonly=True)
    view = readonly.read()
    assert list(view.scan(Table.START, b"", None)) == []
    assert next(view.scan(Table.INODES, b"", None))
    view.close()
    readonly.close()
    with pytest.raises(CacheError, match="cannot be read"):
        readonly.read()
    assert schema(machine.directory) == 1, "who only reads changes nothing"
    machine.open()
    machine.page(number, 3)
    machine.remount()
    assert machine.recorded(number) == [3]
    machine.close()
    assert schema(machine.directory) == LOCAL_SCHEMA_VERSION
    machine.open()


@pytest.mark.parametrize("readonly", [False, True])
def test_a_store_of_a_newer_schema_is_refused(machine: Starting, readonly: bool):
    machine.close()
    make_old(machine.directory, LOCAL_SCHEMA_VERSION + 1)
    with pytest.raises(FormatMismatch, match="use the qsfs version that wrote it"):
        Environment(machine.directory, LIMITS.map_bytes, readonly=readonly)
    make_old(machine.directory, 1)
    machine.open()


def test_counting_blocks_and_bits():
    assert bits_of(0, 0, CHUNK_PAGES) == (1 << CHUNK_PAGES) - 1
    assert bits_of(1, 0, CHUNK_PAGES) == 0
    assert bits_of(1, CHUNK_PAGES - 1, CHUNK_PAGES + 2) == 0b11
    bits = 1 << 3 | 1 << 4 | 1 << 6 | 1 << CHUNK_PAGES - 1
    assert blocks_in(bits) == 3
    last = CHUNK_PAGES // BLOCK_PAGES - 1
    assert list(blocks_of(1, bits)) == [(last + 1, 8), (last + 2, 5), (2 * last + 1, 8)]
