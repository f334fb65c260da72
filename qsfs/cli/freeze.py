"""Holding applications still by the freezer of cgroup v2, and letting them go whatever happens.

While a `Frozen` block runs, a process of its own watches over it: it thaws when the block ends, when its
deadline comes, and when the process that froze is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from qsfs.errors import ConfigError, DeadlineExceeded, DependencyMissing, QsfsError

_POLL_SECONDS = 0.01


def cgroup_root(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Where cgroup v2 is mounted.  Raises `DependencyMissing` if it is not."""
    for line in mounts.read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise DependencyMissing("cgroup v2 is not mounted here, so applications cannot be held; leave --freeze away")


def find_cgroup(name: str, root: Path) -> Path:
    """The cgroup of a systemd unit, or the one that a path names (from `/sys/fs/cgroup` or from the root).

    Raises `ConfigError` if there is none, or if it cannot be frozen.
    """
    if name.startswith("/"):
        path = Path(os.path.normpath(name))
        directory = path if path.is_relative_to(root) else root / path.relative_to("/")
    else:
        directory = root / _cgroup_of_unit(name).relative_to("/")
    if directory == root:
        raise ConfigError(f"{name}: the root cgroup holds every process and cannot be frozen; name a unit")
    if not directory.is_dir():
        raise ConfigError(f"{name}: there is no cgroup {directory}; is it running?")
    if not (directory / "cgroup.freeze").exists():
        raise ConfigError(f"{directory}: has no cgroup.freeze; is it a cgroup of version 2?")
    return directory


def _cgroup_of_unit(unit: str) -> Path:
    command = ["systemctl", "show", "--property=ControlGroup", "--value", "--", unit]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError as error:
        raise DependencyMissing("systemctl is not here to look up a unit; give the path of its cgroup") from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded("systemctl did not answer within 10 s") from error
    path = found.stdout.strip()
    if found.returncode or not path.startswith("/") or path == "/":
        reason = found.stderr.strip() or "it has no cgroup, so it does not run"
        raise ConfigError(f"unit {unit}: {reason}")
    return Path(path)


def refuse_own(directory: Path, processes: list[int]) -> None:
    """Raises `ConfigError` if the cgroup holds one of these: a frozen qsfs could answer nobody."""
    for file in directory.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            inside = {int(word) for word in file.read_text().split()}
            for process in processes:
                if process in inside:
                    raise ConfigError(
                        f"{directory}: holds process {process} of qsfs itself, which would be frozen too; name the "
                        "cgroup of the application alone"
                    )


class Frozen:
    """Applications that are held still; made by `freeze`."""

    def __init__(self, directory: Path, until: float) -> None:
        self.directory = directory
        self._until = until

    @property
    def seconds_left(self) -> float:
        """How much longer they are held."""
        return max(0.0, self._until - time.monotonic())

    def require_held(self) -> None:
        """Raises `QsfsError` unless they have been held all the time, as far as can be seen now."""
        if time.monotonic() >= self._until or not _is_frozen(self.directory):
            raise QsfsError(
                f"{self.directory}: was thawed before the snapshot's cut was sealed, by its deadline or by "
                "someone else"
            )


@contextlib.contextmanager
def freeze(directory: Path, seconds: float) -> Iterator[Frozen]:
    """Holds the processes of a cgroup still for the time of the block, and for `seconds` at most.

    Raises `ConfigError` if it is not allowed or if the cgroup is frozen already, and `DeadlineExceeded`,
    having thawed it, if they do not all stop in time.
    """
    if _is_frozen(directory) or _read(directory / "cgroup.freeze").strip() == "1":
        raise ConfigError(f"{directory}: is frozen already, by somebody else; nothing was done")
    until = time.monotonic() + seconds
    with _guarded(directory, seconds), _signals_raise():
        try:
            _write(directory, "1")
            while not _is_frozen(directory):
                if time.monotonic() >= until:
                    raise DeadlineExceeded(f"{directory}: its processes did not stop within {seconds:g} s; thawed")
                time.sleep(_POLL_SECONDS)
            yield Frozen(directory, until)
        finally:
            _write(directory, "0")


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Has SIGTERM and SIGHUP unwind the block, as an interrupt from the keyboard does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _guarded(directory: Path, seconds: float) -> Iterator[None]:
    """Runs the guardian: it thaws when this process's end of a pipe closes, or after `seconds`."""
    read, write = os.pipe()
    guardian = os.fork()
    if not guardian:
        _guard(directory, read, write, seconds)
    os.close(read)
    try:
        yield
    finally:
        os.close(write)
        os.waitpid(guardian, 0)


def _guard(directory: Path, read: int, write: int, seconds: float) -> None:
    """The guardian's whole life.  It never returns into the program that it was forked from."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.close(write)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        select.select([read], [], [], seconds)
        _write(directory, "0")
    finally:
        os._exit(0)


def _is_frozen(directory: Path) -> bool:
    return "frozen 1" in _read(directory / "cgroup.events").splitlines()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; has the application ended?") from error


def _write(directory: Path, value: str) -> None:
    path = directory / "cgroup.freeze"
    try:
        path.write_text(value)
    except FileNotFoundError:
        if value == "1":
            raise ConfigError(f"{directory}: is gone; has the application ended?") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; holding applications needs root") from error
