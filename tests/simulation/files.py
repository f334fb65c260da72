"""What applications do: changes and reads through the namespace, told to the ledger in the same step."""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from qsfs.errors import QsfsError
from qsfs.filesystem.needs import Need, NeedPages
from qsfs.filesystem.posix import Credentials
from qsfs.store.schema import PAGE, ROOT_INODE, Inode
from tests.simulation.cluster import MARK, MARKER
from tests.simulation.ledger import Files, Ledger
from tests.simulation.machine import Life

ROOT = Credentials(0, 0)
MOST_FILES = 6
MOST_PAGES = 40


class _RemovedMeanwhile(Exception):
    """Another program removed the file while this one waited."""


class Applications:
    """Those of all machines."""

    def __init__(self, ledger: Ledger, chance: random.Random) -> None:
        self._ledger = ledger
        self._chance = chance
        self._names = 0

    async def change(self, life: Life) -> None:
        """One change; none if it waits for what does not come."""
        files = self._ledger.versions[life.version].files
        chance = self._chance
        if not files or (len(files) < MOST_FILES and chance.random() < 0.2):
            self._names += 1
            await self.create(life, f"f{self._names} {MARK.decode()}")
            return
        name = chance.choice(sorted(files))
        size = len(files[name])
        kind = chance.choices(("write", "append", "truncate", "extend", "unlink", "rename"), (8, 3, 2, 1, 1, 1))[0]
        if kind == "write":
            offset = chance.randrange(MOST_PAGES * PAGE) if chance.random() < 0.4 else chance.randrange(8) * PAGE
            await self._write(life, name, offset)
        elif kind == "append":
            await self._write(life, name, size if size < MOST_PAGES * PAGE else 0)
        elif kind == "truncate":
            await self.truncate(life, name, chance.choice((0, chance.randrange(size + 1), size // PAGE * PAGE)))
        elif kind == "extend":
            await self.truncate(life, name, size + chance.randrange(3 * PAGE))
        elif kind == "unlink":
            await self.unlink(life, name)
        else:
            other = chance.choice([*sorted(files), f"g{chance.randrange(9)} {MARK.decode()}"])
            await self._do(life, lambda: self._rename(life, name, other))

    async def _do(self, life: Life, step: Callable[[], Files]) -> None:
        """Does `step` as often as it needs something first, and notes what it made of the files."""
        for _ in range(20):
            if life is not life.machine.writable:
                return
            try:
                files = step()
            except NeedPages as need:
                try:
                    await life.fetcher.fetch(need.inode, need.first, need.count)
                except QsfsError:
                    return
                continue
            except Need:
                await life.committer.room()
                continue
            except _RemovedMeanwhile:
                return
            life.version = self._ledger.add(life.version, files)
            life.namespace.set_xattr(ROOT_INODE, MARKER, str(life.version).encode())
            return

    def _files(self, life: Life) -> Files:
        return dict(self._ledger.versions[life.version].files)

    def inode(self, life: Life, name: str) -> Inode:
        """The inode of a file that must be there."""
        inode = life.namespace.lookup(ROOT_INODE, name.encode())
        assert inode is not None, f"{life.name}: {name} is gone"
        return inode

    def _inode(self, life: Life, name: str) -> Inode:
        if name not in self._files(life):
            raise _RemovedMeanwhile
        return self.inode(life, name)

    async def create(self, life: Life, name: str) -> None:
        """Makes an empty file."""
        await self._do(life, lambda: self._create(life, name))

    def _create(self, life: Life, name: str) -> Files:
        life.namespace.create(ROOT_INODE, name.encode(), 0o644, ROOT)
        return self._files(life) | {name: b""}

    async def _write(self, life: Life, name: str, offset: int) -> None:
        chance = self._chance
        length = chance.choice((1, 100, PAGE, PAGE, 3 * PAGE, 12 * PAGE))
        data = (chance.randbytes(64) + MARK) * (length // 64 + 1)
        await self.write(life, name, offset, data[:length])

    async def write(self, life: Life, name: str, offset: int, data: bytes) -> None:
        """Writes to a file."""
        await self._do(life, lambda: self._wrote(life, name, offset, data))

    def _wrote(self, life: Life, name: str, offset: int, data: bytes) -> Files:
        life.contents.write(self._inode(life, name), offset, data)
        files = self._files(life)
        content = bytearray(files[name].ljust(offset, b"\0"))
        content[offset : offset + len(data)] = data
        return files | {name: bytes(content)}

    async def truncate(self, life: Life, name: str, size: int) -> None:
        """Sets the size of a file."""
        await self._do(life, lambda: self._truncated(life, name, size))

    def _truncated(self, life: Life, name: str, size: int) -> Files:
        life.contents.truncate(self._inode(life, name), size)
        files = self._files(life)
        return files | {name: files[name][:size].ljust(size, b"\0")}

    async def unlink(self, life: Life, name: str) -> None:
        """Removes a file."""
        await self._do(life, lambda: self._unlink(life, name))

    def _unlink(self, life: Life, name: str) -> Files:
        self._inode(life, name)
        life.namespace.unlink(ROOT_INODE, name.encode())
        life.namespace.references.collect()
        files = self._files(life)
        del files[name]
        return files

    def _rename(self, life: Life, name: str, other: str) -> Files:
        self._inode(life, name)
        life.namespace.rename(ROOT_INODE, name.encode(), ROOT_INODE, other.encode())
        life.namespace.references.collect()
        files = self._files(life)
        if name != other:
            files[other] = files.pop(name)
        return files

    # reading

    async def read(self, life: Life, name: str, offset: int, size: int) -> bool:
        """Reads a part of a file; whether it came.  What comes is what was written."""
        for _ in range(60):
            version = life.version
            files = self._ledger.versions[version].files
            if name not in files:
                return True
            inode = self.inode(life, name)
            try:
                data = life.contents.read(inode, offset, size)
            except NeedPages as need:
                try:
                    await life.fetcher.fetch(need.inode, need.first, need.count)
                except QsfsError as error:
                    life.machine.note(f"{life.name} cannot read {name}: {error}")
                    return False
                await trio.lowlevel.checkpoint()
                continue
            assert data == files[name][offset : offset + size], f"{life.name}: {name} reads wrong at {offset}"
            return True
        raise AssertionError(f"{life.name}: fetches of {name} bring nothing")

    def check_local(self, life: Life) -> None:
        """Names and sizes, and all bytes that are local, are those of the version that the store says it is."""
        files = self._ledger.versions[life.version].files
        listed = [name.decode() for _, name, _ in life.namespace.list_directory(ROOT_INODE, 2)]
        assert sorted(listed) == sorted(files), f"{life.name}: {sorted(listed)}, not {sorted(files)}"
        for name, content in files.items():
            inode = self.inode(life, name)
            assert inode.size == len(content), f"{life.name}: {name} has {inode.size} bytes, not {len(content)}"
            for offset in range(0, len(content), PAGE):
                try:
                    data = life.contents.read(inode, offset, PAGE)
                except NeedPages:
                    continue
                assert data == content[offset : offset + PAGE], f"{life.name}: {name} differs at {offset}"

    def evict(self, life: Life) -> None:
        """Drops every page that is clean and committed."""
        assert life.store is not None
        for name in self._ledger.versions[life.version].files:
            inode = self.inode(life, name)
            for block in life.store.blocks.numbers(inode.number, 0):
                life.store.blocks.evict(inode, block, 15)
