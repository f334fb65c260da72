"""A machine with one local store, driven step by step: what a schedule needs to be written down in order.

The remote is a dictionary: `upload` does at once what a written pack does to the tables, `fetch` starts a
fetch that lands when it is told to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from qsfs.clock import FixedClock
from qsfs.filesystem.contents import Contents
from qsfs.store.group import Group
from qsfs.store.journal import journal_paths
from qsfs.store.limits import Limits
from qsfs.store.packs import add_pack
from qsfs.store.schema import PAGE, Entry, ExtentRow, Inode, InodeFlag, PackRow, PackState, Table, u64
from qsfs.store.store import NEXT_PACK, CommitNeeded, Store

LIMITS = Limits(
    map_bytes=64 << 20,
    journal_bytes=1 << 20,
    spool_bytes=1 << 20,
    group_bytes=2 << 20,
    uncovered_bytes=8 * PAGE,
    largest_append=256 << 10,
    high_bytes=40 << 20,
    low_bytes=36 << 20,
    full_bytes=48 << 20,
)

Frame = tuple[int, int, bytes]


def write_torn(directory: Path, frame: Frame, length: int) -> None:
    """Writes no more than the first `length` bytes of an append to the journal of the store in `directory`."""
    number, offset, data = frame
    with journal_paths(directory)[number].open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data[:length], offset)
        os.fsync(file.fileno())


def page(letter: str) -> bytes:
    """A page of one letter."""
    return letter.encode() * PAGE


ZEROS = bytes(PAGE)


class Machine:
    """Opens the store in `directory`; `crash` and `power_cut` lose what is not durable and open it again."""

    def __init__(self, directory: Path, limits: Limits = LIMITS) -> None:
        self.directory = directory
        self.limits = limits
        self.clock = FixedClock(7)
        self.remote: dict[int, bytes] = {}
        self.sealed: Group | None = None
        self.open()
        if not self.store.root_exists():
            with self.store.change() as change:
                change.create(Inode(1, 0o40755, nlink=2, parent=1))
            self.commit()

    def open(self) -> None:
        self.store = Store(self.directory, self.limits, self.clock)
        self.contents = Contents(self.store)

    def close(self) -> None:
        self.store.close()

    # what an application does

    def create(self, name: str, *, atomic: bool = False, opened: bool = True) -> int:
        number = self.store.allocate_inode()
        flags = InodeFlag.ATOMIC_SYNC if atomic else 0
        with self.store.change() as change:
            change.create(Inode(number, 0o100644, nlink=1, flags=flags))
            change.put(Table.ENTRIES, u64(1) + name.encode(), Entry(number, number, 8).encode())
        if opened:
            self.contents.opened(self.inode(number))
        return number

    def names(self) -> set[str]:
        return {key[8:].decode() for key, _ in self.store.scan(Table.ENTRIES, u64(1), u64(2))}

    def inode(self, number: int) -> Inode:
        inode = self.store.inode(number)
        assert inode is not None
        return inode

    def write(self, number: int, first: int, data: bytes) -> None:
        """Writes at page `first`."""
        self.contents.write(self.inode(number), first * PAGE, data)

    def write_at(self, number: int, offset: int, data: bytes) -> None:
        self.contents.write(self.inode(number), offset, data)

    def truncate(self, number: int, pages: int) -> None:
        self.contents.truncate(self.inode(number), pages * PAGE)

    def truncate_to(self, number: int, size: int) -> None:
        self.contents.truncate(self.inode(number), size)

    def read(self, number: int) -> bytes:
        return self.contents.read(self.inode(number), 0, 1 << 40)

    def page(self, number: int, index: int) -> bytes:
        return self.contents.read(self.inode(number), index * PAGE, PAGE)

    def rename_over(self, source: str, target: str) -> None:
        row = self.store.get(Table.ENTRIES, u64(1) + source.encode())
        old = self.store.get(Table.ENTRIES, u64(1) + target.encode())
        assert row is not None and old is not None
        with self.store.change() as change:
            change.delete(Table.ENTRIES, u64(1) + source.encode())
            change.put(Table.ENTRIES, u64(1) + target.encode(), row)
            change.remove(Entry.decode(old).inode)
            change.with_data(Entry.decode(row).inode)
        self.contents.forget(Entry.decode(old).inode)

    # durability

    def frame(self, *numbers: int) -> Frame | None:
        """Covers and places the append of an fsync, unwritten."""
        for number in numbers:
            self.contents.cover(self.inode(number))
        return self.store.journal_frame(numbers)

    def fsync(self, *numbers: int) -> None:
        """An fsync that must be served by the journal, or has nothing left to do."""
        frame = self.frame(*numbers)
        if frame is not None:
            self.store.journal.write([frame])

    def fsync_or_commit(self, *numbers: int) -> bool:
        """An fsync as the daemon does it; returns whether it took a commit."""
        try:
            self.fsync(*numbers)
        except CommitNeeded:
            self.commit()
            return True
        return False

    def seal(self) -> Group:
        self.sealed = self.store.seal()
        return self.sealed

    def finish(self) -> None:
        """Commits the sealed group."""
        assert self.sealed is not None
        self.store.commit(self.sealed)
        self.store.committed(self.sealed)
        self.sealed = None

    def commit(self) -> None:
        if self.sealed is not None:
            self.finish()
        self.seal()
        self.finish()

    def crash(self) -> None:
        """The machine stops and starts: what was written to the disk is there, nothing else."""
        self.store.close()
        self.sealed = None
        self.open()

    def power_cut(self, change: Callable[[dict[str, bytearray]], None]) -> None:
        """A crash after which `change` says what of the journal files reached the disk."""
        self.store.close()
        self.sealed = None
        paths = {name: self.directory / name for name in ("journal.0", "journal.1")}
        files = {name: bytearray(path.read_bytes()) for name, path in paths.items()}
        change(files)
        for name, path in paths.items():
            path.write_bytes(files[name])
        self.open()

    # the daemon's own work

    def upload(self, number: int, pages: Iterable[int], *, together: bool = False) -> list[int]:
        """Makes committed dirty pages clean, each with an extent (or `together` one) in a new pack."""
        wanted = sorted(pages)
        runs = [wanted] if together else [[index] for index in wanted]
        return [self._upload_run(number, run) for run in runs]

    def _upload_run(self, number: int, run: list[int]) -> int:
        read = self.read_committed(number, run)
        pack = self.land_upload(number, run[0], read)
        assert pack is not None, "the pages were not dirty any more"
        return pack

    def read_committed(self, number: int, run: Iterable[int]) -> list[tuple[int, bytes]]:
        """What pre-copy reads: write number and bytes of each page, as committed."""
        found = []
        for index in run:
            state = self.store.blocks.state(number, index // 4)
            assert state is not None and state.dirty & 1 << index % 4
            found.append((state.writes[index % 4], self.page(number, index)))
        return found

    def land_upload(self, number: int, first: int, read: list[tuple[int, bytes]]) -> int | None:
        """What a written pack does to the tables; None if no page of it could be marked clean."""
        inode = self.inode(number)
        cleaned = [
            self.store.blocks.clean(inode, first + i, (write_number,))
            for i, (write_number, _) in enumerate(read)
        ]
        if not any(cleaned):
            return None
        assert all(cleaned)
        pack = self.store.next_number(NEXT_PACK)
        state = int(PackState.FULL | PackState.LOOKED)
        row = PackRow(bytes(16), bytes(32), 1, 1, 1, 0, 0, 0, 0, 0, 0, state, ())
        add_pack(self.store, pack, row)
        self.remote[pack] = b"".join(data for _, data in read)
        highest = max(write_number for write_number, _ in read)
        extent = ExtentRow(first, highest, len(read), 0, pack, 0, 0, 0, len(read) * PAGE, 0)
        self.store.extents.insert(number, extent)
        return pack

    def evict(self, number: int, pages: Iterable[int]) -> None:
        for index in pages:
            self.store.blocks.evict(self.inode(number), index // 4, 1 << index % 4)

    def fetch(self, number: int, index: int) -> Callable[[], bool]:
        """Starts a fetch of one page; the result lets it land and says whether it was installed."""
        extent = self.store.blocks.remote_extent(number, index)
        assert extent is not None
        offset = (extent.skip + index - extent.first) * PAGE
        data = self.remote[extent.pack][offset : offset + PAGE]

        def land() -> bool:
            return self.store.blocks.install(self.inode(number), index, data, extent)

        return land

    def work_off(self) -> None:
        while not self.store.work_off_truncations(64):
            pass


def with_limits(**changes: int) -> Limits:
    """The limits of these tests, some of them changed."""
    return replace(LIMITS, **changes)


def flip(path: Path, offset: int) -> None:
    """Turns one byte of a file into another."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes((byte[0] ^ 0xFF,)))
        os.fsync(file.fileno())
