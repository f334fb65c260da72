"""A random history of the local store against plain byte strings, with a crash at any point.

The model keeps every state that a file has had.  After a crash a plain file must hold one of the
states since its last completed fsync, an atomic-sync file one of its covers since then; without a
crash every read returns the newest state.  A pretended remote takes dirty pages, so that pages get
clean, are evicted and come back by fetches that land late.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from qsfs.clock import FixedClock
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.needs import NeedPages, NeedRoom
from qsfs.store.group import Group
from qsfs.store.limits import Limits
from qsfs.store.schema import (
    BLOCK_PAGES,
    PAGE,
    BlockRow,
    Entry,
    ExtentRow,
    Inode,
    InodeFlag,
    Table,
    is_cut,
    split_u64_pair,
    u64,
)
from qsfs.store.store import CommitNeeded, Store
from tests.core.machine import write_torn

LIMITS = Limits(
    map_bytes=256 << 20,
    journal_bytes=4 << 20,
    spool_bytes=1 << 20,
    group_bytes=2 << 20,
    uncovered_bytes=10 * PAGE,
    largest_append=64 << 10,
    high_bytes=200 << 20,
    low_bytes=190 << 20,
    full_bytes=220 << 20,
)
ROOM = 40 * PAGE


@dataclass
class File:
    """What the model knows of a file: all states since the last certain one, and which are certain."""

    number: int
    atomic: bool
    states: list[bytes] = field(default_factory=lambda: [b""])
    covers: list[int] = field(default_factory=lambda: [0])
    synced: int = 0
    open: bool = True

    @property
    def now(self) -> bytes:
        return self.states[-1]

    def allowed(self) -> list[bytes]:
        if self.atomic:
            return [self.states[i] for i in self.covers if i >= self.synced]
        return self.states[self.synced :]

    def settle(self, content: bytes) -> None:
        self.states, self.covers, self.synced = [content], [0], 0


class History:
    """One run.  `step` does something random; `crash` loses what is not durable and checks the rest."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.directory = directory
        self.clock = FixedClock(seed)
        self.store = Store(directory, LIMITS, self.clock)
        self.contents = Contents(self.store)
        self.sealed: Group | None = None
        self.remote: dict[tuple[int, int], bytes] = {}
        self.fetches: list[tuple[int, int, ExtentRow, bytes]] = []
        self.packs = 0
        self.files: dict[int, File] = {}
        with self.store.change() as change:
            change.create(Inode(1, 0o40755, nlink=2, parent=1))
        for number, atomic in ((2, False), (3, True), (4, False)):
            flags = InodeFlag.ATOMIC_SYNC if atomic else 0
            with self.store.change() as change:
                change.create(Inode(number, 0o100644, nlink=1, flags=flags))
                change.put(Table.ENTRIES, u64(1) + b"%d" % number, Entry(number, number, 8).encode())
            self.files[number] = File(number, atomic)
        self.reopen_handles()
        self.commit()

    # what an application does

    def inode(self, file: File) -> Inode:
        inode = self.store.inode(file.number)
        assert inode is not None
        return inode

    def reopen_handles(self) -> None:
        for file in self.files.values():
            file.open = True
            self.contents.opened(self.inode(file))

    def attempt(self, operation: object, *args: object) -> bytes | int | None:
        """Runs an operation, satisfying its needs as the daemon would."""
        while True:
            try:
                return operation(*args)  # type: ignore[operator]
            except NeedPages as need:
                for page in range(need.first, need.first + need.count):
                    self.fetch_now(need.inode, page)
            except NeedRoom:
                self.commit()
                self.store.move_covered(10_000)
                self.commit()

    def changed(self, file: File, content: bytes) -> None:
        file.states.append(content)
        if not file.open:
            self.covered(file)

    def covered(self, file: File) -> None:
        if file.covers[-1] != len(file.states) - 1:
            file.covers.append(len(file.states) - 1)

    def write(self, file: File) -> None:
        r = self.random
        offset = r.choice((0, r.randrange(ROOM), r.randrange(ROOM // PAGE) * PAGE))
        size = r.choice((1, 100, PAGE, 3 * PAGE, r.randrange(1, 6 * PAGE)))
        data = r.randbytes(size)
        self.attempt(self.contents.write, self.inode(file), offset, data)
        old = file.now.ljust(offset, b"\0")
        self.changed(file, old[:offset] + data + old[offset + size :])

    def truncate(self, file: File) -> None:
        r = self.random
        size = r.choice((0, len(file.now), r.randrange(ROOM), r.randrange(ROOM // PAGE) * PAGE))
        self.attempt(self.contents.truncate, self.inode(file), size)
        self.changed(file, file.now[:size].ljust(size, b"\0"))

    def close_or_open(self, file: File) -> None:
        if file.open:
            self.contents.closed(self.inode(file))
            self.covered(file)
        else:
            self.contents.opened(self.inode(file))
        file.open = not file.open

    def read(self, file: File) -> None:
        start = self.random.randrange(ROOM)
        size = self.random.randrange(1, ROOM)
        got = self.attempt(self.contents.read, self.inode(file), start, size)
        assert got == file.now[start : start + size], f"inode {file.number}: wrong bytes at {start}"

    def check(self) -> None:
        for file in self.files.values():
            inode = self.inode(file)
            assert self.contents.stat(inode).size == len(file.now)
            assert self.attempt(self.contents.read, inode, 0, 1 << 40) == file.now, file.number

    # durability

    def sync(self, file: File, torn: bool = False) -> None:
        """An fsync; `torn`: the machine dies before its append is whole."""
        self.contents.cover(self.inode(file))
        self.covered(file)
        try:
            frame = self.store.journal_frame({file.number})
        except CommitNeeded:
            if not torn:
                self.commit()
                file.synced = len(file.states) - 1
            return
        if torn:
            if frame is not None:
                write_torn(self.store.directory, frame, self.random.randrange(len(frame[2])))
            return
        if frame is not None:
            self.store.journal.write([frame])
        file.synced = len(file.states) - 1

    def seal(self) -> None:
        if self.sealed is None:
            self.sealed = self.store.seal()

    def finish(self) -> None:
        if self.sealed is not None:
            self.store.commit(self.sealed)
            self.store.committed(self.sealed)
            self.sealed = None

    def commit(self) -> None:
        self.finish()
        self.seal()
        self.finish()

    # the daemon's own work

    def upload(self) -> None:
        """What pre-copy does: dirty pages of the last commit become an extent each."""
        view = self.store.environment.read()
        found = []
        for key, _ in view.scan(Table.DIRTY, b"", None):
            inode, number = split_u64_pair(key)
            encoded, value = view.get(Table.BLOCKS, key), view.get(Table.VALUES, key)
            assert encoded is not None and value is not None
            row = BlockRow.decode(encoded)
            whole = bytes(value) + row.tail
            for i in range(BLOCK_PAGES):
                page = number * BLOCK_PAGES + i
                pending = self.store.pending_truncations(inode)
                if row.dirty & 1 << i and not is_cut(pending, page, row.writes[i]):
                    found.append((inode, page, row.writes[i], whole[i * PAGE : (i + 1) * PAGE]))
        view.close()
        self.random.shuffle(found)
        if self.random.random() < 0.5 and self.sealed is None:
            # The application goes on while the pack is under way.
            self.application_step()
        for inode_number, page, write_number, data in found[: self.random.randrange(1, 20)]:
            inode = self.store.inode(inode_number)
            if inode is None or not self.store.blocks.clean(inode, page, (write_number,)):
                continue
            self.packs += 1
            self.remote[self.packs, 0] = data
            self.store.extents.insert(
                inode_number, ExtentRow(page, write_number, 1, 0, self.packs, 0, 0, 0, PAGE, 0)
            )

    def evict(self) -> None:
        for file in self.files.values():
            for number in self.store.blocks.numbers(file.number, 0):
                if self.random.random() < 0.5:
                    self.store.blocks.evict(self.inode(file), number, 0b1111)

    def fetch_now(self, inode: int, page: int) -> None:
        extent = self.store.blocks.remote_extent(inode, page)
        owner = self.store.inode(inode)
        if extent is not None and owner is not None:
            self.store.blocks.install(owner, page, self.remote[extent.pack, extent.ordinal], extent)

    def fetch_start(self) -> None:
        for file in self.files.values():
            page = self.random.randrange(ROOM // PAGE)
            extent = self.store.blocks.remote_extent(file.number, page)
            if extent is not None:
                self.fetches.append((file.number, page, extent, self.remote[extent.pack, extent.ordinal]))

    def fetch_end(self) -> None:
        for number, page, extent, data in self.fetches:
            owner = self.store.inode(number)
            if owner is not None:
                self.store.blocks.install(owner, page, data, extent)
        self.fetches = []

    # the history

    def application_step(self) -> None:
        file = self.random.choice(list(self.files.values()))
        write, rest = self.write, (self.truncate, self.read, self.sync, self.close_or_open)
        actions = (write, write, write, *rest)
        self.random.choice(actions)(file)

    def background_step(self) -> None:
        actions = (
            self.seal,
            self.finish,
            self.commit,
            self.upload,
            self.evict,
            self.fetch_start,
            self.fetch_end,
            lambda: self.store.work_off_truncations(2),
            lambda: self.store.move_covered(2),
        )
        self.random.choice(actions)()

    def step(self) -> None:
        if self.random.random() < 0.6:
            self.application_step()
        else:
            self.background_step()

    def crash(self) -> None:
        """The machine stops; what a mount finds must be a state that is allowed."""
        if self.random.random() < 0.3:
            self.sync(self.random.choice(list(self.files.values())), torn=True)
        self.store.close()
        self.sealed, self.fetches = None, []
        self.store = Store(self.directory, LIMITS, self.clock)
        self.contents = Contents(self.store)
        for file in self.files.values():
            inode = self.inode(file)
            found = self.attempt(self.contents.read, inode, 0, 1 << 40)
            assert isinstance(found, bytes)
            assert found in file.allowed(), (
                f"inode {file.number} (atomic={file.atomic}): {len(found)} bytes that are none of "
                f"{len(file.allowed())} allowed states"
            )
            assert self.contents.stat(inode).size == len(found)
            file.settle(found)
        self.reopen_handles()
        self.check_allocation()

    def check_allocation(self) -> None:
        """`allocated` counts exactly the pages that are resident or in an extent."""
        for file in self.files.values():
            held = set()
            for number in self.store.blocks.numbers(file.number, 0):
                state = self.store.blocks.state(file.number, number)
                if state is not None:
                    held |= {number * 4 + i for i in range(4) if state.resident & 1 << i}
            for row in self.store.extents.overlapping(file.number, 0, 1 << 50):
                held |= set(range(row.first, row.first + row.pages))
            assert self.inode(file).allocated == len(held), f"inode {file.number}"
