"""`qsfs takeover`: goes on, on this machine, with a file system that another machine wrote."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `takeover`."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "takeover",
        help="go on with a file system that another machine wrote",
        description="Make this machine the owner: restore the newest generation where there is no local "
        "state, and publish it as ours. Where an older generation was restored ('qsfs restore --generation'), "
        "that one becomes the newest, and what it leaves a snapshot. The other machine fences itself when it next "
        "publishes; until then it serves its applications, so stop it first: a validator's keys must not run twice.",
    )
    parser.add_argument(
        "--head",
        metavar="DIGEST",
        help="where two copies of a machine have sent heads: the one to go on from, by the first digits of its digest; "
        "local state that is there must be of that one",
    )
    add_unlock_options(parser)


def run(args: argparse.Namespace) -> int:
    """Takes over; the next command is `mount`."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.rollback import rollback_fields, rollback_sentences
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon.takeover import take_over

    config = Config.load(args.config)
    secret = unlocking(args)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    taken = trio.run(lambda: take_over(config, SystemClock(), progress, secret=secret, head=args.head))
    ref, returned = taken.ref, taken.returned
    if args.json:
        found: dict[str, Any] = {"generation": ref.generation, "epoch": ref.owner.epoch}
        print_json(found | ({} if returned is None else rollback_fields(returned)))
    else:
        where = f"epoch {ref.owner.epoch}, generation {ref.generation}"
        print(f"this machine owns the file system now ({where})")
        for line in [] if returned is None else rollback_sentences(returned):
            print(line)
        print("The machine that owned it must not run its applications any more. Next: qsfs mount")
    return 0
