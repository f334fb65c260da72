"""`qsfs drill`: the proof that the file system comes back from the backends and the key alone."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qsfs.errors import ConfigError, QsfsError

if TYPE_CHECKING:
    from qsfs.clock import Clock


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `drill`."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "drill",
        help="prove that the file system can be restored",
        description="Restore the newest generation from backends and key alone into a scratch directory, read a "
        "sample or all of the contents, verify every byte, compare with the running mount where there is one, and "
        "print a dated report. Nothing is written to backends, and the cache is not touched. Exit codes: 0 all that "
        "was to be read was read and verified; 5 some of it did not come; 8 it is wrong or differs from the mount; "
        "21 it is lost; others if there was nothing to read from (docs/errors.md).",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--sample", metavar="PERCENT", type=_percent, default=1.0,
        help="read so much of the contents, chosen at random (default: 1; never less than 64 extents)",
    )  # fmt: skip
    amount.add_argument("--full", action="store_true", help="read all contents")
    parser.add_argument("--generation", metavar="G", type=int, help="a kept generation (default: the newest)")
    parser.add_argument(
        "--head", metavar="DIGEST",
        help="where two copies of a machine have sent heads: the one to restore from, by the first digits of its "
        "digest",
    )  # fmt: skip
    parser.add_argument("--report", metavar="FILE", type=Path, help="write the report there, instead of printing it")
    parser.add_argument(
        "--backends-down", metavar="N", type=_count, default=0,
        help="count N backends as down, chosen by the seed: how much may be lost?",
    )  # fmt: skip
    parser.add_argument(
        "--down", metavar="BACKEND", action="append", default=[],
        help="count this backend (HOST:PORT or HOST:PORT/NAMESPACE) as down; may be repeated",
    )  # fmt: skip
    parser.add_argument("--seed", metavar="S", type=int, help="repeat the choice of an earlier drill")
    parser.add_argument(
        "--scratch", metavar="DIRECTORY", type=Path,
        help="where the scratch directory is made (default: $TMPDIR, /var/tmp)",
    )  # fmt: skip
    parser.add_argument("--no-mount", action="store_true", help="do not ask the running mount")
    add_unlock_options(parser)


def run(args: argparse.Namespace) -> int:
    """Drills, prints or writes the report, and returns what it says as an exit code."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.drilling import Wishes, drill_file_system
    from qsfs.health.drill_plan import Plan
    from qsfs.health.drill_report import exit_code, json_of, text_of
    from qsfs.remote.readable import Wanted

    config = Config.load(args.config)
    secret = unlocking(args)
    if args.report is not None:
        _check_writable(args.report)
    seed = args.seed if args.seed is not None else secrets.randbelow(1 << 32)
    wishes = Wishes(
        Plan(1.0 if args.full else args.sample / 100, seed),
        Wanted(args.generation, head=args.head),
        args.backends_down,
        tuple(args.down),
        args.scratch,
        not args.no_mount,
    )

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    clock = SystemClock()
    with _failure_reported(args.report, clock):
        result = trio.run(lambda: drill_file_system(config, clock, wishes, progress, secret=secret))
    if args.report is not None:
        _write(args.report, text_of(result))
        progress(f"{result.verdict.value}; the report is in {args.report}")
    if args.json:
        print_json(json_of(result))
    elif args.report is None:
        print(text_of(result), end="")
    return exit_code(result)


@contextlib.contextmanager
def _failure_reported(path: Path | None, clock: Clock) -> Iterator[None]:
    """Writes a report also of a drill that ends with an error: the file never tells of an older one then."""
    from qsfs.health.drill_report import failure_text
    from qsfs.remote.plain import plain_errors

    try:
        with plain_errors():
            yield
    except QsfsError as error:
        if path is not None:
            _write(path, failure_text(error, clock.time_ns()))
        raise


def _check_writable(path: Path) -> None:
    """A drill takes long: what would lose its report is said before it begins."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: the report cannot be written there; name a file in a directory that exists")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(text, end="")
        raise ConfigError(f"{path}: the report cannot be written: {error.strerror}; it was printed") from error


def _percent(text: str) -> float:
    value = float(text.rstrip("%"))
    if not 0 < value <= 100:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value
