"""Restoring many rows: bounded memory whatever there is, and minutes for ten million extents."""

from __future__ import annotations

import dataclasses
import random
import stat
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from qsfs.clock import SystemClock
from qsfs.errors import Corrupt
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.head import Head, MetadataPack, SnapshotRange
from qsfs.format.pack import PackKind
from qsfs.format.rows import Row, encode_rows
from qsfs.format.units import MAX_EXTENT
from qsfs.remote.image import packs_of
from qsfs.remote.packing import RowPacker, Sealer
from qsfs.remote.rebuild import Rebuild
from qsfs.remote.restore import load
from qsfs.remote.stored import StoredPack
from qsfs.store.positions import position_of
from qsfs.store.schema import (
    BLOCK_SIZE,
    PAGE,
    SCHEMA_VERSION,
    Entry,
    ExtentRow,
    Inode,
    PackRow,
    Table,
    u64,
    u64_pair,
)
from qsfs.store.store import Store
from tests.format.samples import KEYS, head, sealed_head
from tests.remote.flush_machine import LIMITS

FILES = range(2, 6)
EXTENTS_A_PACK = 200
SEALER = Sealer(KEYS, Code(CodeParams(16, 20)), 1, SystemClock())


def rows_of(extents: int) -> Iterator[Row]:
    """In the order of positions: four files, and extents of one and two pages in turn in packs all over."""
    r = random.Random(1)
    packs = extents // EXTENTS_A_PACK + 1
    each = extents // len(FILES)
    yield Table.INODES, u64(1), Inode(1, stat.S_IFDIR | 0o755, nlink=2, parent=1, next_cookie=9).encode()
    for number in FILES:
        yield Table.INODES, u64(number), Inode(number, stat.S_IFREG | 0o644, nlink=1, size=each * 2 * PAGE).encode()
    for number in FILES:
        yield Table.ENTRIES, u64(1) + b"f%d" % number, Entry(number, number, 8).encode()
    for number in FILES:
        for index in range(each):
            row = ExtentRow(
                first=2 * index,
                write_number=r.randrange(1 << 30),
                pages=1 + index % 2,
                skip=0,
                pack=r.randrange(1, packs + 1),
                ordinal=r.randrange(1000),
                offset=r.randrange(1 << 22),
                sealed_length=4112,
                plain_length=PAGE,
                codec=0,
            )
            yield Table.EXTENTS, u64_pair(number, 2 * index), row.encode()
    for number in range(1, packs + 1):
        placement = tuple(r.sample(range(24), 20))
        row = PackRow(
            r.randbytes(16), r.randbytes(32), PackKind.DATA, 1, 1, 16 << 16, 1 << 16, 0, 1, 0, 0, 3, placement
        )
        yield Table.PACKS, u64(number), row.encode()


class Stored:
    """A generation whose packs lie in files; reads them as `PackReader` does."""

    def __init__(self, directory: Path, extents: int, changed: int, pack_bytes: int) -> None:
        """`changed` rows of extents come in a delta too, of a generation that replaced them."""
        self.keys, self.code = KEYS, SEALER.code.params
        self.directory = directory
        self.explain: Any = None
        snapshot: list[MetadataPack] = []
        ranges: list[SnapshotRange] = []
        packer = RowPacker(pack_bytes)
        start = b""
        delta: list[MetadataPack] = []
        again: list[Row] = []
        shuffle = random.Random(2).shuffle
        every = max(1, extents // changed)
        for count, row in enumerate(rows_of(extents)):
            full = False
            for chunks in packer.add([row]):
                snapshot.append(self.write(chunks))
                full = True
            ranges += [SnapshotRange(start, 1, 0)] if full else []
            start = position_of(row[0], row[1]) + b"\0" if full else start
            if row[0] == Table.EXTENTS and count % every == 0:
                again.append(row)
            if len(again) * 60 >= pack_bytes:
                shuffle(again)
                delta.append(self.write(list(encode_rows(again, MAX_EXTENT))))
                again = []
        if not packer.empty:
            snapshot.append(self.write(packer.rest()))
            ranges.append(SnapshotRange(start, 1, 0))
        self.head: Head = dataclasses.replace(
            head(),
            snapshot=tuple(snapshot),
            deltas=(tuple(delta),),
            ranges=tuple(ranges),
            schema_version=SCHEMA_VERSION,
            block_size=BLOCK_SIZE,
        )

    def write(self, chunks: list[bytes]) -> MetadataPack:
        pack = SEALER.metadata_pack(chunks)
        (self.directory / pack.ref.pack_id.hex()).write_bytes(pack.body)
        return MetadataPack(pack.ref, tuple(range(20)), len(chunks))

    async def body(self, pack: StoredPack) -> bytes:
        await trio.lowlevel.checkpoint()
        return (self.directory / pack.ref.pack_id.hex()).read_bytes()

    async def restore(self, directory: Path, map_bytes: int, say: Any = lambda progress: None) -> Rebuild:
        rebuild = Rebuild(directory, map_bytes, 1)
        try:
            await load(rebuild, self, list(packs_of(self.head)), say, 60.0)  # type: ignore[arg-type]
            rebuild.finish(self.head, sealed_head())
        finally:
            rebuild.close()
        return rebuild


def anonymous_mib() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.parametrize("extents", [40_000, 200_000])
async def test_memory_does_not_grow_with_the_rows(tmp_path: Path, extents: int):
    """A few packs and one step of rows are in memory at a time; what is counted is counted right."""
    (tmp_path / "packs").mkdir()
    (tmp_path / "store").mkdir()
    stored = Stored(tmp_path / "packs", extents, extents // 10, 256 << 10)
    tracemalloc.start()
    try:
        rebuild = await stored.restore(tmp_path / "store", 64 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
    assert rebuild.tally.files == len(FILES)
    store = Store(tmp_path / "store", LIMITS, SystemClock())
    try:
        view = store.layers.view
        assert view.count(Table.EXTENTS) == extents
        assert [store.inodes.get(n).allocated for n in FILES] == [extents // len(FILES) * 3 // 2] * len(FILES)
        live = sum(PackRow.decode(bytes(row)).live for _, row in view.scan(Table.PACKS, b"", None) if row[49] == 1)
        assert live == extents * 3 // 2 * PAGE
        sent = {(table, key): value for table, key, value in rows_of(extents) if table == Table.EXTENTS}
        assert {(Table.EXTENTS, k): bytes(v) for k, v in view.scan(Table.EXTENTS, b"", None)} == sent
    finally:
        store.close()


def test_rows_out_of_order_and_rows_that_come_again_end_as_the_last_says(tmp_path: Path):
    """Appending is only for rows behind all others; the last of a key counts, also within one step."""
    rebuild = Rebuild(tmp_path, 16 << 20, 1)
    a, b, c = (u64_pair(2, number) for number in range(3))
    try:
        rebuild.load([(Table.EXTENTS, b, b"1"), (Table.EXTENTS, a, b"2"), (Table.EXTENTS, b, b"3")])
        rebuild.load([(Table.EXTENTS, a, None), (Table.EXTENTS, c, b"4"), (Table.EXTENTS, a, b"5")])
        rebuild.load([(Table.EXTENTS, c, b"6"), (Table.EXTENTS, c, None)])
        with pytest.raises(Corrupt, match="table 99"):
            rebuild.load([(99, a, b"7")])
        view = rebuild._environment.read()
        assert [(key, bytes(value)) for key, value in view.scan(Table.EXTENTS, b"", None)] == [(a, b"5"), (b, b"3")]
        view.close()
    finally:
        rebuild.close()


@pytest.mark.slow
async def test_ten_million_extents_in_minutes(tmp_path: Path):
    """A node's metadata are restored in less than three minutes, in less than 500 MB of memory."""
    (tmp_path / "packs").mkdir()
    (tmp_path / "store").mkdir()
    stored = Stored(tmp_path / "packs", 10_000_000, 1_000_000, SEALER.pack_bytes)
    most = before = anonymous_mib()

    def say(progress: object) -> None:
        nonlocal most
        most = max(most, anonymous_mib())

    begin = time.monotonic()
    await stored.restore(tmp_path / "store", 4 << 30, say)
    seconds = time.monotonic() - begin
    most = max(most, anonymous_mib())
    print(f"{seconds:.0f} s, {most - before} MiB more than {before}, {len(stored.head.snapshot)} packs")
    assert seconds < 180
    assert most - before < 500
