"""`qsfs umount`: unmounts and returns when the daemon has ended."""

from __future__ import annotations

import argparse
import time

from qsfs.errors import DeadlineExceeded, NotRunning

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
    """Unmounts; a dead mount is cleared away."""
    from qsfs.config import Config
    from qsfs.daemon import control, mountpoint
    from qsfs.daemon.lock import holder

    config = Config.load(args.config)
    directory, target = config.cache.directory, config.filesystem.mountpoint
    if holder(directory) is None:
        if mountpoint.kind_of_mount(target) == "fuse.qsfs":
            mountpoint.clear(target)
            print(f"{target}: the daemon had ended already; its dead mount is cleared")
            return 0
        raise NotRunning(f"{target}: not mounted")
    control.ask(directory, "umount")
    until = time.monotonic() + args.wait
    while holder(directory) is not None:
        if time.monotonic() > until:
            raise DeadlineExceeded(
                f"{target}: unmounted, but the daemon still publishes; it ends by itself (see 'qsfs status')"
            )
        time.sleep(_LOOK_SECONDS)
    return 0
