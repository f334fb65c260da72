"""Recovery sheets: their text, for paper and for somebody who has nothing else, and making one with its slot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsfs.config import Config
    from qsfs.format.slots import Secret
    from qsfs.remote.key_slots import Changed, KeyState

_HOW = """\
Whoever reads this sheet and reaches the backends can read the file system. Keep it where you keep deeds.
It is worth nothing without the backends, and they are worth nothing without one such secret.

The secret. Letters are upper or lower case as you like; O is 0, I and L are 1; there is no U.
The last three characters of a line are its checksum: a typing error is found in its line.
"""

_RESTORE = """\
To restore, on a machine with qsfs and FUSE:
  1. Write qsfs.toml with the lines below (a password, if a backend has one, is not on this sheet).
  2. qsfs key from-sheet qsfs.key     and type the five lines
  3. qsfs -c . key verify             proves that it opens what the backends hold
  4. Stop the machine that wrote it, if it still runs. Then:
     qsfs -c . takeover && qsfs -c . mount
"""


def sheet_text(config: Config, state: KeyState, secret: bytes, now_ns: int, *, slot: int | None) -> str:
    """A sheet with `secret`, of key slot `slot` (None: that of a key file)."""
    from qsfs.format.sheet import sheet_lines

    superblock = state.found.superblock
    made = f"key slot {slot}" if slot is not None else "the secret of a key file"
    lines = [
        "RECOVERY SHEET of a qsfs file system",
        "",
        f"file system   {superblock.fsid.hex()}",
        f"label         {superblock.label or '-'}",
        f"created       {_day(superblock.created_ns)}",
        f"this sheet    {_day(now_ns)}, {made}",
        f"code          {superblock.code.k}+{superblock.code.m} shards (the backends know it too)",
        "",
        *_HOW.splitlines(),
        "",
        *(f"    {line}" for line in sheet_lines(secret)),
        "",
        *_RESTORE.splitlines(),
        "",
        "    [filesystem]",
        '    mountpoint = "mnt"',
        '    key_file = "qsfs.key"',
        "    [cache]",
        '    directory = "cache"',
        '    size = "20GiB"',
    ]
    for name in sorted(_backends(config, state)):
        address, _, namespace = name.partition("/")
        lines += ["    [[backend]]", f'    address = "{address}"', f'    namespace = "{namespace}"']
    return "\n".join(lines) + "\n"


def add_sheet(
    config: Config, secret: Secret, target: Path | None, *, replace: bool, show: Callable[[str, int], None]
) -> Changed:
    """Makes a sheet with a slot of its own, in `target`; what that replaces stays until the slot holds.

    Without a target `show` writes the text out, for the slot with this number, which is not made if that raises.
    """
    import trio

    from qsfs.clock import SystemClock
    from qsfs.daemon import keys
    from qsfs.daemon.secret import move_private, write_private
    from qsfs.format.key_changes import Change, add_slot

    clock = SystemClock()
    on_paper = clock.random_bytes(32)
    written = target
    shown = 0
    if target is not None and replace:
        written = target.with_name(f"{target.name}.{clock.random_bytes(4).hex()}")

    def make(superblock: Any, ring: Any, _: int, __: frozenset[int]) -> Change:
        nonlocal shown
        change = add_slot(superblock, ring, on_paper, clock)
        text = sheet_text(config, state, on_paper, clock.time_ns(), slot=change.slot)
        # First the paper, then the slot: a slot that nobody can open is worse than a sheet that opens nothing.
        if written is not None:
            write_private(written, text, clock)
        else:
            show(text, change.slot)
            shown = change.slot
        return change

    with keys.one_at_a_time(config):
        state = trio.run(lambda: keys.key_state(config, clock, secret))
        try:
            changed = trio.run(lambda: keys.change(config, clock, secret, make))
            if target is not None and written is not None and written != target:
                move_private(written, target)
        except BaseException:
            # Once it is written its slot may be made.
            if written is not None and written != target and written.exists():
                print(
                    f"{target} is as it was; the new sheet, whose key slot may be made, is {written}", file=sys.stderr
                )
            elif shown:
                print(
                    f"key slot {shown} may not be made, and the sheet that was printed open nothing: 'qsfs key verify "
                    "--sheet -' tells",
                    file=sys.stderr,
                )
            raise
    print(f"key slot {changed.change.slot} added, which the sheet opens; {changed.sentence()}", file=sys.stderr)
    return changed


def show_sheet(text: str, slot: int, *, as_json: bool) -> None:
    """Prints a sheet; once it returns that is out of this process.  `ConfigError` if it cannot be written there.

    `BrokenPipeError` if nobody reads it.
    """
    from qsfs.cli.output import print_json
    from qsfs.errors import ConfigError

    try:
        if as_json:
            print_json({"slot": slot, "file": None, "sheet": text})
        else:
            print(text, end="")
        sys.stdout.flush()
    except BrokenPipeError:
        print("nobody reads the sheet: no key slot was made", file=sys.stderr)
        raise
    except OSError as error:
        raise ConfigError(f"the sheet cannot be printed: {error.strerror}; no key slot was made") from None
    if slot:
        print(f"The sheet opens nothing until it is said that key slot {slot} was added.", file=sys.stderr)


def _backends(config: Config, state: KeyState) -> set[str]:
    """The fleet as the newest head names it, and what is configured beside."""
    entries = {f"{entry.address}/{entry.namespace}" for fleet in state.newest.head.fleets for entry in fleet.entries}
    return entries | {backend.name for backend in config.backends}


def _day(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d")
