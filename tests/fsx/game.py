"""A file system, a player of operations on it, and what happens to the machine while it plays."""

from __future__ import annotations

import json
import mmap
import select
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsfs.daemon.control import ask
from tests.fsx.operations import POLICIES, operations, story
from tests.support import scratch
from tests.support.daemon import PATIENCE, FileSystem
from tests.system.fleet import cold, eventually, status

# Everything that may leave the cache leaves it at once; or nothing ever does, until the machine is lost.
LEAVING = {"cache.high_watermark": 0.002, "cache.low_watermark": 0.001}
STAYING = {"cache.high_watermark": 0.90, "cache.low_watermark": 0.85}

SETTINGS: dict[str, Any] = {
    "cache.size": "40MiB",
    "cache.uncovered_size": "1MiB",
    "cache.group_seconds": 0.3,
    "cache.second_look_seconds": 0,
    "flush.quiet_seconds": 0.2,
    "flush.cut_seconds": 1,
    "policy": POLICIES,
    **LEAVING,
}


@dataclass(slots=True)
class Seen:
    """What came to pass in a game, so that a test can see that its cases were met."""

    events: dict[str, int] = field(default_factory=dict)
    fetched_bytes: int = 0
    evicted_bytes: int = 0


class Game:
    """One seed played on a mounted file system, in a directory of its own; raises `AssertionError` with the story."""

    def __init__(self, fs: FileSystem, seed: int, count: int) -> None:
        self.seen = Seen()
        self._fs = fs
        self._seed = seed
        self._count = count

    def play(self) -> Seen:
        """Plays to the end; leaves the file system mounted."""
        directory = self._fs.mountpoint / f"game-{self._seed}"
        directory.mkdir()
        progress = self._fs.directory / f"progress-{self._seed}"
        progress.write_bytes(bytes(8))
        words = [sys.executable, "-m", "tests.fsx.player", str(directory)]
        words += [str(self._seed), str(self._count), str(progress)]
        with progress.open("rb") as file, mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ) as shown:
            player = subprocess.Popen(
                words, cwd=scratch.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            try:
                self._serve(player, lambda: int(struct.unpack_from("<Q", shown)[0]))
            finally:
                if player.poll() is None:
                    player.kill()
                    # What waits for the daemon in the kernel ends with it.
                    if self._fs.process and not _ends(player):
                        scratch.kill_process(self._fs.process)
                player.wait()
                for pipe in (player.stdin, player.stdout):
                    assert pipe is not None
                    pipe.close()
        self._count_up()
        return self.seen

    def _serve(self, player: subprocess.Popen[str], at: Callable[[], int]) -> None:
        assert player.stdin is not None and player.stdout is not None
        while True:
            said = self._next_line(player, at)
            if not said:
                code = player.wait()
                self._fail(at(), "", f"the player ended with {code}" + (" (SIGBUS)" if code == -7 else ""))
            message = json.loads(said)
            if "wrong" in message:
                self._fail(at(), message["file"], message["wrong"])
            if "done" in message:
                return
            event = message["request"]
            self.seen.events[event] = self.seen.events.get(event, 0) + 1
            getattr(self, f"_{event}")()
            player.stdin.write("\n")
            player.stdin.flush()

    def _next_line(self, player: subprocess.Popen[str], at: Callable[[], int]) -> str:
        """What the player says next; fails if it stands still for long."""
        before, since = -1, time.monotonic()
        while not select.select([player.stdout], [], [], 1)[0]:
            if (now := at()) != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                self._fail(now, "", f"it hangs: {status(self._fs).get('waits')}")
        assert player.stdout is not None
        return player.stdout.readline()

    def _fail(self, number: int, file: str, what: str) -> None:
        told = list(operations(self._seed, number))
        file = file or (told[-1].file if told else "")
        raise AssertionError(
            f"seed {self._seed}, operation {number}: {what}\n{story(told, file)}\n"
            f"again: python -m tests.fsx --seed {self._seed} --operations {number}"
        )

    # what happens to the machine

    def _publish(self) -> None:
        ask(self._fs.cache, "sync", timeout=PATIENCE)

    def _evict(self) -> None:
        self._publish()
        if leaves(self._fs):
            empty(self._fs)

    def _remount(self) -> None:
        self._count_up()
        self._fs.umount()
        self._fs.set(STAYING if leaves(self._fs) else LEAVING)
        self._fs.mount()

    def _kill(self) -> None:
        self._count_up()
        self._fs.kill()
        self._fs.mount()

    def _restore(self) -> None:
        self._publish()
        self._count_up()
        cold(self._fs)

    def _count_up(self) -> None:
        found = status(self._fs)
        assert found["requests"]["unexpected_errors"] == 0
        self.seen.fetched_bytes += found["fetched_bytes"]
        self.seen.evicted_bytes += found["cache"]["evicted_bytes"]


def leaves(fs: FileSystem) -> bool:
    """Whether the cache keeps nothing that may leave it."""
    return bool(tomllib.loads(fs.config.read_text())["cache"]["high_watermark"] < 0.5)


def empty(fs: FileSystem) -> None:
    """Waits until nothing is local any more; only for caches that keep nothing."""
    try:
        eventually(lambda: status(fs)["cache"]["blocks"] == 0, "everything has left the cache")
    except AssertionError as error:
        found = status(fs)
        raise AssertionError(f"{error}: {found['cache']}, {found.get('flush')}, {found['backends']}") from None


def _ends(process: subprocess.Popen[str], seconds: float = 5) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@contextmanager
def field_of_play(directory: Path, **settings: Any) -> Any:
    """A mounted file system for games; checked when they are over."""
    with FileSystem(directory, count=6, settings=SETTINGS | settings) as fs:
        fs.format()
        fs.mount()
        yield fs
        fs.umount()
        fs.run("fsck")
