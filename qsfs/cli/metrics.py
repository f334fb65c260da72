"""`qsfs status --metrics`: the status in the text format of Prometheus.

Names and labels are an interface: they stay.  What is not known yet is left out, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Sample = tuple[Mapping[str, object], float | int | None]

_ONE: Mapping[str, object] = {}


def metrics(found: Mapping[str, Any]) -> str:
    """All metrics of a status, one sample a line, each name with its HELP and TYPE before it."""
    out = []
    for name, kind, explanation, samples in _families(found):
        known = [(labels, value) for labels, value in samples if value is not None]
        if not known:
            continue
        out += [f"# HELP {name} {explanation}", f"# TYPE {name} {kind}"]
        out += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in known]
    return "\n".join(out) + "\n"


def _families(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Iterable[Sample]]]:
    def one(value: float | int | None) -> list[Sample]:
        return [(_ONE, value)]

    flush, cache = found.get("flush") or {}, found.get("cache") or {}
    requests, fsyncs = found.get("requests") or {}, found.get("fsync_waits") or {}
    exposure = (flush or found).get("exposure") or {}
    waits, backends = found.get("waits"), found.get("backends") or ()
    published = flush.get("published_ns")
    info = {name: found.get(name, "") for name in ("version", "file_system", "mountpoint")}
    yield "qsfs_info", "gauge", "Always 1; says which mount this is.", [(info, 1)]
    yield "qsfs_mounted", "gauge", "1 while requests are answered.", one(int(found["phase"] == "mounted"))
    yield "qsfs_writable", "gauge", "0 once fenced or failed.", one(int(found["writable"]))
    owner = found.get("owner")
    yield "qsfs_owner", "gauge", "1 while this mount may publish.", one(None if owner is None else int(owner))
    yield (
        "qsfs_exposure_bytes",
        "gauge",
        "Bytes not durable yet at a class, at most.",
        [({"class": name}, entry["bytes"]) for name, entry in exposure.items()],
    )
    yield (
        "qsfs_exposure_seconds",
        "gauge",
        "Age of the oldest byte not durable yet at a class, at most.",
        [({"class": name}, entry["age"]) for name, entry in exposure.items()],
    )
    over = int(bool(flush["exposure_problem"])) if "exposure_problem" in flush else None
    yield "qsfs_exposure_over_limit", "gauge", "1 while it is above a limit of [flush].", one(over)
    yield "qsfs_generation", "gauge", "Number of the last published generation.", one(flush.get("generation"))
    age = None if published is None else max(0.0, found["time"] - published / 1e9)
    yield "qsfs_generation_age_seconds", "gauge", "Age of the last published generation's cut.", one(age)
    slowed = None if "writers_slowed" not in flush else int(flush["writers_slowed"])
    yield "qsfs_writers_slowed", "gauge", "1 while writes are slowed so that a generation can be made.", one(slowed)
    waiting = None if not flush else len(flush["waiting"])
    yield "qsfs_flush_waits", "gauge", "What flushing waits for backends for: so many things.", one(waiting)
    start = flush.get("start") or {}
    yield "qsfs_start_pages", "gauge", "Pages read at starts that are recorded.", one(start.get("recorded_pages"))
    packed = start.get("packed_bytes")
    yield "qsfs_start_packed_bytes_total", "counter", "Bytes of such pages that were packed together.", one(packed)
    yield "qsfs_packs_not_full", "gauge", "Packs that lack shards.", one(flush.get("packs_not_full"))
    lost = flush.get("lost") or {}
    yield "qsfs_lost_packs", "gauge", "Packs with too few shards, found since the mount.", one(lost.get("packs"))
    unreadable = lost.get("unreadable_bytes")
    yield "qsfs_unreadable_bytes", "gauge", "Bytes in them that nobody has any more.", one(unreadable)
    yield "qsfs_spool_bytes", "gauge", "Bytes that wait for their upload on disk.", one(flush.get("spool_bytes"))
    yield "qsfs_cache_used_bytes", "gauge", "Bytes used in the cache.", one(cache.get("used_bytes"))
    yield "qsfs_cache_limit_bytes", "gauge", "Bytes at which writers wait for room.", one(cache.get("limit_bytes"))
    yield "qsfs_cache_disk_bytes", "gauge", "Bytes that the cache directory takes.", one(cache.get("disk_bytes"))
    yield "qsfs_cache_size_bytes", "gauge", "Bytes that it may take.", one(cache.get("size_bytes"))
    yield "qsfs_cache_dirty_blocks", "gauge", "Blocks with dirty pages.", one(cache.get("dirty_blocks"))
    yield "qsfs_writes_waiting", "gauge", "Writes that wait for room.", one(cache.get("waiting_for_room"))
    yield "qsfs_commits_total", "counter", "Local commits.", one(cache.get("commits"))
    yield "qsfs_evicted_bytes_total", "counter", "Bytes evicted.", one(cache.get("evicted_bytes"))
    yield "qsfs_fetched_bytes_total", "counter", "Bytes fetched from backends.", one(found.get("fetched_bytes"))
    reads = None if waits is None else len(waits)
    yield "qsfs_reads_waiting", "gauge", "Reads that wait for backends.", one(reads)
    longest = None if waits is None else max((wait["seconds"] for wait in waits), default=0)
    yield "qsfs_read_wait_seconds", "gauge", "How long the longest of them has.", one(longest)
    yield "qsfs_fsyncs_waiting", "gauge", 'Fsyncs that wait for a head (fsync = "written").', one(fsyncs.get("waiting"))
    yield "qsfs_fsync_wait_seconds", "gauge", "How long the longest of them has.", one(fsyncs.get("oldest_seconds"))
    yield "qsfs_fsyncs_ended_total", "counter", "Fsyncs that got EIO for want of a head.", one(fsyncs.get("ended"))
    yield (
        "qsfs_requests_total",
        "counter",
        "Requests of the kernel.",
        [({"kind": kind}, count) for kind, count in sorted(requests.get("by_kind", {}).items())],
    )
    unexpected = requests.get("unexpected_errors")
    yield "qsfs_unexpected_errors_total", "counter", "Requests that failed unexpectedly.", one(unexpected)
    yield "qsfs_memory_bytes", "gauge", "Anonymous memory of the daemon.", one(found["memory_bytes"])
    yield (
        "qsfs_backend_up",
        "gauge",
        "1 while a backend answers as itself.",
        [(_backend(b), int(b["state"] == "up" and b["identified"])) for b in backends],
    )
    yield (
        "qsfs_backend_full",
        "gauge",
        "1 while a backend has no room.",
        [(_backend(b), int(b["full"])) for b in backends],
    )


def _backend(backend: Mapping[str, Any]) -> Mapping[str, object]:
    return {"number": backend["number"], "backend": backend["name"], "group": backend["group"]}


def _labels(labels: Mapping[str, object]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
