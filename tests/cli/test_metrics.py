"""`qsfs status --metrics`: names that stay, one truth with the status, and nothing made up."""

from __future__ import annotations

import re
from pathlib import Path

from qsfs.cli.metrics import metrics
from qsfs.daemon import control
from tests.cli.test_status import LOST, backend, flush, status

ROOT = Path(__file__).parents[2]
SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (-?[0-9.e+-]+)')


def whole(**fields):
    counts = {"commits": 3, "evicted_bytes": 0}
    found = status(
        version="1",
        memory_bytes=7,
        fetched_bytes=0,
        flush=flush(
            spool_bytes=5, exposure_problem="", writers_slowed=False, start={"recorded_pages": 4, "packed_bytes": 8}
        ),
        requests={"by_kind": {"read": 2, "write": 3}, "unexpected_errors": 0, "waiting": 0},
        fsync_waits={"waiting": 2, "oldest_seconds": 1.5, "ended": 1, "why": "x"},
    )
    found["cache"] |= counts
    return found | fields


def samples(text: str) -> dict[tuple[str, str], float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            found[match[1], match[2] or ""] = float(match[3])
    return found


def test_every_line_is_of_the_format_and_every_name_declared_once_before_its_samples():
    text = metrics(whole())
    assert text.endswith("\n")
    declared = re.findall(r"^# TYPE (\S+) (gauge|counter)$", text, re.MULTILINE)
    names = [name for name, _ in declared]
    assert len(names) == len(set(names))
    assert list(dict.fromkeys(name for name, _ in samples(text))) == names
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in declared)


def test_the_numbers_are_those_of_the_status():
    exposure = {
        "local": {"bytes": 1, "age": 0.5},
        "written": {"bytes": 2, "age": 6.0},
        "full": {"bytes": 3, "age": 9.0},
    }
    lost = dict.fromkeys(LOST, 0) | {"packs": 2, "unreadable_bytes": 4096}
    shown = flush(spool_bytes=5, exposure=exposure, waiting=["a"], packs_not_full=4, lost=lost)
    found = samples(metrics(whole(flush=shown)))
    assert (found["qsfs_lost_packs", ""], found["qsfs_unreadable_bytes", ""]) == (2, 4096)
    for name, entry in exposure.items():
        assert found["qsfs_exposure_bytes", f'class="{name}"'] == entry["bytes"]
        assert found["qsfs_exposure_seconds", f'class="{name}"'] == entry["age"]
    assert found["qsfs_generation", ""] == 7
    assert found["qsfs_generation_age_seconds", ""] == 12
    assert (found["qsfs_flush_waits", ""], found["qsfs_packs_not_full", ""]) == (1, 4)
    assert (found["qsfs_fsyncs_waiting", ""], found["qsfs_fsyncs_ended_total", ""]) == (2, 1)
    assert found["qsfs_requests_total", 'kind="write"'] == 3


def test_what_is_not_known_yet_is_left_out():
    """A zero would say that nothing is exposed."""
    found = whole(phase="starting")
    for key in ("flush", "waits", "requests", "owner", "backends", "fsync_waits"):
        del found[key]
    names = {name for name, _ in samples(metrics(found))}
    assert not names & {"qsfs_exposure_bytes", "qsfs_generation", "qsfs_owner", "qsfs_reads_waiting", "qsfs_backend_up"}
    assert "qsfs_cache_used_bytes" in names
    known = {name: {"bytes": 0, "age": 0.0} for name in ("local", "written")}
    found = samples(metrics(whole(packs_known=False, flush=flush(exposure=known, packs_not_full=None))))
    assert ("qsfs_exposure_bytes", 'class="written"') in found and ("qsfs_exposure_bytes", 'class="full"') not in found
    assert ("qsfs_exposure_seconds", 'class="full"') not in found and ("qsfs_packs_not_full", "") not in found


def test_a_read_only_mount_that_looks_for_its_generation_has_metrics_too():
    """It has no cache and no name yet; a collector must not find the command failing."""
    found = {key: whole()[key] for key in ("version", "phase", "mountpoint", "writable", "time", "memory_bytes")}
    names = {name for name, _ in samples(metrics(found))}
    assert {"qsfs_info", "qsfs_mounted", "qsfs_writable", "qsfs_memory_bytes"} == names


def test_labels_are_escaped():
    found = whole(mountpoint='/a"b\\c\nd', backends=[backend(1), backend(2, "down", full=True)])
    text = metrics(found)
    assert 'mountpoint="/a\\"b\\\\c\\nd"' in text
    values = {name: value for name, value in samples(text).items() if name[0].startswith("qsfs_backend")}
    assert [*values.values()] == [1, 0, 0, 1]


def test_the_page_names_every_metric_and_no_other():
    page = (ROOT / "docs" / "metrics.md").read_text()
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(qsfs_\w+)`", table)) == {name for name, _ in samples(metrics(whole()))}


def test_the_command_prints_them(monkeypatch, qsfs, tmp_path):
    qsfs("init", tmp_path)
    monkeypatch.setattr(control, "ask", lambda *_, **__: whole())
    said = qsfs("-c", tmp_path, "status", "--metrics")
    assert (said.code, said.out) == (0, metrics(whole()))
