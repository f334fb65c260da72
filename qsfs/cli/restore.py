"""`qsfs restore`: from configuration and key to a file system, on a machine that has nothing else."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `restore`."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "restore",
        help="rebuild the local state from the backends",
        description="Rebuild the local state of the newest generation, or of an older one that it keeps, in an empty "
        "cache directory. Contents stay on the backends and are fetched when they are read. Next: 'qsfs takeover', "
        "then 'qsfs mount'. The takeover makes an older generation the newest; what it leaves it keeps as a snapshot.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="restore even if too few backends answer to rule out a newer generation",
    )
    parser.add_argument(
        "--set-aside",
        action="store_true",
        help="move the local state that is there beside the cache directory; nothing is deleted",
    )
    parser.add_argument(
        "--head",
        metavar="DIGEST",
        help="where two copies of a machine have sent heads: the one to restore from, by the first digits of its "
        "digest",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--generation", type=int, metavar="G", help="this generation (default: the newest)")
    which.add_argument("--snapshot", metavar="NAME", help="the generation of this snapshot")
    add_unlock_options(parser)


def run(args: argparse.Namespace) -> int:
    """Restores and prints what was found."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.restoring import restore_file_system
    from qsfs.remote.newest import describe_head
    from qsfs.remote.readable import Wanted
    from qsfs.remote.snapshots import snapshots_of
    from qsfs.values import counted

    config = Config.load(args.config)
    secret = unlocking(args)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    report = trio.run(
        lambda: restore_file_system(
            config,
            SystemClock(),
            progress,
            wanted=Wanted(args.generation, args.snapshot, args.head),
            force=args.force,
            aside=args.set_aside,
            secret=secret,
        )
    )
    if args.json:
        print_json(
            {
                "generation": report.base.generation,
                "newest": report.newest.generation,
                "withstands": report.withstands,
                "metadata_packs": report.packs,
                "sentences": report.sentences,
            }
        )
        return 0
    for sentence in report.sentences:
        print(sentence)
    snapshots = snapshots_of(report.kept)
    if report.base != report.newest:
        print(
            f"It is not the newest, which is {describe_head(report.newest)}: 'qsfs takeover' keeps that one as a "
            "snapshot, and makes this one the newest"
        )
    elif snapshots:
        there = f"{counted(len(snapshots), 'snapshot')}, the newest {snapshots[-1].name}"
        print(f"{there}: 'qsfs restore --set-aside --snapshot NAME' restores one, 'qsfs rollback' returns to one later")
    print("Next: 'qsfs takeover' once the machine that wrote it is stopped, then 'qsfs mount'")
    return 0
