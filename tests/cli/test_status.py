"""What `qsfs status` prints: what must be acted on comes first, and what is in order takes one line."""

from __future__ import annotations

from typing import Any

from qsfs.cli.status import lines

SAFE = {"bytes": 0, "age": 0.0}
LOST = (
    "packs", "metadata_packs", "local_bytes", "rescued_bytes", "unreadable_bytes", "unreadable_packs", "packs_to_read",
    "head_unreadable",
)  # fmt: skip


def backend(number: int, state: str = "up", **fields: Any) -> dict[str, Any]:
    return {
        "number": number,
        "name": f"10.0.0.{number}:9900/qsfs",
        "group": "",
        "state": state,
        "seconds": 300.0,
        "identified": True,
        "full": False,
        "error": "",
    } | fields


def wait(inode: int, seconds: float, **fields: Any) -> dict[str, Any]:
    found = {"inode": inode, "path": "", "seconds": seconds, "until_data": True, "why": "too few shards"}
    return found | fields


def status(**fields: Any) -> dict[str, Any]:
    """A mount that is in order."""
    cache = dict.fromkeys(("used_bytes", "limit_bytes", "disk_bytes", "size_bytes", "dirty_blocks"), 0)
    found = {
        "time": 1000.0,
        "mountpoint": "/m",
        "phase": "mounted",
        "process": 1,
        "file_system": "00",
        "label": "",
        "waiting_for": "",
        "writable": True,
        "reason": "",
        "failure": "",
        "owner": True,
        "packs_known": True,
        "code": {"data_shards": 16, "parity_shards": 4, "write_quorum": 18},
        "cache": cache | {"waiting_for_room": 0, "oldest_uncovered_seconds": None},
        "flush": {
            "phase": "running",
            "generation": 7,
            "published_ns": 988_000_000_000,
            "exposure": {"local": SAFE, "written": SAFE, "full": SAFE},
            "waiting": [],
            "pressure": "",
            "packs_not_full": 0,
            "drain": {"packs_left": {}, "moved_packs": 0, "forgotten_shards": 0},
            "dead": {"packs": 0, "bytes": 0, "strays": {"packs": 0, "bytes": 0}, "unreclaimed": []},
            "lost": dict.fromkeys(LOST, 0),
            "packs_not_looked_at": 0,
            "next_look_seconds": None,
            "last_error": "",
        },
        "backends": [backend(number) for number in (1, 2, 3)],
        "sentences": ["3 backends, 2 data and 1 parity shards"],
        "warnings": [],
        "waits": [],
    }
    return found | fields


def flush(**fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = status()["flush"]
    return found | fields


def test_a_mount_in_order_is_a_few_lines():
    assert lines(status()) == [
        "/m: mounted, process 1, file system 00",
        "",
        "exposure: none (local 0 B, written 0 B, full 0 B): all of it is in full packs",
        "last generation: 7, 12 s old; flushing is running",
        "",
        "waits: none",
        "",
        "cache: 0 B of 0 B used, 0 B of 0 B on disk, 0 dirty blocks",
        "",
        "backends: 3 of 3 up",
        "3 backends, 2 data and 1 parity shards",
    ]


def test_exposure_is_told_by_class_with_its_age_and_what_it_is_lost_with():
    exposure = {
        "local": SAFE,
        "written": {"bytes": 1 << 20, "age": 6.0},
        "full": {"bytes": 3 << 20, "age": 200.0},
    }
    shown = lines(status(flush=flush(exposure=exposure, packs_not_full=2)))
    table = "\n".join(shown)
    assert "local        0 B       -" in table
    assert "written  1.0 MiB     6 s  this machine" in table
    assert "full     3.0 MiB   3 min  more than 2 shards of a pack" in table
    assert "2 packs are not full yet" in shown


def test_what_backends_lacked_of_heads_is_told_once_it_was_refilled():
    none = {"refilled": 0, "last": ""}
    assert not any("refilled" in line for line in lines(status(copies=none)))
    shown = lines(status(copies={"refilled": 2, "last": "backend h/q lacked, and has again: owner record of epoch 3"}))
    assert (
        "heads and owner records that backends lacked: 2 refilled; the last: backend h/q lacked, and has again: owner "
        "record of epoch 3"
    ) in shown


def test_backends_that_are_being_emptied_are_told_with_how_far_that_is():
    """Nothing before it was looked at; a backend that is no member any more by its number."""
    drain = status()["flush"]["drain"]
    assert not any("emptied" in line for line in lines(status(flush=flush(drain=drain | {"packs_left": None}))))
    shown = lines(status(flush=flush(drain=drain | {"packs_left": {"2": 7, "3": 0, "9": 1}})))
    emptied = [line for line in shown if "emptied" in line]
    assert emptied[0] == "backend 10.0.0.2:9900/qsfs is being emptied: 7 packs left"
    assert "10.0.0.3" in emptied[1] and "fleet apply" in emptied[1]
    assert emptied[2] == "backend 9 is being emptied: 1 pack left"


def test_what_became_of_lost_packs_comes_first():
    """What is gone, what was saved, and what is still to be looked for."""
    lost = {"packs": 3, "local_bytes": 4096, "rescued_bytes": 1 << 20, "unreadable_bytes": 8192, "packs_to_read": 1}
    lost["unreadable_packs"] = 2
    shown = lines(status(flush=flush(lost=dict.fromkeys(LOST, 0) | lost)))
    assert shown[1] == "DATA LOST: 8.0 KiB in 2 packs cannot be read any more; 'qsfs fsck --deep' names the files"
    assert shown[2] == (
        "3 packs lost more shards than the code can replace: uploaded anew are 4.0 KiB from the cache and 1.0 MiB from "
        "the shards that are left; 1 pack left to read"
    )
    assert shown[3] == ""
    shown = lines(status(flush=flush(lost=dict.fromkeys(LOST, 0) | {"head_unreadable": 1})))
    assert shown[1].startswith("NO RESTORE: ") and shown[2] == ""


def test_nothing_passes_for_full_before_it_was_looked_at():
    """Not even at the start of a mount, or without an owner, when nobody has read of which packs."""
    shown = lines(status(packs_known=False))
    assert shown[2:4] == [
        "exposure: local 0 B, written 0 B",
        "full: not known yet; not all packs of before this mount have been looked at",
    ]
    assert not [line for line in shown if "all of it is in full packs" in line]


def test_what_must_be_acted_on_comes_first():
    shown = lines(
        status(
            writable=False,
            reason="taken over",
            warnings=["2 of 3 backends do not answer"],
            flush=flush(waiting=["1 of 3 shards stored"], last_error="taken over"),
            cache=status()["cache"] | {"waiting_for_room": 4},
        )
    )
    assert shown[1:6] == [
        "READ-ONLY: taken over",
        "CACHE FULL: 4 writes wait for room",
        "FLUSHING WAITS: 1 of 3 shards stored",
        "warning: 2 of 3 backends do not answer",
        "",
    ]


def test_fsyncs_that_wait_for_a_head_are_told_with_what_for_and_how_to_end_them():
    waits = {"waiting": 3, "oldest_seconds": 40.0, "why": "2 of 6 shards stored", "ended": 0}
    assert lines(status(fsync_waits=waits))[1] == (
        "FSYNCS WAIT for a published head: 3, the longest for 40 s: 2 of 6 shards stored; "
        "'qsfs unblock' ends them with EIO"
    )
    assert lines(status(fsync_waits=waits | {"waiting": 0})) == lines(status())


def test_a_full_cache_that_waits_for_second_looks_says_so():
    """Else an operator looks for a backend in trouble, and there is none."""
    shown = lines(
        status(
            flush=flush(packs_not_looked_at=526, next_look_seconds=62.4),
            cache=status()["cache"] | {"waiting_for_room": 5},
        )
    )
    assert shown[1] == (
        "CACHE FULL: 5 writes wait for room; 526 packs are to be looked at a second time before their pages may go, "
        "the next in 62 s ([cache] second_look_seconds)"
    )


def test_only_backends_in_trouble_are_listed_unless_all_are_asked_for():
    down = backend(2, "down", error="backend 10.0.0.2:9900/qsfs: Connection refused")
    full = backend(3, full=True)
    found = status(backends=[backend(1), down, full])
    shown = lines(found)
    assert "backends: 2 of 3 up" in shown
    table = "\n".join(shown)
    assert "10.0.0.1" not in table
    assert "10.0.0.2:9900/qsfs      -  down for 5 min      Connection refused" in table
    assert "up for 5 min, full" in table
    assert "10.0.0.1:9900/qsfs" in "\n".join(lines(found, all_backends=True))


def test_waits_are_told_by_file_the_longest_first():
    shown = lines(status(waits=[wait(5, 3.0), wait(9, 40.0, path="chain/data.mdb"), wait(5, 130.0)]))
    assert shown[5:8] == [
        "waits: 3 reads of 2 files; 'qsfs unblock' ends them",
        "  inode 5: 2 reads, for 2 min (until the data come): too few shards",
        "  chain/data.mdb: 1 read, for 40 s (until the data come): too few shards",
    ]


def test_many_files_that_are_waited_for_do_not_flood_the_terminal():
    shown = lines(status(waits=[wait(inode, 5.0) for inode in range(300)]))
    assert "waits: 300 reads of 300 files; 'qsfs unblock' ends them" in shown
    assert "  and 290 files more" in shown
    assert len(shown) < 40


def test_what_waits_and_what_failed_is_said():
    requests = {"by_kind": {"read": 1200, "write": 5}, "waiting": 3, "unexpected_errors": 2}
    expected = "requests: 1,205 (read 1,200, write 5), 3 waiting, 2 failed unexpectedly (see the log)"
    assert expected in lines(status(requests=requests))


def test_a_sync_that_waits_for_full_packs_is_said():
    wait = {"packs": 3, "bytes": 1 << 20, "why": "backend a: down"}
    assert "A SYNC WAITS for 3 packs with 1.0 MiB not full yet: backend a: down" in lines(status(full_waits=[wait]))


def test_a_start_that_waits_shows_what_is_known():
    found = status(phase="starting", waiting_for="a quorum of backends: 24 backends: Connection refused")
    del found["flush"]
    found["exposure"] = {"local": SAFE, "written": {"bytes": 4096, "age": 60.0}, "full": SAFE}
    found["owner"] = False
    shown = lines(found)
    assert shown[1] == "WAITING for a quorum of backends: 24 backends: Connection refused"
    assert "not the owner: nothing is uploaded" in shown


def test_an_offline_mount_says_so_before_anything_else():
    """What a takeover elsewhere would cost must not be missed."""
    told = lines(status(offline="mounted offline: nothing is uploaded", writable=True, warnings=["one group"]))
    assert told[1:3] == ["OFFLINE: mounted offline: nothing is uploaded", "warning: one group"]
    assert not any("OFFLINE" in line for line in lines(status(offline="")))
