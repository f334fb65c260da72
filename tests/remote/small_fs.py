"""A small file system on memory backends, built from formats and rows directly: for fetch, restore and fsck.

fs = await SmallFs.make(scratch)           # 8 backends, 4 + 2 shards
number = fs.write("a", data)               # a file in the root, dirty
fs.upload(number); fs.evict(number)        # remote only
async with fs.fetching() as fetcher: ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from qsfs.filesystem.transient import TransientPages
from qsfs.format.erasure import Code
from qsfs.format.head import MetadataPack, Owner, OwnerRecord, SealedHead, seal_owner_record
from qsfs.format.keys import wrap_keys
from qsfs.format.pack import Pack, PackKind, PlainExtent, build_pack
from qsfs.format.rows import encode_rows
from qsfs.format.shard import encode_shards, shard_key
from qsfs.format.superblock import SUPERBLOCK_KEY, create_superblock, encode_superblock
from qsfs.remote.base import record_base
from qsfs.remote.fetch import Fetcher
from qsfs.remote.members import Candidate, Member, Members
from qsfs.remote.reader import PackReader
from qsfs.store.limits import Limits
from qsfs.store.schema import (
    BLOCK_PAGES,
    PAGE,
    REMOTE_TABLES,
    ROOT_INODE,
    Entry,
    ExtentRow,
    Inode,
    PackRow,
    PackState,
    Table,
    u64,
    u64_pair,
)
from qsfs.store.store import FSID_KEY, NEXT_INODE, NEXT_PACK, Store
from tests.remote.harness import FaultyBackend, TrioClock, World, make_head, make_world, plant

LIMITS = Limits(
    map_bytes=64 << 20,
    journal_bytes=1 << 20,
    spool_bytes=1 << 20,
    group_bytes=8 << 20,
    uncovered_bytes=1 << 20,
    largest_append=64 << 10,
    high_bytes=44 << 20,
    low_bytes=40 << 20,
    full_bytes=48 << 20,
)
OWNER = Owner(1, b"first mount's id")
SECRET = b"k" * 32
"""What the key file holds."""


class SmallFs:
    """One machine's store and its connections to the world's backends."""

    def __init__(self, world: World, directory: Path, limits: Limits = LIMITS) -> None:
        self.world = world
        self.keys = world.keys
        self.code = Code(world.code)
        self.clock = TrioClock(7)
        directory.mkdir(exist_ok=True)
        self.store = Store(directory, limits, self.clock)
        self.transient = TransientPages()
        self.backends: dict[int, FaultyBackend] = {}
        self.members = self.connect()
        self.room_waits = 0
        self.sealed: SealedHead | None = None

    @classmethod
    async def make(
        cls, directory: Path, count: int = 8, *, k: int = 4, m: int = 2, limits: Limits = LIMITS
    ) -> SmallFs:
        fs = cls(await make_world(count, k=k, m=m), directory, limits)
        fs.store.set_local(FSID_KEY, fs.keys.fsid)
        with fs.store.change() as change:
            change.create(Inode(ROOT_INODE, stat.S_IFDIR | 0o755, nlink=2, parent=ROOT_INODE, next_cookie=3))
        fs.store.set_counter(NEXT_INODE, 1)
        fs.commit()
        return fs

    def connect(self) -> Members:
        """New connections to all backends."""
        members = Members()
        for entry, data, control in zip(
            self.world.fleet.entries, self.world.data, self.world.control, strict=True
        ):
            self.backends[entry.number] = FaultyBackend(data)
            members.add(
                Member(
                    entry, self.backends[entry.number], FaultyBackend(control), self.clock, identified=True
                )
            )
        return members

    def close(self) -> None:
        self.store.close()

    def commit(self) -> None:
        """Seals and commits the open group."""
        group = self.store.seal()
        self.store.commit(group)
        self.store.committed(group)

    async def room(self) -> None:
        """What the committer offers: here, commits."""
        self.room_waits += 1
        await trio.lowlevel.checkpoint()
        self.commit()

    # files

    def create(
        self, name: str, *, mode: int = stat.S_IFREG | 0o644, flags: int = 0, parent: int = ROOT_INODE
    ) -> int:
        """A new file or directory; returns its inode."""
        number = self.store.allocate_inode()
        above = self.store.inode(parent)
        assert above is not None
        directory = stat.S_ISDIR(mode)
        cookie = above.next_cookie
        with self.store.change() as change:
            change.create(
                Inode(
                    number,
                    mode,
                    nlink=2 if directory else 1,
                    flags=flags,
                    parent=parent if directory else 0,
                )
            )
            change.put(Table.ENTRIES, u64(parent) + name.encode(), Entry(number, cookie, mode >> 12).encode())
            change.put(Table.COOKIES, u64_pair(parent, cookie), name.encode())
            change.patch(parent, next_cookie=cookie + 1, nlink=above.nlink + directory)
        return number

    def write(self, name: str, data: bytes, *, flags: int = 0, parent: int = ROOT_INODE) -> int:
        """A new file with `data`, dirty."""
        number = self.create(name, flags=flags, parent=parent)
        self.overwrite(number, 0, data)
        return number

    def overwrite(self, number: int, first: int, data: bytes) -> None:
        """Writes whole pages from page `first` on."""
        inode = self.inode(number)
        padded = data + bytes(-len(data) % PAGE)
        self.store.blocks.put(inode, first, memoryview(padded), self.store.next_write())
        inode.size = max(inode.size, first * PAGE + len(data))
        self.store.touch_data(inode)

    def inode(self, number: int) -> Inode:
        inode = self.store.inode(number)
        assert inode is not None
        return inode

    def read(self, number: int, first: int, count: int) -> list[bytes | None]:
        """Resident pages; None for holes and what is only remote."""
        return [
            None if page is None else bytes(page) for page in self.store.blocks.pages(number, first, count)
        ]

    # packs

    def upload(
        self, number: int, *, extent_pages: int = 8, extents_in_pack: int = 64, commit: bool = True
    ) -> list[int]:
        """Puts a file's dirty pages into packs on the backends and marks them clean; returns the packs."""
        pages = self._dirty_pages(number)
        runs: list[list[int]] = []
        for page in pages:
            if runs and runs[-1][-1] == page - 1 and len(runs[-1]) < extent_pages:
                runs[-1].append(page)
            else:
                runs.append([page])
        numbers = []
        for start in range(0, len(runs), extents_in_pack):
            numbers.append(self._upload_pack(number, runs[start : start + extents_in_pack]))
        if commit:
            self.commit()
        return numbers

    def _dirty_pages(self, number: int) -> list[int]:
        found = []
        for block in self.store.blocks.numbers(number, 0):
            state = self.store.blocks.state(number, block)
            if state is not None:
                found += [block * BLOCK_PAGES + i for i in range(BLOCK_PAGES) if state.dirty & 1 << i]
        return found

    def _upload_pack(self, number: int, runs: list[list[int]]) -> int:
        extents, writes = [], {}
        for run in runs:
            data = b"".join(page or b"" for page in self.read(number, run[0], len(run)))
            for page in run:
                state = self.store.blocks.state(number, page // BLOCK_PAGES)
                assert state is not None
                writes[page] = state.writes[page % BLOCK_PAGES]
            highest = max(writes[page] for page in run)
            extents.append(PlainExtent(number, run[0], len(run), highest, data))
        pack, placement = self.put_pack(PackKind.DATA, extents)
        row = self.add_pack_row(pack, placement)
        inode = self.inode(number)
        for entry in pack.entries:
            self.store.extents.insert(
                number,
                ExtentRow(
                    entry.first_page,
                    entry.write_number,
                    entry.pages,
                    0,
                    row,
                    entry.ordinal,
                    entry.offset,
                    entry.sealed_length,
                    entry.plain_length,
                    entry.codec,
                ),
            )
        for page, write in writes.items():
            assert self.store.blocks.clean(inode, page, (write,))
        return row

    def put_pack(self, kind: PackKind, extents: list[PlainExtent]) -> tuple[Pack, tuple[int, ...]]:
        """Builds a pack and stores its shards, one a backend, starting at a backend that varies."""
        pack = build_pack(
            kind, extents, keys=self.keys, code=self.world.code, owner_epoch=OWNER.epoch, clock=self.clock
        )
        shards = encode_shards(pack, self.code, self.keys)
        count = len(self.world.data)
        start = pack.ref.pack_id[0] % count
        placement = tuple((start + i) % count + 1 for i in range(len(shards)))
        for i, (shard, place) in enumerate(zip(shards, placement, strict=True)):
            key = shard_key(self.keys.fsid, pack.ref.owner_epoch, pack.ref.pack_id, i)
            self.world.data[place - 1].put(key, shard)
        return pack, placement

    def add_pack_row(self, pack: Pack, placement: tuple[int, ...]) -> int:
        """Adds the pack to the store; returns its number there."""
        number = self.store.next_number(NEXT_PACK)
        ref = pack.ref
        row = PackRow(
            ref.pack_id,
            ref.digest,
            int(ref.kind),
            ref.key_number,
            ref.owner_epoch,
            ref.body_length,
            ref.shard_size,
            0,
            self.clock.time_ns(),
            0,
            0,
            int(PackState.FULL),
            placement,
        )
        self.store.layers.put(Table.PACKS, u64(number), row.encode())
        return number

    def pack_row(self, number: int) -> PackRow:
        row = self.store.get(Table.PACKS, u64(number))
        assert row is not None
        return PackRow.decode(row)

    def shard_keys(self, number: int) -> list[tuple[int, bytes]]:
        """(backend, key) of each shard of a pack."""
        row = self.pack_row(number)
        return [
            (place, shard_key(self.keys.fsid, row.owner_epoch, row.pack_id, i))
            for i, place in enumerate(row.placement)
        ]

    def evict(self, number: int) -> None:
        """Drops every clean page of a file."""
        for block in self.store.blocks.numbers(number, 0):
            self.store.blocks.evict(self.inode(number), block, (1 << BLOCK_PAGES) - 1)
        self.commit()

    def remote_file(self, name: str, data: bytes, **options: int) -> int:
        """A file that is only remote."""
        number = self.write(name, data)
        self.commit()
        self.upload(number, **options)
        self.evict(number)
        return number

    # generations

    def publish(
        self,
        generation: int = 1,
        *,
        rows: list[tuple[int, bytes, bytes | None]] | None = None,
        **fields: object,
    ) -> None:
        """Puts a head on every backend that names a snapshot of the committed rows (or of `rows`)."""
        if rows is None:
            rows = [
                (int(table), key, value)
                for table in sorted(REMOTE_TABLES)
                for key, value in self.store.scan(table, b"", None)
            ]
        head = make_head(
            self.world,
            OWNER,
            generation,
            None if self.sealed is None else self.sealed.ref,
            snapshot=(self.metadata(rows),),
            write_number=self.store.layers.committed_write_number,
            **fields,
        )
        self.sealed = plant(self.world, head)
        self.head = head

    def metadata(self, rows: list[tuple[int, bytes, bytes | None]]) -> MetadataPack:
        """Rows as one metadata pack on the backends."""
        chunks = list(encode_rows(rows, 16 << 10))
        extents = [PlainExtent(0, i, 0, 0, chunk) for i, chunk in enumerate(chunks)]
        pack, placement = self.put_pack(PackKind.METADATA, extents)
        return MetadataPack(pack.ref, placement, len(chunks))

    def record_base(self) -> None:
        """Makes the head published last the local base, as after a flush."""
        assert self.sealed is not None
        record_base(self.store, self.sealed, ours=True)
        key, value = seal_owner_record(
            OwnerRecord(self.keys.fsid, OWNER, self.clock.time_ns(), "host"), self.keys, self.clock
        )
        for control in self.world.control:
            control.put(key, value)
        self.commit()

    # as a machine with only a configuration sees it

    def add_superblock(self) -> None:
        """Puts the superblock on every backend."""
        add_superblock(self.world)

    def candidates(self, down: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> list[Candidate]:
        """New connections; `down` backends do not answer, `silent` ones only for heads."""
        self.connections: dict[int, FaultyBackend] = {}
        return candidates_of(self.world, down, silent, self.connections)

    # reading

    def reader(self) -> PackReader:
        """A reader that stays on the event loop's thread: the virtual clock would run on meanwhile."""
        return PackReader(self.members, self.keys, self.code, worth_a_thread=64 << 20)

    @contextlib.asynccontextmanager
    async def fetching(self, deadline_seconds: float = 30.0) -> AsyncIterator[Fetcher]:
        """A fetcher at work."""
        fetcher = Fetcher(
            self.store,
            self.reader(),
            self,
            self.transient,
            deadline_seconds=deadline_seconds,
            path_of=lambda number: f"/file-{number}",
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(fetcher.run)
            yield fetcher
            nursery.cancel_scope.cancel()


def noise(count: int, seed: int = 1) -> bytes:
    """Bytes that do not compress."""
    return TrioClock(1000 + seed).random_bytes(count)


def add_superblock(world: World) -> None:
    """Puts a superblock that `SECRET` opens on every backend of a world."""
    superblock, _ = create_superblock(SECRET, code=world.code, clock=world.clock)
    slots = wrap_keys(SECRET, world.keys, slot_number=1, clock=world.clock)
    superblock = dataclasses.replace(superblock, fsid=world.keys.fsid, slots=slots)
    value = encode_superblock(superblock, world.keys, world.clock)
    for store in world.data:
        store.put(SUPERBLOCK_KEY, value)


def candidates_of(
    world: World,
    down: tuple[int, ...] = (),
    silent: tuple[int, ...] = (),
    connections: dict[int, FaultyBackend] | None = None,
) -> list[Candidate]:
    """New connections to a world, as a machine with only a configuration makes them."""
    found = []
    for entry, data, control in zip(world.fleet.entries, world.data, world.control, strict=True):
        backend, heads = FaultyBackend(data), FaultyBackend(control)
        backend.down = entry.number in down
        heads.down = entry.number in (*down, *silent)
        if connections is not None:
            connections[entry.number] = backend
        found.append(Candidate(entry.address, entry.namespace, backend, lambda _, heads=heads: heads))
    return found
