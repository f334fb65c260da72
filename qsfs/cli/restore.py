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
        description="Rebuild the local state of the newest generation in an empty cache directory. Contents "
        "stay on the backends and are fetched when they are read. Next: 'qsfs takeover', then 'qsfs mount'. To go on "
        "from an older generation, a snapshot for example, restore and take over, and then 'qsfs rollback'.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="restore even if too few backends answer to rule out a newer generation",
    )
    parser.add_argument(
        "--set-aside",
        action="store_true",
        help="first move the local state that is there beside the cache directory; nothing is deleted",
    )
    add_unlock_options(parser)


def run(args: argparse.Namespace) -> int:
    """Restores and prints what was found."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.restoring import restore_file_system
    from qsfs.remote.snapshots import snapshots_of
    from qsfs.values import counted

    config = Config.load(args.config)
    secret = unlocking(args)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    report = trio.run(
        lambda: restore_file_system(
            config, SystemClock(), progress, force=args.force, aside=args.set_aside, secret=secret
        )
    )
    if args.json:
        print_json(
            {
                "generation": report.base.generation,
                "withstands": report.withstands,
                "metadata_packs": report.packs,
                "sentences": report.sentences,
            }
        )
        return 0
    for sentence in report.sentences:
        print(sentence)
    snapshots = snapshots_of(report.head.kept)
    if snapshots:
        there = f"{counted(len(snapshots), 'snapshot')}, the newest {snapshots[-1].name}"
        print(f"{there}: 'qsfs rollback' returns to one, after 'qsfs takeover'")
    print("Next: 'qsfs takeover' once the machine that wrote it is stopped, then 'qsfs mount'")
    return 0
