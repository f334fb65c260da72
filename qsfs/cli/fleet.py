"""`qsfs fleet`: the backends of a file system: which they are, and changing them to what is configured."""

from __future__ import annotations

import argparse
from typing import Any

from qsfs.errors import NotRunning, QsfsError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `fleet` and its subcommands."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "fleet",
        help="show the backends, or change them to what is configured",
        description="Show the backends of the file system (its fleet), or change them to what is configured.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list",
        help="number, name, group, node, state and reachability of each backend",
        description="Show the fleet of the newest generation known here: each backend's number, name, group, node, "
        "state (active, draining; joining or leaving during a change), whether it answers the mount, and how many "
        "packs have still a shard on a draining one.",
    )
    add_unlock_options(listing)
    apply = actions.add_parser(
        "apply",
        help="change the fleet to the backends that the configuration lists now",
        description="Compare the [[backend]]s of the configuration with the fleet, and change the fleet of the "
        "running mount accordingly: new ones are added; those with drain = true, and those that are listed no more, "
        "take no new shards and are emptied; empty ones that are listed no more are retired. Groups, nodes, weights "
        "and addresses are taken over. Waits until a fence quorum of the old and of the new fleet has the change, "
        "and says so in 'qsfs status'; an interrupt does not undo it.",
    )
    apply.add_argument("--dry-run", action="store_true", help="change nothing, only tell")
    apply.add_argument(
        "--lost", metavar="NAME", nargs="+", action="extend", default=[],
        help="a backend (its number, address or address/namespace) that is gone for good: it leaves the fleet at once, "
        "and its shards are made again; refused if a pack would have too few shards left",
    )  # fmt: skip
    apply.add_argument(
        "--accept-loss", action="store_true",
        help="give the --lost backends up even so: of packs with too few shards left is saved what the cache holds and "
        "what the shards that are left hold; the rest is lost for good. A dry run tells how much is at stake",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs a subcommand; raises what the daemon or the local store say."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config
    from qsfs.daemon import control

    config = Config.load(args.config)
    if args.action == "list":
        try:
            found = control.ask(config.cache.directory, "fleet", timeout=60)
        except NotRunning:
            from qsfs.cli.unlock import unlocking
            from qsfs.daemon.fleet import describe_fleet
            from qsfs.daemon.placing import known_unmounted

            found = describe_fleet(known_unmounted(config, secret=unlocking(args)).fleets, None, None)
        text = list_lines
    else:
        found = control.ask(
            config.cache.directory, "fleet-apply", dry_run=args.dry_run, lost=args.lost, accept_loss=args.accept_loss,
            config=str(config.path),
        )  # fmt: skip
        text = apply_lines
    if args.json:
        print_json(found)
    else:
        print("\n".join(text(found)))
    return QsfsError.exit_code if args.action == "apply" and found["refusals"] else 0


def list_lines(found: dict[str, Any]) -> list[str]:
    """The fleet as text."""
    from qsfs.cli.output import format_table

    rows = [
        (
            backend["number"],
            backend["name"],
            backend["group"],
            backend["node"],
            backend["state"],
            "(not mounted)" if backend["reachable"] is None else backend["reachable"],
            "" if backend["packs_left"] is None else backend["packs_left"],
        )
        for backend in found["backends"]
    ]
    fleets = found["fleets"]
    out = [format_table(("number", "backend", "group", "node", "state", "reachable", "packs left"), rows)]
    if found["changing"]:
        out.append(f"the fleet is being changed from number {fleets[0]} to {fleets[1]}")
    out += [
        f"warning: {one['name']} is configured and not in the fleet: 'qsfs fleet apply' adds it; else remove it from "
        "the configuration"
        for one in found["outside"]
    ]
    return out


def apply_lines(found: dict[str, Any]) -> list[str]:
    """What was, or would be, done."""
    out = list(found["changes"]) or ["the fleet is as configured: nothing to change"]
    out += [f"note: {note}" for note in found["notes"]]
    out += [f"REFUSED: {refusal}" for refusal in found["refusals"]]
    if found["changes"]:
        (old, of_old), (new, of_new) = found["quorum_before"], found["quorum_after"]
        out.append(f"fence quorum: {old} of {of_old} before, {new} of {of_new} after")
        out += found["sentences"]
    out += [f"warning: {warning}" for warning in found["warnings"]]
    if found["changed"]:
        out.append(f"done: this is fleet {found['fleet']} now")
    elif found["changes"]:
        out.append("nothing was changed")
    return out
