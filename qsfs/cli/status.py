"""`qsfs status`: how the mount is, for people and for programs."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `status`."""
    subparsers.add_parser(
        "status",
        help="show how the mount is",
        description="Show exposure by class, cache, backends and waits of a running mount. Exit 16 if none "
        "runs.",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the status."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control

    config = Config.load(args.config)
    found = control.ask(config.cache.directory, "status", timeout=30)
    if args.json:
        print_json(found)
        return 0
    for line in lines(found):
        print(line)
    return 0


def lines(found: dict[str, Any]) -> list[str]:
    """The status as text."""
    from qsfs.cli.output import format_table
    from qsfs.values import format_size

    cache = found["cache"]
    out = [
        f"{found['mountpoint']}: {found['phase']}, process {found['process']}, "
        f"file system {found['file_system']}"
    ]
    if found["waiting_for"]:
        out.append(f"waiting for {found['waiting_for']}")
    if not found["writable"]:
        out.append(f"READ-ONLY: {found['reason']}")
    if found.get("failure"):
        out.append(f"FLUSHING ENDED: {found['failure']}")
    flush = found.get("flush")
    exposure = (flush or found).get("exposure")
    if exposure is not None:
        out += ["", "not yet safe (at most so many bytes, age of the oldest):"]
        rows = [
            (name, format_size(entry["bytes"]), _age(entry.get("age"))) for name, entry in exposure.items()
        ]
        out.append(format_table(("class", "bytes", "age"), rows))
    if flush is not None:
        out.append(f"last generation: {flush['generation']}; flushing is {flush['phase']}")
        out += [f"flushing waits: {what}" for what in flush["waiting"]]
        if flush["last_error"]:
            out.append(f"last error: {flush['last_error']}")
    elif not found.get("owner", True):
        out.append("not the owner: nothing is uploaded")
    out += [
        "",
        f"cache: {format_size(cache['used_bytes'])} of {format_size(cache['limit_bytes'])} used, "
        f"{format_size(cache['disk_bytes'])} of {format_size(cache['size_bytes'])} on disk, "
        f"{cache['dirty_blocks']} dirty blocks",
    ]
    if cache["waiting_for_room"]:
        out.append(f"{cache['waiting_for_room']} writes wait for room in the cache")
    if cache["oldest_uncovered_seconds"] is not None:
        age = _age(cache["oldest_uncovered_seconds"])
        out.append(f"oldest write of an atomic-sync file without a sync: {age}")
    requests = found.get("requests")
    if requests is not None:
        out.append(_requests(requests))
    for sentence in found.get("sentences", ()):
        out.append(sentence)
    for warning in found.get("warnings", ()):
        out.append(f"warning: {warning}")
    backends = found.get("backends")
    if backends:
        states = [b["state"] + (", full" if b["full"] else "") for b in backends]
        table = [
            (b["number"], b["name"], b["group"] or "-", state, b["error"])
            for b, state in zip(backends, states, strict=True)
        ]
        out += ["", format_table(("no", "backend", "group", "state", "error"), table)]
    for wait in found.get("waits", ()):
        until = "until the data come" if wait["until_data"] else "until the deadline"
        out.append(
            f"a read of inode {wait['inode']} has waited {wait['seconds']} s ({until}): {wait['why']}; "
            "'qsfs unblock' ends it"
        )
    return out


def _requests(requests: dict[str, Any]) -> str:
    """One line: how many, of which kinds most, how many wait and failed."""
    kinds = sorted(requests["by_kind"].items(), key=lambda item: -item[1])
    most = ", ".join(f"{name} {count:,}" for name, count in kinds[:4])
    line = f"requests: {sum(requests['by_kind'].values()):,}" + (f" ({most})" if most else "")
    if requests["waiting"]:
        line += f", {requests['waiting']} waiting"
    if requests["unexpected_errors"]:
        line += f", {requests['unexpected_errors']} failed unexpectedly (see the log)"
    return line


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
