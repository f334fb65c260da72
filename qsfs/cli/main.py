"""The command line: parses, runs one command, turns what went wrong into one line and an exit code.

Exit codes: 0 success; 2 a wrong command line; those of `qsfs.errors`; 70 a bug; 130 interrupted;
141 the reader of the output went away.  With `--json`, an error is an object on standard output.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import qsfs
from qsfs import failpoints
from qsfs.errors import QsfsError

# One module of `qsfs.cli` a command, in the order of the help.  A module offers
# `add_parser(subparsers)` and `run(args) -> int`; at its top it imports nothing but the standard
# library and `qsfs.errors`, so that help is instant.
COMMANDS = (
    "init",
    "config",
    "zdb",
    "format",
    "mount",
    "umount",
    "status",
    "info",
    "cache",
    "sync",
    "collect",
    "snapshot",
    "rollback",
    "takeover",
    "restore",
    "drill",
    "unblock",
    "key",
    "fsck",
    "placement",
    "fleet",
    "codec",
)

_BUG = 70
_INTERRUPTED = 130
_READER_GONE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: this process's own) and returns its exit code."""
    modules = {name: importlib.import_module(f"qsfs.cli.{name}") for name in COMMANDS}
    parser = build_parser(modules)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _parser_of(parser, arguments.command).error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    if arguments.debug:
        _log_everything()
    try:
        failpoints.arm_from_environment(os.environ.get("QSFS_FAILPOINTS", ""))
        code: int = modules[arguments.command].run(arguments)
        sys.stdout.flush()
        return code
    except BaseException as error:  # noqa: BLE001 - the last border: everything ends as one line
        return _report(error, arguments)


def _parser_of(parser: argparse.ArgumentParser, command: str | None) -> argparse.ArgumentParser:
    """The parser of a command, which ends a wrong command line as that command documents it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and command is not None:
            found: argparse.ArgumentParser = action.choices[command]
            return found
    return parser


def build_parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """The parser of all commands.  `-c`, `--json` and `--debug` may stand before or after the command."""
    parser = argparse.ArgumentParser(
        prog="qsfs",
        description="A file system whose history lives, encrypted and erasure-coded, on 0-db backends.",
    )
    parser.add_argument("--version", action="version", version=f"qsfs {qsfs.__version__}")
    _add_common(parser, config=None, json=False, debug=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in modules.values():
        module.add_parser(subparsers)
    for command in _with_subcommands(subparsers):
        _add_common(command, config=argparse.SUPPRESS, json=argparse.SUPPRESS, debug=argparse.SUPPRESS)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, config: object, json: object, debug: object) -> None:
    group = parser.add_argument_group("options of every command")
    group.add_argument(
        "-c", "--config", metavar="FILE", default=config,
        help="configuration file, or the directory of a qsfs.toml "
        "(default: $QSFS_CONFIG, ./qsfs.toml, /etc/qsfs/qsfs.toml)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", default=json, help="print JSON, errors too")
    group.add_argument("--debug", action="store_true", default=debug, help="log everything; show tracebacks")


def _with_subcommands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
) -> Iterator[argparse.ArgumentParser]:
    for parser in subparsers.choices.values():
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from _with_subcommands(action)


def _log_everything() -> None:
    import logging

    logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in `error`: a nursery delivers them in groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _report(error: BaseException, arguments: argparse.Namespace) -> int:
    """Says what went wrong and returns the exit code for it."""
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, SystemExit):
            raise leaf
        if isinstance(leaf, BrokenPipeError):
            # What is still buffered would fail once more when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _READER_GONE
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return _INTERRUPTED
    if arguments.debug:
        import traceback

        traceback.print_exception(error)
    unexpected = [leaf for leaf in leaves if not isinstance(leaf, QsfsError)]
    if unexpected:
        first = unexpected[0]
        message = (
            f"internal error: {type(first).__name__}: {first}; nothing more is known; please report it "
            "with the traceback that --debug shows"
        )
        _say(arguments, "InternalError", message, _BUG)
        return _BUG
    expected = [leaf for leaf in leaves if isinstance(leaf, QsfsError)]
    for leaf in expected:
        _say(arguments, type(leaf).__name__, str(leaf), leaf.exit_code)
    return expected[0].exit_code


def _say(arguments: argparse.Namespace, kind: str, message: str, code: int) -> None:
    if arguments.json:
        from qsfs.cli.output import print_json

        print_json({"error": {"kind": kind, "message": message, "exit_code": code}})
    else:
        print("qsfs:", " ".join(message.split("\n")), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
