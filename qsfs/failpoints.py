"""Named points in flush, publish, commit and replay at which a test may crash, fail or pause.

Production code calls `hit("flush.cut.sealed")`; nothing is armed there, so it costs one check of
an empty dictionary.  A test arms a point with an action, which may raise, kill the process or
block.  `QSFS_FAILPOINTS="[FIRST[@COUNT]>]name=kill[@COUNT],..."` arms points in a command or daemon that a
test starts: `kill` sends SIGKILL to the process at the COUNT-th hit (default the first), where FIRST is given
only counting from its own COUNT-th hit on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial

_armed: dict[str, Callable[[], None]] = {}


def hit(name: str) -> None:
    """Runs the action armed at `name`, if any."""
    if _armed and (action := _armed.get(name)) is not None:
        action()


def arm(name: str, action: Callable[[], None]) -> None:
    """Arms `name` with `action`, replacing what was armed there."""
    _armed[name] = action


def disarm(name: str) -> None:
    """Disarms `name`; nothing happens if it was not armed."""
    _armed.pop(name, None)


def disarm_all() -> None:
    """Disarms every point."""
    _armed.clear()


def arm_from_environment(setting: str) -> None:
    """Arms the points of a `QSFS_FAILPOINTS` value.

    Raises `ValueError` for an entry that is not `[FIRST[@COUNT]>]name=kill[@COUNT]`.
    """
    for entry in filter(None, setting.split(",")):
        names, _, verb = entry.partition("=")
        action, _, count = verb.partition("@")
        if action != "kill":
            raise ValueError(f"QSFS_FAILPOINTS: '{entry}' is not [FIRST[@COUNT]>]name=kill[@COUNT]")
        first, _, name = names.rpartition(">")
        kill = _at(int(count or "1"), lambda: os.kill(os.getpid(), signal.SIGKILL))
        if first:
            first, _, before = first.partition("@")
            arm(first, _at(int(before or "1"), partial(arm, name, kill)))
        else:
            arm(name, kill)


def _at(count: int, then: Callable[[], None]) -> Callable[[], None]:
    """An action that does `then` when it is run for the `count`-th time."""
    remaining = count

    def action() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            then()

    return action
