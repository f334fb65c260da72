"""One machine that flushes to memory backends, and a restore that shares no code with the store.

    machine = FlushMachine(world, directory)
    async with machine.mounted():          # opens the store, owns, starts what uploads
        number = machine.create("a"); machine.write(number, 0, data)
        await machine.cut()
    image = restore(world)                 # from the newest head alone
"""

from __future__ import annotations

import contextlib
import dataclasses
import stat
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.clock import FixedClock
from qsfs.errors import CacheError, DataLost
from qsfs.format.erasure import Code
from qsfs.format.extent import ExtentEntry, PackKind, PackRef
from qsfs.format.head import Head, HeadRef, MetadataPack, Owner, open_head, parse_head_key, seal_head
from qsfs.format.pack import open_body, open_extent
from qsfs.format.rows import decode_rows
from qsfs.format.shard import open_shard, shard_key
from qsfs.remote.base import BASE_KEY, PUBLISHED_KEY, local_head, record_base
from qsfs.remote.context import FlushContext
from qsfs.remote.cut import NoCut
from qsfs.remote.generation import Generations
from qsfs.remote.image import packs_of
from qsfs.remote.kept import kept_of_first
from qsfs.remote.ledger import Ledger, read_rows
from qsfs.remote.members import Member, Members
from qsfs.remote.metadata import upload_rows
from qsfs.remote.packing import Sealer
from qsfs.remote.placement import FreeSpace
from qsfs.remote.precopy import PreCopier
from qsfs.remote.publish import NotYet, Published
from qsfs.remote.spool import Spool
from qsfs.remote.stored import StoredPack
from qsfs.remote.upload import Uploader
from qsfs.store.group import Publication
from qsfs.store.limits import Limits
from qsfs.store.schema import (
    BLOCK_PAGES,
    PAGE,
    ROOT_INODE,
    SCHEMA_VERSION,
    Entry,
    ExtentRow,
    Inode,
    PackRow,
    Table,
    Truncation,
    decode_truncations,
    is_cut,
    split_u64,
    split_u64_pair,
    u64,
    u64_pair,
)
from qsfs.store.snapshot import CommittedState
from qsfs.store.store import FSID_KEY, NEXT_INODE, Store
from tests.remote.harness import FaultyBackend, World

LIMITS = Limits(
    map_bytes=128 << 20,
    journal_bytes=1 << 20,
    spool_bytes=16 << 20,
    group_bytes=8 << 20,
    uncovered_bytes=1 << 20,
    largest_append=64 << 10,
    high_bytes=80 << 20,
    low_bytes=70 << 20,
    full_bytes=96 << 20,
)


class Crash(BaseException):
    """The machine loses power here."""


def crash() -> None:
    """What a failpoint does to end the machine."""
    raise Crash


class SmallSealer(Sealer):
    """Closes packs at 16 pages, so that little data makes several."""

    pack_bytes = 16 * PAGE  # type: ignore[assignment]


class DirectCommitter:
    """Commits at once, on the calling thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.before_seal: Callable[[int], None] = lambda number: None
        self.failed: CacheError | None = None
        self._failure = trio.Event()

    def fail(self, error: CacheError) -> None:
        self.failed = error
        self._failure.set()

    async def failure(self) -> CacheError:
        await self._failure.wait()
        assert self.failed is not None
        return self.failed

    def commit_now(self) -> int:
        self.before_seal(self.store.layers.open.number)
        group = self.store.seal()
        self.store.commit(group)
        self.store.committed(group)
        return group.number

    async def commit(self) -> int:
        await trio.lowlevel.checkpoint()
        if self.failed is not None:
            raise self.failed
        return self.commit_now() if self.store.dirty else self.store.layers.committed_number

    async def room(self) -> None:
        await trio.lowlevel.checkpoint()


class SimplePublisher:
    """Puts heads on the backends of the world; ownership has tests of its own.

    `reach`: how many backends a head gets to; below the quorum it is not published.
    """

    def __init__(self, world: World, owner: Owner, spool: Spool, found: HeadRef | None) -> None:
        self.world = world
        self.owner = owner
        self.published: HeadRef | None = None
        self.last_sent = found
        self.reach = len(world.control)
        self._spool = spool
        self._pending: tuple[Head, HeadRef] | None = None
        self.attempts = 0

    async def publish(self, head: Head, *, deadline_seconds: float) -> Published | NotYet:
        self.attempts += 1
        if self._pending is None or self._pending[0] != head:
            assert head.predecessor == self.last_sent
            assert self.last_sent is None or head.generation >= self.last_sent.generation
            sealed = seal_head(head, self.world.keys, self.world.clock)
            await self._spool.store_head(sealed)
            failpoints.hit("test.head.stored")
            self.last_sent = sealed.ref
            self._pending = (head, sealed.ref)
        sealed = self._spool.heads[self._pending[1]]
        for store in self.world.control[: self.reach]:
            store.put(sealed.key, sealed.value)
            failpoints.hit("test.head.at-one")
        await trio.lowlevel.checkpoint()
        if self.reach <= len(self.world.control) // 2:
            return NotYet(sealed.ref, frozenset(range(1, self.reach + 1)), ("too few backends answered",))
        self.published = sealed.ref
        return Published(sealed.ref, frozenset(), frozenset())


class FlushMachine:
    """One machine's cache directory; `mounted` is one run of its daemon."""

    def __init__(self, world: World, directory: Path, *, seed: int = 1, limits: Limits = LIMITS) -> None:
        self.world = world
        self.directory = directory
        self.limits = limits
        self.clock = FixedClock(seed)
        self.code = Code(world.code)
        self.backends = [FaultyBackend(store) for store in world.data]
        self.epoch = 0
        self.look_seconds = 120.0
        self.before_seal: Callable[[int], None] = lambda number: None
        self.opened: Callable[[], None] = lambda: None
        self.store: Store
        self.spool: Spool
        self.context: FlushContext
        self.generations: Generations
        self.precopier: PreCopier
        self.publisher: SimplePublisher
        self.uploader: Uploader
        self.nursery: trio.Nursery
        self.fleet_members: Members
        self.first: Head

    def members(self) -> Members:
        return Members(
            Member(entry, data, FaultyBackend(control), self.clock, identified=True)
            for entry, data, control in zip(
                self.world.fleet.entries, self.backends, self.world.control, strict=True
            )
        )

    @contextlib.asynccontextmanager
    async def mounted(self) -> AsyncIterator[FlushMachine]:
        """Opens the store (the first time: formats), owns, and starts the uploader.

        What is not committed at the end is lost, as in a crash.
        """
        self.directory.mkdir(exist_ok=True)
        self.store = Store(self.directory, self.limits, self.clock)
        self.opened()
        try:
            self.spool = Spool(self.directory / "spool", self.limits.spool_bytes)
            self.committer = DirectCommitter(self.store)
            self.committer.before_seal = self.before_seal
            members = self.fleet_members = self.members()
            self.free = FreeSpace(members, self.clock)
            self.uploader = Uploader(
                members, self.free, self.world.code, self.world.keys.fsid, self.clock, full_grace_seconds=2.0
            )
            with self._unwrapped():
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    await nursery.start(self.uploader.run)
                    await self._own()
                    yield self
                    nursery.cancel_scope.cancel()
        finally:
            self.store.close()

    @contextlib.contextmanager
    def _unwrapped(self) -> object:
        """A single exception out of a nursery comes out as itself."""
        try:
            yield
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None

    async def _own(self) -> None:
        self.epoch += 1
        owner = Owner(self.epoch, self.clock.random_bytes(16))
        sealer = SmallSealer(self.world.keys, self.code, self.epoch, self.clock)
        if self.store.local(BASE_KEY) is None:
            await self._format(owner, sealer)
        await self._publish_first(owner)
        sealer = SmallSealer(self.world.keys, self.code, self.publisher.owner.epoch, self.clock)
        ledger = Ledger(self.clock, self.look_seconds)
        ledger.take(read_rows(self.store.environment, self.clock, b""))
        self.context = FlushContext(
            self.store, self.committer, sealer, self.uploader, self.spool, ledger, self.clock
        )
        base = local_head(self.store, BASE_KEY, self.world.keys)
        assert base is not None
        self.generations = Generations(self.context, self.publisher, base, self.first)
        self.generations.take_chain()
        self.precopier = PreCopier(
            self.context,
            lambda *block: 0 if self.generations.cut is None else self.generations.cut.taken(*block),
            quiet_seconds=5.0,
        )

    async def _publish_first(self, owner: Owner) -> None:
        newest = newest_head(self.world)
        assert newest is not None
        ref, found = newest
        ours = {r for r in (self._known(BASE_KEY), self._known(PUBLISHED_KEY)) if r} | set(self.spool.heads)
        assert ref in ours, "a healthy machine does not know the newest head as its own"
        self.publisher = SimplePublisher(self.world, owner, self.spool, ref)
        self.first = dataclasses.replace(found, owner=owner, predecessor=ref, kept=kept_of_first(found, ref))
        await self.publisher.publish(self.first, deadline_seconds=1)

    def _known(self, name: bytes) -> HeadRef | None:
        head = local_head(self.store, name, self.world.keys)
        return None if head is None else head.sealed.ref

    async def _format(self, owner: Owner, sealer: Sealer) -> None:
        store = self.store
        store.set_local(FSID_KEY, self.world.keys.fsid)
        with store.change() as change:
            change.create(Inode(ROOT_INODE, stat.S_IFDIR | 0o755, nlink=2, parent=ROOT_INODE, next_cookie=3))
        store.set_counter(NEXT_INODE, 1)
        self.committer.commit_now()
        with CommittedState(store.environment, self.clock) as state:
            rows = list(state.everything(b"", 1 << 20).rows)
            number = state.write_number
        head = Head(
            fsid=self.world.keys.fsid,
            owner=owner,
            generation=1,
            time_ns=self.clock.time_ns(),
            write_number=number,
            predecessor=None,
            fleets=(self.world.fleet,),
            kept=(),
            snapshot=await upload_rows(rows, sealer=sealer, uploader=self.uploader),
            deltas=(),
            schema_version=SCHEMA_VERSION,
        )
        await SimplePublisher(self.world, owner, self.spool, None).publish(head, deadline_seconds=1)
        store.layers.open.published = Publication(store.layers.committed_number, {})
        record_base(store, next(iter(self.spool.heads.values())), ours=True)
        self.committer.commit_now()

    # flushing, one step at a time

    async def cut(self, *, commit: bool = True) -> bool:
        """Makes one generation; False if nothing has changed."""
        renewed = self.generations.renewed
        order = self.generations.next_order(64 << 20)
        if commit:
            await self.committer.commit()
        cut = await self.generations.seal(order)
        if isinstance(cut, NoCut):
            assert cut is NoCut.UNCHANGED, cut
            return False
        await self.generations.publish(cut, renewed)
        return True

    async def precopy(self, *, orphans_too: bool = False) -> None:
        """Uploads one round of everything that is dirty and committed."""
        self.precopier.press("test", orphans_too=orphans_too)
        self.store.blocks.written.turn()
        self.store.blocks.written.turn()
        with self._unwrapped():
            async with trio.open_nursery() as nursery:
                while await self.precopier._pass(nursery):
                    if not self.precopier._position:
                        break

    # files

    def create(self, name: str, *, flags: int = 0) -> int:
        number = self.store.allocate_inode()
        above = self.inode(ROOT_INODE)
        cookie = above.next_cookie
        with self.store.change() as change:
            change.create(Inode(number, stat.S_IFREG | 0o644, nlink=1, flags=flags))
            change.put(Table.ENTRIES, u64(ROOT_INODE) + name.encode(), Entry(number, cookie, 8).encode())
            change.put(Table.COOKIES, u64_pair(ROOT_INODE, cookie), name.encode())
            change.patch(ROOT_INODE, next_cookie=cookie + 1)
        return number

    def write(self, number: int, first: int, data: bytes) -> None:
        """Writes whole pages from page `first` on."""
        inode = self.inode(number)
        padded = data + bytes(-len(data) % PAGE)
        self.store.put_pages(inode, first, memoryview(padded), self.store.next_write())
        inode.size = max(inode.size, first * PAGE + len(data))
        self.store.touch_data(inode)

    def truncate(self, number: int, pages: int, *, later: bool = False) -> None:
        """Truncates to a number of pages; `later` leaves the work to `work_off`."""
        inode = self.inode(number)
        if later:
            self.store.blocks.truncate(inode, pages, self.store.next_write())
            inode.size = pages * PAGE
            self.store.touch_data(inode)
        else:
            self.store.truncate_data(inode, pages, pages * PAGE)

    def extend(self, number: int, pages: int) -> None:
        inode = self.inode(number)
        inode.size = max(inode.size, pages * PAGE)
        self.store.touch_data(inode)

    def unlink(self, name: str, number: int, *, still_open: bool = False) -> None:
        key = u64(ROOT_INODE) + name.encode()
        row = self.store.get(Table.ENTRIES, key)
        assert row is not None
        with self.store.change() as change:
            change.delete(Table.ENTRIES, key)
            change.delete(Table.COOKIES, u64_pair(ROOT_INODE, Entry.decode(row).cookie))
            if still_open:
                change.patch(number, nlink=0)
                change.put(Table.ORPHANS, u64(number), b"")
            else:
                change.remove(number)

    def close_orphan(self, number: int) -> None:
        with self.store.change() as change:
            change.remove(number)

    def set_xattr(self, number: int, name: bytes, value: bytes | None) -> None:
        with self.store.change() as change:
            key = u64(number) + name
            if value is None:
                change.delete(Table.XATTRS, key)
            else:
                change.put(Table.XATTRS, key, value)

    def evict(self, number: int) -> None:
        for block in self.store.blocks.numbers(number, 0):
            self.store.blocks.evict(self.inode(number), block, (1 << BLOCK_PAGES) - 1)

    def inode(self, number: int) -> Inode:
        inode = self.store.inode(number)
        assert inode is not None
        return inode

    def content(self, number: int) -> bytes:
        """What an application would read, with what is remote fetched."""
        inode = self.inode(number)
        parts = []
        for page in range(-(-inode.size // PAGE)):
            data = self.store.blocks.pages(number, page, 1)[0]
            if data is None:
                row = self.store.blocks.remote_extent(number, page)
                data = bytes(PAGE) if row is None else self._fetch(number, page, row)
            parts.append(bytes(data))
        return b"".join(parts)[: inode.size]

    def _fetch(self, number: int, page: int, row: ExtentRow) -> bytes:
        stored = self.store.get(Table.PACKS, u64(row.pack))
        assert stored is not None, f"extent of inode {number} names pack {row.pack}, which has no row"
        return read_extent(self.world, PackRow.decode(stored), number, row)[page - row.first + row.skip]


# restoring


class DirectReader:
    """Reads shards without any waiting."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def shards(self, pack: StoredPack, wanted: Collection[int]) -> dict[int, memoryview]:
        await trio.lowlevel.checkpoint()
        here = shards_left(self.world, pack.ref)
        if here.keys() >= set(wanted):
            return {number: here[number] for number in wanted}
        try:
            body = memoryview(read_body(self.world, pack.ref))
        except AssertionError as error:
            raise DataLost(str(error)) from error
        size = pack.ref.shard_size
        return {number: body[number * size : (number + 1) * size] for number in wanted}


@dataclass
class Image:
    """A file system as a generation holds it: files by name, with content and xattrs."""

    head: Head
    files: dict[str, bytes]
    xattrs: dict[str, dict[bytes, bytes]]
    inodes: set[int]
    rows: dict[int, dict[bytes, bytes]] = field(default_factory=dict)


def newest_head(world: World) -> tuple[HeadRef, Head] | None:
    """The newest head that any backend holds."""
    found: dict[HeadRef, tuple[bytes, bytes]] = {}
    for store in world.control:
        for key in list(store.keys()):
            named = parse_head_key(key)
            if named is not None:
                found[named.ref] = (key, store.peek(key) or b"")
    if not found:
        return None
    ref = max(found)
    return ref, open_head(*found[ref], world.keys)


def restore(world: World, head: Head | None = None) -> Image:
    """Reads a generation (default: the newest) from the backends, and checks that its rows fit together."""
    if head is None:
        newest = newest_head(world)
        assert newest is not None
        head = newest[1]
    rows: dict[int, dict[bytes, bytes]] = {int(table): {} for table in Table}
    for pack, counting in packs_of(head):
        for chunk in read_metadata(world, pack):
            for table, key, value in counting.of(decode_rows(chunk)):
                if value is None:
                    rows[table].pop(key, None)
                else:
                    rows[table][key] = value
    return image_of(world, head, rows)


def image_of(world: World, head: Head, rows: dict[int, dict[bytes, bytes]]) -> Image:
    pending = {
        split_u64(key): decode_truncations(row) for key, row in rows[Table.TRUNCATIONS].items()
    }
    check_extents(rows, pending)
    files: dict[str, bytes] = {}
    xattrs: dict[str, dict[bytes, bytes]] = {}
    for key, row in rows[Table.ENTRIES].items():
        name, number = key[8:].decode(), Entry.decode(row).inode
        stored = rows[Table.INODES].get(u64(number))
        assert stored is not None, f"{name}: its inode {number} is not in the generation"
        inode = Inode.decode(number, stored)
        files[name] = file_content(world, rows, inode, pending.get(number, ()))
        xattrs[name] = {k[8:]: v for k, v in rows[Table.XATTRS].items() if split_u64(k) == number}
    inodes = {split_u64(key) for key in rows[Table.INODES]}
    for key in rows[Table.XATTRS]:
        assert split_u64(key) in inodes, "an xattr of no inode"
    return Image(head, files, xattrs, inodes, rows)


def check_extents(
    rows: dict[int, dict[bytes, bytes]], pending: dict[int, tuple[Truncation, ...]]
) -> None:
    """Extents do not overlap, their packs have rows and the right live bytes, what is gone has no data."""
    last: dict[int, int] = {}
    live: dict[int, int] = {}
    for key in sorted(rows[Table.EXTENTS]):
        number, first = split_u64_pair(key)
        row = ExtentRow.decode(first, rows[Table.EXTENTS][key])
        assert first >= last.get(number, 0), f"inode {number}: extents overlap at page {first}"
        last[number] = first + row.pages
        live[row.pack] = live.get(row.pack, 0) + row.pages * PAGE
        if u64(number) not in rows[Table.INODES]:
            cut = is_cut(pending.get(number, ()), first, row.write_number)
            assert cut, f"inode {number} is gone, and its extent at page {first} stays"
    for pack, size in live.items():
        stored = rows[Table.PACKS].get(u64(pack))
        assert stored is not None, f"pack {pack} is named by an extent and has no row"
        counted = PackRow.decode(stored).live
        assert counted == size, f"pack {pack}: {counted} live, not {size}"


def file_content(
    world: World, rows: dict[int, dict[bytes, bytes]], inode: Inode, pending: tuple[Truncation, ...]
) -> bytes:
    content = bytearray(inode.size)
    for key in sorted(k for k in rows[Table.EXTENTS] if split_u64(k) == inode.number):
        row = ExtentRow.decode(split_u64_pair(key)[1], rows[Table.EXTENTS][key])
        pages: list[bytes] | None = None
        for page in range(row.first, row.first + row.pages):
            if is_cut(pending, page, row.write_number) or page * PAGE >= inode.size:
                continue
            if pages is None:
                pack = PackRow.decode(rows[Table.PACKS][u64(row.pack)])
                pages = read_extent(world, pack, inode.number, row)
            content[page * PAGE : (page + 1) * PAGE] = pages[page - row.first + row.skip]
    return bytes(content[: inode.size])


def read_metadata(world: World, pack: MetadataPack) -> Iterable[bytes]:
    body = read_body(world, pack.ref)
    chunks = [data for _, data in open_body(world.keys, pack.ref, body)]
    assert len(chunks) == pack.chunks
    return chunks


def read_extent(world: World, pack: PackRow, inode: int, row: ExtentRow) -> list[bytes]:
    """The pages of a whole sealed extent."""
    ref = PackRef(
        pack.pack_id,
        pack.digest,
        PackKind(pack.kind),
        pack.key_number,
        pack.owner_epoch,
        pack.body_length,
        pack.shard_size,
    )
    entry = ExtentEntry(
        row.ordinal,
        inode,
        row.first - row.skip,
        row.plain_length // PAGE,
        row.write_number,
        row.offset,
        row.sealed_length,
        row.plain_length,
        row.codec,
    )
    sealed = read_body(world, ref)[row.offset : row.offset + row.sealed_length]
    data = open_extent(world.keys, ref, entry, sealed)
    return [data[i : i + PAGE] for i in range(0, len(data), PAGE)]


def shards_left(world: World, ref: PackRef) -> dict[int, memoryview]:
    """The payloads of a pack's shards, from whichever backends hold them: placement is a hint that is not used here."""
    have: dict[int, memoryview] = {}
    for number in range(world.code.n):
        key = shard_key(world.keys.fsid, ref.owner_epoch, ref.pack_id, number)
        for store in world.data:
            value = store.peek(key)
            if value is not None:
                have[number] = open_shard(value, world.keys, key=key).payload
                break
    return have


def read_body(world: World, ref: PackRef) -> bytes:
    """A pack's body."""
    have = shards_left(world, ref)
    assert len(have) >= world.code.k, f"pack {ref.pack_id.hex()} is lost"
    return b"".join(Code(world.code).decode(have))


