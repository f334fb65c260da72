"""Times what a measure does, and the CPU time that the daemon behind its directory takes meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Watch:
    """Runs within its `with` blocks; `cpu_seconds` is None where no FUSE daemon serves the directory."""

    def __init__(self, process: int | None = None) -> None:
        self.seconds = 0.0
        self.cpu_seconds = None if process is None else 0.0
        self._process = process
        self._began = (0.0, 0.0)

    def __enter__(self) -> Watch:
        self._began = (self._cpu(), time.perf_counter())
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began[1]
        if self.cpu_seconds is not None:
            self.cpu_seconds += self._cpu() - self._began[0]

    @property
    def running_seconds(self) -> float:
        """Seconds since the block began."""
        return time.perf_counter() - self._began[1]

    def _cpu(self) -> float:
        # The kernel's clock of another process: all its threads, to the nanosecond.
        return 0.0 if self._process is None else time.clock_gettime(~self._process << 3 | 2)


def daemon_of(directory: Path, proc: Path = Path("/proc")) -> int | None:
    """The process that answers for the FUSE mount that holds `directory`, as far as we may see it."""
    wanted = f"fuse_connection:\t{os.minor(directory.stat().st_dev)}"
    for descriptors in proc.glob("[0-9]*/fd"):
        try:
            for descriptor in descriptors.iterdir():
                if str(descriptor.readlink()) == "/dev/fuse":
                    info = (descriptors.parent / "fdinfo" / descriptor.name).read_text()
                    if wanted in info.splitlines():
                        return int(descriptors.parent.name)
        except OSError:
            continue
    return None
