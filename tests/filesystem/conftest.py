"""A namespace over the model and over the real store: every rule is checked on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qsfs.clock import FixedClock
from qsfs.config import PolicyRule
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.namespace import Namespace, make_root
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.posix import Credentials, PosixError
from qsfs.store.limits import Limits
from qsfs.store.schema import ROOT_INODE, Inode
from qsfs.store.store import Store
from tests.support.memory_store import MemoryContents, MemoryStore

LIMITS = Limits(
    map_bytes=64 << 20,
    journal_bytes=1 << 20,
    spool_bytes=1 << 20,
    group_bytes=2 << 20,
    uncovered_bytes=1 << 20,
    largest_append=64 << 10,
    high_bytes=40 << 20,
    low_bytes=30 << 20,
    full_bytes=50 << 20,
)

ROOT = Credentials(0, 0)
USER = Credentials(1000, 100)


class World:
    """A namespace, its store, and shorthands for tests."""

    def __init__(self, store: Any, contents: Any, rules: tuple[PolicyRule, ...], new: bool) -> None:
        self.store = store
        self.contents = contents
        self.clock: FixedClock = store.clock
        if new:
            make_root(store, ROOT)
        self.names = Namespace(store, contents, Policies(rules))

    def file(self, name: bytes, parent: int = ROOT_INODE, mode: int = 0o644) -> int:
        return self.names.create(parent, name, mode, ROOT).number

    def directory(self, name: bytes, parent: int = ROOT_INODE, mode: int = 0o755) -> int:
        return self.names.mkdir(parent, name, mode, ROOT).number

    def inode(self, number: int) -> Inode:
        return self.names.inode(number)

    def find(self, name: bytes, parent: int = ROOT_INODE) -> int | None:
        inode = self.names.lookup(parent, name)
        return None if inode is None else inode.number

    def listing(self, parent: int = ROOT_INODE, after: int = 0) -> list[bytes]:
        rows = list(self.names.list_directory(parent, after))
        return [name for _, name, _ in rows if name not in (b".", b"..")]

    def tick(self) -> int:
        """Moves time on; returns the time from now on."""
        self.clock.advance(1.0)
        return self.clock.time_ns()

    def times(self, number: int) -> tuple[int, int, int]:
        inode = self.inode(number)
        return inode.atime_ns, inode.mtime_ns, inode.ctime_ns

    def looked_up(self, number: int, count: int = 1) -> None:
        for _ in range(count):
            self.names.references.looked_up(number)

    def forget(self, number: int, count: int = 1) -> None:
        self.names.forget([(number, count)])
        self.names.references.collect()

    def work_off_policies(self, limit: int = 256) -> None:
        for _ in range(1000):
            if self.names.policies.step(limit):
                return
        raise AssertionError("the policies are never worked off")


MakeWorld = Callable[..., World]


@pytest.fixture(params=["model", "store"])
def make_world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeWorld]:
    """Makes a world with policy rules; with `again` the same one, as a new mount finds it."""
    stores: list[Store] = []
    model = MemoryStore(FixedClock())

    def make(*rules: PolicyRule, again: bool = False) -> World:
        if request.param == "model":
            return World(model, MemoryContents(model), rules, new=not again)
        if again:
            group = stores[-1].seal()
            stores[-1].commit(group)
            stores[-1].committed(group)
            stores.pop().close()
        store = Store(tmp_path, LIMITS, FixedClock())
        stores.append(store)
        return World(store, Contents(store), rules, new=not again)

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    return make_world()


@pytest.fixture
def fails() -> Callable[..., None]:
    """`fails(errno.ENOENT, operation, *arguments)`: the operation ends with that code and changes nothing."""

    def check(code: int, operation: Callable[..., object], *arguments: object) -> None:
        with pytest.raises(PosixError) as caught:
            operation(*arguments)
        assert caught.value.errno == code, caught.value

    return check
