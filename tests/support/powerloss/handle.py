"""Starting a forgetting disk, steering it, and being rid of it."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import scratch
from tests.support.powerloss.cut import CutReport

PATIENCE = 240.0


_UNASKED = re.compile(r"fuse_reply_\S* failed with No such file or directory")
"""What libfuse says of an answer that nobody waits for any more, since the mount is gone."""


class PowerLossError(Exception):
    """The process of the disk did not do what it was asked; the message holds what it said."""


class PowerLoss:
    """A file system on `mountpoint` whose medium is the directory `backing`.

    Use it as a context manager, or call `close`, which never fails to take the mount away.  After a cut
    `backing` is what the disk would hold; start another one on it to go on.  `metadata` is "ordered"
    (as ext4) or "strict" (only what POSIX promises).

    >>> with PowerLoss(backing, mountpoint) as disk:
    ...     disk.arm(at=3, match="*.mdb", victims=[writer.pid])
    ...     report = disk.wait()
    """

    def __init__(
        self,
        backing: Path,
        mountpoint: Path,
        *,
        seed: object = 0,
        metadata: str = "ordered",
        control: Path | None = None,
    ) -> None:
        """Mounts; returns once requests are served.  Makes directories that are missing."""
        self.backing = backing
        self.mountpoint = mountpoint
        self.seed = str(seed)
        backing.mkdir(parents=True, exist_ok=True)
        mountpoint.mkdir(parents=True, exist_ok=True)
        self._control = control or mountpoint.with_name(f"{mountpoint.name}.control")
        self._control.unlink(missing_ok=True)
        scratch.session()
        arguments = [str(backing), str(mountpoint), "--control", str(self._control)]
        arguments += ["--seed", self.seed, "--metadata", metadata, "--until-eof"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._words = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.powerloss", *arguments],
            cwd=scratch.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and (said := self._said()):
            raise PowerLossError(f"the disk on {self.mountpoint} itself failed: {said}")

    def cut(self, *, seed: object = None, keep: str = "random", victims: Iterable[int] = ()) -> CutReport:
        """The power goes now, and with it the processes `victims` (by SIGKILL, before anything else).

        `keep` is "random", "none", "all", "newest" (only the last uncovered write) or "oldest" (all but it).
        """
        return self._report(self._ask("cut", seed=self._seed(seed), keep=keep, victims=list(victims)))

    def arm(
        self,
        *,
        at: int,
        kind: str = "fsync",
        before: bool = True,
        match: str = "*",
        seed: object = None,
        keep: str = "random",
        victims: Iterable[int] = (),
    ) -> None:
        """The power will go at the `at`-th fsync (or "write") from now on files whose path matches.

        `before` it takes effect, or after; either way nobody gets its answer.
        """
        self._ask(
            "arm",
            at=at,
            kind=kind,
            before=before,
            match=match,
            seed=self._seed(seed),
            keep=keep,
            victims=list(victims),
        )

    def disarm(self) -> None:
        """The power stays."""
        self._ask("disarm")

    def wait(self, timeout: float = PATIENCE) -> CutReport:
        """Waits until an armed cut has happened."""
        return self._report(self._ask("wait", timeout=timeout))

    def fail(self, kind: str, number: int, *, match: str = "*", count: int = -1) -> None:
        """Lets the next `count` requests (all, if negative) of `kind` fail with errno `number`.

        `kind` is "write" (also truncations), "fsync", "create" or "any" of them.
        """
        self._ask("fail", kind=kind, errno=number, match=match, count=count)

    def heal(self) -> None:
        """Ends what `fail` began."""
        self._ask("heal")

    def stat(self) -> dict[str, Any]:
        """Counts: `dead`, `uncovered_bytes`, `uncovered_operations`, and `writes` and `fsyncs` by path."""
        return self._ask("stat")

    def restart(self) -> None:
        """The power comes back: mounts again what a cut left.  All that used the mount must have ended."""
        self._ask("restart")
        scratch.detach(self.mountpoint)
        self._await_ready()

    def unmount(self) -> None:
        """An orderly unmount: everything becomes durable.  Raises `OSError` (EBUSY) while it is in use."""
        scratch.unmount(self.mountpoint)
        self._process.wait(PATIENCE)
        self.close()

    def close(self) -> None:
        """Takes the mount away and ends the process; what no fsync covered is lost.  May be called twice."""
        # Dead first: a disk that sees its mount go in order would keep everything.
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        scratch.detach(self.mountpoint)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._said()
        self._errors.close()
        self._control.unlink(missing_ok=True)

    def _seed(self, seed: object) -> str:
        return self.seed if seed is None else str(seed)

    def _await_ready(self) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not ready or self._process.stdout.readline() != b"ready\n":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            raise PowerLossError(f"no disk on {self.mountpoint}: {self._last_words()}")

    def _ask(self, verb: str, *, timeout: float = PATIENCE, **command: Any) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(timeout)
                connection.connect(str(self._control))
                connection.sendall(json.dumps({"do": verb, **command}).encode() + b"\n")
                with connection.makefile("rb") as answers:
                    line = answers.readline()
        except OSError as error:
            words = f"'{verb}' to the disk on {self.mountpoint}: {error}; {self._last_words()}"
            raise PowerLossError(words) from error
        if not line:
            raise PowerLossError(f"'{verb}': the disk on {self.mountpoint} is gone: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PowerLossError(answer["error"])
        return answer

    @staticmethod
    def _report(answer: dict[str, Any]) -> CutReport:
        report = CutReport(**answer["report"])
        report.files = {name: (kept, lost) for name, (kept, lost) in report.files.items()}
        report.torn = (report.torn[0], report.torn[1], report.torn[2]) if report.torn else None
        return report

    def _last_words(self) -> str:
        if self._process.poll() is None:
            return "its process runs"
        return f"its process ended with {self._process.returncode}: {self._said() or 'it said nothing'}"

    def _said(self) -> str:
        """What the process wrote to standard error."""
        if not self._errors.closed:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").splitlines()
            self._words = "\n".join(line for line in lines if not _UNASKED.search(line)).strip()
        return self._words
