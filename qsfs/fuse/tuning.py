"""Kernel settings of a mount that FUSE does not negotiate; set through sysfs, as root, after mounting.

Nothing here sends a request to the mount: its daemon could not answer itself.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

MAX_RATIO = 40
"""Percent of the machine's dirty limit that one mount may use; FUSE starts with 1."""

_MOUNTINFO = Path("/proc/self/mountinfo")
_SYS = Path("/sys")
_VM = Path("/proc/sys/vm")
_MEMINFO = Path("/proc/meminfo")
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
    device: Device,
    *,
    read_ahead_kb: int,
    max_background: int,
    max_ratio: int = MAX_RATIO,
    sys: Path = _SYS,
) -> dict[str, int]:
    """Sets readahead, background requests and the share of dirty pages; returns what was set.

    What is not permitted or not there is left alone and logged: it costs speed, nothing else.
    """
    bdi = sys / "class" / "bdi" / f"{device.major}:{device.minor}"
    connection = sys / "fs" / "fuse" / "connections" / str(device.minor)
    wanted = {
        bdi / "read_ahead_kb": read_ahead_kb,
        bdi / "max_ratio": max_ratio,
        connection / "max_background": max_background,
        connection / "congestion_threshold": max(1, max_background * 3 // 4),
    }
    done = {}
    for file, value in wanted.items():
        try:
            file.write_text(f"{value}\n", encoding="ascii")
        except OSError as error:
            log.info("%s stays as it is: %s", file, error.strerror)
        else:
            done[file.name] = value
    return done


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
