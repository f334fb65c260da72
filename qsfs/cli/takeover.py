"""`qsfs takeover`: goes on, on this machine, with a file system that another machine wrote."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `takeover`."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "takeover",
        help="go on with a file system that another machine wrote",
        description="Make this machine the owner: restore the newest generation where there is no local "
        "state, and publish it as ours. The other machine fences itself when it next publishes; until then "
        "it serves its applications, so stop it first: a validator's keys must not run twice.",
    )
    add_unlock_options(parser)


def run(args: argparse.Namespace) -> int:
    """Takes over; the next command is `mount`."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.takeover import take_over

    config = Config.load(args.config)
    secret = unlocking(args)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    owned = trio.run(lambda: take_over(config, SystemClock(), progress, secret=secret))
    ref = owned.first_ref
    if args.json:
        print_json({"generation": ref.generation, "epoch": owned.owner.epoch})
    else:
        where = f"epoch {owned.owner.epoch}, generation {ref.generation}"
        print(f"this machine owns the file system now ({where})")
        print("The machine that owned it must not run its applications any more. Next: qsfs mount")
    return 0
