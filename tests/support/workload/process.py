"""A workload as a process: started, waited for by its progress, killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import scratch

PATIENCE = 120.0


class WorkloadError(Exception):
    """The program ended when it should not have; the message holds what it said."""


class Running:
    """A workload in a process of its own; a context manager that ends it.

    >>> with Running("lmdb", mount / "db", scratch / "acks", seed=1) as writer:
    ...     writer.wait_for(20)
    ...     disk.cut(victims=[writer.pid])
    """

    def __init__(
        self, name: str, directory: Path, ack_file: Path, *, seed: object = 0, count: int = 0, **options: Any
    ) -> None:
        scratch.session()
        words = [name, str(directory), str(ack_file), "--seed", str(seed), "--count", str(count), "--echo"]
        words += [f"--option={key}={value}" for key, value in options.items()]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.workload", *words],
            cwd=scratch.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.pid = self._process.pid
        self.acked = -1
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def wait_for(self, steps: int, timeout: float = PATIENCE) -> int:
        """Waits until `steps` steps were acknowledged; the number of the last one.

        Raises `WorkloadError` if the program ends before, or does not come so far in `timeout` seconds.
        """
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._ended or self.acked >= steps - 1, timeout)
        if self.acked >= steps - 1:
            return self.acked
        raise WorkloadError(f"acknowledged {self.acked + 1} of {steps} steps: {self._said(arrived)}")

    def finish(self, timeout: float = PATIENCE) -> None:
        """Waits until the program has done all its steps; raises `WorkloadError` if it failed."""
        self._process.wait(timeout)
        if self._process.returncode != 0:
            raise WorkloadError(self._said(ended=True))
        self.kill()

    def end(self, timeout: float = PATIENCE) -> int:
        """Waits until the program has ended, however; its exit status, negative for a signal."""
        self._process.wait(timeout)
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """Ends the program at once; may be called twice."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.acked = int(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _said(self, ended: bool) -> str:
        if not ended:
            return "it is still at it"
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        return f"it ended with {self._process.returncode}: {said}"
