"""Several programs at work on one mount, round after round, until it dies under them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import workload
from tests.support.daemon import FileSystem
from tests.support.workload import Running
from tests.system.ballast import Ballast

BALLAST_PAGES = (24 << 20) // 4096

# Groups commit, pages are uploaded and evicted, and generations are cut between the crashes too.
EAGER: dict[str, Any] = {
    "cache.size": "40MiB",
    "cache.group_seconds": 0.3,
    "cache.second_look_seconds": 0,
    "flush.quiet_seconds": 0.2,
    "flush.cut_seconds": 1,
    "flush.snapshot_ratio": 0.02,
}

Programs = Mapping[str, tuple[str, dict[str, Any]]]

# Casper's environments under LMDB's own names, as the presets know them: the data under `atomic_sync`, the
# unit file under `write_through`.
PROGRAMS: Programs = {
    "files": ("files", {}),
    "sqlite": ("sqlite", {"journal": "wal"}),
    "casper": ("casper", {"validators": 6, "units": "durable", "default_names": True}),
}

# One sync of it is larger than group, journal append and uncovered memory of `EAGER` together.
LARGE: Programs = {"large": ("lmdb", {"mode": "manual", "large": 600})}


class Load:
    """The programs of one round, each in `mnt/NAME-ROUND`; a context manager that ends them."""

    def __init__(self, fs: FileSystem, number: int, programs: Programs) -> None:
        self.number = number
        self._fs = fs
        self._programs = programs
        self._stack = ExitStack()
        self._running: dict[str, Running] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name, (kind, options) in self._programs.items():
                program = Running(kind, self.place(name), self._acks(name), seed=self.number, **options)
                self._running[name] = stack.enter_context(program)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def wait_for_any(self, choose: random.Random, most: int) -> None:
        """Waits until all programs are at work, and one of them, drawn, has come up to `most` steps far."""
        self.wait_for(1)
        self._running[choose.choice(sorted(self._running))].wait_for(choose.randint(1, most))

    def wait_for(self, steps: int) -> None:
        """Waits until each program has come `steps` steps far."""
        for program in self._running.values():
            program.wait_for(steps)

    def kill(self) -> None:
        """Ends the programs at once."""
        self._stack.close()

    def steps(self) -> int:
        """How many steps were acknowledged, over all programs."""
        return sum(workload.read(self._acks(name)).acked + 1 for name in self._programs if self._ran(name))

    def place(self, name: str, mountpoint: Path | None = None) -> Path:
        """The directory of one program."""
        return (mountpoint or self._fs.mountpoint) / f"{name}-{self.number}"

    def verify(self, mountpoint: Path | None = None) -> list[str]:
        """What is missing or wrong of what the programs were promised."""
        problems = []
        for name in filter(self._ran, self._programs):
            place, acks = self.place(name, mountpoint), self._acks(name)
            if place.exists() or workload.read(acks).acked >= 0:
                problems += [f"{place.name}: {problem}" for problem in workload.verify(place, acks)]
        return problems

    def remove(self) -> None:
        """Removes what the programs wrote."""
        for name in self._programs:
            if self.place(name).exists():
                shutil.rmtree(self.place(name))

    def _ran(self, name: str) -> bool:
        """Whether the program came so far as to note its first step."""
        acks = self._acks(name)
        return acks.exists() and acks.stat().st_size > 0

    def _acks(self, name: str) -> Path:
        return self._fs.directory / f"acks-{name}-{self.number}"


class Rounds:
    """The rounds of one mounted file system: what the last few wrote is judged after each crash.

    Beside the programs of a round the ballast, which is larger than the cache of `EAGER`, is worked on all
    the time, so that what they wrote is evicted and fetched meanwhile.
    """

    def __init__(self, fs: FileSystem, kept: int = 2) -> None:
        self._fs = fs
        self._kept = kept
        self._loads: list[Load] = []
        self.steps = 0
        self.ballast = Ballast(fs.mountpoint, BALLAST_PAGES)
        self.ballast.fill()
        fs.sync()

    def load(self, number: int, programs: Programs = PROGRAMS) -> Load:
        """The programs of the next round, not started yet."""
        load = Load(self._fs, number, programs)
        self._loads.append(load)
        return load

    def judge(self) -> None:
        """Verifies all that is kept, after the mount that followed a crash; then removes the oldest."""
        last = self._loads[-1]
        self.steps += last.steps()
        self.verify(f"after the crash of round {last.number}", sample=50)
        while len(self._loads) > self._kept:
            self._loads.pop(0).remove()

    def verify(self, when: str, *, mountpoint: Path | None = None, sample: int = 0) -> None:
        """Everything that is kept is as promised; of the ballast `sample` pages, or all."""
        problems = [problem for load in self._loads for problem in load.verify(mountpoint)]
        problems += self.ballast.verify(mountpoint, sample=sample)
        assert not problems, f"{when}:\n" + "\n".join(problems)


def check_clean(fs: FileSystem) -> None:
    """`qsfs fsck` of what is not mounted finds nothing wrong."""
    done = fs.run("fsck", code=None)
    assert done.returncode == 0, done.stdout + done.stderr
