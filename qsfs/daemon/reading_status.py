"""What `qsfs status` shows of a read-only mount: one dictionary, answered from memory."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import qsfs
from qsfs.daemon.status import anonymous_bytes, backends_of, disk_bytes
from qsfs.fuse.boundary import RequestCounts
from qsfs.remote.fetch import Fetcher
from qsfs.store.schema import PAGE, Table

if TYPE_CHECKING:
    from qsfs.daemon.image import Image
    from qsfs.daemon.reading import Reading


def status_of(reading: Reading) -> dict[str, Any]:
    """The state of a read-only mount; parts that are not there yet are missing."""
    found: dict[str, Any] = {
        "version": qsfs.__version__,
        "process": os.getpid(),
        "phase": reading.phase,
        "waiting_for": reading.waiting_for,
        "mountpoint": str(reading.config.filesystem.mountpoint),
        "started_at": reading.started_ns / 1e9,
        "time": reading.clock.time_ns() / 1e9,
        "writable": False,
        "reason": "",
        "memory_bytes": anonymous_bytes(),
        "read_only": {"mode": "follow" if reading.follow else "fixed", "wanted": str(reading.wanted)},
    }
    image = reading.image
    if image is None:
        return found
    source = reading.source
    found["file_system"] = source.keys.fsid.hex()
    found["label"] = source.superblock.label
    code = source.superblock.code
    found["code"] = {"data_shards": code.k, "parity_shards": code.m, "write_quorum": code.write_quorum}
    found["read_only"] = _generation(reading, image)
    found["cache"] = _cache(reading, image)
    found["waits"] = [wait for each in reading.images for wait in _waits(each.fetcher)]
    found["taken_over_bytes"] = image.inheritance.pages * PAGE
    found["fetched_bytes"] = (image.fetcher.fetched_pages + image.fetcher.start.counts.pages) * PAGE
    found["reads"] = dataclasses.asdict(image.fetcher.reader.counts)
    found["requests"] = _requests(image.operations.counts)
    found["backends"] = backends_of(source.members, reading.clock.time_ns())
    return found


def _generation(reading: Reading, image: Image) -> dict[str, Any]:
    sightings = reading.sightings
    newest = sightings.newest
    gone = sightings.gone_since(image.ref)
    return {
        **reading.shown(),
        "newest": newest.ref.generation,
        "newest_cut_at": newest.head.time_ns / 1e9,
        "behind_seconds": max(0.0, (newest.head.time_ns - image.head.time_ns) / 1e9),
        "is_newest": newest.ref <= image.ref,
        "looked_at": sightings.seen_ns / 1e9,
        "look_error": sightings.error,
        "kept": gone is None,
        "not_kept_since": None if gone is None else gone / 1e9,
        "expired": gone is not None and image.fetcher.expired_reads > 0,
        "expired_reads": sum(each.fetcher.expired_reads for each in reading.images),
        **({} if reading.follower is None else reading.follower.status()),
    }


def _cache(reading: Reading, image: Image) -> dict[str, Any]:
    store = image.store
    directory = reading.config.cache.directory
    return {
        "directory": str(directory),
        "size_bytes": reading.config.cache.size_bytes,
        "disk_bytes": disk_bytes(directory),
        "used_bytes": store.used_bytes,
        "limit_bytes": store.limits.full_bytes,
        "commits": image.committer.commits,
        "evicted_bytes": image.keeper.evicted_bytes,
        "waiting_for_room": 0,
        "blocks": store.layers.view.count(Table.BLOCKS),
        "dirty_blocks": 0,
        "damaged": image.committer.failed is not None,
    }


def _waits(fetcher: Fetcher) -> list[dict[str, Any]]:
    return [
        {
            "inode": wait.inode,
            "path": wait.path,
            "first_page": wait.first,
            "pages": wait.count,
            "seconds": round(wait.seconds, 1),
            "until_data": wait.keeps_waiting,
            "why": wait.why,
        }
        for wait in fetcher.waits
    ]


def _requests(counts: RequestCounts) -> dict[str, Any]:
    return {
        "by_kind": dict(counts.requests),
        "waits_by_kind": dict(counts.waits),
        "waiting": counts.waiting,
        "unexpected_errors": counts.unexpected,
        "unexpected_errors_by_kind": dict(counts.failures),
    }
