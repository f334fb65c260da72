"""What a head lists: ranges that are read anew, deltas that are dropped, and which rows count."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise
from pathlib import Path

import pytest

from qsfs.clock import SystemClock
from qsfs.format.extent import PackKind, PackRef
from qsfs.format.head import Head, MetadataPack
from qsfs.remote import chain as chains
from qsfs.remote.chain import Chain, Delta, ListedPack, Merge, Packs, Range, Refresh, Renewal, Stretch, Touched
from qsfs.remote.image import Counting, packs_of
from qsfs.store.positions import position_of
from qsfs.store.schema import Inode, Table, Truncation, encode_truncations, u64, u64_pair
from qsfs.store.snapshot import CommittedState
from qsfs.store.store import Store
from qsfs.store.stretch import read_stretch
from tests.format.samples import head
from tests.remote.flush_machine import LIMITS

Rows = dict[bytes, bytes | None]
SMALL = 512


def pack(number: int, size: int = SMALL) -> ListedPack:
    ref = PackRef(number.to_bytes(16, "big"), bytes(32), PackKind.METADATA, 1, 1, size, size)
    return ListedPack(number, ref, 1)


def head_of(chain: Chain) -> Head:
    """The head that lists a chain, as `Generations` makes it."""

    def listed(packs: Packs) -> tuple[MetadataPack, ...]:
        return tuple(MetadataPack(pack.ref, (0, 1, 2, 3), pack.chunks) for pack in packs)

    return dataclasses.replace(
        head(),
        snapshot=tuple(pack for part in chain.ranges for pack in listed(part.packs)),
        deltas=tuple(listed(delta.packs) for delta in chain.deltas),
        ranges=chain.heads_ranges(),
    )


def number_of(listed: MetadataPack) -> int:
    return int.from_bytes(listed.ref.pack_id, "big")


class World:
    """Rows as bytes by position, generations of them, and the packs that were written: all in memory."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rows: Rows = {bytes((5,)) + u64(key): b"old" for key in range(0, 300, 3)}
        self.marked: set[bytes] = set()
        self.packs: dict[int, list[tuple[bytes, bytes | None]]] = {}
        old = sorted(self.rows.items())
        # As a version without ranges left it: one snapshot of several packs, and deltas since.
        whole = Range(b"", tuple(self.written(old[at : at + 20]) for at in range(0, len(old), 20)), 0)
        self.chain = Chain((whole,), (), 0).followed_by((self.written([old[7]]),), Touched.everything())
        self.remount()
        self.at: list[tuple[Stretch, bytes]] = []
        self.longest = self.merges = 0

    def written(self, rows: list[tuple[bytes, bytes | None]]) -> ListedPack:
        number = len(self.packs) + 1
        self.packs[number] = rows
        return pack(number, SMALL * (1 + len(rows)))

    def change(self) -> None:
        r = self.random
        key = bytes((5,)) + u64(r.choice((r.randrange(300), r.randrange(8))))
        self.marked.add(key)
        if r.random() < 0.3:
            self.rows.pop(key, None)
        else:
            self.rows[key] = r.randbytes(4)

    def generation(self) -> None:
        """A cut, during whose upload changes go on, and its record."""
        done = self.refresh if self.refresh is not None and self.refresh.done else None
        marked, self.marked = self.marked, set()
        if not marked:
            return
        expected = dict(self.rows)
        touched = Touched(self.chain.starts)
        for key in marked:
            touched.note(key)
        delta = self.written([(key, self.rows.get(key)) for key in sorted(marked)])
        for _ in range(self.random.randrange(3)):
            self.change()
        chain = self.chain.renewed(done) if done is not None else self.chain
        self.chain = chain.followed_by((delta,), touched)
        if done is not None:
            self.refresh = None
        self.longest = max(self.longest, len(self.chain.deltas))
        assert self.restored() == expected

    def restored(self) -> Rows:
        rows: Rows = {}
        for listed, counting in packs_of(head_of(self.chain)):
            for key, value in self.packs[number_of(listed)]:
                if list(counting.of([(Table.EXTENTS, key[1:], value)])):
                    rows[key] = value
        return {key: value for key, value in rows.items() if value is not None}

    def begin(self, refresh: Renewal | None) -> None:
        if self.refresh is None and refresh is not None:
            self.refresh = refresh
            if isinstance(refresh, Merge):
                self.merges += 1
                return
            self.at = [(stretch, stretch.start) for stretch in refresh.stretches]

    def read(self) -> None:
        """Reads one pack of the refresh."""
        if self.refresh is None or self.refresh.done:
            return
        if isinstance(self.refresh, Merge):
            self.merge(self.refresh)
            return
        stretch, start = self.at.pop(0)
        stop = stretch.stop
        found = sorted(k for k in self.rows if k >= start and (stop is None or k < stop))
        some, more = found[:20], found[20:21]
        stretch.reached = more[0] if more else stop
        stretch.pieces.append((start, (self.written([(k, self.rows[k]) for k in some]),) if some else ()))
        if more:
            self.at.insert(0, (stretch, more[0]))
        self.refresh.done = not self.at or len(self.refresh.packs) >= self.refresh.most_packs

    def merge(self, merge: Merge) -> None:
        rows: Rows = {}
        for delta in merge.deltas:
            counting = Counting(merge.starts, tuple(since <= delta.number for since in merge.since))
            for listed in delta.packs:
                for key, value in self.packs[listed.number]:
                    if list(counting.of([(Table.EXTENTS, key[1:], value)])):
                        rows[key] = value
        merge.packs = (self.written(sorted(rows.items())),)
        merge.done = True

    def remount(self) -> None:
        """What is being read is lost; the chain is what the last head lists."""
        self.refresh = None
        self.chain = Chain.of_head(head_of(self.chain), number_of)
        assert head_of(Chain.of_head(head_of(self.chain), number_of)) == head_of(self.chain)


@pytest.mark.parametrize("seed", range(40))
def test_every_head_gives_the_rows_of_its_cut(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Whatever ranges are read anew while rows change, generations are made and mounts end."""
    monkeypatch.setattr(chains, "LEAST_DELTAS", 6)
    monkeypatch.setattr(chains, "_LEAST_AT_ONCE", 1 + seed % 4)
    monkeypatch.setattr(chains, "MERGED", 3 + seed % 3)
    monkeypatch.setattr(chains, "_NONE_OUTWEIGHS", 2)
    world = World(seed)
    for _ in range(600):
        act = world.random.random()
        if act < 0.4:
            world.change()
        elif act < 0.7:
            world.generation()
            due = world.chain.next_merge(), world.chain.next_refresh(1.0, 4096)
            world.begin(due[seed % 2] or due[1 - seed % 2])
        elif act < 0.99:
            world.read()
        else:
            world.remount()
    assert world.longest < 60
    assert world.merges > 3


def test_a_delta_is_dropped_once_no_range_needs_it_and_untouched_ranges_are_left_alone():
    parts = tuple(Range(bytes((5, number)), (pack(number + 1),), 0) for number in range(4))
    chain = Chain((dataclasses.replace(parts[0], start=b""), *parts[1:]), (), 0)
    for _ in range(chains.LEAST_DELTAS):
        touched = Touched(chain.starts)
        touched.note(bytes((5, 2, 9)))
        chain = chain.followed_by((pack(9),), touched)
    refresh = chain.next_refresh(1.0, 4 << 20)
    assert refresh is not None
    assert [(stretch.start, stretch.stop) for stretch in refresh.stretches] == [(bytes((5, 2)), bytes((5, 3)))]
    stretch = refresh.stretches[0]
    stretch.pieces, stretch.reached = [(stretch.start, (pack(10),))], stretch.stop
    after = chain.refreshed(refresh)
    assert after.deltas == ()
    assert [part.packs[0].number for part in after.ranges] == [1, 2, 10, 4]
    assert after.next_refresh(1.0, 4 << 20) is None


def test_work_at_a_time_is_bounded_however_much_there_is():
    """A thousand ranges that all changed are read anew a few at a time, the oldest first."""
    parts = [Range(bytes((5,)) + u64(number), (pack(number + 1, 1 << 20),), 0) for number in range(1000)]
    parts[0] = dataclasses.replace(parts[0], start=b"")
    deltas = tuple(Delta(number, (pack(5000 + number),), Touched.everything()) for number in range(600))
    chain = Chain(tuple(parts), deltas, 600)
    refresh = chain.next_refresh(1.0, 4 << 20)
    assert refresh is not None
    assert [stretch.start for stretch in refresh.stretches] == [b""]
    assert refresh.stretches[0].stop == bytes((5,)) + u64(refresh.most_packs)
    assert 1000 / chains.most_deltas(1000 << 20) <= refresh.most_packs <= 8


def test_small_deltas_are_merged_and_large_ones_left_alone():
    chain = Chain((Range(b"", (pack(1),), 0),), (), 0)
    chain = chain.followed_by((pack(2, 3 << 20),), Touched.everything())
    for number in range(chains.MERGED):
        assert chain.next_merge() is None
        chain = chain.followed_by((pack(3 + number),), Touched.everything())
    merge = chain.next_merge()
    assert merge is not None
    merge.packs = (pack(50),)
    later = chain.followed_by((pack(51),), Touched.everything())
    after = later.merged(merge)
    assert [delta.packs[0].number for delta in after.deltas] == [2, 50, 51]
    assert after.next_merge() is None
    assert after.merged(merge) == after, "what is not listed any more is replaced by nothing"


def test_a_chain_of_one_range_is_a_head_that_older_versions_read():
    chain = Chain((Range(b"", (pack(1),), 0),), (), 0)
    for number in range(3):
        chain = chain.followed_by((pack(2 + number),), Touched.everything())
    assert head_of(chain).ranges == ()
    refresh = Refresh([Stretch(b"", None)], 4, chain.next_number)
    refresh.stretches[0].pieces = [(b"", (pack(9),))]
    assert head_of(chain.refreshed(refresh)).ranges == ()


# reading stretches


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path, LIMITS, SystemClock())
    yield store
    store.close()


@pytest.mark.parametrize("seed", range(10))
def test_stretches_side_by_side_are_everything(store: Store, seed: int):
    """However rows are divided, the parts hold each row of a generation once, where it stands."""
    r = random.Random(seed)
    clock = SystemClock()
    with store.environment.write() as txn:

        def put(table: Table, key: bytes, value: bytes) -> None:
            txn.put(key, value, db=store.environment.databases[table])

        for number in r.sample(range(1, 200), 60):
            key = u64(number)
            exists = r.random() < 0.8
            if exists:
                put(Table.INODES, key, Inode(number, 0o100644, flags=r.choice((0, 0, 1))).encode())
            for _ in range(r.choice((0, 0, 3))):
                put(Table.XATTRS, key + r.randbytes(3), b"value")
            if r.random() < 0.3:
                put(Table.EXTENTS, u64_pair(number, r.randrange(99)), bytes(45))
            if r.random() < 0.3 or not exists:
                put(Table.TRUNCATIONS, key, encode_truncations((Truncation(3, 9),)))
            if r.random() < 0.2:
                put(Table.ORPHANS, key, b"")
            put(Table.ENTRIES, key + r.randbytes(4), b"entry")
            put(Table.PACKS, key, b"pack")
        put(Table.COUNTERS, b"generation", u64(7))
    with CommittedState(store.environment, clock) as state:
        whole = {(table, key): value for table, key, value in state.everything(b"", 1 << 30).rows}
        positions = sorted({position_of(table, key)[:9] for table, key in whole})
        bounds: list[bytes | None] = [b"", *sorted(r.sample(positions, 9)), None]
        found: dict[tuple[int, bytes], bytes | None] = {}
        for start, stop in pairwise(bounds):
            at = start
            while at is not None:
                part = read_stretch(state, clock, at, stop, r.choice((1, 300, 5000)))
                for table, key, value in part.rows:
                    assert at <= position_of(table, key)
                    assert stop is None or position_of(table, key) < stop
                    assert part.resume is None or position_of(table, key) < part.resume
                    found[table, key] = value
                at = part.resume
        assert found == whole
