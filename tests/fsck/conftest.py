"""A file system to check: some files in packs, some dirty, a directory, a link, a symlink, an orphan."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qsfs.fsck.check import Backends, fsck
from qsfs.fsck.report import Report
from qsfs.remote.survey import Timing
from qsfs.store.environment import Environment
from qsfs.store.schema import PAGE, ROOT_INODE, Entry, Inode, Table, u64, u64_pair
from qsfs.store.store import FSID_KEY
from tests.remote.small_fs import LIMITS, SECRET, SmallFs, noise

TIMING = Timing(attempt=2.0, retry=0.01, retry_most=0.02, grace=0.2)


@dataclass
class Checked:
    """A file system at rest."""

    fs: SmallFs
    directory: Path
    numbers: dict[str, int]
    packs: dict[str, list[int]]

    async def fsck(self, *, remote: bool = False, down: tuple[int, ...] = (), **options: bool) -> Report:
        backends = Backends(self.fs.candidates(down), SECRET, TIMING) if remote else None
        return await fsck(self.directory, LIMITS, clock=self.fs.clock, backends=backends, **options)

    def edit(self, change: Callable[[Environment, object], None]) -> None:
        """Changes rows behind the store's back."""
        environment = Environment(self.directory, LIMITS.map_bytes)
        with environment.write() as txn:
            change(environment, txn)
        environment.close()

    def put(self, table: Table, key: bytes, value: bytes | None) -> None:
        """Sets or deletes one row behind the store's back."""

        def change(environment, txn):
            if value is None:
                assert txn.delete(key, db=environment.databases[table])
            else:
                txn.put(key, value, db=environment.databases[table])

        self.edit(change)

    def get(self, table: Table, key: bytes) -> bytes | None:
        environment = Environment(self.directory, LIMITS.map_bytes, readonly=True)
        view = environment.read()
        row = view.get(table, key)
        found = None if row is None else bytes(row)
        view.close()
        environment.close()
        return found

    def inode(self, name: str) -> Inode:
        number = self.numbers[name]
        return Inode.decode(number, self.get(Table.INODES, u64(number)))

    def put_inode(self, inode: Inode) -> None:
        self.put(Table.INODES, u64(inode.number), inode.encode())

    def reopen(self) -> SmallFs:
        return SmallFs(self.fs.world, self.directory)


def kinds(report: Report) -> list[str]:
    return sorted({finding.kind for finding in report.findings if finding.severity.value == "error"})


@pytest.fixture
async def checked(scratch: Path) -> AsyncIterator[Checked]:
    directory = scratch / "cache"
    fs = await SmallFs.make(directory)
    fs.add_superblock()
    fs.store.set_local(FSID_KEY, fs.keys.fsid)
    sub = fs.create("dir", mode=stat.S_IFDIR | 0o755)
    inner = fs.create("inner", mode=stat.S_IFDIR | 0o755, parent=sub)
    numbers = {
        "root": ROOT_INODE,
        "dir": sub,
        "inner": inner,
        "big": fs.write("big", noise(40 * PAGE)),
        "small": fs.write("small", b"hello", parent=inner),
        "cold": fs.write("cold", noise(9 * PAGE, 2), parent=sub),
        "dirty": fs.write("dirty", noise(6 * PAGE, 3)),
        "link": fs.create("link", mode=stat.S_IFLNK | 0o777),
        "orphan": fs.write("orphan", noise(PAGE, 4)),
    }
    fs.commit()
    packs = {name: fs.upload(numbers[name]) for name in ("big", "small", "cold")}
    fs.evict(numbers["cold"])
    with fs.store.change() as change:
        # A second name for a file, a target for the symlink, and a file that is unlinked but open.
        root = fs.inode(ROOT_INODE)
        change.put(
            Table.ENTRIES,
            u64(ROOT_INODE) + b"second",
            Entry(numbers["big"], root.next_cookie, stat.S_IFREG >> 12).encode(),
        )
        change.put(Table.COOKIES, u64_pair(ROOT_INODE, root.next_cookie), b"second")
        change.patch(ROOT_INODE, next_cookie=root.next_cookie + 1)
        change.patch(numbers["big"], nlink=2)
        change.put(Table.SYMLINKS, u64(numbers["link"]), b"target")
        entry = Entry.decode(fs.store.get(Table.ENTRIES, u64(ROOT_INODE) + b"orphan"))
        change.delete(Table.ENTRIES, u64(ROOT_INODE) + b"orphan")
        change.delete(Table.COOKIES, u64_pair(ROOT_INODE, entry.cookie))
        change.patch(numbers["orphan"], nlink=0)
        change.put(Table.ORPHANS, u64(numbers["orphan"]), b"")
    fs.commit()
    fs.publish()
    fs.record_base()
    fs.close()
    yield Checked(fs, directory, numbers, packs)


@pytest.fixture
def small_and_big(checked: Checked) -> tuple[int, int]:
    return checked.numbers["small"], checked.numbers["big"]
