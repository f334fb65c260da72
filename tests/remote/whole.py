"""A whole file system on memory backends: the real format, mount, flush, restore and reading, without FUSE and 0-db.

    fleet = WholeFleet(count, code, directory, clock)
    await fleet.format()
    async with fleet.mounted("first") as mount:
        mount.write("a", data)
        await mount.sync()
    fleet.down |= {1, 2}                       # servers, by number from 1
    report = await fleet.restore("second")
    assert await fleet.read("second") == {"a": data}
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from unittest import mock

import trio
from trio.testing import MockClock

from qsfs.backend.limits import RateLimit
from qsfs.backend.memory import MemoryStore
from qsfs.config import BackendConfig, CacheConfig, CodeConfig, Config, FlushConfig
from qsfs.daemon import formatting, restoring
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import Links, members_of, open_file_system
from qsfs.daemon.flushing import Flushing
from qsfs.daemon.formatting import format_file_system
from qsfs.daemon.owning import local_fleets
from qsfs.daemon.restoring import restore_file_system
from qsfs.errors import BackendUnavailable
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.posix import Credentials
from qsfs.format.erasure import CodeParams
from qsfs.remote.fetch import Fetcher
from qsfs.remote.format_fs import FormatReport
from qsfs.remote.members import Candidate
from qsfs.remote.reader import PackReader
from qsfs.remote.restore import RestoreReport
from qsfs.remote.spool import Spool
from qsfs.store.limits import Limits
from qsfs.store.schema import PAGE, ROOT_INODE, Entry, Table, u64
from qsfs.store.store import Store
from tests.remote.flushing import VirtualClock
from tests.remote.harness import FaultyBackend
from tests.remote.small_fs import SECRET

_HEADS = "qsfs.control"
_ROOT = Credentials(0, 0)


class WholeFleet:
    """Servers numbered from 1, and the cache directories of machines, by name; `down` servers answer nobody."""

    def __init__(self, count: int, code: CodeParams, root: Path, clock: MockClock) -> None:
        self.code = code
        self.clock = VirtualClock(clock)
        self.down: set[int] = set()
        self.numbers = range(1, count + 1)
        self.data = {n: MemoryStore(f"host{n}:9900/qsfs", clock=self.clock) for n in self.numbers}
        self.control = {n: MemoryStore(f"host{n}:9900/{_HEADS}", clock=self.clock) for n in self.numbers}
        self._root = root
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> WholeFleet:
        for module in (formatting, restoring):
            self._patches.enter_context(mock.patch.object(module, "links", lambda *_: self.links()))
        self._patches.enter_context(mock.patch.object(formatting, "prepare_namespaces", _namespaces))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patches.close()

    def config(self, machine: str) -> Config:
        """What the configuration file of a machine says."""
        directory = self._root / machine
        directory.mkdir(exist_ok=True)
        return Config(
            path=directory / "qsfs.toml",
            cache=CacheConfig(directory=directory, size_bytes=256 << 20),
            code=CodeConfig(self.code.k, self.code.m, self.code.codec),
            flush=FlushConfig(cut_seconds=3600.0, quiet_seconds=1.0),
            backends=tuple(BackendConfig(address=f"host{n}:9900") for n in self.numbers),
        )

    def links(self) -> Links:
        """New connections to all servers."""
        found = [
            Candidate(
                f"host{n}:9900",
                "qsfs",
                self._connect(n, self.data[n]),
                lambda _, n=n: self._connect(n, self.control[n]),
            )
            for n in self.numbers
        ]
        return Links(found, [], {}, RateLimit(), RateLimit())

    def _connect(self, number: int, store: MemoryStore) -> FaultyBackend:
        backend = FaultyBackend(store)

        def refuse(call: str, key: bytes) -> None:
            if number in self.down:
                raise BackendUnavailable(f"backend {store.name}: connection refused")

        backend.gate = refuse
        return backend

    async def format(self) -> FormatReport:
        """Formats on the machine "first"."""
        return await format_file_system(self.config("first"), self.clock, secret=SECRET)

    async def restore(self, machine: str, *, force: bool = False) -> RestoreReport:
        """Restores on a machine; raises as `qsfs restore` does."""
        return await restore_file_system(
            self.config(machine), self.clock, lambda line: None, force=force, secret=SECRET
        )

    @contextlib.asynccontextmanager
    async def mounted(self, machine: str) -> AsyncIterator[WholeMount]:
        """A machine that owns and flushes; what is not committed at the end is lost, as in a crash."""
        async with self._opened(machine) as mount:
            await mount.own()
            yield mount
            mount.nursery.cancel_scope.cancel()

    async def read(self, machine: str) -> dict[str, bytes]:
        """All files of a restored machine, each page fetched from the backends that answer."""
        async with self._opened(machine) as mount:
            found = {name: await mount.read(name) for name in mount.names()}
            mount.nursery.cancel_scope.cancel()
        return found

    @contextlib.asynccontextmanager
    async def _opened(self, machine: str) -> AsyncIterator[WholeMount]:
        config = self.config(machine)
        store = Store(config.cache.directory, Limits.of(config.cache, config.flush.spool_bytes), self.clock)
        try:
            async with trio.open_nursery() as nursery:
                mount = WholeMount(self, config, store, nursery)
                await mount.open()
                yield mount
        finally:
            store.close()


class WholeMount:
    """One machine's store, and what reads and flushes for it."""

    def __init__(self, fleet: WholeFleet, config: Config, store: Store, nursery: trio.Nursery) -> None:
        self.fleet = fleet
        self.config = config
        self.store = store
        self.nursery = nursery
        self.contents = Contents(store)
        self.namespace = Namespace(store, self.contents)
        self.committer = Committer(store, self.contents, 5.0)
        self.flushing: Flushing
        self._fetcher: Fetcher

    async def open(self) -> None:
        """Opens the file system, and starts what fetches."""
        clock, links = self.fleet.clock, self.fleet.links()
        self.nursery.start_soon(self.committer.run)
        opened = await open_file_system(self.store, links, SECRET, clock)
        members, _ = await members_of(links, opened, clock, local_fleets(self.store, opened))
        reader = PackReader(members, opened.keys, opened.code)
        self._fetcher = Fetcher(
            self.store, reader, self.committer, self.contents.transient, deadline_seconds=30.0, path_of=str
        )
        await self.nursery.start(self._fetcher.run)
        self.flushing = Flushing(
            self.config.flush,
            120.0,
            self.store,
            Spool(self.store.directory / "spool", self.store.limits.spool_bytes),
            self.committer,
            opened,
            members,
            reader,
            clock,
            on_fenced=_raise,
            waiting=lambda what: None,
        )

    async def own(self) -> None:
        """Owns, and starts what flushes."""
        await self.flushing.start(self.nursery, offline=False)

    def write(self, name: str, data: bytes) -> None:
        """Makes a file of `data`."""
        inode = self.namespace.create(ROOT_INODE, name.encode(), 0o644, _ROOT)
        self.contents.write(inode, 0, data)

    async def sync(self) -> str:
        """Publishes all of it; returns the class that was reached."""
        return str((await self.flushing.sync())["class"])

    def names(self) -> Iterator[str]:
        """The names in the root directory."""
        for key, _ in list(self.store.scan(Table.ENTRIES, u64(ROOT_INODE), u64(ROOT_INODE + 1))):
            yield key[8:].decode()

    async def read(self, name: str) -> bytes:
        """A file's content, fetched where it is only remote."""
        row = self.store.get(Table.ENTRIES, u64(ROOT_INODE) + name.encode())
        assert row is not None
        number = Entry.decode(row).inode
        inode = self.store.inode(number)
        assert inode is not None
        pages = -(-inode.size // PAGE)
        await self._fetcher.fetch(number, 0, pages)
        found = self.store.blocks.pages(number, 0, pages)
        return b"".join(bytes(page) if page else bytes(PAGE) for page in found)[: inode.size]


async def _namespaces(backends: tuple[BackendConfig, ...], _: object) -> dict[str, str]:
    await trio.lowlevel.checkpoint()
    return {backend.name: _HEADS for backend in backends}


def _raise(error: Exception) -> None:
    raise error
