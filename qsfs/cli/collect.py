"""`qsfs collect`: deletes from the backends what no generation needs any more."""

from __future__ import annotations

import argparse
import time
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `collect`."""
    parser = subparsers.add_parser(
        "collect",
        help="delete from the backends what nothing needs any more",
        description="Publish a generation, then delete the packs that are dead (all their pages were rewritten "
        "or removed), that no kept generation or snapshot names, and whose retention time ([flush] "
        "retention_hours) is over; and strays, shards of packs that nothing names, which scans of the backends "
        "have found. The mount does the same by itself, after each generation; this also begins a new scan. A 0-db "
        "counts what was deleted as free, but keeps its bytes on its disk until its namespace is deleted.",
    )
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, only tell")


def run(args: argparse.Namespace) -> int:
    """Collects; raises what the daemon reports."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control

    config = Config.load(args.config)
    found = control.ask(config.cache.directory, "collect", dry_run=args.dry_run)
    if args.json:
        print_json(found)
        return 0
    if not args.dry_run:
        print(f"{_packs(found['deleted_now_packs'], found['deleted_now_bytes'])} deleted")
    print("\n".join(lines(found, time.time())))
    return 0


def lines(found: dict[str, Any], now: float) -> list[str]:
    """What waits, and what for; for people.  `now` is the wall time in seconds."""
    from qsfs.cli.status import age

    out = [f"{_packs(found['packs'], found['bytes'])} dead on the backends"]
    for name, why in (
        ("until_next_generation", "until the next generations are published"),
        ("maybe_in_kept_generations", "because kept generations or snapshots may need them"),
        ("in_retention", f"for the retention time, the first {age(found['next_retention_end_seconds'])} more"),
        ("being_deleted", "to be deleted now"),
    ):
        if found[name]:
            out.append(f"  {found[name]} wait {why}" if name != "being_deleted" else f"  {found[name]} are {why}")
    out += [f"  no answer from {name}: what it holds of them is deleted later" for name in found["unanswered"]]
    return [*out, *_strays(found["strays"], now), *_unreclaimed(found["unreclaimed"])]


def _unreclaimed(found: list[dict[str, Any]]) -> list[str]:
    """What was deleted and takes space all the same."""
    from qsfs.values import format_size

    if not found:
        return []
    out = ["deleted since this cache began, and still on the disks of backends that are 0-dbs, at least:"]
    return out + [f"  {entry['backend']}: {format_size(entry['bytes'])}" for entry in found]


def _strays(found: dict[str, Any], now: float) -> list[str]:
    """What nothing names, and when that was looked for last."""
    from qsfs.cli.status import age

    out = [f"{_packs(found['packs'], found['bytes'])} on the backends named by nothing (strays)"]
    if found["packs"]:
        out[0] += f", the first known for {age(found['oldest_seconds'])} of running time"
    for name, why in (
        ("in_retention", "wait for the retention time"),
        ("until_next_generation", "wait until the next generation is published"),
        ("being_deleted", "are to be deleted now"),
    ):
        if found[name]:
            out.append(f"  {found[name]} {why}")
    if found["left_out"]:
        out.append("  there are more than are kept in mind at a time; later scans take them")
    if found["problem"]:
        out.append(f"  nothing of them is deleted now: {found['problem']}")
    out += [f"  no answer from {name}: what it holds of them is deleted later" for name in found["unanswered"]]
    never = [scan["backend"] for scan in found["scans"] if not scan["ended_ns"]]
    ended = {scan["backend"]: scan["ended_ns"] for scan in found["scans"] if scan["ended_ns"]}
    if ended:
        first = min(ended, key=lambda name: ended[name])
        out.append(f"  scans: {len(ended)} backends, the longest ago {first}: {age(now - ended[first] / 1e9)}")
    out += [f"  scans: {name} was not scanned to its end yet" for name in never]
    return out


def _packs(count: int, size: int) -> str:
    from qsfs.values import counted, format_size

    return f"{counted(count, 'pack')}, {format_size(size)},"
