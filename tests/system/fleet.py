"""Steps of stories about a file system and its backends: losing some, reading cold, looking inside."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import trio

from qsfs.backend.link import Link, Target
from qsfs.daemon.control import ask
from tests.support import scratch
from tests.support.backends import HOST, Servers
from tests.support.daemon import PATIENCE, FileSystem

T = TypeVar("T")

# Generations are made when a test asks for one; reads and uploads do not wait for longer than a test can.
QUICK: dict[str, Any] = {
    "cache.group_seconds": 0.3,
    "flush.cut_seconds": "1h",
    "flush.quiet_seconds": 0.5,
    "flush.full_grace_seconds": 1,
    "flush.stop_deadline_seconds": 30,
    "fetch.deadline_seconds": 2,
}

# What a daemon says while backends do not answer.
SILENCE = (r"waiting for a quorum of backends",)


def content(name: str, size: int) -> bytes:
    """`size` bytes that do not compress and follow from the name."""
    return random.Random(name).randbytes(size)


def configured(fs: FileSystem) -> list[dict[str, Any]]:
    """The backends in the configuration."""
    tables: list[dict[str, Any]] = tomllib.loads(fs.config.read_text())["backend"]
    return tables


def store(fs: FileSystem, name: str, size: int) -> str:
    """Writes a file with the `content` of its name; returns the name."""
    (fs.mountpoint / name).write_bytes(content(name, size))
    return name


def check(fs: FileSystem, name: str) -> None:
    """The file holds exactly the `content` of its name."""
    found = (fs.mountpoint / name).read_bytes()
    wanted = content(name, len(found))
    assert hashlib.sha256(found).digest() == hashlib.sha256(wanted).digest(), f"{name}: other bytes"


def status(fs: FileSystem) -> dict[str, Any]:
    """The daemon's status, without the cost of a command."""
    found: dict[str, Any] = ask(fs.cache, "status", timeout=PATIENCE)
    return found


def eventually(look: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Looks until it is true, and returns that; fails after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def dead(servers: Servers, indices: Collection[int]) -> Iterator[None]:
    """Backends that are killed for the time of a `with` block."""
    for index in indices:
        servers.kill(index)
    try:
        yield
    finally:
        start(servers, indices)


def start(servers: Servers, indices: Collection[int]) -> None:
    """Starts backends again, and waits until they answer."""
    for index in indices:
        servers.start(index)


def up(fs: FileSystem, count: int) -> bool:
    """Whether so many backends answer the daemon."""
    return sum(backend["state"] == "up" and backend["identified"] for backend in status(fs)["backends"]) >= count


def forget(fs: FileSystem) -> None:
    """Unmounts, loses the cache, restores and takes over: nothing that files hold is local after this."""
    if fs.process:
        fs.umount()
    shutil.rmtree(fs.cache)
    fs.cache.mkdir(mode=0o700)
    fs.run("takeover")


def cold(fs: FileSystem) -> None:
    """`forget`, and mounts."""
    forget(fs)
    fs.mount()


@contextlib.contextmanager
def running(fs: FileSystem, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A `qsfs` command that runs beside the test; it is killed if it still does at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qsfs.cli.main", "-c", str(fs.config), *words],
        cwd=scratch.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ended(process: subprocess.Popen[str], seconds: float = PATIENCE) -> tuple[int, str]:
    """Waits for the end of a process: exit code and what it printed."""
    printed, _ = process.communicate(timeout=seconds)
    return process.returncode, printed


class Inside:
    """What lies in a namespace of one backend, seen and changed behind the back of qsfs."""

    def __init__(self, servers: Servers, index: int, namespace: str, password: str = "") -> None:
        self._link = Link(Target(HOST, servers.ports[index], namespace, password))
        trio.run(self._link.connect, trio.CapacityLimiter(1), 30.0)

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            self._link.close()

        trio.run(close)

    def call(self, *words: bytes | str) -> Any:
        """One command."""
        return trio.run(self._link.call, *words)

    def keys(self) -> list[bytes]:
        """All keys, oldest first."""
        found: list[bytes] = []
        cursor: bytes | None = None
        while True:
            try:
                cursor, rows = self.call("SCAN", *([] if cursor is None else [cursor]))
            except Exception as error:
                if "No more data" in str(error):
                    return found
                raise
            found += [bytes(row[0]) for row in rows]

    def values(self) -> dict[bytes, bytes]:
        """Everything."""
        return {key: self.call("GET", key) for key in self.keys()}


def keys_of(fs: FileSystem, indices: Collection[int], *, control: bool = True) -> dict[int, set[bytes]]:
    """The keys that backends hold for a file system."""
    found: dict[int, set[bytes]] = {}
    for index in indices:
        found[index] = set()
        for namespace in (fs.namespace, *([fs.namespace + ".control"] if control else [])):
            with Inside(fs.servers, index, namespace) as inside:
                found[index].update(inside.keys())
    return found


def program(text: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A Python program of its own process, for what would block the test's: reads that wait."""
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        cwd=scratch.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
