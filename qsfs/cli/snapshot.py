"""`qsfs snapshot`: makes, lists, deletes and mounts snapshots."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys
from typing import TYPE_CHECKING, Any

from qsfs.errors import MountError, NotRunning, QsfsError

if TYPE_CHECKING:
    from pathlib import Path

    from qsfs.config import Config

_FREEZE_SECONDS = 30.0
_MOST_FREEZE_SECONDS = 600.0
_ANSWER_SECONDS = 5.0
_UMOUNT_SECONDS = 600.0
_CACHE_BYTES = 256 << 20
_LEAST_CACHE_BYTES = 16 << 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `snapshot` and its subcommands."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "snapshot",
        help="make, list, delete or mount snapshots",
        description="A snapshot keeps the whole file system as it is at one moment, under a name, on the "
        "backends. It costs nothing until what it holds is changed. 'qsfs rollback' returns to one.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser(
        "create",
        help="keep the file system as it is now",
        description="Put everything written so far on the backends and keep it under NAME. Returns once that "
        "is sure; waits while too few backends answer, and says so. Of a file with atomic sync, everything up "
        "to its last sync is in it.",
    )
    create.add_argument("name", metavar="NAME", help='letters, digits, ".", "_", "-"; not a number alone')
    create.add_argument(
        "--freeze",
        metavar="UNIT|CGROUP",
        help="hold the processes of a systemd unit, or of a cgroup given by its path, while the snapshot is cut: "
        "it is then what would be left if they were killed at that moment. Needs root and cgroup v2",
    )
    create.add_argument(
        "--freeze-seconds",
        type=_seconds,
        default=_FREEZE_SECONDS,
        metavar="N",
        help="hold them no longer than this; then they go on and no snapshot is made (default: 30)",
    )
    listing = actions.add_parser(
        "list",
        help="list the snapshots",
        description="List the snapshots: those of the mount, or, if nothing is mounted here, those that the newest "
        "generation on the backends keeps.",
    )
    add_unlock_options(listing)
    delete = actions.add_parser(
        "delete",
        help="keep a snapshot no longer",
        description="Keep a snapshot no longer. Returns once that is published. Nothing else is changed.",
    )
    delete.add_argument("name", metavar="NAME")
    mount = actions.add_parser(
        "mount",
        help="mount a snapshot read-only",
        description="Mount a snapshot read-only on an empty directory, beside the mount that writes or without one. "
        "What is read is kept in a cache of its own, which goes with 'qsfs snapshot umount'.",
    )
    mount.add_argument("name", metavar="NAME")
    mount.add_argument("mountpoint", metavar="DIRECTORY")
    mount.add_argument(
        "--cache-size",
        type=_size,
        default=_CACHE_BYTES,
        metavar="SIZE",
        help="of its cache, beside the configured one and not part of its bound (default: 256MiB)",
    )
    add_unlock_options(mount)
    umount = actions.add_parser(
        "umount",
        help="unmount a snapshot",
        description="Unmount a snapshot and remove its cache. Refused while in use.",
    )
    umount.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    """Does what the subcommand says; raises what the daemon reports."""
    from qsfs.config import Config

    config = Config.load(args.config)
    actions = {"create": _create, "list": _list, "delete": _delete, "mount": _mount, "umount": _umount}
    return actions[args.action](config, args)


def _size(text: str) -> int:
    from qsfs.values import size

    try:
        found: int = size(_LEAST_CACHE_BYTES)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def _seconds(text: str) -> float:
    from qsfs.values import duration

    try:
        seconds: float = duration(1, _MOST_FREEZE_SECONDS)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return seconds


def _create(config: Config, args: argparse.Namespace) -> int:
    from qsfs.cli.output import format_time, print_json
    from qsfs.cli.sync import waits_told
    from qsfs.daemon import control
    from qsfs.daemon.handover import require_handed_over
    from qsfs.remote.snapshots import check_name

    cache = config.cache.directory
    check_name(args.name)
    if args.freeze is None:
        control.require_running(cache)
        with waits_told(cache):
            require_handed_over(config.filesystem.mountpoint)
            made = control.ask(cache, "snapshot-create", name=args.name)
    else:
        made = _create_held(config, args)
    if args.json:
        print_json(made)
    else:
        print(f"snapshot {made['name']}: generation {made['generation']}, cut at {format_time(made['time'])}")
    return 0


def _create_held(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from qsfs import failpoints
    from qsfs.cli.freeze import cgroup_root, find_cgroup, freeze, refuse_own
    from qsfs.cli.sync import waits_told
    from qsfs.daemon import control
    from qsfs.daemon.handover import require_handed_over
    from qsfs.remote.snapshots import check_new

    cache, mountpoint = config.cache.directory, config.filesystem.mountpoint
    directory = find_cgroup(args.freeze, cgroup_root())
    refuse_own(directory, [os.getpid(), control.ask(cache, "status", timeout=30)["process"]])
    check_new(args.name, [entry["name"] for entry in control.ask(cache, "snapshot-list", timeout=30)])
    # What is dirty now need not be uploaded while they are held.
    with waits_told(cache):
        require_handed_over(mountpoint)
        control.ask(cache, "sync")
    ticket = secrets.token_hex(8)
    try:
        with freeze(directory, args.freeze_seconds) as frozen:
            require_handed_over(mountpoint, frozen.seconds_left)
            frozen.require_held()
            left = frozen.seconds_left
            control.ask(
                cache, "snapshot-cut", name=args.name, held_seconds=left, ticket=ticket, timeout=left + _ANSWER_SECONDS
            )
            failpoints.hit("snapshot.cut")
            frozen.require_held()
    except BaseException:
        _abandon(cache, ticket)
        raise
    # Nothing is a snapshot before this is asked.
    with waits_told(cache):
        made: dict[str, Any] = control.ask(cache, "snapshot-hold", ticket=ticket)
    return made


def _abandon(cache: Path, ticket: str) -> None:
    """Has a cut that is not what was asked for given up at once; unasked, the daemon does it somewhat later."""
    from qsfs.daemon import control

    with contextlib.suppress(QsfsError):
        control.ask(cache, "snapshot-abandon", ticket=ticket, timeout=_ANSWER_SECONDS)


def _list(config: Config, args: argparse.Namespace) -> int:
    from qsfs.cli.output import format_table, format_time, print_json
    from qsfs.clock import SystemClock
    from qsfs.daemon import control
    from qsfs.daemon.beside import mounted
    from qsfs.values import format_duration

    sentences: tuple[str, ...] = ()
    try:
        found = control.ask(config.cache.directory, "snapshot-list", timeout=30)
    except (NotRunning, MountError):
        # Nothing is mounted here, or not by one who writes.
        found, sentences = _on_backends(config, args)
    now = SystemClock().time_ns() / 1e9
    places = {name: str(place) for name, place in mounted(config).items()}
    for entry in found:
        entry["mounted_on"] = places.get(entry["name"])
        entry["age_seconds"] = round(now - entry["time"], 1)
    if args.json:
        print_json({"snapshots": found})
        return 0
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    if not found:
        print("no snapshots")
        return 0
    rows = []
    for entry in found:
        age = format_duration(max(0.0, entry["age_seconds"]))
        rows.append((entry["name"], entry["generation"], format_time(entry["time"]), age, entry["mounted_on"] or ""))
    print(format_table(("name", "generation", "cut at", "age", "mounted on"), rows))
    return 0


def _on_backends(config: Config, args: argparse.Namespace) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    import trio

    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.daemon.snapshots import described, snapshots_on_backends

    secret = unlocking(args)
    found, sentences = trio.run(lambda: snapshots_on_backends(config, SystemClock(), secret=secret))
    return [described(snapshot) for snapshot in found], sentences


def _delete(config: Config, args: argparse.Namespace) -> int:
    from qsfs.cli.output import print_json
    from qsfs.cli.sync import waits_told
    from qsfs.daemon import control

    with waits_told(config.cache.directory):
        control.ask(config.cache.directory, "snapshot-delete", name=args.name)
    if args.json:
        print_json({"deleted": args.name})
    else:
        print(f"snapshot {args.name} is deleted")
    return 0


def _mount(config: Config, args: argparse.Namespace) -> int:
    from pathlib import Path

    from qsfs.cli.mount import start
    from qsfs.cli.unlock import unlocking
    from qsfs.daemon.beside import beside, make, remove, started

    place = Path(args.mountpoint).absolute()
    secret = unlocking(args)
    shown = beside(config, args.name, place, args.cache_size)
    make(shown)
    words = ["--beside", args.name, str(place), str(args.cache_size), *(["--debug"] if args.debug else [])]
    try:
        code = start(shown, words, secret, as_json=args.json)
    except QsfsError:
        remove(shown.cache.directory)
        raise
    started(shown)
    return code


def _umount(config: Config, args: argparse.Namespace) -> int:
    from qsfs.cli.output import print_json
    from qsfs.cli.umount import unmount
    from qsfs.daemon.beside import cache_of, mountpoint_of, remove

    directory = cache_of(config, args.name)
    if not directory.is_dir():
        raise NotRunning(f'snapshot "{args.name}" is not mounted; \'qsfs snapshot list\' tells which are, and where')
    place = mountpoint_of(directory)
    try:
        unmount(directory, place, _UMOUNT_SECONDS)
    except NotRunning:
        # The machine went down meanwhile.
        remove(directory)
        raise
    remove(directory)
    if args.json:
        print_json({"unmounted": args.name, "mountpoint": str(place)})
    else:
        print(f"{place}: snapshot {args.name} is unmounted")
    return 0
