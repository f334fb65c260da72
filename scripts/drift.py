"""What `scripts/bench --drift` measures: whether half an hour of mixed load leaves qsfs as it found it.

A file system of its own is made below the directory, on 24 embedded backends, with a cache that holds about
half of a ring of files.  The programs of `mixed_load.py` run on it together; samples are taken meanwhile.  At
the end the contents are verified after a new mount, and the last third of the time is compared with the first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latency import percentiles
from measures import MIB
from mixed_load import FILE, Commits, DiskWrites, DurableWrites, EvictedReads, Program, Ring, SequentialWrites
from remote import BACKENDS, DATA_SHARDS, PARITY_SHARDS, Remote, cpu_seconds, servers
from svg import Line, Panel, panels

from qsfs.cli.output import format_table
from qsfs.daemon import control
from qsfs.values import format_size

GAUGES = {
    "daemon_memory": "RssAnon of the daemon",
    "store_file": "LMDB file of the cache",
    "store_used": "used of it",
    "cache_disk": "cache directory on its disk",
    "dirty": "not on the backends yet",
    "application_lmdb": "the application's LMDB file",
}
"""What a sample holds in bytes."""
_LATENCIES = {"p50_ms": 1.5, "p95_ms": 2.0, "p99_ms": 2.0}
_GAUGES_MAY = 1.1
_LEAST_MS, _LEAST_BYTES = 0.5, 16 * MIB


def measure_drift(directory: Path, minutes: float, size: int) -> dict[str, Any]:
    """Runs the load for `minutes` over files of 4 x `size` in a cache of as much; the report, for JSON."""
    with tempfile.TemporaryDirectory(prefix="qsfs-bench-", dir=directory) as place:
        below = Path(place)
        with servers(below / "backends") as (process, first_port):
            remote = Remote(below, process, 4 * size, "zfec")
            remote.create(first_port)
            # Defaults; but what was written may be evicted sooner, so that this needs less than a cache of 10 GiB.
            look = min(10.0, minutes)
            remote.configure(r"^cut_seconds .*\nquiet_seconds .*$", f"cut_seconds = {min(30.0, minutes * 6):g}")
            remote.configure(r"^(size = .*)$", rf"\1\nsecond_look_seconds = {look:g}")
            remote.mount()
            try:
                report = _run(remote, minutes * 60, size)
            finally:
                with contextlib.suppress(SystemExit):
                    remote.qsfs("umount")
    return {
        "backends": BACKENDS, "code": f"{DATA_SHARDS}+{PARITY_SHARDS}", "minutes": minutes,
        "cache": 4 * size, "files": 4 * size, "second_look_seconds": look, **report,
    }  # fmt: skip


def _run(remote: Remote, seconds: float, size: int) -> dict[str, Any]:
    ring = Ring(remote.mountpoint / "ring", 4 * size // FILE)
    with contextlib.ExitStack() as stack:
        programs: list[Program] = [
            SequentialWrites(ring),
            EvictedReads(ring),
            DurableWrites(remote.mountpoint / "durable", size // 16),
            DiskWrites(remote.directory / "on-disk", size // 16),
            Commits(remote.mountpoint / "store.lmdb"),
        ]
        for program in programs:
            stack.callback(program.close)
        for _ in range(ring.count):
            ring.write()
        remote.qsfs("sync")
        began = time.monotonic()
        samples = list(_load(remote, programs, seconds, began))
    remote.qsfs("sync")
    remote.remount()
    wrong = list(itertools.chain.from_iterable(program.check() for program in programs))
    read = len(next(program for program in programs if program.name == "evicted").taken) * (128 << 10)
    report = {
        "programs": {
            program.name: {"what": program.what, "each_seconds": program.seconds, "done": len(program.taken)}
            for program in programs
        },
        "latencies": {program.name: _windows(program, began, seconds) for program in programs},
        "samples": samples,
        "thirds": thirds(programs, samples, began, seconds),
        "read_bytes": read,
        "fetched_bytes": samples[-1]["fetched"] - samples[0]["fetched"],
        "wrong": wrong,
    }
    return report | {"drifted": drifted(report["thirds"])}


def _load(remote: Remote, programs: list[Program], seconds: float, began: float) -> Iterator[dict[str, float]]:
    """Runs the programs, and takes a sample every five seconds or more often."""
    stop = threading.Event()
    threads = [threading.Thread(target=program.run, args=(stop,)) for program in programs]
    for thread in threads:
        thread.start()
    try:
        every = min(5.0, seconds / 12)
        for number in itertools.count():
            yield _sample(remote) | {"seconds": time.monotonic() - began}
            left = began + min((number + 1) * every, seconds) - time.monotonic()
            if time.monotonic() - began >= seconds or any(program.error for program in programs):
                break
            time.sleep(max(0.0, left))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for program in programs:
        if program.error is not None:
            raise program.error


def _sample(remote: Remote) -> dict[str, float]:
    found = control.ask(remote.directory / "cache", "status", timeout=60)
    exposure = found["flush"]["exposure"]
    return {
        "daemon_memory": found["memory_bytes"],
        "store_file": (remote.directory / "cache" / "data.mdb").stat().st_blocks * 512,
        "store_used": found["cache"]["used_bytes"],
        "cache_disk": found["cache"]["disk_bytes"],
        "dirty": exposure["local"]["bytes"],
        "application_lmdb": (remote.mountpoint / "store.lmdb").stat().st_blocks * 512,
        "fetched": found["fetched_bytes"],
        "evicted": found["cache"]["evicted_bytes"],
        "daemon_cpu": cpu_seconds(remote.daemon),
        "servers_cpu": cpu_seconds(remote.servers),
        "load": os.getloadavg()[0],
    }


def summary(seconds: list[float]) -> dict[str, float]:
    """Number, median, 95th and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return percentiles(ordered) | {"p95_ms": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)] * 1e3}


def _windows(program: Program, began: float, seconds: float) -> list[dict[str, float]]:
    """The percentiles of each sixtieth of the time in which the program did something."""
    width = seconds / 60
    windows: dict[int, list[float]] = {}
    for at, took in program.taken:
        windows.setdefault(int((at - began) / width), []).append(took)
    return [{"seconds": (number + 0.5) * width, **summary(taken)} for number, taken in sorted(windows.items())]


def thirds(
    programs: list[Program], samples: list[dict[str, float]], began: float, seconds: float
) -> list[dict[str, Any]]:
    """What the first and the last third of the time were like, a row for each figure."""
    rows: list[dict[str, Any]] = []
    for program in programs:
        parts = [
            [took for at, took in program.taken if low <= at - began < high]
            for low, high in ((0, seconds / 3), (seconds * 2 / 3, float("inf")))
        ]
        if all(parts):
            first, last = map(summary, parts)
            rows += [_row(program.name, figure, first[figure], last[figure]) for figure in _LATENCIES]
    for gauge in GAUGES:
        first, last = (
            statistics.median(sample[gauge] for sample in part)
            for part in (samples[: len(samples) // 3 or 1], samples[-(len(samples) // 3 or 1) :])
        )
        rows.append(_row(gauge, "bytes", first, last))
    return rows


def _row(name: str, figure: str, first: float, last: float) -> dict[str, Any]:
    return {
        "name": name, "figure": figure, "first": first, "last": last, "ratio": last / first if first else None,
    }  # fmt: skip


def drifted(rows: list[dict[str, Any]]) -> list[str]:
    """Which figures of `thirds` grew by more than two runs on a busy machine differ, relatively and absolutely."""
    found = []
    for row in rows:
        latency = row["figure"] in _LATENCIES
        may = _LATENCIES[row["figure"]] if latency else _GAUGES_MAY
        least = _LEAST_MS if latency else _LEAST_BYTES
        if row["last"] > row["first"] * may and row["last"] - row["first"] > least:
            found.append(f"{row['name']} {row['figure']}")
    return found


def drift_table(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = []
    for row in report["thirds"]:
        latency = row["figure"] in _LATENCIES
        name = report["programs"][row["name"]]["what"] if latency else GAUGES[row["name"]]
        first, last = (f"{row[part]:.2f} ms" if latency else format_size(int(row[part])) for part in ("first", "last"))
        figure = row["figure"].removesuffix("_ms") if latency else "median"
        rows.append([name, figure, first, last, None if row["ratio"] is None else f"{row['ratio']:.2f}"])
    share = report["fetched_bytes"] / max(report["read_bytes"], 1)
    lines = [
        f"{report['minutes']:g} minutes of mixed load; {report['backends']} backends on this machine, "
        f"{report['code']}, cache of {format_size(report['cache'])}, a ring of files of {format_size(report['files'])}",
        f"read as evicted {format_size(report['read_bytes'])}, fetched {format_size(report['fetched_bytes'])} "
        f"({share:.2f} of it)",
        "",
        format_table(["measure", "figure", "first third", "last third", "ratio"], rows),
        "",
        "drifted: " + (", ".join(report["drifted"]) or "nothing"),
        "contents: " + (f"{len(report['wrong'])} WRONG" if report["wrong"] else "as written"),
        *report["wrong"][:10],
    ]
    return "\n".join(lines)


def drift_svg(report: dict[str, Any]) -> str:
    """Latencies, memory and sizes over time."""
    shown = []
    for name, windows in report["latencies"].items():
        lines = [
            Line(label, [(window["seconds"] / 60, window[figure]) for window in windows])
            for label, figure in (("p50", "p50_ms"), ("p95", "p95_ms"))
        ]
        shown.append(Panel(f"{report['programs'][name]['what']}, ms", lines))
    for title, gauges in (
        ("Memory and dirty data, MiB", {"daemon RssAnon": "daemon_memory", "dirty": "dirty"}),
        (
            "Sizes, MiB",
            {"cache": "cache_disk", "LMDB": "store_file", "used": "store_used", "app's LMDB": "application_lmdb"},
        ),
    ):
        lines = [
            Line(label, [(sample["seconds"] / 60, sample[gauge] / MIB) for sample in report["samples"]])
            for label, gauge in gauges.items()
        ]
        shown.append(Panel(title, lines))
    return panels(shown, "minutes")


def run_drift(directory: Path, minutes: float, size: int, output: Path, *, as_json: bool) -> int:
    """Measures, writes OUTPUT.json and OUTPUT.svg, prints; 1 if contents are wrong."""
    report = measure_drift(directory, minutes, size)
    output.with_suffix(".json").write_text(json.dumps(report) + "\n")
    output.with_suffix(".svg").write_text(drift_svg(report))
    print(json.dumps(report, indent=2) if as_json else drift_table(report))
    return 1 if report["wrong"] else 0
