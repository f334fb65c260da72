"""`qsfs sync`: everything written so far, on the backends."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsfs.errors import DeadlineExceeded, QsfsError
from qsfs.values import duration

_TELL_SECONDS = 3.0
_LEAST_HAND_OVER_SECONDS = 2.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sync`."""
    parser = subparsers.add_parser(
        "sync",
        help="put everything written so far on the backends",
        description="Cut a generation and wait until its head is published. Prints its number, and whether "
        "its packs are full (any m backends may be lost) or only written (fewer). Waits while too few "
        "backends answer, and says so. Of a file with atomic sync, everything up to its last sync is in it. "
        "Exit 17 if --timeout ends before the class is reached; it goes on by itself.",
    )
    parser.add_argument(
        "--class",
        dest="durability",
        choices=("local", "written", "full"),
        help="wait until all of it is durable on this machine's disk (local), named by a published head (written: "
        "the default), or until each pack of that has all of its shards too (full)",
    )
    parser.add_argument(
        "--timeout",
        metavar="DURATION",
        type=_timeout,
        help='wait for at most so long, such as "30s", once the kernel has handed its pages over, for which it gets '
        "as long, and 2 s at least; then say what was reached and what is missing",
    )


def _timeout(text: str) -> float:
    try:
        seconds: float = duration(0, 365 * 86400)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return seconds


def run(args: argparse.Namespace) -> int:
    """Syncs; raises what the daemon reports, and `MountError` if the kernel lost some of what was written."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control
    from qsfs.daemon.handover import require_handed_over

    config = Config.load(args.config)
    within = None if args.timeout is None else max(args.timeout, _LEAST_HAND_OVER_SECONDS)
    control.require_running(config.cache.directory)
    with waits_told(config.cache.directory, full=args.durability == "full"):
        require_handed_over(config.filesystem.mountpoint, within)
        wanted = {"class": args.durability, "seconds": args.timeout}
        result = control.ask(
            config.cache.directory, "sync", **{key: value for key, value in wanted.items() if value is not None}
        )
    reached = result.get("reached", True)
    if args.json:
        print_json(result)
        return 0 if reached else DeadlineExceeded.exit_code
    if not reached:
        for line in missing(result):
            print(line, file=sys.stderr)
        return DeadlineExceeded.exit_code
    if result["generation"] is None:
        print("all of it is on this machine's disk")
        return 0
    worth = {
        "full": "its packs are full",
        "written": "its packs are written, and become full when more backends take shards",
    }
    print(f"generation {result['generation']} is published, {worth[result['class']]}")
    return 0


def missing(result: dict[str, Any]) -> list[str]:
    """What a sync that ran out of time reached, and what keeps it from going on."""
    from qsfs.values import counted, format_size

    lacks = result["missing"]
    got = {
        "": "nothing is certain yet",
        "local": "it is on this machine's disk; no published head has it yet",
        "written": f"generation {result['generation']} is published, its packs are written",
    }[result["class"]]
    out = [f"not {result['wanted']} in time, it goes on: {got}"]
    if lacks["packs_not_full"]:
        out.append(
            f"not full yet: {counted(lacks['packs_not_full'], 'pack')} with {format_size(lacks['bytes_not_full'])}"
        )
    out += [f"waiting: {what}" for what in lacks["waiting"]]
    for backend in lacks["backends"]:
        ago = f" ({backend['seconds_ago']:.0f} s ago)" if backend["seconds_ago"] >= 1 else ""
        out.append(f"backend {backend['name']}: {backend['why']}{ago}")
    return out


def not_full(wait: dict[str, Any]) -> str:
    """What a sync waits for that wants full packs."""
    from qsfs.values import counted, format_size

    return f"{counted(wait['packs'], 'pack')} with {format_size(wait['bytes'])} not full yet: {wait['why']}"


@contextlib.contextmanager
def waits_told(cache: Path, *, full: bool = False) -> Iterator[None]:
    """Tells on standard error what flushing waits for, whenever that changes, for the time of the block.

    With `full` also why packs are not full that a sync waits for, and each time half of them are.
    """
    from qsfs.daemon import control

    ended = threading.Event()

    def tell() -> None:
        told: list[str] = []
        short: dict[str, Any] = {"packs": 0, "why": ""}
        while not ended.wait(_TELL_SECONDS):
            try:
                found = control.ask(cache, "status", timeout=_TELL_SECONDS)
            except QsfsError:
                continue
            waits = (found.get("flush") or {}).get("waiting") or list(filter(None, [found["waiting_for"]]))
            if waits != told and not ended.is_set():
                told = waits
                for what in waits:
                    print(f"waiting: {what}", file=sys.stderr, flush=True)
            most = max(found.get("full_waits", ()), key=lambda wait: int(wait["packs"]), default=None)
            if not full or most is None or ended.is_set():
                continue
            if most["why"] != short["why"] or not short["packs"] / 2 < most["packs"] <= short["packs"]:
                short = most
                print(f"waiting: {not_full(most)}", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
