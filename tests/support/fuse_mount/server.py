"""What runs in the mount's process: the handlers over the model, and commands to look at and upset it."""

from __future__ import annotations

import faulthandler
import gc
import inspect
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from qsfs.clock import SystemClock
from qsfs.config import MountConfig, PolicyRule
from qsfs.filesystem.namespace import Namespace, make_root
from qsfs.filesystem.needs import Need, NeedPages
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.posix import Credentials, PosixError
from qsfs.filesystem.space import SpaceReport
from qsfs.fuse.operations import Operations
from qsfs.fuse.session import serve
from qsfs.fuse.state import MountState
from tests.support.memory_store import MemoryContents, MemoryStore


class Daemon:
    """Stands for the daemon: waits, durability and space, all of which the test decides."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.store = MemoryStore(SystemClock())
        self.contents = MemoryContents(self.store)
        make_root(self.store, Credentials(), 0o755)
        rules = [PolicyRule(**rule) for rule in settings["policies"]]
        self.namespace = Namespace(self.store, self.contents, Policies(rules))
        self.state = MountState()
        self.room = True
        self.syncs: list[Any] = []
        self.released = trio.Event()
        self.wait_error = 0
        self.needed: NeedPages | None = None
        self.operations = Operations(self.namespace, self, self, self, self.state, xattr=settings["xattr"])
        self._seen: dict[str, int] = {}

    # what the handlers ask for

    async def satisfy(self, need: Need) -> None:
        await self.released.wait()
        if self.wait_error:
            raise PosixError(self.wait_error)

    async def sync(self, number: int, data_only: bool) -> None:
        self.syncs.append([number, data_only])

    async def sync_namespace(self) -> None:
        self.syncs.append("namespace")

    def report(self) -> SpaceReport:
        free = self.settings["free_bytes"] if self.room else 0
        return SpaceReport(self.settings["total_bytes"], free, len(self.store.inodes), 1_000_000)

    def has_room(self) -> bool:
        return self.room

    # what the test asks for

    def requests(self) -> dict[str, int]:
        now = dict(self.operations.counts.requests)
        new = {name: count - self._seen.get(name, 0) for name, count in now.items()}
        self._seen = now
        return {name: count for name, count in new.items() if count}

    def take_syncs(self) -> list[Any]:
        syncs, self.syncs = self.syncs, []
        return syncs

    def inodes(self) -> list[int]:
        return sorted(self.store.inodes)

    def known(self) -> int:
        return self.namespace.references.known

    def flags(self, number: int) -> int:
        return self.store.inodes[number].flags

    async def settled(self) -> bool:
        """Waits until nothing that has no name is left, which ends with a FORGET of the kernel."""
        with trio.fail_after(30):
            while self.namespace.references.orphans:
                await trio.sleep(0.01)
        return True

    async def waiting(self, count: int) -> bool:
        """Waits until so many requests wait."""
        with trio.fail_after(30):
            while self.operations.counts.waiting < count:
                await trio.sleep(0.01)
        return True

    def times(self, number: int) -> list[int]:
        inode = self.store.inodes[number]
        return [inode.atime_ns, inode.mtime_ns, inode.ctime_ns]

    def size(self, number: int) -> int:
        return self.store.inodes[number].size

    def unexpected(self) -> int:
        return self.operations.counts.unexpected

    def raise_in(self, method: str, error: str) -> None:
        """The next call of a method of the namespace raises."""
        kinds: dict[str, BaseException] = {
            "ValueError": ValueError("planned"),
            "OSError": OSError(28, "planned"),
            "ExceptionGroup": ExceptionGroup("planned", [PosixError(2), ValueError("planned")]),
            "KeyError group": BaseExceptionGroup("planned", [KeyError("planned")]),
        }
        original = getattr(self.namespace, method)

        def fail(*args: Any) -> None:
            setattr(self.namespace, method, original)
            raise kinds[error]

        setattr(self.namespace, method, fail)

    def raise_in_forget(self) -> None:
        original = self.namespace.references.forget

        def fail(counts: Any) -> None:
            self.namespace.references.forget = original  # type: ignore[method-assign]
            original(counts)
            raise ValueError("planned")

        self.namespace.references.forget = fail  # type: ignore[method-assign]

    def need_pages(self, number: int, always: bool = False) -> None:
        """The next access to a file's contents waits until `release`, or all of them."""
        self.released = trio.Event()
        self.contents.need_stays = always
        self.needed = NeedPages(number, 0, 1)
        self.contents.need = self.needed

    def release(self, error: int) -> None:
        """Lets go what waits: with 0 it finds what it needs, else it and all that follow get `error`."""
        self.wait_error = error
        self.contents.need = None
        if error:
            self.contents.need_stays = True
            self.contents.need = self.needed
        self.released.set()

    def fill_up(self, full: bool) -> None:
        self.room = not full

    def fence(self) -> None:
        self.state.fence("planned")

    def fail(self) -> None:
        self.state.fail("planned")

    def policy_step(self) -> bool:
        return self.namespace.policies.step()

    async def command_loop(self, cancel: Callable[[], None]) -> None:
        stream = trio.lowlevel.FdStream(0)
        pending = b""
        async for part in stream:
            pending += part
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                name, *arguments = json.loads(line)
                result = getattr(self, name)(*arguments)
                answer(await result if inspect.iscoroutine(result) else result)
        cancel()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.command_loop, nursery.cancel_scope.cancel)
            await serve(
                self.operations,
                Path(self.settings["mountpoint"]),
                MountConfig(xattr=self.settings["xattr"], short_loop=self.settings["short_loop"]),
                mounted=lambda: answer("mounted"),
            )
            nursery.cancel_scope.cancel()


def answer(value: Any) -> None:
    """One line to the test."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serves the mount that the first argument describes."""
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    gc.freeze()
    daemon = Daemon(json.loads(sys.argv[1]))
    trio.run(daemon.run)
