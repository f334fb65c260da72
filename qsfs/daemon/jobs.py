"""Work that a command asks for and that takes long: done in steps, watched, and ended with its command.

A request starts a job and gets its number; the command then asks after it.  A job that nobody has
asked after for a while is cancelled: its command was interrupted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from qsfs.daemon import control
from qsfs.errors import LimitExceeded, NotFound, QsfsBug, QsfsError

MOST_JOBS = 16
_ALONE_SECONDS = 10.0
_FIRST_ANSWER_SECONDS = 0.05
_ANSWER_SECONDS = 0.5
_POLL_SECONDS = 0.2

Progress = dict[str, Any]
Work = Callable[[Progress], Awaitable[Any]]
"""Does the work, keeps what it gets up to date for whoever watches, and returns the result."""


class _Job:
    def __init__(self) -> None:
        self.progress: Progress = {}
        self.result: Any = None
        self.error: QsfsError | None = None
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.asked = trio.Event()


class Jobs:
    """The jobs of one mount.  `run` must be running."""

    def __init__(self) -> None:
        self._jobs: dict[int, _Job] = {}
        self._last = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def start(self, work: Work) -> dict[str, Any]:
        """Starts a job; the answer is that of `ask`, after a moment: short work is done by then.

        Raises `LimitExceeded` if too many run, `NotFound` while the daemon starts or stops.
        """
        if self._nursery is None:
            raise NotFound("the daemon starts or stops; try again")
        if len(self._jobs) >= MOST_JOBS:
            raise LimitExceeded(f"{len(self._jobs)} commands are at work already; wait until one has ended")
        self._last += 1
        job = self._jobs[self._last] = _Job()
        self._nursery.start_soon(self._do, self._last, job, work)
        # At once: before its command knows the number, an interrupt cannot end the job.
        return await self.ask(self._last, _FIRST_ANSWER_SECONDS)

    async def ask(self, number: int, seconds: float = _ANSWER_SECONDS) -> dict[str, Any]:
        """`{"job", "progress", "done"}` of a job, with `result` once it is done.

        Raises what the job raised, `NotFound` for one that is not known (any more).
        """
        job = self._jobs.get(number)
        if job is None:
            raise NotFound("the daemon does not know this command any more; run it again")
        job.asked.set()
        with trio.move_on_after(seconds):
            await job.done.wait()
        if not job.done.is_set():
            return {"job": number, "done": False, "progress": dict(job.progress)}
        self._jobs.pop(number, None)
        if job.error is not None:
            raise job.error
        return {"job": number, "done": True, "progress": dict(job.progress), "result": job.result}

    def cancel(self, number: int) -> None:
        """Ends a job, if it still runs."""
        job = self._jobs.get(number)
        if job is not None:
            job.scope.cancel()

    async def _do(self, number: int, job: _Job, work: Work) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, job)
            try:
                with job.scope:
                    job.result = await work(job.progress)
                if job.scope.cancelled_caught:
                    job.error = QsfsError("the command was ended")
            except QsfsError as error:
                job.error = error
            except Exception as error:  # noqa: BLE001 - what a command asks for must not end the mount
                job.error = QsfsBug(f"internal error: {error!r}")
            job.done.set()
            with trio.move_on_after(_ALONE_SECONDS):
                while number in self._jobs:
                    await trio.sleep(_ANSWER_SECONDS)
            self._jobs.pop(number, None)
            nursery.cancel_scope.cancel()

    async def _watch(self, job: _Job) -> None:
        while True:
            job.asked = trio.Event()
            with trio.move_on_after(_ALONE_SECONDS) as scope:
                await job.asked.wait()
            if scope.cancelled_caught:
                job.scope.cancel()
                return


def follow(
    cache: Path, command: str, say: Callable[[Progress], None] = lambda progress: None, **arguments: Any
) -> Any:
    """Starts a job in the daemon of `cache` and waits for its result; blocks.

    An interrupt ends the job too.  Raises what `control.ask` and the job raise.
    """
    answer = control.ask(cache, command, **arguments)
    with _ended_with_us(cache, answer):
        while not answer["done"]:
            say(answer["progress"])
            time.sleep(_POLL_SECONDS)
            answer = control.ask(cache, "job", number=answer["job"])
    return answer["result"]


@contextlib.contextmanager
def _ended_with_us(cache: Path, answer: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(QsfsError):
            control.ask(cache, "job-cancel", timeout=5, number=answer["job"])
        raise
