"""`qsfs fsck`: checks the unmounted file system, and mends what can be mended.

Exit codes are those of fsck(8): 0 clean, 1 errors were mended, 4 errors are left, 8 something could
not be checked, 16 a wrong command line; 1, 4 and 8 add up.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from qsfs.errors import ConfigError, QsfsError

_FAILED, _USAGE = 8, 16


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends as fsck(8) does for a wrong command line."""
        self.print_usage(sys.stderr)
        self.exit(_USAGE, f"{self.prog}: error: {message}\n")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `fsck`."""
    from qsfs.cli.unlock import add_unlock_options

    kind, subparsers._parser_class = subparsers._parser_class, _Parser
    parser = subparsers.add_parser(
        "fsck",
        help="check the unmounted file system",
        description="Check the local store, the namespace, extents and pages, and whether the backends hold "
        "every shard. Exit codes as fsck(8): 0 clean, 1 mended, 4 errors left, 8 not everything could be "
        "checked, 16 wrong command line.",
    )
    subparsers._parser_class = kind
    parser.add_argument("--deep", action="store_true", help="read and authenticate every shard")
    parser.add_argument(
        "--repair", action="store_true", help="rebuild missing and wrong shards; mend what can be mended"
    )
    parser.add_argument("--local", action="store_true", help="check this machine only, ask no backend")
    add_unlock_options(parser)


def run(args: argparse.Namespace) -> int:
    """Checks, prints the findings, and returns the exit code of fsck(8)."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.checking import check_file_system

    try:
        config = Config.load(args.config)
        secret = unlocking(args)
        report = trio.run(
            lambda: check_file_system(
                config,
                SystemClock(),
                deep=args.deep,
                repair=args.repair,
                local_only=args.local,
                say=_progress,
                secret=secret,
            )
        )
    except QsfsError as error:
        if args.json:
            print_json({"exit_code": _code(error), "failures": [str(error)], "findings": []})
        else:
            print(f"qsfs: {error}", file=sys.stderr)
        return _code(error)
    if args.json:
        print_json(report.to_json())
    else:
        for sentence in report.sentences():
            print(sentence)
    return report.exit_code


def _code(error: QsfsError) -> int:
    return _USAGE if isinstance(error, ConfigError) else _FAILED


def _progress(what: str, done: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[Kchecking {what}: {done}", end="", file=sys.stderr, flush=True)
