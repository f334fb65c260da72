"""`qsfs cache`: what stays local, what goes, and what is fetched, by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from qsfs.errors import ConfigError

_WHY = {
    "dirty": "are not on the backends yet ('qsfs sync', then again)",
    "local_only": "are never uploaded (policy local_only)",
    "pinned": "are pinned",
    "not_full": "lie in packs that are not full yet",
    "not_looked": "lie in packs that the second look has not found whole yet ([cache] second_look_seconds)",
    "shares_block": "share a block with such pages",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `cache` with its own commands."""
    parser = subparsers.add_parser(
        "cache", help="pin, evict or fetch files", description="Decide what of a mount lies in the local cache."
    )
    commands = parser.add_subparsers(dest="cache_command", metavar="COMMAND", required=True)

    def add(name: str, text: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=description)

    pin = add(
        "pin",
        "keep files local",
        "Fetch files, or all below directories, and never evict them, nor what is made in those directories later. "
        "The pin is part of the file system: it survives restores. Refused if pinned data would take more than half of "
        "the cache.",
    )
    unpin = add("unpin", "undo a pin", "Let files be evicted again. What a policy pins stays pinned.")
    evict = add(
        "evict",
        "drop local pages",
        "Drop the local pages of files that are safe on the backends: in packs that are full and were found whole by "
        "the second look. Says what stays, and why.",
    )
    for command in (pin, unpin, evict):
        command.add_argument("paths", metavar="PATH", nargs="+", help="on the mount")
    warm = add(
        "warm",
        "fetch files",
        "Fetch what of files is only on the backends, many parts at a time. Refused if it does not fit without "
        "evicting anything.",
    )
    warm.add_argument("paths", metavar="PATH", nargs="*", help="on the mount")
    warm.add_argument("--pinned", action="store_true", help="everything that is pinned, after a restore for example")
    warm.add_argument(
        "--start", action="store_true", help="what databases read while they start, before a node is started"
    )
    warm.add_argument(
        "--range", metavar="START-[END]", help='only these bytes of each file, such as "0-64MiB" or "10GiB-"'
    )
    add("status", "show what is pinned, and the room that is left", "Goes once through all inodes.")


def run(args: argparse.Namespace) -> int:
    """Has the daemon do it, and says what was done."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon.jobs import follow

    config = Config.load(args.config)
    what = args.cache_command
    arguments: dict[str, Any] = {}
    if what != "status":
        arguments["paths"] = _paths(config.filesystem.mountpoint, args)
    if what == "warm":
        if args.pinned or args.start:
            what = "warm-pinned" if args.pinned else "warm-start"
        arguments |= _range(args.range)
    found = follow(config.cache.directory, "cache", _Teller().say, what=what, **arguments)
    if args.json:
        print_json(found)
    else:
        print("\n".join(lines(args.cache_command, found)))
    return 0


def lines(what: str, found: dict[str, Any]) -> list[str]:
    """What was done, as text."""
    from qsfs.values import counted, format_size

    if what == "evict":
        stays = [f"  {format_size(size)} {_WHY[reason]}" for reason, size in found["stays"].items()]
        said = [f"{format_size(found['dropped_bytes'])} dropped"]
        return said + (["stay in the cache:", *stays] if stays else [])
    if what == "warm":
        return [f"{format_size(found['fetched_bytes'])} fetched"]
    if what == "pin":
        return [
            f"{found['changed']:,} pinned now, {format_size(found['fetched_bytes'])} fetched; "
            f"{format_size(found['pinned_bytes'])} are pinned in all"
        ]
    if what == "unpin":
        said = [f"{found['changed']:,} unpinned"]
        if found["pinned_by_policy"]:
            said.append(f"{counted(found['pinned_by_policy'], 'file')} stay pinned: a policy says so")
        return said
    return _status(found)


def _status(found: dict[str, Any]) -> list[str]:
    from qsfs.values import counted, format_size

    pinned, most = found["pinned_bytes"], found["pinned_limit_bytes"]
    said = [
        f"used {format_size(found['used_bytes'])}; eviction begins at {format_size(found['evict_from_bytes'])}, "
        f"writers wait at {format_size(found['limit_bytes'])}",
        f"room to fetch {format_size(found['room_bytes'])}",
        f"pinned {format_size(pinned)} in {counted(found['pinned_files'], 'file')}; 'pin' stops at {format_size(most)}",
        f"dirty {format_size(found['dirty_bytes'])}",
    ]
    if pinned > most:
        said.append("WARNING: more is pinned than leaves the cache fit to work; unpin something, or give it more room")
    return said


class _Teller:
    """Tells on standard error how far it has come, whenever that has changed much."""

    def __init__(self) -> None:
        self._told = ""

    def say(self, progress: dict[str, Any]) -> None:
        """Tells what is new."""
        from qsfs.values import format_size

        text = ""
        if "wanted_bytes" in progress:
            done = format_size(progress.get("fetched_bytes", 0))
            text = f"fetched {done} of {format_size(progress['wanted_bytes'])}"
        elif "dropped_bytes" in progress:
            text = f"dropped {format_size(progress['dropped_bytes'])}"
        elif "counted_bytes" in progress:
            text = f"looking: {format_size(progress['counted_bytes'])} to fetch so far"
        if text and text != self._told:
            self._told = text
            print(text, file=sys.stderr, flush=True)


def _paths(mountpoint: Path, args: argparse.Namespace) -> list[str]:
    from qsfs.cli.paths import on_mount

    if args.cache_command == "warm" and bool(args.paths) + args.pinned + args.start != 1:
        raise ConfigError("name files to fetch, or give --pinned or --start: one of these")
    return [on_mount(mountpoint, path) for path in args.paths]


def _range(text: str | None) -> dict[str, int]:
    """The bytes that `--range` names.  Raises `ConfigError`."""
    from qsfs.values import parse_size

    if text is None:
        return {}
    start, dash, stop = text.partition("-")
    try:
        found = {"start": parse_size(start)}
        if stop:
            found["stop"] = parse_size(stop)
    except ValueError as error:
        raise ConfigError(f'--range {text}: {error}; write for example "0-64MiB" or "10GiB-"') from error
    if not dash or found.get("stop", found["start"] + 1) <= found["start"]:
        raise ConfigError(f'--range {text}: is not START-END or START-; write for example "0-64MiB" or "10GiB-"')
    return found
