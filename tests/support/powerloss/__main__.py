"""The process of a forgetting disk: `python -m tests.support.powerloss BACKING MOUNTPOINT --control SOCKET`.

Prints "ready" once mounted.  The control socket takes one JSON object a line and answers each with one:

    {"do": "cut", "seed": "7", "keep": "random", "victims": [PID, ...]}     the power goes now
    {"do": "arm", "kind": "fsync", "at": 3, "before": true, "match": "*.mdb", "seed": "7", ...}
    {"do": "disarm"}
    {"do": "wait"}                                                          answers once the power went
    {"do": "fail", "kind": "write", "errno": 28, "match": "*", "count": -1} requests fail from now on
    {"do": "heal"}
    {"do": "stat"}
    {"do": "restart"}                                                       mounts again once unmounted

After a cut every request fails with EIO until the file system is unmounted, then the process ends.  An
orderly unmount first makes everything durable.  With `--until-eof` the process also ends, as if killed,
when its standard input does: nothing outlives a test run that was killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from tests.support.powerloss.cut import KEEP
from tests.support.powerloss.disk import METADATA, Disk
from tests.support.powerloss.fuse import Fault, Operations, Trigger
from tests.support.scratch import detach


def main() -> int:
    """Mounts, serves until unmounted, and leaves the backing directory as the disk would be."""
    options = _arguments()
    logging.basicConfig(format="powerloss: %(message)s", level=logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    trigger = None
    if options.at_fsync:
        before = options.when == "before"
        trigger = Trigger("fsync", options.at_fsync, before, options.match, options.seed, options.keep)
    again = True
    while again:
        operations = Operations(Disk(options.backing, options.metadata))
        operations.trigger, trigger = trigger, None
        pyfuse3.init(operations, str(options.mountpoint), {"fsname=powerloss", "default_permissions"})
        try:
            trio.run(_serve, operations, options)
        finally:
            pyfuse3.close(unmount=False)
            options.control.unlink(missing_ok=True)
        again = operations.comes_back
    return 0


async def _serve(operations: Operations, options: argparse.Namespace) -> None:
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(os.fspath(options.control))
        listener.listen()
        control = functools.partial(_control, operations, options.seed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, control, [trio.SocketListener(listener)])
            if options.until_eof:
                nursery.start_soon(_follow_input, options.mountpoint)
            print("ready", flush=True)
            await pyfuse3.main(max_tasks=200)
            if not operations.dead:
                operations.disk.settle()
            nursery.cancel_scope.cancel()


async def _follow_input(mountpoint: Path) -> None:
    """Ends the process, without making anything durable, when nobody holds the other end of its input."""
    await trio.lowlevel.wait_readable(sys.stdin)
    detach(mountpoint)
    os._exit(1)


async def _control(operations: Operations, seed: str, stream: trio.SocketStream) -> None:
    """Answers the commands of one connection."""
    received = b""
    async with stream:
        with suppress(trio.BrokenResourceError):
            async for chunk in stream:
                received += chunk
                while b"\n" in received:
                    line, _, received = received.partition(b"\n")
                    answer = await _obey(operations, seed, json.loads(line))
                    await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _obey(operations: Operations, seed: str, command: dict[str, Any]) -> dict[str, Any]:
    verb = command.pop("do")
    try:
        match verb:
            case "cut":
                _refuse_second(operations)
                victims = command.get("victims", ())
                operations.cut(command.get("seed", seed), command.get("keep", "random"), victims)
            case "wait":
                await operations.went.wait()
            case "arm":
                _refuse_second(operations)
                operations.trigger = Trigger(**{"seed": seed, **command})
            case "disarm":
                operations.trigger = None
            case "fail":
                operations.fault = Fault(
                    command["kind"], command["errno"], command.get("match", "*"), command.get("count", -1)
                )
            case "heal":
                operations.fault = None
            case "restart":
                operations.comes_back = True
            case "stat":
                return _status(operations)
            case _:
                return {"error": f"unknown command '{verb}'"}
    except (TypeError, KeyError, ValueError) as error:
        return {"error": f"{verb}: {error}"}
    return {"report": dataclasses.asdict(operations.report)} if operations.report else {}


def _refuse_second(operations: Operations) -> None:
    if operations.dead:
        raise ValueError("the power went already")


def _status(operations: Operations) -> dict[str, Any]:
    written, changes = operations.disk.uncovered()
    return {
        "dead": operations.dead,
        "uncovered_bytes": written,
        "uncovered_operations": changes,
        "writes": dict(operations.counts["write"]),
        "fsyncs": dict(operations.counts["fsync"]),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="powerloss", description="A disk that forgets.")
    parser.add_argument("backing", type=Path, help="directory that is the medium")
    parser.add_argument("mountpoint", type=Path, help="empty directory to mount on")
    parser.add_argument("--control", type=Path, required=True, help="path of the control socket to make")
    parser.add_argument("--seed", default="0", help="names the choices of a cut")
    parser.add_argument("--metadata", choices=METADATA, default="ordered", help="how names become durable")
    parser.add_argument("--at-fsync", type=int, default=0, metavar="N", help="when the power goes")
    parser.add_argument(
        "--when", choices=("before", "after"), default="before", help="relative to its effect"
    )
    parser.add_argument("--match", default="*", help="count only fsyncs of files whose path matches")
    parser.add_argument("--keep", choices=KEEP, default="random", help="what of the uncovered is kept")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
