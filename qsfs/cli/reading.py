"""What the commands print of read-only mounts: which generation, of what time, from which owner."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def generation_line(shown: Mapping[str, Any]) -> str:
    """The generation: "generation 12 (snapshot "x") of 2026-01-31 12:00:00 UTC, from host a (epoch 3)"."""
    wanted = shown["wanted"]
    why = f" ({wanted})" if wanted.startswith("snapshot") else ""
    host = f"host {shown['host']} (epoch {shown['epoch']})" if shown["host"] else f"the owner of epoch {shown['epoch']}"
    return f"generation {shown['generation']}{why} of {moment(shown['cut_at'])}, from {host}"


def status_lines(found: Mapping[str, Any], now: float) -> list[str]:
    """What `qsfs status` shows in place of exposure: nothing here can be lost."""
    from qsfs.values import counted, format_duration

    if "generation" not in found:
        return [f"read-only: {found['wanted']} is being looked for"]
    out = []
    if found["expired"]:
        out.append(
            f"EXPIRED: generation {found['generation']} is not kept any more and {found['expired_reads']} reads found "
            "its data deleted; remount to read a newer one"
        )
    age = format_duration(now - found["cut_at"])
    out.append(f"read-only: {generation_line(found)}, {age} old")
    looked = format_duration(now - found["looked_at"])
    if found["is_newest"]:
        out.append(f"it is the newest generation (seen {looked} ago)")
    else:
        behind = format_duration(found["behind_seconds"])
        out.append(f"the newest generation is {found['newest']}, {behind} newer (seen {looked} ago)")
    if found["mode"] == "follow":
        held = f", but stays here: {found['held']}" if found["held"] else ""
        out.append(f"follows the newest generation{held}; {found['moves']} moves so far")
        if found["donors"]:
            out.append(f"what is the same in {counted(found['donors'], 'older generation')} is not fetched again")
        for older in found["older"]:
            kept = "" if older["kept"] else ", not kept any more"
            out.append(f"generation {older['generation']}: {counted(older['open'], 'open file')}{kept}")
        if found["move_error"]:
            out.append(f"cannot move now: {found['move_error']}")
    if found["look_error"]:
        out.append(f"the newest head is not known now: {found['look_error']}")
    if not found["kept"] and not found["expired"] and found["mode"] == "fixed":
        out.append(
            f"not kept any more since {moment(found['not_kept_since'])}: its data stay for the writer's retention "
            "time ([flush] retention_hours); remount, or use --follow, to read a newer one"
        )
    return out


def moment(seconds: float) -> str:
    """A time for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
