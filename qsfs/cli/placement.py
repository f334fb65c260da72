"""`qsfs placement check`: which losses of backends, nodes and groups are survived now."""

from __future__ import annotations

import argparse
from typing import Any

from qsfs.errors import DataLost, NotRunning, QsfsError

_KINDS = (("backend", "backends"), ("node", "nodes"), ("group", "groups"))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `placement` and its subcommands."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "placement",
        help="show which losses of backends are survived",
        description="Show which losses of backends are survived.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="what would be lost with a backend, node or group",
        description="From where the shards of all packs are recorded to lie: which losses are survived now, for each "
        "group, node and backend, or for all that --lose names together. Works mounted and unmounted; no backend is "
        "asked. Data that are only local are not counted: 'qsfs status' shows them. Exit 21 if packs would be (or "
        "are) lost, 1 if a promise of the configuration does not hold.",
    )
    check.add_argument(
        "--lose", metavar="WHAT", nargs="+", action="extend", default=[],
        help="a backend (its number, address or address/namespace), group:NAME or node:NAME; may be repeated",
    )  # fmt: skip
    add_unlock_options(check)


def run(args: argparse.Namespace) -> int:
    """Prints the check.  Raises what the daemon or the local store say."""
    import trio

    from qsfs.cli.output import print_json
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.daemon import control

    config = Config.load(args.config)
    try:
        found = control.ask(config.cache.directory, "placement", timeout=300, lose=args.lose)
    except NotRunning:
        from qsfs.cli.unlock import unlocking
        from qsfs.daemon.placing import check_unmounted

        secret = unlocking(args)
        found = trio.run(lambda: check_unmounted(config, SystemClock(), args.lose, secret=secret))
    if args.json:
        print_json(found)
    else:
        for line in lines(found, lose=bool(args.lose)):
            print(line)
    if any(may is not None and may < 0 for may in found["any_may_be_lost"].values()):
        return DataLost.exit_code
    if args.lose and not found["losses"][0]["survived"]:
        return DataLost.exit_code
    return QsfsError.exit_code if found["broken_promises"] else 0


def lines(found: dict[str, Any], *, lose: bool) -> list[str]:
    """The check as text."""
    from qsfs.values import counted, format_size

    packs = found["packs"]
    out = [f"warning: {sentence}" for sentence in found["broken_promises"]]
    if not packs["full"] + packs["written"]:
        return [*out, "nothing is on the backends yet", *found["sentences"]]
    out.append(
        f"{counted(packs['full'], 'full pack')}, {counted(packs['written'], 'pack')} not full, "
        f"{format_size(packs['bytes'])} in all"
    )
    if found["shards_outside_the_fleet"]:
        out.append(f"{counted(found['shards_outside_the_fleet'], 'shard')} on backends that are not in the fleet")
    if found["down_now"]:
        names = ", ".join(found["backend_names"][str(number)] for number in found["down_now"])
        out.append(f"do not answer now: {names}")
    if lose:
        out += _imagined(found)
    else:
        out += _table(found)
        out += _any(found)
    return [*out, *found["sentences"]]


def _table(found: dict[str, Any]) -> list[str]:
    from qsfs.cli.output import format_table

    rows = [
        (
            loss["what"],
            len(loss["backends"]),
            "yes" if loss["survived"] else "NO",
            max(0, loss["spare"]),
            loss["lost"]["full"],
            loss["lost"]["written"],
            "yes" if loss["flushing"] else "no",
            "yes" if loss["restore_proved"] else "no",
        )
        for loss in found["losses"]
    ]
    headers = ("loss of", "backends", "survived", "spare shards", "full packs lost", "others lost", "flushing goes on",
               "restore proved")  # fmt: skip
    out = [format_table(headers, rows)]
    for loss in found["losses"]:
        if not loss["survived"]:
            out.append(f"worst without {loss['what']}: {_worst(found, loss)}")
    return out


def _any(found: dict[str, Any]) -> list[str]:
    out = []
    for kind, plural in _KINDS:
        may, full = found["any_may_be_lost"][kind], found["any_may_be_lost_of_full"][kind]
        if may < 0:
            out.append(f"SOME PACKS ARE LOST NOW: they have fewer than {found['code']['data_shards']} shards")
            break
        line = f"any {may} {kind if may == 1 else plural} may be lost now"
        if full is not None and full > may:
            line += f" (what is full survives any {full})"
        out.append(line)
    return out


def _imagined(found: dict[str, Any]) -> list[str]:
    out = []
    for loss in found["losses"]:
        out += _imagined_one(found, loss)
    return out


def _imagined_one(found: dict[str, Any], loss: dict[str, Any]) -> list[str]:
    from qsfs.values import counted, format_size

    lost = loss["lost"]["full"] + loss["lost"]["written"]
    names = ", ".join(found["backend_names"][str(number)] for number in loss["backends"])
    out = [f"without {loss['what']} ({names}):"]
    if loss["survived"]:
        out.append(f"  everything can be read; the worst pack has {counted(loss['spare'], 'shard')} to spare")
    else:
        out.append(
            f"  LOST: {counted(loss['lost']['full'], 'full pack')} and {counted(loss['lost']['written'], 'other')}, "
            f"{format_size(loss['lost']['bytes'])} ({counted(lost, 'pack')})"
        )
    out.append(f"  worst: {_worst(found, loss)}")
    flushing = "goes on" if loss["flushing"] else "stops"
    proof = "can prove" if loss["restore_proved"] else "CANNOT prove"
    out.append(f"  flushing {flushing}; a restore {proof} that its generation is the newest")
    return out


def _worst(found: dict[str, Any], loss: dict[str, Any]) -> str:
    k = found["code"]["data_shards"]
    return ", ".join(f"{pack['pack']} ({pack['class']}, {pack['shards']} shards of {k})" for pack in loss["worst"])
