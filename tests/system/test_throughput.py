"""The flush and fetch figures of `scripts/bench --remote`: taken from a real file system, and honest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scratch import ROOT

pytestmark = pytest.mark.mount

BENCH = ROOT / "scripts" / "bench.py"


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *map(str, words)], capture_output=True, text=True, timeout=300)


def test_the_remote_bench_counts_daemon_and_servers_apart_and_leaves_nothing(scratch: Path) -> None:
    """No speed is asserted: the machine is shared."""
    done = bench("--remote", scratch, "--size", "8MiB", "--only", "flush,fetch", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["backends"], report["code"], report["size"]) == (24, "16+4", 8 << 20)
    for name in ("flush", "fetch"):
        (run,) = report[name]
        assert run["bytes"] == 8 << 20
        assert run["seconds"] > 0 and run["daemon"] > 0 and run["servers"] > 0
        assert run["mb_per_second"] == pytest.approx(run["bytes"] / 1e6 / run["seconds"])
        assert run["mb_per_daemon_cpu_second"] == pytest.approx(run["bytes"] / 1e6 / run["daemon"])
    assert "delayed_fetch" not in report
    assert list(scratch.iterdir()) == []


def test_the_remote_bench_delays_what_it_says_with_the_codec_that_is_named(scratch: Path) -> None:
    """Nothing that is only remote can come back before the round trip is over."""
    words = ("--only", "delayed_random", "--rtt", "40", "--codec", "isa_l_rs_cauchy")
    done = bench("--remote", scratch, "--size", "4MiB", *words, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (run,) = report["delayed_random"]
    assert (report["codec"], report["rtt_ms"], run["count"]) == ("isa_l_rs_cauchy", 40, 16)
    assert 40 <= run["p50_ms"] <= run["p99_ms"]


@pytest.mark.slow
def test_the_remote_bench_times_durable_writes_with_and_without_the_flush(scratch: Path) -> None:
    done = bench("--remote", scratch, "--size", "4MiB", "--only", "quiet,flushing", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name in ("quiet", "flushing"):
        (run,) = report[name]
        assert run["count"] > 0 and run["stream_mb_per_second"] > 0


def test_the_remote_bench_compares_with_nothing(tmp_path: Path) -> None:
    done = bench("--remote", tmp_path, "--floor")
    assert done.returncode == 2 and "--remote" in done.stderr
