"""`qsfs unblock`: ends waits for backends, with an error to whoever waits."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `unblock`."""
    parser = subparsers.add_parser(
        "unblock",
        help="end reads and fsyncs that wait for backends",
        description="End reads that wait for data on backends that do not answer: their processes get EIO "
        "(SIGBUS in mapped memory). They cannot be killed while they wait. With [mount] fsync = \"written\" it ends "
        "fsyncs that wait for a published head too (EIO; the local disk has what they cover).",
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="only of this file, given from the mount point")


def run(args: argparse.Namespace) -> int:
    """Ends the waits and says how many."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control
    from qsfs.values import counted

    config = Config.load(args.config)
    path = args.path
    prefix = f"{config.filesystem.mountpoint}/"
    if path is not None and path.startswith(prefix):
        path = path[len(prefix) :]
    result = control.ask(config.cache.directory, "unblock", path=path)
    if args.json:
        print_json(result)
    else:
        print(f"{counted(result['ended'], 'wait')} ended")
    return 0
