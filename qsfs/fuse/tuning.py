"""Kernel settings of a mount that FUSE does not negotiate; set through sysfs, as root, after mounting.

Nothing here sends a request to the mount: its daemon could not answer itself.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

MAX_RATIO = 40
"""Percent of the machine's dirty limit that one mount may use; FUSE starts with 1."""

_MOUNTINFO = Path("/proc/self/mountinfo")
_SYS = Path("/sys")
_VM = Path("/proc/sys/vm")
_MEMINFO = Path("/proc/meminfo")
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture
_FSCONFIG_CMD_CREATE = 6
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Device:
    """The device number of a mount."""

    major: int
    minor: int


def find_device(mountpoint: Path, mountinfo: Path = _MOUNTINFO) -> Device | None:
    """The device of the newest mount at `mountpoint`, from the kernel's table; None if there is none."""
    wanted = str(mountpoint.absolute())
    found: Device | None = None
    for line in mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if _unescape(fields[4]) == wanted:
            major, minor = fields[2].split(":")
            found = Device(int(major), int(minor))
    return found


def tune(
    device: Device, *, read_ahead_kb: int, max_background: int, max_ratio: int = MAX_RATIO, sys: Path = _SYS
) -> dict[str, int]:
    """Sets readahead, background requests and the share of dirty pages; returns what was set.

    What is not permitted or not there is left alone and logged: it costs speed, nothing else.
    """
    bdi = sys / "class" / "bdi" / f"{device.major}:{device.minor}"
    done = _write({bdi / "read_ahead_kb": read_ahead_kb, bdi / "max_ratio": max_ratio})
    with _connections(sys / "fs" / "fuse" / "connections", device) as connections:
        connection = connections / str(device.minor)
        threshold = max(1, max_background * 3 // 4)
        return done | _write(
            {connection / "max_background": max_background, connection / "congestion_threshold": threshold}
        )


def _write(settings: dict[Path, int]) -> dict[str, int]:
    done = {}
    for file, value in settings.items():
        try:
            file.write_text(f"{value}\n", encoding="ascii")
        except OSError as error:
            log.info("%s stays as it is: %s", file, error.strerror)
        else:
            done[file.name] = value
    return done


@contextmanager
def _connections(usual: Path, device: Device) -> Iterator[Path]:
    """The control file system of FUSE: where it is mounted, else a mount of it that nobody else sees."""
    if (usual / str(device.minor)).exists() or usual != _SYS / "fs" / "fuse" / "connections":
        yield usual
        return
    mount = _private_mount(b"fusectl")
    if mount is None:
        yield usual
        return
    try:
        yield Path(f"/proc/self/fd/{mount}")
    finally:
        os.close(mount)


def _private_mount(kind: bytes) -> int | None:
    """A descriptor of a new mount that is attached nowhere; None where that is not permitted."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    context = call(_FSOPEN, kind, 0)
    if context < 0:
        return None
    try:
        if call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            return None
        mount = int(call(_FSMOUNT, context, 0, 0))
        return mount if mount >= 0 else None
    finally:
        os.close(context)


def dirty_limit_bytes(max_ratio: int = MAX_RATIO, vm: Path = _VM, meminfo: Path = _MEMINFO) -> int:
    """About how many dirty bytes the kernel may hold back for a mount with this share."""
    fixed = _number(vm / "dirty_bytes")
    if fixed == 0:
        available = 0
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        fixed = available * _number(vm / "dirty_ratio") // 100
    return fixed * max_ratio // 100


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
