"""Starts a mount in its own process, steers it, and takes it away again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import scratch


@dataclass(frozen=True)
class Settings:
    """How to mount.  `policies` holds the arguments of `PolicyRule`s; `without` names a saving to go without."""

    mountpoint: str = ""
    xattr: bool = False
    relatime: bool = False
    short_loop: bool = True
    break_tuning: bool = False
    without: str = ""
    policies: tuple[dict[str, Any], ...] = ()
    total_bytes: int = 1 << 40
    free_bytes: int = 1 << 39


class FuseMount:
    """A running mount: `path` is its root."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.path = directory / "mnt"
        self.path.mkdir()
        self.expected_log = ""
        self.spoilt = False
        self._log = (directory / "stderr").open("w+", encoding="utf-8")
        arguments = json.dumps(dataclasses.asdict(settings) | {"mountpoint": str(self.path)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fuse_mount", arguments],
            cwd=scratch.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answer()

    def command(self, name: str, *arguments: Any) -> Any:
        """Has the process do something and returns its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def requests(self) -> dict[str, int]:
        """How many requests came since the last call, by kind."""
        counts: dict[str, int] = self.command("requests")
        return counts

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self._process.kill()
        self._process.wait()

    @property
    def log(self) -> str:
        """What the process has logged at WARNING and above."""
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> None:
        """Unmounts, waits for the process to end by itself unless it was killed, and judges its log."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                scratch.unmount(self.path)
            assert self._process.wait(60) == 0, self.log
        assert bool(self.expected_log) == bool(self.log), self.log
        assert self.expected_log in self.log, self.log

    def end(self) -> None:
        """Takes everything away, whatever state it is in."""
        scratch.detach(self.path)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the mount's process ended: {self.log}"
        return json.loads(line)


@contextlib.contextmanager
def mounted(settings: Settings, directory: Path) -> Iterator[FuseMount]:
    """A mount for the length of a `with` block; judged at its end if the block succeeds."""
    mount = FuseMount(settings, directory)
    try:
        yield mount
        mount.stop()
    finally:
        mount.end()
