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
    done = bench("--remote", scratch, "--size", "24MiB", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["backends"], report["code"], report["size"]) == (24, "16+4", 24 << 20)
    for name in ("flush", "fetch"):
        (run,) = report[name]
        assert run["bytes"] == 24 << 20
        assert run["seconds"] > 0 and run["daemon"] > 0 and run["servers"] > 0
        assert run["mb_per_second"] == pytest.approx(run["bytes"] / 1e6 / run["seconds"])
        assert run["mb_per_daemon_cpu_second"] == pytest.approx(run["bytes"] / 1e6 / run["daemon"])
    assert list(scratch.iterdir()) == []


def test_the_remote_bench_compares_with_nothing(tmp_path: Path) -> None:
    done = bench("--remote", tmp_path, "--floor")
    assert done.returncode == 2 and "--remote" in done.stderr
