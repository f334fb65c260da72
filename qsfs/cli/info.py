"""`qsfs info`: where the pages of a file lie, and what of them may be lost."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `info`."""
    parser = subparsers.add_parser(
        "info",
        help="show where a file's data lie",
        description="Show a file's pages by state, its packs, on which backends their shards lie, and how many "
        "of those may be lost; of a directory the sums over all below it. A symbolic link is shown itself, not what "
        "it names.",
    )
    parser.add_argument("path", metavar="FILE", help="on the mount")
    parser.add_argument("--extents", action="store_true", help="list extents, up to 500")
    parser.add_argument("--from-page", metavar="N", type=int, default=0, help="list extents from this page on")


def run(args: argparse.Namespace) -> int:
    """Prints what the daemon knows."""
    from qsfs.cli.output import print_json
    from qsfs.cli.paths import on_mount
    from qsfs.config import Config
    from qsfs.daemon.jobs import follow

    config = Config.load(args.config)

    def say(progress: dict[str, Any]) -> None:
        if sys.stderr.isatty():
            print(f"\r{progress.get('extents', 0):,} extents", end="", file=sys.stderr, flush=True)

    found = follow(
        config.cache.directory,
        "info",
        say,
        path=on_mount(config.filesystem.mountpoint, args.path),
        extents=args.extents,
        first_page=max(0, args.from_page),
    )
    if args.json:
        print_json(found)
    else:
        print("\n".join(lines(args.path, found, time.time())))
    return 0


def lines(path: str, found: dict[str, Any], now: float) -> Iterator[str]:
    """The answer as text; `now` is wall time in seconds."""
    from qsfs.values import counted, format_size

    policy = f", policy {', '.join(found['policy'])}" if found["policy"] else ""
    yield f"{path}: {found['kind']}, inode {found['inode']}{policy}"
    if found["kind"] == "directory":
        yield "contains, itself too: " + ", ".join(_kinds(found["contains"]))
    if "file" not in found["contains"]:
        return
    yield f"size {format_size(found['size'])} ({found['size']:,} bytes), allocated {format_size(found['allocated'])}"
    pages = found["pages"]
    named = [
        ("hole", "holes"),
        ("remote", "only on backends"),
        ("clean", "local, and on backends"),
        ("dirty", "local only, dirty"),
        ("uncovered", "not synced yet (atomic sync), in memory"),
    ]
    shown = [f"{pages[key]:,} {what}" for key, what in named if pages[key]]
    yield "pages of 4 KiB: " + (", ".join(shown) or "none")
    if pages["unpublished"]:
        yield f"  {pages['unpublished']:,} of those on backends are named by the next generation only ('qsfs sync')"
    if pages["dirty"] or pages["unpublished"]:
        exposed = (pages["dirty"] + pages["unpublished"]) * 4096
        yield f"  lost with this machine now: {format_size(exposed)}"
    yield from _packs(found, now)
    extents = found.get("listed_extents")
    if extents is not None:
        yield ""
        yield "   first page  pages       sealed  pack                              no."
        for extent in extents:
            yield (
                f"{extent['first_page']:>13}  {extent['pages']:>5}  {extent['sealed_bytes']:>11}  "
                f"{extent['pack']}  {extent['ordinal']:>3}"
            )
        if found["next_page"] is not None:
            of_all = counted(found["extents"], "extent")
            yield f"there are more, of {of_all}: go on with --from-page {found['next_page']}"


def _kinds(contains: dict[str, int]) -> Iterator[str]:
    for kind, count in contains.items():
        yield f"{count:,} {'directorie' if kind == 'directory' and count != 1 else kind}" + "s" * (count != 1)


def _packs(found: dict[str, Any], now: float) -> Iterator[str]:
    from qsfs.values import counted, format_duration

    packs = found["packs"]
    if not packs["count"]:
        yield "nothing of it is on the backends"
        return
    yield (
        f"{counted(found['extents'], 'extent')} in {counted(packs['count'], 'pack')}: {packs['full']:,} full, "
        f"{packs['written']:,} only written; {packs['looked']:,} found whole by the second look"
    )
    if packs["missing_rows"]:
        yield f"  DAMAGED: of {counted(packs['missing_rows'], 'pack')} the local record is missing; run 'qsfs fsck'"
    oldest = packs["oldest_look_at"]
    looked = "not yet" if oldest is None else f"{format_duration(max(0.0, now - oldest))} ago or later"
    yield f"  shards last found on their backends: {looked}"
    stored = min(map(int, packs["spare_shards"]), default=0)
    here = min(map(int, packs["spare_shards_now"]), default=0)
    yield f"  of each pack any {stored} of the stored shards may be lost"
    if here < 0:
        count = sum(number for spare, number in packs["spare_shards_now"].items() if int(spare) < 0)
        yield f"  UNREADABLE NOW: of {counted(count, 'pack')} too few shards lie on backends that answer"
    elif here != stored:
        yield f"  now that some backends do not answer: any {here} more"
    if packs["lost_with_one_group"]:
        yield f"  the loss of one whole group would end {counted(packs['lost_with_one_group'], 'pack')}"
    yield "  shards by backend: " + ", ".join(f"{name} {count:,}" for name, count in found["shards"].items())
    for pack in found["listed_packs"]:
        verified = pack["verified_at"]
        seen = "not yet" if verified is None else f"{format_duration(max(0.0, now - verified))} ago"
        spare = pack["spare_now"]
        now_may = f"may lose {spare} now" if spare >= 0 else f"lacks {counted(-spare, 'shard')} to be read now"
        yield f"  pack {pack['id']}: {pack['class']}, second look {seen}, {now_may}"
        yield "    " + " ".join(f"{i}:{name or 'nowhere'}" for i, name in enumerate(pack["shards"]))
    more = packs["count"] - packs["missing_rows"] - len(found["listed_packs"])
    if more > 0 and found["listed_packs"]:
        yield f"  and {counted(more, 'pack')} more"
