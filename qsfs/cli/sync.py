"""`qsfs sync`: everything written so far, on the backends."""

from __future__ import annotations

import argparse
import os

from qsfs.errors import MountError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sync`."""
    subparsers.add_parser(
        "sync",
        help="put everything written so far on the backends",
        description="Cut a generation and wait until its head is published. Prints its number, and whether "
        "its packs are full (any m backends may be lost) or only written (fewer). Waits while too few "
        "backends answer. Of a file with atomic sync, everything up to its last sync is in it.",
    )


def run(args: argparse.Namespace) -> int:
    """Syncs; raises what the daemon reports."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control

    config = Config.load(args.config)
    target = config.filesystem.mountpoint
    _hand_over(str(target))
    result = control.ask(config.cache.directory, "sync")
    if args.json:
        print_json(result)
    else:
        print(f"generation {result['generation']} is published, its packs are {result['class']}")
    return 0


def _hand_over(target: str) -> None:
    """Has the kernel hand its pages over (`syncfs`), so that they are in the generation."""
    import ctypes

    try:
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise MountError(f"{target}: {error.strerror}; is it mounted?") from error
    try:
        ctypes.CDLL(None, use_errno=True).syncfs(directory)
    finally:
        os.close(directory)
