"""`qsfs sync`: everything written so far, on the backends."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from qsfs.errors import QsfsError

_TELL_SECONDS = 3.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sync`."""
    subparsers.add_parser(
        "sync",
        help="put everything written so far on the backends",
        description="Cut a generation and wait until its head is published. Prints its number, and whether "
        "its packs are full (any m backends may be lost) or only written (fewer). Waits while too few "
        "backends answer, and says so. Of a file with atomic sync, everything up to its last sync is in it.",
    )


def run(args: argparse.Namespace) -> int:
    """Syncs; raises what the daemon reports."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control
    from qsfs.daemon.handover import hand_over

    config = Config.load(args.config)
    hand_over(config.filesystem.mountpoint)
    with waits_told(config.cache.directory):
        result = control.ask(config.cache.directory, "sync")
    if args.json:
        print_json(result)
        return 0
    worth = {
        "full": "its packs are full",
        "written": "its packs are written, and become full when more backends take shards",
    }
    print(f"generation {result['generation']} is published, {worth[result['class']]}")
    return 0


@contextlib.contextmanager
def waits_told(cache: Path) -> Iterator[None]:
    """Tells on standard error what flushing waits for, whenever that changes, for the time of the block."""
    from qsfs.daemon import control

    ended = threading.Event()

    def tell() -> None:
        told: list[str] = []
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

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
