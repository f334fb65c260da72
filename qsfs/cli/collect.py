"""`qsfs collect`: deletes from the backends what no generation needs any more."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `collect`."""
    parser = subparsers.add_parser(
        "collect",
        help="delete from the backends what nothing needs any more",
        description="Publish a generation, then delete the packs that are dead (all their pages were rewritten "
        "or removed), that no kept generation or snapshot names, and whose retention time ([flush] "
        "retention_hours) is over. The mount does the same by itself, after each generation. A 0-db counts what "
        "was deleted as free, but keeps its bytes on its disk until its namespace is deleted.",
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
    print("\n".join(lines(found)))
    return 0


def lines(found: dict[str, Any]) -> list[str]:
    """What waits, and what for; for people."""
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
    return out


def _packs(count: int, size: int) -> str:
    from qsfs.values import counted, format_size

    return f"{counted(count, 'pack')}, {format_size(size)},"
