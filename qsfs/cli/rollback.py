"""`qsfs rollback`: returns the file system to a snapshot."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from qsfs.errors import ConfigError, QsfsError

if TYPE_CHECKING:
    from qsfs.daemon.rollback import Plan
    from qsfs.remote.rollback import RollbackReport


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `rollback`."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "rollback",
        help="return the file system to a snapshot",
        description="Make the file system what it was when a snapshot (or a generation that is still kept) was cut. "
        "Not while it is mounted. What is left is kept as a snapshot of its own, so a rollback can be rolled back. "
        "Contents are fetched from the backends when they are read. May be repeated if it is interrupted.",
    )
    parser.add_argument("which", metavar="NAME|GENERATION", help="as 'qsfs snapshot list' shows it")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--set-aside",
        action="store_true",
        help="also if this machine holds what was never published: that is in no snapshot then, and the local state "
        "is moved beside the cache directory",
    )
    add_unlock_options(parser)


def run(args: argparse.Namespace) -> int:
    """Rolls back and says what the file system is now."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.rollback import Order, roll_back

    config = Config.load(args.config)
    secret = unlocking(args)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def agree(plan: Plan) -> None:
        _tell_lost(plan)
        if not args.yes:
            _ask(plan)

    order = Order(args.which, args.set_aside, agree)
    report = trio.run(lambda: roll_back(config, SystemClock(), order, progress, secret=secret))
    if args.json:
        print_json({"generation": report.base.generation} | rollback_fields(report))
        return 0
    for line in rollback_sentences(report):
        print(line)
    print("Next: qsfs mount")
    return 0


def _tell_lost(plan: Plan) -> None:
    """Says what no snapshot will have, also where nobody is asked."""
    from qsfs.daemon.rollback import describe_unpublished

    if plan.lost:
        what = f"It will be in {plan.aside} only." if plan.aside is not None else "It will be gone."
        print(f"Never published: {describe_unpublished(plan.lost)}. {what}", file=sys.stderr)


def _ask(plan: Plan) -> None:
    from qsfs.cli.output import format_time
    from qsfs.remote.newest import describe_head

    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to agree to a rollback; give --yes")
    names = f" ({', '.join(plan.target.pins)})" if plan.target.pins else ""
    cut_at = format_time(plan.target.time_ns / 1e9)
    print(f"What is there now, {describe_head(plan.newest)}, will be kept as a snapshot.", file=sys.stderr)
    target = f"{describe_head(plan.target.head)}{names}"
    print(f"The file system will be what it was at {cut_at}, {target}.", file=sys.stderr)
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise QsfsError("not agreed to; nothing was changed")


def rollback_fields(report: RollbackReport) -> dict[str, Any]:
    """What was done, for `--json`."""
    return {
        "as": report.target.head.generation,
        "left": report.left,
        "aside": None if report.aside is None else str(report.aside),
        "emptied": report.tally.emptied,
        "put_aside": [{"path": file.path, "name": file.name} for file in report.tally.aside],
    }


def rollback_sentences(report: RollbackReport) -> list[str]:
    """What was done, for people."""
    from qsfs.cli.output import format_time
    from qsfs.remote.restore import changed_sentences

    names = f" ({', '.join(report.target.pins)})" if report.target.pins else ""
    tally = report.tally
    lines = [
        f"the file system is what it was at {format_time(report.target.time_ns / 1e9)}, generation "
        f"{report.target.head.generation}{names}, published as generation {report.base.generation}: "
        f"{tally.files} files, {tally.directories} directories, {tally.others} others",
        f"what was left is kept as snapshot {report.left}",
    ]
    if report.aside is not None:
        lines.append(f"what was never published is in {report.aside}")
    return [*lines, *changed_sentences(tally)]
