"""The mount that the cases share, the plain directory beside it, and what happens to the mount."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsfs.daemon.control import ask
from tests.fsx.game import empty
from tests.support import scratch
from tests.support.daemon import PATIENCE, FileSystem
from tests.system.fleet import cold, status

# Small, and everything that may leave the cache leaves it at once.
SETTINGS: dict[str, Any] = {
    "cache.size": "40MiB",
    "cache.uncovered_size": "1MiB",
    "cache.group_seconds": 0.3,
    "cache.second_look_seconds": 0,
    "cache.high_watermark": 0.002,
    "cache.low_watermark": 0.001,
    "flush.quiet_seconds": 0.2,
    "flush.cut_seconds": 1,
}

_MS_REMOUNT = 32
_libc = ctypes.CDLL(None, use_errno=True)


class Field:
    """A mounted file system and a plain directory; `seen` counts what came to pass."""

    def __init__(self, fs: FileSystem, plain: Path) -> None:
        self.seen: Counter[str] = Counter()
        self._fs = fs
        self._plain = plain
        self._cases = 0

    def new_case(self) -> tuple[Path, Path]:
        """Two empty directories: on the mount, and the plain one."""
        self._cases += 1
        name = f"case-{self._cases}"
        mount, plain = self._fs.mountpoint / name, self._plain / name
        mount.mkdir()
        plain.mkdir()
        return mount, plain

    def check(self) -> None:
        """Mounts again if the last case broke the mount."""
        if not self._fs.process:
            for mountpoint in scratch.mounts_below(self._fs.mountpoint):
                scratch.detach(mountpoint)
            self._fs.mount()

    def break_down(self) -> None:
        """After a call that did not come back: nothing may wait for the daemon any more."""
        if self._fs.process:
            scratch.kill_process(self._fs.process)
            self._fs.wait_ended()

    def publish(self, *, evict: bool) -> None:
        """Makes a generation; `evict` waits until nothing is local any more."""
        self.seen["evict" if evict else "publish"] += 1
        ask(self._fs.cache, "sync", timeout=PATIENCE)
        if evict:
            empty(self._fs)

    def forget_names(self) -> None:
        """The kernel forgets names, attributes and files of the mount that nobody uses; it asks again."""
        self.seen["forget"] += 1
        target = os.fsencode(self._fs.mountpoint)
        flags = _MS_REMOUNT | os.statvfs(target).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOATIME)
        if _libc.mount(b"", target, b"", flags, None) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self._fs.mountpoint))

    def begin_again(self, how: str) -> None:
        """Ends the daemon and starts another; nobody may use the mount."""
        self.seen[how] += 1
        self.count_up()
        if how == "remount":
            self._fs.umount()
            self._fs.mount()
        elif how == "kill":
            self._fs.kill()
            self._fs.mount()
        else:
            ask(self._fs.cache, "sync", timeout=PATIENCE)
            cold(self._fs)

    def count_up(self) -> None:
        """Adds what the daemon counted; called before it ends."""
        found = status(self._fs)
        assert found["requests"]["unexpected_errors"] == 0
        self.seen["fetched bytes"] += found["fetched_bytes"]
        self.seen["evicted bytes"] += found["cache"]["evicted_bytes"]


@contextmanager
def make_field(directory: Path) -> Iterator[Field]:
    """A field for some cases; the file system is checked when they are over."""
    directory.chmod(0o711)
    plain = directory / "plain"
    plain.mkdir()
    with FileSystem(directory / "qsfs", count=6, settings=SETTINGS) as fs:
        fs.format()
        fs.mount()
        field = Field(fs, plain)
        yield field
        field.count_up()
        fs.umount()
        fs.run("fsck")
