"""`qsfs status`: how the mount is, for people and for programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

_MOST_FILES = 10


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `status`."""
    parser = subparsers.add_parser(
        "status",
        help="show how the mount is",
        description="Show exposure by class, waits, cache and backends of a running mount. Exit 16 if none "
        "runs.",
    )
    parser.add_argument(
        "--metrics", action="store_true", help="print them in the text format of Prometheus (docs/metrics.md)"
    )
    parser.add_argument(
        "--backends", action="store_true", help="list all backends, not only those in trouble"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the status."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control

    config = Config.load(args.config)
    found = control.ask(config.cache.directory, "status", timeout=30)
    if args.metrics:
        from qsfs.cli.metrics import metrics

        print(metrics(found), end="")
        return 0
    if args.json:
        print_json(found)
        return 0
    for line in lines(found, all_backends=args.backends):
        print(line)
    return 0


def lines(found: dict[str, Any], *, all_backends: bool = False) -> list[str]:
    """The status as text: first what somebody must act on, then what may be lost, then the rest."""
    from qsfs.cli.reading import status_lines

    name = found.get("file_system", "not known yet") + (f" ({found['label']})" if found.get("label") else "")
    out = [f"{found['mountpoint']}: {found['phase']}, process {found['process']}, file system {name}"]
    out += _alarms(found)
    read_only = found.get("read_only")
    out += ["", *(_exposure(found) if read_only is None else status_lines(read_only, found["time"]))]
    out += ["", *_waits(found.get("waits", ()))]
    if "cache" in found:
        out += ["", *_cache(found["cache"])]
    requests = found.get("requests")
    if requests is not None:
        out.append(_requests(requests))
    policies = found.get("policies")
    if policies is not None and (policies["files_waiting"] or policies["directories_to_walk"]):
        out.append(
            f"policies: {policies['files_waiting']} files and {policies['directories_to_walk']} directories "
            "do not follow the configuration yet"
        )
    out += _keys(found.get("keys"))
    if found.get("snapshots"):
        out.append(_snapshots(found["snapshots"], found["time"]))
    if found.get("backends"):
        out += ["", *_backends(found["backends"], all_backends)]
    copies = found.get("copies")
    if copies is not None and copies["refilled"]:
        last = copies["last"]
        out.append(f"heads and owner records that backends lacked: {copies['refilled']} refilled; the last: {last}")
    out += found.get("sentences", ())
    return out


def _alarms(found: dict[str, Any]) -> list[str]:
    from qsfs.cli.sync import not_full

    out = []
    if found["waiting_for"]:
        out.append(f"WAITING for {found['waiting_for']}")
    if found.get("offline"):
        out.append(f"OFFLINE: {found['offline']}")
    if not found["writable"] and "read_only" not in found:
        out.append(f"READ-ONLY: {found['reason']}")
    if found.get("failure"):
        out.append(f"FLUSHING ENDED: {found['failure']}")
    if found.get("cache", {}).get("waiting_for_room"):
        out.append(f"CACHE FULL: {found['cache']['waiting_for_room']} writes wait for room{_second_looks(found)}")
    fsyncs = found.get("fsync_waits")
    if fsyncs is not None and fsyncs["waiting"]:
        out.append(
            f"FSYNCS WAIT for a published head: {fsyncs['waiting']}, the longest for "
            f"{age(fsyncs['oldest_seconds'])}: {fsyncs['why']}; 'qsfs unblock' ends them with EIO"
        )
    flush = found.get("flush")
    if flush is not None:
        out += _lost(flush["lost"])
        if flush.get("exposure_problem"):
            out.append(f"EXPOSED: {flush['exposure_problem']}")
        out += [f"FLUSHING WAITS: {what}" for what in flush["waiting"]]
        out += [f"A SYNC WAITS for {not_full(wait)}" for wait in found.get("full_waits", ())]
        if flush["pressure"]:
            out.append(f"flushing hurries: {flush['pressure']}")
        if flush.get("writers_slowed"):
            out.append(
                "WRITES ARE SLOWED: for long applications wrote faster than backends take it, so that no generation "
                "could be made ([flush] slow_writers_after); they go on at full speed once one can"
            )
        if flush["last_error"] and flush["last_error"] != found.get("reason"):
            out.append(f"last error: {flush['last_error']}")
    out += [f"warning: {warning}" for warning in found.get("warnings", ())]
    return out


def _lost(lost: dict[str, int]) -> list[str]:
    """Packs of which more shards are gone than the code can replace, and what became of what lay in them."""
    from qsfs.values import counted, format_size

    out = []
    if lost["unreadable_bytes"]:
        size = format_size(lost["unreadable_bytes"])
        packs = counted(lost["unreadable_packs"], "pack")
        out.append(f"DATA LOST: {size} in {packs} cannot be read any more; 'qsfs fsck --deep' names the files")
    if lost["head_unreadable"]:
        out.append(
            "NO RESTORE: metadata on the backends are lost, and this machine is needed until they are written anew, "
            "which is under way"
        )
    if lost["packs"]:
        local, rescued = format_size(lost["local_bytes"]), format_size(lost["rescued_bytes"])
        still = f"; {counted(lost['packs_to_read'], 'pack')} left to read" if lost["packs_to_read"] else ""
        out.append(
            f"{counted(lost['packs'], 'pack')} lost more shards than the code can replace: uploaded anew are {local} "
            f"from the cache and {rescued} from the shards that are left{still}"
        )
    return out


def _second_looks(found: dict[str, Any]) -> str:
    """What holds up eviction where no pack is incomplete."""
    flush = found.get("flush")
    if flush is None or flush["packs_not_full"] or not flush["packs_not_looked_at"]:
        return ""
    soon = age(flush["next_look_seconds"])
    return (
        f"; {flush['packs_not_looked_at']} packs are to be looked at a second time before their pages may go, "
        f"the next in {soon} ([cache] second_look_seconds)"
    )


def _exposure(found: dict[str, Any]) -> list[str]:
    from qsfs.cli.output import format_table
    from qsfs.values import counted, format_size

    flush = found.get("flush")
    exposure = (flush or found).get("exposure")
    if exposure is None:
        return ["exposure: not known yet"]
    out = []
    if any(entry["bytes"] for entry in exposure.values()):
        spare = found["code"]["write_quorum"] - found["code"]["data_shards"]
        lost_with = {
            "local": "the power, unless an fsync returned",
            "written": "this machine",
            "full": f"more than {counted(spare, 'shard')} of a pack",
        }
        rows = [
            (name, format_size(entry["bytes"]), age(entry["age"]), lost_with[name])
            if entry["bytes"]
            else (name, "0 B", "-", "")
            for name, entry in exposure.items()
        ]
        out.append("exposure: not durable yet, at most")
        out.append(format_table(("class", "bytes", "oldest", "lost with"), rows))
    elif not found["packs_known"]:
        out.append("exposure: local 0 B, written 0 B")
    else:
        out.append("exposure: none (local 0 B, written 0 B, full 0 B): all of it is in full packs")
    if not found["packs_known"]:
        out.append("full: not known yet; not all packs of before this mount have been looked at")
    if flush is not None:
        published = flush["published_ns"]
        since = None if published is None else found["time"] - published / 1e9
        out.append(f"last generation: {flush['generation']}, {age(since)} old; flushing is {flush['phase']}")
        if flush["packs_not_full"]:
            out.append(f"{flush['packs_not_full']} packs are not full yet")
        out += _drain(flush["drain"]["packs_left"] or {}, found.get("backends") or ())
        if flush["dead"]["packs"]:
            size = format_size(flush["dead"]["bytes"])
            out.append(f"dead on the backends: {size}; 'qsfs collect --dry-run' tells more")
        kept = sum(entry["bytes"] for entry in flush["dead"]["unreclaimed"])
        if kept:
            out.append(f"deleted, and still on backends' disks until their namespaces go: at least {format_size(kept)}")
        strays = flush["dead"]["strays"]
        if strays["packs"]:
            size = format_size(strays["bytes"])
            out.append(f"on the backends and named by nothing: {size}; 'qsfs collect --dry-run' tells more")
    elif not found.get("owner", True):
        out.append("not the owner: nothing is uploaded")
    oldest = found["cache"]["oldest_uncovered_seconds"]
    if oldest is not None:
        out.append(f"oldest write of an atomic-sync file without a sync: {age(oldest)}")
    return out


def _drain(packs_left: dict[str, int], backends: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each backend that is being emptied: how far that is, and what to do once nothing is left."""
    from qsfs.values import counted

    names = {str(backend["number"]): backend["name"] for backend in backends}
    out = []
    for number, left in packs_left.items():
        what = f"backend {names.get(number, number)} is being emptied: "
        if left:
            out.append(f"{what}{counted(left, 'pack')} left")
        else:
            out.append(f"{what}nothing is left; once it is not configured any more 'qsfs fleet apply' lets it go")
    return out


def _waits(waits: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each file that is waited for, the longest wait first."""
    from qsfs.values import counted

    if not waits:
        return ["waits: none"]
    files: dict[int, list[dict[str, Any]]] = {}
    for wait in sorted(waits, key=lambda wait: -wait["seconds"]):
        files.setdefault(wait["inode"], []).append(wait)
    out = [f"waits: {counted(len(waits), 'read')} of {counted(len(files), 'file')}; 'qsfs unblock' ends them"]
    for inode, of in list(files.items())[:_MOST_FILES]:
        first = of[0]
        until = "until the data come" if first["until_data"] else "until the deadline"
        out.append(
            f"  {first['path'] or f'inode {inode}'}: {counted(len(of), 'read')}, for {age(first['seconds'])} "
            f"({until}): {first['why']}"
        )
    if len(files) > _MOST_FILES:
        out.append(f"  and {counted(len(files) - _MOST_FILES, 'file')} more")
    return out


def _cache(cache: dict[str, Any]) -> list[str]:
    from qsfs.values import format_size

    return [
        f"cache: {format_size(cache['used_bytes'])} of {format_size(cache['limit_bytes'])} used, "
        f"{format_size(cache['disk_bytes'])} of {format_size(cache['size_bytes'])} on disk, "
        f"{cache['dirty_blocks']:,} dirty blocks",
    ]


def _keys(keys: dict[str, Any] | None) -> list[str]:
    """What is left under old master keys; nothing where there never was another."""
    from qsfs.values import counted, format_size

    if keys is None or not keys["old_master_keys"]:
        return []
    line = f"keys: master key {keys['master_key']} seals what is new; "
    if keys["left"] is None:
        return [line + "what is left under older ones is being counted"]
    left = [
        f"{counted(entry['packs'], 'pack')} ({format_size(entry['bytes'])}) under master key {number}"
        for number, entry in keys["left"].items()
    ]
    return [line + ("left: " + ", ".join(left) if left else "no pack is left under older ones")]


def _backends(backends: Sequence[dict[str, Any]], all_of_them: bool) -> list[str]:
    from qsfs.cli.output import format_table

    troubled = [b for b in backends if b["state"] != "up" or b["full"] or b["error"] or not b["identified"]]
    up = sum(b["state"] == "up" and b["identified"] for b in backends)
    out = [f"backends: {up} of {len(backends)} up"]
    table = [
        (b["number"], b["name"], b["group"] or "-", _state(b), b["error"].removeprefix(f"backend {b['name']}: "))
        for b in (backends if all_of_them else troubled)
    ]
    if table:
        out.append(format_table(("no", "backend", "group", "state", "why"), table))
    return out


def _state(backend: dict[str, Any]) -> str:
    state = f"{backend['state']} for {age(backend['seconds'])}"
    return state + (", full" if backend["full"] else "")


def _requests(requests: dict[str, Any]) -> str:
    """One line: how many, of which kinds most, how many wait and failed."""
    kinds = sorted(requests["by_kind"].items(), key=lambda item: -item[1])
    most = ", ".join(f"{name} {count:,}" for name, count in kinds[:4])
    line = f"requests: {sum(requests['by_kind'].values()):,}" + (f" ({most})" if most else "")
    if requests["waiting"]:
        line += f", {requests['waiting']} waiting"
    if requests["unexpected_errors"]:
        line += f", {requests['unexpected_errors']} failed unexpectedly (see the log)"
    return line


def _snapshots(snapshots: Sequence[tuple[str, int]], now: float) -> str:
    """One line: how many, and which is the newest."""
    from qsfs.values import counted

    name, time_ns = snapshots[-1]
    return f"{counted(len(snapshots), 'snapshot')}, the newest {name}, {age(max(0.0, now - time_ns / 1e9))} old"


def age(seconds: float | None) -> str:
    """A length of time for people; "-" for None."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
