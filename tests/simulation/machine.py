"""Machines: a directory, a generator of random bytes, and now and then a daemon that runs on them.

A `Life` is one run of the daemon's own parts, wired as `qsfs.daemon.service` does it, without FUSE.  It ends by a power
cut at any moment: the machine goes on from a copy of its directory that was made at that moment, whatever the dying
tasks still do.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from qsfs.config import FlushConfig
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import Links, members_of, open_file_system
from qsfs.daemon.flushing import Flushing
from qsfs.daemon.keeper import Keeper
from qsfs.daemon.owning import local_fleets
from qsfs.daemon.probing import probe
from qsfs.errors import Fenced, QsfsError
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.posix import PosixError
from qsfs.remote.fetch import Fetcher
from qsfs.remote.reader import PackReader
from qsfs.remote.spool import Spool
from qsfs.store.group import Group
from qsfs.store.schema import ROOT_INODE
from qsfs.store.store import Store
from tests.remote.harness import TrioClock
from tests.remote.small_fs import SECRET
from tests.simulation.cluster import LIMITS, MARKER, Cluster
from tests.simulation.engine import PowerCut, on, thaw

Work = Callable[["Life"], Awaitable[None]]


class WatchedStore(Store):
    """A store that tells which version each of its commits holds, and which is durable."""

    def __init__(self, life: Life, directory: Path) -> None:
        self._life = life
        self.sealed: dict[int, int] = {}
        super().__init__(directory, LIMITS, life.machine.clock)

    def seal(self, switch: bool = True) -> Group:
        group = super().seal(switch)
        version = self._life.version
        if version:
            self.sealed[group.number] = version
            self._life.cuts[self.write_number] = version
        return group

    def committed(self, group: Group) -> None:
        super().committed(group)
        if group.number in self.sealed:
            self._life.machine.durable = self.sealed[group.number]


class Life:
    """One run on a machine: `work` is what it does; None is a mount."""

    def __init__(self, machine: Machine, cut_off: frozenset[int] = frozenset()) -> None:
        self.machine = machine
        self.cut_off = cut_off
        machine.lives += 1
        self.name = f"{machine.name}{machine.lives}"
        self.frozen = self.dead = self.ready = False
        self.held: list[trio.lowlevel.Task] = []
        self.ended = trio.Event()
        self.news = trio.Event()
        self.error: QsfsError | None = None
        self.fenced: QsfsError | None = None
        self.version = 0
        self.cuts: dict[int, int] = {}
        self.scope = trio.CancelScope()
        self.store: WatchedStore | None = None
        self.nursery: trio.Nursery
        self.namespace: Namespace
        self.contents: Contents
        self.committer: Committer
        self.fetcher: Fetcher
        self.flushing: Flushing
        self.links: Links

    @property
    def cluster(self) -> Cluster:
        """The backends."""
        return self.machine.cluster

    @property
    def config(self) -> Any:
        """As much of a configuration as commands look at."""
        return SimpleNamespace(
            cache=SimpleNamespace(directory=self.machine.directory, group_seconds=5.0),
            flush=SimpleNamespace(spool_bytes=LIMITS.spool_bytes),
        )

    def start(self, nursery: trio.Nursery, *works: Work) -> None:
        """Lives through `works`, one after the other."""
        self.machine.life = self
        with on(self):
            nursery.start_soon(self._run, works)

    async def _run(self, works: tuple[Work, ...]) -> None:
        try:
            with self.scope:
                for work in works:
                    await work(self)
        except BaseException as error:
            self._died_of(error)
        finally:
            if self.store is not None:
                self.store.close()
            if self.machine.life is self:
                self.machine.life = None
            self.ready = False
            self.ended.set()
            self.tell()

    def _died_of(self, error: BaseException) -> None:
        """Power cuts are what they are; errors of ours ended the life in an orderly way; all else is a bug."""
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if self.dead:
            return
        if isinstance(error, QsfsError):
            self.error = self.machine.error = error
            self.machine.refused(self, error)
            self.machine.note(f"{self.name} ends: {type(error).__name__}: {error}")
            return
        raise error

    def tell(self) -> None:
        """Wakes who waits for something of this life."""
        self.news.set()
        self.news = trio.Event()

    # ending

    def cut_power(self) -> None:
        """Ends it here and now."""
        if self.dead or self.ended.is_set():
            return
        self.machine.save()
        self.dead = True
        self.scope.cancel()
        if self.frozen:
            thaw(self)

    def die(self) -> None:
        """For failpoints: ends it in the middle of what it does."""
        self.cut_power()
        raise PowerCut

    # the daemon

    def open(self) -> WatchedStore:
        """Opens the store, and sees which version it holds."""
        self.store = store = WatchedStore(self, self.machine.directory)
        self.contents = Contents(store)
        self.namespace = Namespace(store, self.contents)
        self.version = self.machine.opened(self)
        self.cuts[store.layers.committed_write_number] = self.version
        self.cuts[store.write_number] = self.version
        return store

    def marked(self) -> int:
        """The version that the file system says it is."""
        try:
            return int(self.namespace.get_xattr(ROOT_INODE, MARKER))
        except PosixError:
            return 1

    async def mount(self) -> None:
        """Opens, owns, flushes, and goes on until the power is cut."""
        store, clock = self.open(), self.machine.clock
        self.committer = Committer(store, self.contents, self.machine.group_seconds)
        keeper = Keeper(store, self.contents, self.committer, clock)
        self.links = self.cluster.links(self)
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(self.committer.run)
            opened = await open_file_system(store, self.links, SECRET, clock)
            members, _ = await members_of(self.links, opened, clock, local_fleets(store, opened))
            reader = PackReader(members, opened.keys, opened.code, worth_a_thread=64 << 20)
            self.fetcher = Fetcher(
                store, reader, self.committer, self.contents.transient, deadline_seconds=30.0, path_of=str
            )
            await nursery.start(self.fetcher.run)
            nursery.start_soon(probe, members, opened.keys)
            self.flushing = Flushing(
                self.machine.flush,
                self.machine.second_look_seconds,
                store,
                Spool(store.directory / "spool", store.limits.spool_bytes),
                self.committer,
                opened,
                members,
                reader,
                clock,
                on_fenced=self._fence,
                waiting=lambda what: None,
            )
            await self.flushing.start(nursery, offline=False)
            self.namespace.remove_orphans()
            nursery.start_soon(keeper.run)
            self.ready = True
            self.machine.note(f"{self.name} is mounted at version {self.version}")
            self.tell()
            await trio.sleep_forever()

    def _fence(self, error: QsfsError) -> None:
        assert isinstance(error, Fenced), error
        self.fenced = error
        self.machine.note(f"{self.name} is fenced: {error}")
        self.tell()


class Machine:
    """A directory and what runs on it.  `durable` is the newest version that its disk is known to hold,
    or a later one; `exactly` is the very version that it holds where nobody can have written since.
    `head`: the digest that its takeover is given, if any."""

    def __init__(self, cluster: Cluster, name: str, root: Path, seed: int) -> None:
        self.cluster = cluster
        self.name = name
        self.root = root
        self.clock = TrioClock(seed)
        self.lives = self.copies = 0
        self.life: Life | None = None
        self.durable = 1
        self.exactly: int | None = None
        self.takes_over = False
        self.head: str | None = None
        self.group_seconds = 5.0
        self.second_look_seconds = 20.0
        self.error: QsfsError | None = None
        self.flush = FlushConfig(cut_seconds=20.0, quiet_seconds=2.0, retention_seconds=10.0, full_grace_seconds=1.0)
        self.opened: Callable[[Life], int] = Life.marked
        self.refused: Callable[[Life, QsfsError], None] = lambda life, error: None
        self.directory = root / f"{name}-0"

    def note(self, line: str) -> None:
        """For the trace."""
        self.cluster.trace.note(line)

    @property
    def writable(self) -> Life | None:
        """The life that applications can write to now."""
        life = self.life
        if life is None or not life.ready or life.frozen or life.dead or life.fenced is not None:
            return None
        return life

    def next_directory(self) -> Path:
        """A directory that nothing lies in yet."""
        self.copies += 1
        return self.root / f"{self.name}-{self.copies}"

    def save(self) -> None:
        """What the disk holds at this moment is what the machine goes on with."""
        new = self.next_directory()
        if self.directory.exists():
            copy_directory(self.directory, new)
        self.directory = new

    def clone(self, name: str) -> Machine:
        """Another machine with the same disk and the same random bytes to come."""
        twin = Machine(self.cluster, name, self.root, 0)
        twin.clock = copy.copy(self.clock)
        twin.clock._random = copy.deepcopy(self.clock._random)
        twin.exactly = self.exactly
        twin.durable, twin.opened, twin.takes_over = self.durable, self.opened, self.takes_over
        twin.head = self.head
        twin.flush, twin.group_seconds = self.flush, self.group_seconds
        copy_directory(self.directory, twin.directory)
        return twin

    def forget(self) -> None:
        """The disk is gone."""
        self.directory = self.next_directory()


def copy_directory(old: Path, new: Path) -> None:
    """A copy of a cache directory as it is now."""
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("lock.mdb", "mount.lock"))
