"""What a start on an empty cache fetches: the part `start` of `scripts/bench --remote`.

A Casper-like block store is put on the mount.  Then the scan with which a node starts reads it three times with
nothing of it local: scattered as it was uploaded; packed, after its pages were recorded and packed together; and on
another machine that was restored from the backends.  What the readings cost is counted in bytes, and what stays of the
last one in the cache in bytes of LMDB's pages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casper_like import build
from quickstart import wait_for
from residue import measure_residue, recorded_pages

if TYPE_CHECKING:
    from remote import Remote

PAGE = 4096
NAME = "storage.lmdb"
START_SECONDS = 30
_PATIENCE = 900.0


def measure_start(remote: Remote, size: int) -> dict[str, Any]:
    """The pages that a start touches, what it fetches for each byte of them, and what they take locally."""
    remote.configure(r"^\[cache\]$", f"[cache]\nsecond_look_seconds = 1\nstart_seconds = {START_SECONDS}")
    remote.remount()
    _put_database(remote, size)
    _settle(remote)
    scattered = _start(remote, _evicted)
    _wait(lambda: _status(remote)["flush"]["start"]["packed_bytes"], "packing of what the start read")
    touched = _status(remote)["flush"]["start"]["recorded_pages"]
    _settle(remote)
    packed = _start(remote, _evicted)
    restored = _start(remote, lambda remote: remote.lose_cache())
    remote.qsfs("sync")
    _wait(lambda: not _status(remote)["cache"]["open_group_bytes"], "the last commit")
    used = _status(remote)["cache"]["used_bytes"] - restored["used_bytes"]
    remote.qsfs("umount")
    pages = recorded_pages(remote.directory / "cache")
    remote.mount()
    return {
        "touched_pages": touched,
        "touched_share": touched * PAGE / size,
        **{
            f"{name}_{key}": value
            for name, run in (("scattered", scattered), ("packed", packed), ("restored", restored))
            for key, value in (
                ("fetched_per_byte", run["bytes"] / (touched * PAGE)),
                ("gets", run["gets"]),
                ("seconds", run["seconds"]),
            )
        },
        "local_bytes_per_page": used / touched,
        "residue": measure_residue(pages),
    }


def _put_database(remote: Remote, size: int) -> None:
    """Builds it elsewhere, where no commit waits for a disk, and copies it."""
    with tempfile.TemporaryDirectory(prefix="qsfs-casper-", dir=remote.directory) as place:
        build(Path(place) / NAME, size)
        shutil.copyfile(Path(place) / NAME, remote.mountpoint / NAME)


def _settle(remote: Remote) -> None:
    """Publishes everything, and waits until all of it may be evicted."""
    remote.qsfs("sync")

    def settled() -> bool:
        found = json.loads(remote.qsfs("info", NAME))["packs"]
        return bool(found["looked"] == found["count"])

    _wait(settled, "second looks")


def _evicted(remote: Remote) -> None:
    remote.remount()
    remote.qsfs("cache", "evict", NAME)


def _start(remote: Remote, empty: Callable[[Remote], None]) -> dict[str, float]:
    """Empties the cache, kernel's too, and scans: bytes and GETs from the backends, seconds, bytes used before."""
    empty(remote)
    before = _status(remote)
    begun = time.perf_counter()
    script = Path(__file__).with_name("casper_like.py")
    done = subprocess.run([sys.executable, str(script), "scan", str(remote.mountpoint / NAME)], capture_output=True)
    if done.returncode:
        sys.exit(f"bench: the scan failed: {done.stderr.decode()}")
    seconds = time.perf_counter() - begun
    reads = _status(remote)["reads"]
    return {
        "bytes": reads["bytes"] - before["reads"]["bytes"],
        "gets": reads["gets"] - before["reads"]["gets"],
        "seconds": seconds,
        "used_bytes": before["cache"]["used_bytes"],
    }


def _status(remote: Remote) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(remote.qsfs("status"))
    return found


def _wait(ready: Callable[[], object], what: str) -> None:
    wait_for(lambda: bool(ready()), what, _PATIENCE)
