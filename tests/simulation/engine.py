"""One seed, one order of events: the virtual clock, work of threads in place, and machines that can be frozen.

A frozen machine is what SIGSTOP, or a hypervisor that moves a guest, leaves: none of its tasks runs, its deadlines
pass, what it had sent may arrive, and it goes on in the middle of whatever it was doing.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol, TypeVar
from unittest import mock

import trio
from trio.testing import MockClock

from qsfs.store import packs

T = TypeVar("T")


class PowerCut(BaseException):
    """The machine that this task runs on is no more."""


class Host(Protocol):
    """What tasks run on: a machine for as long as it is up."""

    frozen: bool
    dead: bool
    held: list[trio.lowlevel.Task]


HOST: contextvars.ContextVar[Host | None] = contextvars.ContextVar("host", default=None)
"""The machine that the running task belongs to; tasks inherit it from who starts them."""


@contextlib.contextmanager
def on(host: Host) -> Iterator[None]:
    """What is started in the block runs on `host`."""
    token = HOST.set(host)
    try:
        yield
    finally:
        HOST.reset(token)


def thaw(host: Host) -> None:
    """Lets a frozen machine go on."""
    host.frozen = False
    tasks, host.held = host.held, []
    for task in tasks:
        task._runner.runq.append(task)


class Trace:
    """A digest of everything that happened, in its order, and optionally the lines themselves."""

    def __init__(self, keep: bool = False) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self._keep = keep
        self._digest = hashlib.blake2b(digest_size=8)

    def event(self, line: str) -> None:
        """Something too small to tell a reader of."""
        self._digest.update(line.encode())
        if self._keep:
            self.lines.append(f"{trio.current_time():10.3f}  {line}")

    def note(self, line: str) -> None:
        """Something that a reader wants to see."""
        self.notes.append(f"{trio.current_time():10.3f}  {line}")
        self.event(line)

    @property
    def digest(self) -> str:
        """Of all events so far."""
        return self._digest.hexdigest()


async def _in_place(work: Callable[..., T], *arguments: Any, **_: Any) -> T:
    await trio.lowlevel.checkpoint()
    host = HOST.get()
    if host is not None and host.dead:
        raise PowerCut
    result = work(*arguments)
    # What a thread did is done, whether its caller still waits or not.
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result


def _from_thread(work: Callable[..., T], *arguments: Any) -> T:
    return work(*arguments)


@contextlib.contextmanager
def _patched(seed: int) -> Iterator[None]:
    core = trio._core._run  # type: ignore[attr-defined]
    reschedule = core.Runner.reschedule

    def hold_frozen(self: Any, task: trio.lowlevel.Task, *outcome: Any) -> None:
        reschedule(self, task, *outcome)
        host = task.context.get(HOST)
        if host is not None and host.frozen:
            assert self.runq.pop() is task
            host.held.append(task)

    core._r.seed(seed)
    with (
        mock.patch.object(core, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(core.Runner, "reschedule", hold_frozen),
        mock.patch.object(trio.to_thread, "run_sync", _in_place),
        mock.patch.object(trio.from_thread, "run_sync", _from_thread),
        mock.patch.object(packs, "STEP_RUNS", 2),
    ):
        yield


def run(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """Runs `main` on a virtual clock; the same for the same seed, in a process with `PYTHONHASHSEED=0`."""
    with _patched(seed):
        return trio.run(main, clock=MockClock(autojump_threshold=0))
