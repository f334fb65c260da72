"""The mount point: is it free, is a dead mount of ours on it, who keeps it busy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qsfs.errors import DependencyMissing, MountError


def check_dependencies() -> None:
    """Raises `DependencyMissing` if FUSE is not there, with what to install."""
    if not Path("/dev/fuse").exists():
        raise DependencyMissing("/dev/fuse is missing: load the fuse module ('modprobe fuse')")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK, effective_ids=True):
        raise DependencyMissing("/dev/fuse: permission denied; be root, or let this user in ('chmod 666 /dev/fuse')")
    if shutil.which("fusermount3") is None:
        raise DependencyMissing("fusermount3 is missing: install it ('apt-get install fuse3')")


def check_allow_other(configuration: Path = Path("/etc/fuse.conf")) -> None:
    """Raises `MountError` if other users are to be let in and FUSE lets only root offer that."""
    if os.geteuid() == 0:
        return
    try:
        allowed = re.search(r"^\s*user_allow_other\s*$", configuration.read_text("utf-8", "replace"), re.MULTILINE)
    except OSError:
        allowed = None
    if allowed is None:
        raise MountError(
            f"[mount] allow_other: who is not root needs the line user_allow_other in {configuration}; add it, "
            "or set allow_other = false"
        )


def kind_of_mount(path: Path) -> str | None:
    """The file system type mounted at `path`, or None if nothing is."""
    found, wanted = None, os.fsencode(os.path.realpath(path))
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        mounted = re.sub(rb"\\([0-7]{3})", lambda match: bytes((int(match[1], 8),)), fields[4])
        if mounted == wanted:
            found = os.fsdecode(fields[fields.index(b"-") + 1])
    return found


def is_dead(path: Path) -> bool:
    """Whether the daemon of the mount at `path` has ended.  Waits while it lives and does not answer."""
    try:
        # What stat shows may come from the kernel's cache, also after the daemon's death; this always asks.
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def prepare(path: Path) -> None:
    """Makes sure that `path` is an empty directory that nothing is mounted on.

    A dead mount of qsfs is cleared first.  Raises `MountError` for everything else.
    """
    while (kind := kind_of_mount(path)) is not None:
        if kind != "fuse.qsfs":
            raise MountError(f"{path}: a file system of type {kind} is mounted there; choose another place")
        if not is_dead(path):
            raise MountError(f"{path}: a qsfs is mounted there already; 'qsfs umount' ends it")
        clear(path)
    try:
        if next(path.iterdir(), None) is not None:
            raise MountError(
                f"{path}: not empty; a mount would hide what lies there: move it away or choose another place"
            )
    except FileNotFoundError:
        raise MountError(f"{path}: does not exist; make it ('mkdir -p {path}')") from None
    except NotADirectoryError:
        raise MountError(f"{path}: not a directory; a mount point must be one") from None
    except OSError as error:
        raise MountError(f"{path}: {error.strerror}") from error


def clear(path: Path) -> None:
    """Takes a dead mount away; raises `MountError` if that fails."""
    _fusermount(path, lazy=True)


def unmount(path: Path) -> None:
    """Unmounts; raises `MountError`, naming who uses it, if it is busy."""
    _fusermount(path, lazy=False)


def _fusermount(path: Path, *, lazy: bool) -> None:
    check_dependencies()
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    users = _users(path)
    busy = f"; in use by {', '.join(users)}" if users else ""
    raise MountError(f"{path}: cannot be unmounted{busy} ({done.stderr.strip() or 'fusermount3 failed'})")


def _users(path: Path) -> list[str]:
    """Processes with an open file, working directory or map below `path`."""
    place = os.path.realpath(path)
    prefix = f"{place}/"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(t == place or t.startswith(prefix) for t in _opened(process)):
                found.append(f"{(process / 'comm').read_text().strip()} ({process.name})")
    return found


def _opened(process: Path) -> Iterator[str]:
    """What a process has open, as far as it has not closed it meanwhile: a busy one always closes something."""
    for link in (process / "cwd", process / "root", *(process / "fd").iterdir()):
        with contextlib.suppress(OSError):
            yield str(link.readlink())
