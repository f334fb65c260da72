"""What `qsfs status` shows: one dictionary, answered from memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qsfs
from qsfs.remote.members import Members
from qsfs.store.schema import PAGE, Table

if TYPE_CHECKING:
    from qsfs.daemon.service import Service

def status_of(service: Service) -> dict[str, Any]:
    """The state of a mount; parts that are not there yet are missing."""
    found: dict[str, Any] = {
        "version": qsfs.__version__,
        "process": os.getpid(),
        "phase": service.phase,
        "waiting_for": service.waiting_for,
        "mountpoint": str(service.config.filesystem.mountpoint),
        "started_at": service.started_ns / 1e9,
        "time": service.clock.time_ns() / 1e9,
        "file_system": service.opened.keys.fsid.hex(),
        "label": service.opened.superblock.label,
        "code": {
            "data_shards": service.opened.superblock.code.k,
            "parity_shards": service.opened.superblock.code.m,
            "write_quorum": service.opened.superblock.code.write_quorum,
        },
        "writable": service.state.writable,
        "reason": service.state.reason,
        "memory_bytes": anonymous_bytes(),
        "cache": _cache(service),
    }
    if hasattr(service, "flushing"):
        found.update(service.flushing.status())
    if hasattr(service, "placing") and "warnings" in found:
        found["warnings"] += service.placing.warnings()
    if hasattr(service, "key_upkeep"):
        found["keys"] = service.key_upkeep.status()
    if service.automatic is not None and service.automatic.problem:
        warning = f"no automatic snapshot was made: {service.automatic.problem}"
        found["warnings"] = [warning, *found.get("warnings", ())]
    if hasattr(service, "fetcher"):
        found["waits"] = [
            {
                "inode": wait.inode,
                "path": wait.path,
                "first_page": wait.first,
                "pages": wait.count,
                "seconds": round(wait.seconds, 1),
                "until_data": wait.keeps_waiting,
                "why": wait.why,
            }
            for wait in service.fetcher.waits
        ]
        found["fetched_bytes"] = (service.fetcher.fetched_pages + service.fetcher.start.counts.pages) * PAGE
        found["start_fetched"] = dataclasses.asdict(service.fetcher.start.counts)
        found["reads"] = dataclasses.asdict(service.fetcher.reader.counts)
    if service.written is not None:
        found["fsync_waits"] = service.written.report()
    if service.operations is not None:
        counts = service.operations.counts
        found["requests"] = {
            "by_kind": dict(counts.requests),
            "waits_by_kind": dict(counts.waits),
            "waiting": counts.waiting,
            "unexpected_errors": counts.unexpected,
            "unexpected_errors_by_kind": dict(counts.failures),
        }
        policies = service.namespace.policies.status()
        found["policies"] = {
            "files_waiting": len(policies.waiting),
            "directories_to_walk": policies.directories,
            "recheck": policies.recheck,
        }
    return found

def _cache(service: Service) -> dict[str, Any]:
    store, limits = service.store, service.store.limits
    oldest = service.contents.oldest_uncovered()
    return {
        "directory": str(store.directory),
        "size_bytes": service.config.cache.size_bytes,
        "disk_bytes": disk_bytes(store.directory),
        "used_bytes": store.used_bytes,
        "limit_bytes": limits.full_bytes,
        "open_group_bytes": store.layers.open.bytes,
        "commits": service.committer.commits,
        "journal_flushes": service.committer.flushes,
        "evicted_bytes": service.keeper.evicted_bytes,
        "waiting_for_room": service.keeper.waiting,
        "pending_truncations": len(store.blocks.pending),
        "oldest_uncovered_seconds": None if oldest is None else service.clock.monotonic() - oldest,
        "blocks": store.layers.view.count(Table.BLOCKS),
        "dirty_blocks": store.layers.view.count(Table.DIRTY),
        "damaged": service.committer.failed is not None,
    }

def backends_of(members: Members, now_ns: int) -> list[dict[str, Any]]:
    """One entry for each backend of the fleet."""
    return [
        {
            "number": member.number,
            "name": member.name,
            "group": member.entry.group,
            "role": member.entry.state,
            "state": member.state.value,
            "seconds": round((now_ns - member.since_ns) / 1e9, 1),
            "identified": member.identified,
            "full": member.full,
            "error": "" if member.error is None else str(member.error),
        }
        for member in members
    ]

def disk_bytes(directory: Path) -> int:
    """Bytes that the cache directory takes on its disk."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(Path(root) / name).st_blocks * 512
            except FileNotFoundError:
                continue
    return total

def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
