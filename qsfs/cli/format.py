"""`qsfs format`: makes a new file system on the configured backends."""

from __future__ import annotations

import argparse

from qsfs.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `format`."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "format",
        help="make a new file system on the backends",
        description="Make a new file system: check every backend, prove the erasure code, write superblock, "
        "owner and first generation. Backends that hold a file system are refused unless it is named.",
    )
    parser.add_argument(
        "--force", metavar="ID", help="id of the file system on these backends that may be lost"
    )
    add_unlock_options(parser, new=True)


def run(args: argparse.Namespace) -> int:
    """Formats and prints what may be lost, and what may be down."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import kdf_cost, unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.formatting import format_file_system

    config = Config.load(args.config)
    secret = unlocking(args, new=True)
    force = None if args.force is None else _id(args.force)
    cost = kdf_cost(args)
    report = trio.run(
        lambda: format_file_system(config, SystemClock(), force=force, secret=secret, cost=cost)
    )
    if args.json:
        print_json(
            {
                "file_system": report.keys.fsid.hex(),
                "generation": report.ref.generation,
                "sentences": report.sentences,
                "warnings": report.warnings,
            }
        )
        return 0
    print(f"file system {report.keys.fsid.hex()} on {len(report.fleet.entries)} backends")
    for sentence in report.sentences:
        print(sentence)
    for warning in report.warnings:
        print(f"warning: {warning}")
    return 0


def _id(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 16:
        raise ConfigError(f"--force {text}: not the id of a file system (32 hexadecimal digits)")
    return value
