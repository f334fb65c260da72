"""What runs in the mount's process: the handlers over the model, and commands to look at and upset it."""

from __future__ import annotations

import faulthandler
import functools
import gc
import inspect
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from qsfs.clock import SystemClock
from qsfs.config import MountConfig, PolicyRule
from qsfs.filesystem.namespace import Namespace, make_root
from qsfs.filesystem.needs import Need, NeedPages
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.posix import Credentials, PosixError
from qsfs.filesystem.space import SpaceReport
from qsfs.fuse import session, tuning
from qsfs.fuse.boundary import RequestCounts
from qsfs.fuse.handles import make_handle
from qsfs.fuse.operations import Operations
from qsfs.fuse.session import serve
from qsfs.fuse.state import MountState
from tests.support.memory_store import MemoryContents, MemoryStore


class _Panic(BaseException):
    """As what is raised by extension modules that do not know Python's rules."""


class _Answered:
    """A handler that answers where the real one says once that it need not be asked."""

    def __init__(self, counts: RequestCounts, name: str) -> None:
        self.counts = counts.requests
        self.name = name

    async def __call__(self, fh: int) -> None:
        self.counts[self.name] = self.counts.get(self.name, 0) + 1


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
        self.group_full = False
        self.syncs: list[Any] = []
        self.released = trio.Event()
        self.wait_error = 0
        self.needed: NeedPages | None = None
        self.operations = Operations(
            self.namespace,
            self,
            self,
            self,
            self.state,
            xattr=settings["xattr"],
            relatime=settings["relatime"],
        )
        self._seen: dict[str, int] = {}
        self._counted: dict[tuple[str, str], int] = {}

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

    def group_is_full(self) -> bool:
        return self.group_full

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
        with trio.move_on_after(15):
            while self.namespace.references.orphans:
                await trio.sleep(0.01)
            return True
        return False

    async def waiting(self, count: int) -> bool:
        """Waits until so many requests wait."""
        with trio.fail_after(30):
            while self.operations.counts.waiting < count:
                await trio.sleep(0.01)
        return True

    def times(self, number: int) -> list[int]:
        inode = self.store.inodes[number]
        return [inode.atime_ns, inode.mtime_ns, inode.ctime_ns]

    def shrink(self) -> None:
        """From now on a truncation of each file is being worked off."""
        self.contents.shrinking = True

    def size(self, number: int) -> int:
        return self.store.inodes[number].size

    def unexpected(self) -> int:
        return self.operations.counts.unexpected

    def break_next(self, place: str, error: str = "ValueError", after: bool = False, times: int = 1) -> None:
        """The next calls of the function at `place`, a dotted path from here, raise: at once or at their end."""
        kinds: dict[str, BaseException] = {
            "ValueError": ValueError("planned"),
            "OSError": OSError(28, "planned"),
            "ExceptionGroup": ExceptionGroup("planned", [PosixError(2), ValueError("planned")]),
            "KeyError group": BaseExceptionGroup("planned", [KeyError("planned")]),
            "BaseException": _Panic("planned"),
        }
        *path, name = place.split(".")
        owner: Any = functools.reduce(getattr, path, self)
        original = getattr(owner, name)
        left = times

        def fail(*args: Any, **kwargs: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                setattr(owner, name, original)
            if after:
                original(*args, **kwargs)
            raise kinds[error]

        setattr(owner, name, fail)

    def break_after(self, place: str, calls: int) -> None:
        """The call of a method of the handlers' helpers after so many good ones raises."""
        *path, name = place.split(".")
        owner: Any = functools.reduce(getattr, path, self)
        original = getattr(owner, name)
        left = calls

        def fail(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                return original(*args)
            setattr(owner, name, original)
            raise ValueError("planned")

        setattr(owner, name, fail)

    def refuse_removal(self, number: int) -> None:
        """An inode cannot be removed any more; 0: all can."""
        original = type(self.store).remove

        def remove(store: MemoryStore, which: int) -> None:
            if which == number:
                raise ValueError("planned")
            original(store, which)

        self.store.remove = functools.partial(remove, self.store)  # type: ignore[method-assign]

    def remove_orphans(self) -> int:
        return self.namespace.remove_orphans()

    def open_files(self) -> int:
        return len(self.contents.open_count)

    def break_refresh(self) -> None:
        """Telling the kernel of changed attributes fails from here on."""

        def fail(*args: Any, **kwargs: Any) -> None:
            raise ValueError("planned")

        session.pyfuse3.invalidate_inode = fail

    def refresh(self, number: int) -> None:
        self.operations.attributes_changed(number)

    async def refreshes_ended(self) -> bool:
        """Waits until no refresh runs."""
        refresh: Any = self.operations.attributes_changed
        nursery = refresh.__self__._nursery
        with trio.fail_after(30):
            while any("AttributeRefresh" in task.name for task in nursery.child_tasks):
                await trio.sleep(0.01)
        return True

    async def counted(self, what: str, name: str) -> bool:
        """Waits until something was counted that comes when the kernel likes."""
        counts: dict[str, int] = getattr(self.operations.counts, what)
        before = self._counted.get((what, name), 0)
        with trio.fail_after(30):
            while counts.get(name, 0) == before:
                await trio.sleep(0.01)
        self._counted[what, name] = counts[name]
        return True

    def failures(self) -> dict[str, int]:
        return dict(self.operations.counts.failures)

    async def known_only(self, count: int) -> bool:
        """Waits until the kernel knows so many inodes, which ends with a FORGET."""
        with trio.move_on_after(15):
            while self.namespace.references.known != count:
                await trio.sleep(0.01)
            return True
        return False

    def need_pages(self, number: int, always: bool = False) -> None:
        """The next access to a file's contents waits until `release`, or all of them."""
        self.released = trio.Event()
        self.contents.need_stays = always
        self.needed = NeedPages(number, 0, 1)
        self.contents.need = self.needed

    def release(self, error: int) -> None:
        """Lets go what waits: with 0 it finds what it needs, else it and all that follow get `error`."""
        self.wait_error = error
        self.group_full = False
        self.contents.need = None
        if error:
            self.contents.need_stays = True
            self.contents.need = self.needed
        self.released.set()

    def fill_group(self) -> None:
        """Changes wait until `release`."""
        self.released = trio.Event()
        self.group_full = True

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

    async def closed(self, left: int = 0) -> bool:
        """Waits until the kernel has released all handles but `left`."""
        counts = self.operations.counts.requests
        with trio.move_on_after(15):
            while sum(counts.get(name, 0) for name in ("open", "create", "opendir")) - left > sum(
                counts.get(name, 0) for name in ("release", "releasedir")
            ):
                await trio.sleep(0.002)
            return True
        return False

    def _go_without(self, saving: str) -> None:
        operations: Any = self.operations
        filler = operations._attributes
        if saving == "timeouts":
            filler._reply.entry_timeout = filler._reply.attr_timeout = 0
        elif saving == "negative entries":
            filler._absent.entry_timeout = 0
        elif saving == "keep_cache":
            operations._file_info = lambda inode, flags, marks_access: pyfuse3.FileInfo(
                fh=make_handle(inode.number), keep_cache=False
            )
        elif saving == "ENOSYS to flush":
            operations.flush = _Answered(operations.counts, "flush")
        elif saving == "writeback cache":
            operations.enable_writeback_cache = False
        elif saving == "kernel settings":
            tuning.tune = lambda *args, **kwargs: {}
        else:
            raise ValueError(saving)

    def _fail_to_tune(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("planned")

    async def run(self) -> None:
        if self.settings["without"]:
            self._go_without(self.settings["without"])
        if self.settings["break_tuning"]:
            tuning.tune = self._fail_to_tune  # type: ignore[assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.command_loop, nursery.cancel_scope.cancel)
            await serve(
                self.operations,
                Path(self.settings["mountpoint"]),
                MountConfig(
                    xattr=self.settings["xattr"],
                    relatime=self.settings["relatime"],
                    short_loop=self.settings["short_loop"],
                ),
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
