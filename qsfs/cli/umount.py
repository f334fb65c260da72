"""`qsfs umount`: unmounts and returns when the daemon has ended."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from qsfs.errors import DeadlineExceeded, NotRunning

if TYPE_CHECKING:
    from pathlib import Path

_LOOK_SECONDS = 0.02


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `umount`."""
    parser = subparsers.add_parser(
        "umount",
        help="unmount, and wait for the daemon to end",
        description="Unmount. Returns when the daemon has ended: what is local is safe on this disk, and "
        "what could be published before stop_deadline is on the backends. Refused while in use.",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for the daemon to end (default: 600)",
    )


def run(args: argparse.Namespace) -> int:
    """Unmounts and says whether all is on the backends; a dead mount is cleared away."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config

    config = Config.load(args.config)
    directory, target = config.cache.directory, config.filesystem.mountpoint
    result = unmount(directory, target, args.wait)
    if args.json:
        print_json(result or {"mounted": True, "published": False})
        return 0
    if result is None:
        print(f"{target}: the daemon had ended already; its dead mount is cleared")
        return 0
    ended = "unmounted" if result["mounted"] else "the daemon ended before it was mounted"
    if result.get("read_only"):
        print(f"{target}: {ended}; it was read-only")
    elif result["published"]:
        print(f"{target}: {ended}; everything is on the backends")
    elif result.get("failure"):
        print(
            f"{target}: {ended}; what was synced is safe in {directory}, what was written since may be lost: "
            f"{result['failure']}"
        )
    else:
        print(
            f"{target}: {ended}; what is not on the backends yet is safe in {directory} and goes on from "
            "there at the next mount"
        )
    return 0


def unmount(directory: Path, target: Path, wait: float) -> dict[str, Any] | None:
    """Ends the daemon of a cache directory; what it reports, or None if it had died: then its mount is cleared.

    Raises `NotRunning` if nothing is mounted, `DeadlineExceeded` if it has not ended within `wait` seconds,
    and what the daemon reports.
    """
    from qsfs.daemon import control, mountpoint
    from qsfs.daemon.lock import holder

    if holder(directory) is None:
        if mountpoint.kind_of_mount(target) == "fuse.qsfs" and mountpoint.is_dead(target):
            mountpoint.clear(target)
            return None
        raise NotRunning(f"{target}: not mounted")
    until = time.monotonic() + wait
    late = DeadlineExceeded(
        f"{target}: the daemon has not ended within {wait:g} s; once unmounted it publishes and ends by "
        "itself (see 'qsfs status')"
    )
    try:
        result: dict[str, Any] = control.ask(directory, "umount", timeout=wait)
    except DeadlineExceeded:
        raise late from None
    while holder(directory) is not None:
        if time.monotonic() > until:
            raise late
        time.sleep(_LOOK_SECONDS)
    return result
