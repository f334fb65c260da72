"""What `scripts/bench --remote` measures: flushing to, and reading from, 24 embedded backends on this machine.

A file system of its own is made below the directory, with the settings of a new one: written once with
random bytes, flushed by `qsfs sync`, restored into an empty cache, and read, in order and at random; the
same behind a proxy that delays each byte; and small durable writes are timed beside a saturated writer with
and without the flush.  Both sides share the machine's cores, so the CPU seconds of daemon and servers are
counted apart: what a daemon does with a second of CPU is what a machine with remote backends would see.
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
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cost import measure_cost
from latency import durable_writes_beside_a_writer, random_reads
from measures import MIB
from quickstart import QSFS, answers, free_ports, wait_for
from residue import residue_table
from start import measure_start
from steady import measure_steady

from qsfs.cli.output import format_table
from qsfs.values import format_size

BACKENDS, DATA_SHARDS, PARITY_SHARDS = 24, 16, 4
PARTS = {
    "flush": "flush (qsfs sync)",
    "fetch": "sequential read from the backends",
    "random": "random reads of 128 KiB from the backends",
    "delayed_fetch": "sequential read, delayed",
    "delayed_random": "random reads of 128 KiB, delayed",
    "cost": "bytes stored for each byte of scattered 4 KiB pages that changed",
    "steady": "bytes sent for each byte that changed of a database that is rewritten for ever, virtual time",
    "start": "a start on an empty cache (a Casper-like block store)",
    "quiet": "4 KiB write + fsync beside a writer, nothing flushed",
    "flushing": "4 KiB write + fsync beside a writer, flushed meanwhile",
}
"""The parts of a round, and what they measure."""
COSTS = {
    "stored_per_byte": "all of it",
    "data_per_byte": "  shards of data",
    "metadata_per_byte": "  shards of metadata",
    "heads_per_byte": "  heads",
    "other_per_byte": "  other records",
}
"""What a cut costs, and how a table calls it."""
STEADY = {
    "sent_per_byte": "all of it, collect and rewriting included",
    "sent_data_per_byte": "  shards of data",
    "sent_metadata_per_byte": "  shards of metadata",
    "sent_heads_per_byte": "  heads",
    "metadata_bytes_per_page": "bytes of metadata for each page that changed",
    "held_per_byte": "held by packs that something lives in, for each byte that lives",
}
"""The same in the long run."""
STARTS = {
    "touched_share": "touched, of the file",
    "scattered_fetched_per_byte": "fetched for each byte touched: as uploaded",
    "packed_fetched_per_byte": "  packed together",
    "restored_fetched_per_byte": "  packed, restored elsewhere",
    "scattered_seconds": "seconds: as uploaded",
    "packed_seconds": "  packed together",
    "restored_seconds": "  packed, restored elsewhere",
    "local_bytes_per_page": "bytes of the local store for each page touched",
}
"""What a start costs, and how a table calls it."""
_NEVER = "cut_seconds = 3600\nquiet_seconds = 3600"
_ALWAYS = "cut_seconds = 5\nquiet_seconds = 0.5"
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
        return self.bytes / 1e6 / max(self.daemon, 1e-6)

    def report(self) -> dict[str, float]:
        """All of it, for JSON."""
        return asdict(self) | {"mb_per_second": self.rate, "mb_per_daemon_cpu_second": self.per_cpu_second}


class Remote:
    """A file system below `directory`, its 24 servers in one process, and the daemon that mounts it."""

    def __init__(self, directory: Path, servers: int, cache_bytes: int, codec: str) -> None:
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.servers = servers
        self.daemon = 0
        self._cache_bytes = cache_bytes
        self._codec = codec

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
        self.configure(r"^cut_seconds .*$", _NEVER)
        self.configure(r"^# codec = .*$", f'codec = "{self._codec}"')
        self.qsfs("format")

    def configure(self, pattern: str, text: str) -> None:
        """Replaces lines of the configuration; the daemon reads it when it starts."""
        config = self.directory / "qsfs.toml"
        config.write_text(re.sub(f"(?m){pattern}", text, config.read_text()))

    def remount(self) -> None:
        self.qsfs("umount")
        self.mount()

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


def measure_remote(
    directory: Path, size: int, rounds: int, *, rtt_ms: float, codec: str, only: Collection[str]
) -> dict[str, Any]:
    """Takes each part of `PARTS` that `only` names `rounds` times with files of `size` bytes; the report, for JSON."""
    report: dict[str, Any] = {
        "backends": BACKENDS,
        "code": f"{DATA_SHARDS}+{PARITY_SHARDS}",
        "codec": codec,
        "size": size,
        "rounds": rounds,
        "rtt_ms": rtt_ms,
        **{name: [] for name in PARTS if name in only},
    }
    for _ in range(rounds):
        if "steady" in only:
            report["steady"].append(measure_steady(directory))
        if set(only) <= {"steady"}:
            continue
        with tempfile.TemporaryDirectory(prefix="qsfs-bench-", dir=directory) as place:
            for name, found in _round(Path(place), size, rtt_ms, codec, only):
                report[name].append(found)
    return report


def remote_table(report: dict[str, Any]) -> str:
    """The report for people: the median round of each part."""
    rates, latencies, costs, steady, starts, residues = [], [], [], [], [], ""
    for name, what in PARTS.items():
        runs = report.get(name)
        if not runs:
            continue
        if name == "cost":
            run = sorted(runs, key=lambda run: run["stored_per_byte"])[len(runs) // 2]
            costs += [[what, f"{run[key]:.3f}"] for key, what in COSTS.items() if key in run]
            continue
        if name == "steady":
            run = sorted(runs, key=lambda run: run["sent_per_byte"])[len(runs) // 2]
            steady += [[what, f"{run[key]:.3f}"] for key, what in STEADY.items() if key in run]
            continue
        if name == "start":
            run = sorted(runs, key=lambda run: run["packed_fetched_per_byte"])[len(runs) // 2]
            starts = [[what, f"{run[key]:,.3f}"] for key, what in STARTS.items()]
            residues = residue_table(run["residue"])
            continue
        key = "p50_ms" if "p50_ms" in runs[0] else "mb_per_second"
        run = sorted(runs, key=lambda run: run[key])[len(runs) // 2]
        if key == "p50_ms":
            stream = run.get("stream_mb_per_second")
            latencies.append(
                [what, f"{run['p50_ms']:.1f}", f"{run['p99_ms']:.1f}", "" if stream is None else f"{stream:.0f}"]
            )
        else:
            rates.append(
                [
                    what,
                    f"{run['mb_per_second']:.0f}",
                    f"{run['mb_per_daemon_cpu_second']:.0f}",
                    f"{run['daemon']:.1f}",
                    f"{run['servers']:.1f}",
                ]
            )
    tables = []
    if rates:
        headers = ["measure", "MB/s", "MB per CPU second of the daemon", "its CPU, s", "the servers', s"]
        tables.append(format_table(headers, rates))
    if latencies:
        tables.append(format_table(["measure", "p50, ms", "p99, ms", "the writer, MB/s"], latencies))
    if costs:
        tables.append(format_table(["stored on all backends, for each byte of the pages that changed", ""], costs))
    if steady:
        tables.append(format_table(["sent to all backends in the long run, for each byte that changed", ""], steady))
    if starts:
        tables += [format_table([PARTS["start"], ""], starts), residues]
    return (
        f"{report['backends']} backends on this machine, {report['code']}, {report['codec']}, "
        f"{format_size(report['size'])} of random bytes, {report['rounds']} rounds; "
        f"delayed: a round trip of {report['rtt_ms']:g} ms\n\n" + "\n\n".join(tables)
    )


def cpu_seconds(process: int) -> float:
    """User and system time that a process has used."""
    return time.clock_gettime(~process << 3 | 2)


def _round(
    directory: Path, size: int, rtt_ms: float, codec: str, only: Collection[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    with servers(directory / "backends") as (process, first_port):
        remote = Remote(directory, process, 4 * size + (1 << 30), codec)
        remote.create(first_port)
        remote.mount()
        try:
            yield from _undelayed(remote, size, only)
            if "delayed_fetch" in only or "delayed_random" in only:
                with _delayed(remote, first_port, rtt_ms):
                    yield from _cold(remote, size, only, "delayed_")
            if "quiet" in only or "flushing" in only:
                yield from _foreground(remote, size, only)
        finally:
            subprocess.run([*QSFS, "-c", str(directory), "umount"], capture_output=True)


def _undelayed(remote: Remote, size: int, only: Collection[str]) -> Iterator[tuple[str, dict[str, float]]]:
    _write(remote.mountpoint / "file", size)
    with remote.stretch(size) as flush:
        remote.qsfs("sync")
    if "flush" in only:
        yield "flush", flush[0].report()
    if "cost" in only:
        yield "cost", measure_cost(remote, remote.mountpoint / "file", size)
    if "start" in only:
        yield "start", measure_start(remote, size)
    yield from _cold(remote, size, only, "")


def _cold(
    remote: Remote, size: int, only: Collection[str], prefix: str
) -> Iterator[tuple[str, dict[str, float]]]:
    file = remote.mountpoint / "file"
    if f"{prefix}fetch" in only:
        remote.lose_cache()
        with remote.stretch(size) as fetch:
            _read(file, size)
        yield f"{prefix}fetch", fetch[0].report()
    if f"{prefix}random" in only:
        remote.lose_cache()
        yield f"{prefix}random", random_reads(file, size)


def _foreground(remote: Remote, size: int, only: Collection[str]) -> Iterator[tuple[str, dict[str, float]]]:
    for name, setting in (("quiet", _NEVER), ("flushing", _ALWAYS)):
        if name in only:
            remote.configure(r"^cut_seconds .*\nquiet_seconds .*$", setting)
            remote.remount()
            place = remote.mountpoint / name
            place.mkdir()
            yield name, durable_writes_beside_a_writer(place, size)


@contextlib.contextmanager
def _delayed(remote: Remote, first_port: int, rtt_ms: float) -> Iterator[None]:
    """Puts a round trip between the daemon and its backends, which keep their identities."""
    proxies = free_ports(BACKENDS)
    script = Path(__file__).with_name("delay.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(rtt_ms), str(proxies), str(first_port), str(BACKENDS)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            sys.exit("bench: the delaying proxy did not start; see above")
        for i in range(BACKENDS):
            remote.configure(f":{first_port + i}\\b", f":{proxies + i}")
        yield
        for i in range(BACKENDS):
            remote.configure(f":{proxies + i}\\b", f":{first_port + i}")
        remote.remount()
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def servers(directory: Path) -> Iterator[tuple[int, int]]:
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
