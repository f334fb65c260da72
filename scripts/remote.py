"""What `scripts/bench --remote` measures: flushing to, and reading from, 24 embedded backends on this machine.

A file system of its own is made below the directory, with the settings of a new one: written once with
random bytes, flushed by `qsfs sync`, restored into an empty cache, and read.  Both sides share the
machine's cores, so the CPU seconds of daemon and servers are counted apart: what a daemon does with a
second of CPU is what a machine with remote backends would see.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from measures import MIB
from quickstart import QSFS, answers, free_ports, wait_for

from qsfs.cli.output import format_table
from qsfs.values import format_size

BACKENDS, DATA_SHARDS, PARITY_SHARDS = 24, 16, 4
_TICKS = os.sysconf("SC_CLK_TCK")
_CHUNK = MIB


@dataclass(frozen=True)
class Stretch:
    """One thing measured: file bytes, and seconds of wall time and of CPU of daemon and servers."""

    bytes: int
    seconds: float
    daemon: float
    servers: float

    @property
    def rate(self) -> float:
        """File bytes, in MB (10^6), a second of wall time."""
        return self.bytes / 1e6 / self.seconds

    @property
    def per_cpu_second(self) -> float:
        """File bytes, in MB, a second of the daemon's CPU."""
        return self.bytes / 1e6 / max(self.daemon, 1 / _TICKS)

    def report(self) -> dict[str, float]:
        """All of it, for JSON."""
        return asdict(self) | {"mb_per_second": self.rate, "mb_per_daemon_cpu_second": self.per_cpu_second}


class Remote:
    """A file system below `directory`, its 24 servers in one process, and the daemon that mounts it."""

    def __init__(self, directory: Path, servers: int, cache_bytes: int) -> None:
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.servers = servers
        self.daemon = 0
        self._cache_bytes = cache_bytes

    def qsfs(self, *words: str) -> str:
        done = subprocess.run(
            [*QSFS, "-c", str(self.directory), "--json", *words], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"bench: `qsfs {' '.join(words)}` failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def create(self, first_port: int) -> None:
        """Makes the file system.  Only a sync begins to flush, so that all of it is measured."""
        self.qsfs(
            "init", str(self.directory), "--backends", str(BACKENDS), "--port", str(first_port),
            "--data-shards", str(DATA_SHARDS), "--parity-shards", str(PARITY_SHARDS),
            "--cache-size", str(self._cache_bytes),
        )  # fmt: skip
        config = self.directory / "qsfs.toml"
        text = re.sub(r"(?m)^cut_seconds .*$", "cut_seconds = 3600\nquiet_seconds = 3600", config.read_text())
        config.write_text(text)
        self.qsfs("format")

    def mount(self) -> None:
        self.daemon = json.loads(self.qsfs("mount"))["process"]

    def lose_cache(self) -> None:
        """Goes on as another machine would that has nothing but the configuration and the key."""
        self.qsfs("umount")
        shutil.rmtree(self.directory / "cache")
        self.qsfs("restore")
        self.qsfs("takeover")
        self.mount()

    @contextlib.contextmanager
    def stretch(self, size: int) -> Iterator[list[Stretch]]:
        """Appends what the block took."""
        found: list[Stretch] = []
        daemon, servers, started = cpu_seconds(self.daemon), cpu_seconds(self.servers), time.perf_counter()
        yield found
        seconds = time.perf_counter() - started
        found.append(
            Stretch(size, seconds, cpu_seconds(self.daemon) - daemon, cpu_seconds(self.servers) - servers)
        )


def measure_remote(directory: Path, size: int, rounds: int) -> dict[str, object]:
    """Flushes and fetches `size` bytes `rounds` times; the report, for JSON."""
    flushes, fetches = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="qsfs-bench-", dir=directory) as place:
            flush, fetch = _round(Path(place), size)
        flushes.append(flush.report())
        fetches.append(fetch.report())
    return {
        "backends": BACKENDS,
        "code": f"{DATA_SHARDS}+{PARITY_SHARDS}",
        "size": size,
        "rounds": rounds,
        "flush": flushes,
        "fetch": fetches,
    }


def remote_table(report: dict) -> str:
    """The report for people: the median round of each."""
    rows = []
    for name, what in (("flush", "flush (qsfs sync)"), ("fetch", "sequential read from the backends")):
        runs = sorted(report[name], key=lambda run: run["mb_per_second"])
        run = runs[len(runs) // 2]
        rows.append(
            [
                what,
                f"{run['mb_per_second']:.0f}",
                f"{run['mb_per_daemon_cpu_second']:.0f}",
                f"{run['daemon']:.1f}",
                f"{run['servers']:.1f}",
            ]
        )
    headers = ["measure", "MB/s", "MB per CPU second of the daemon", "its CPU, s", "the servers', s"]
    return (
        f"{report['backends']} backends on this machine, {report['code']}, {format_size(report['size'])} of "
        f"random bytes, {report['rounds']} rounds\n\n{format_table(headers, rows)}"
    )


def cpu_seconds(process: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _round(directory: Path, size: int) -> tuple[Stretch, Stretch]:
    with _servers(directory / "backends") as (process, first_port):
        remote = Remote(directory, process, 2 * size + (1 << 30))
        remote.create(first_port)
        remote.mount()
        try:
            _write(remote.mountpoint / "file", size)
            with remote.stretch(size) as flush:
                remote.qsfs("sync")
            remote.lose_cache()
            with remote.stretch(size) as fetch:
                _read(remote.mountpoint / "file", size)
        finally:
            subprocess.run([*QSFS, "-c", str(directory), "umount"], capture_output=True)
    return flush[0], fetch[0]


@contextlib.contextmanager
def _servers(directory: Path) -> Iterator[tuple[int, int]]:
    """The process of 24 embedded backends, and their first port."""
    directory.mkdir()
    first = free_ports(BACKENDS)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *QSFS, "zdb", "serve", "--data", str(directory), "--port", str(first),
                "--instances", str(BACKENDS),
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(lambda: answers(first + BACKENDS - 1), f"the backends; see {directory}/log")
        yield process.pid, first
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _write(file: Path, size: int) -> None:
    with file.open("wb", buffering=0) as out:
        for _ in range(size // _CHUNK):
            out.write(os.urandom(_CHUNK))
        os.fsync(out.fileno())


def _read(file: Path, size: int) -> None:
    with file.open("rb", buffering=0) as source:
        buffer = bytearray(_CHUNK)
        found = 0
        while count := source.readinto(buffer):
            found += count
    if found != size:
        sys.exit(f"bench: {found} bytes came back of {size}")
