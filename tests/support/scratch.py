"""Places and processes of a test run: found again and cleared away whatever happened to their owner.

Every process that a test starts inherits `QSFS_TEST_SESSION`, which names the run, so that also a daemon
that changed its parent is found; every directory lies below `session_directory()`, whose path is short
enough for Unix sockets.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "QSFS_TEST_SESSION"
ROOT = Path(__file__).resolve().parents[2]

_PREFIX = "qsfs-t-"
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class CleanupError(Exception):
    """Something of a test run could not be cleared away."""


def begin_session() -> str:
    """Names this run in the environment; a run started by another is a part of it."""
    outer = os.environ.get(VARIABLE)
    name = f"{os.getpid()}-{secrets.token_hex(4)}"
    os.environ[VARIABLE] = f"{outer}/{name}" if outer else name
    return os.environ[VARIABLE]


def session() -> str:
    """The name of this run; begins one where none has."""
    return os.environ.get(VARIABLE) or begin_session()


def session_directory() -> Path:
    """The directory that holds all directories of this run; goes with the process if it is empty then."""
    path = Path(tempfile.gettempdir()) / f"{_PREFIX}{session().rpartition('/')[2]}"
    if not path.exists():
        path.mkdir(exist_ok=True)
        atexit.register(_remove_if_empty, path, os.getpid())
    return path


def sweep_abandoned() -> None:
    """Clears away what runs left behind that were killed: their processes, mounts and directories."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        name = path.name.removeprefix(_PREFIX)
        owner = name.partition("-")[0]
        if not owner.isdigit() or Path("/proc", owner).exists():
            continue
        for process in _processes_of(functools.partial(_takes_part, name)):
            kill_process(process)
        sweep(path)


@contextlib.contextmanager
def scratch_directory(name: str = "t") -> Iterator[Path]:
    """A new directory with a short path; what is mounted below it is detached, then all of it removed."""
    path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=session_directory()))
    try:
        yield path
    finally:
        sweep(path)


def sweep(path: Path) -> None:
    """Detaches every mount at or below `path` and removes it.

    Raises `CleanupError` if a mount stays: nothing is removed through a mount.
    """
    for mountpoint in mounts_below(path):
        detach(mountpoint)
    if left := mounts_below(path):
        raise CleanupError(f"still mounted below {path}: {', '.join(map(str, left))}")
    if path.exists():
        # A program that is just being killed may still add a file.
        for _ in range(3):
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                return
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def mounts_below(path: Path) -> list[Path]:
    """The mount points at or below `path`, innermost first.  Asks no file system anything."""
    top = os.fspath(path)
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if point == top or point.startswith(top + "/"):
            found.append(Path(point))
    return found[::-1]


def detach(mountpoint: Path) -> None:
    """Takes a mount out of the tree at once, dead or alive; nothing happens if there is none."""
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH) == 0 or os.geteuid() == 0:
        return
    subprocess.run(["fusermount3", "-u", "-z", os.fspath(mountpoint)], capture_output=True)


def unmount(mountpoint: Path) -> None:
    """An orderly unmount.  Raises `OSError` where the kernel refuses it, EBUSY while it is in use."""
    if os.geteuid() != 0:
        subprocess.run(["fusermount3", "-u", os.fspath(mountpoint)], check=True, capture_output=True)
    elif _libc.umount2(os.fsencode(mountpoint), 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(mountpoint))


def session_processes() -> list[int]:
    """The processes that were started by this run, wherever they hang now; not this one."""
    mine = session()
    return _processes_of(lambda run: f"{run}/".startswith(f"{mine}/"))


def _takes_part(name: str, run: str) -> bool:
    """Whether a process of `run` belongs to the run that was begun as `name`, or to one inside of it."""
    return name in run.split("/")


def _processes_of(wanted: Callable[[str], bool]) -> list[int]:
    """The processes whose run is `wanted`; not this one."""
    start = f"{VARIABLE}=".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for setting in (entry / "environ").read_bytes().split(b"\0"):
                if setting.startswith(start) and wanted(setting.removeprefix(start).decode()):
                    found.append(int(entry.name))
    return found


def _remove_if_empty(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            path.rmdir()


def describe_process(process: int) -> str:
    """The process id and its command line."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return f"{process} ({words.strip()})"
    return str(process)


def kill_process(process: int, patience: float = 30.0) -> None:
    """Ends a process with SIGKILL and waits until it is gone; nothing happens if it is already.

    A process that has died but that its parent has not asked for yet counts as gone.  Raises
    `CleanupError` if it hangs in the kernel for longer than `patience` seconds.
    """
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(process)
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if not select.select([handle], [], [], patience)[0]:
                raise CleanupError(f"process {describe_process(process)} does not die")
        finally:
            os.close(handle)


def end_session() -> list[str]:
    """Clears away what is left of this run, and says what that was: each entry is a test's mistake."""
    left = []
    # A process may have started another before it died.
    while processes := session_processes():
        for process in processes:
            left.append(f"process {describe_process(process)}")
            kill_process(process)
    directory = session_directory()
    left += [f"mount {mountpoint}" for mountpoint in mounts_below(directory)]
    left += [f"directory {path}" for path in sorted(directory.iterdir())]
    sweep(directory)
    return left
