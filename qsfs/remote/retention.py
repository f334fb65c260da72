"""Which automatic snapshots stay, and when the next is due.  Pure, and indifferent to clocks that jump.

Only automatic snapshots are ever chosen.  Their times come from their names; which of two was made
later comes from their generations, since a clock may have been set back between them.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qsfs.remote.snapshots import AUTOMATIC, Snapshot

_FORM = f"{AUTOMATIC}%Y%m%dT%H%M%SZ"
_HOUR = 3600
_DAY = 86400
_MONDAY = 3
"""Days from a Monday to the day from which times are counted, a Thursday."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How many automatic snapshots stay: the last ones, and the last of each of the last hours, days, weeks.

    Hours, days (of UTC) and weeks in which none was made do not count.  With no rule at all, all stay.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0


def automatic_name(time_ns: int) -> str:
    """The name of an automatic snapshot that is made at this time."""
    return datetime.datetime.fromtimestamp(time_ns // 1_000_000_000, datetime.UTC).strftime(_FORM)


def automatic_time(name: str) -> int | None:
    """Seconds since 1970 of an automatic snapshot; None for the name of any other."""
    try:
        time = datetime.datetime.strptime(name, _FORM)
    except ValueError:
        return None
    return int(time.replace(tzinfo=datetime.UTC).timestamp())


def surplus(snapshots: Iterable[Snapshot], rules: Rules) -> list[str]:
    """The names of the automatic snapshots that no rule keeps; `snapshots` are all, in any order."""
    if rules == Rules():
        return []
    found = [
        (snapshot.name, time)
        for snapshot in sorted(snapshots, key=lambda snapshot: snapshot.head)
        if (time := automatic_time(snapshot.name)) is not None
    ]
    found.reverse()
    periods: list[tuple[int, Callable[[int], int]]] = [
        (rules.hourly, lambda time: time // _HOUR),
        (rules.daily, lambda time: time // _DAY),
        (rules.weekly, lambda time: (time // _DAY + _MONDAY) // 7),
    ]
    stay = {name for name, _ in found[: rules.last]}
    for count, period in periods:
        seen: set[int] = set()
        for name, time in found:
            if len(seen) < count and period(time) not in seen:
                seen.add(period(time))
                stay.add(name)
    return [name for name, _ in reversed(found) if name not in stay]


def seconds_until_due(snapshots: Iterable[Snapshot], every_seconds: float, now_ns: int) -> float:
    """How long until the next automatic snapshot is due: 0 if it is, or if there is none yet.

    If the last one is later than now a clock was set back: then it counts as made just now.
    """
    made = [snapshot for snapshot in snapshots if automatic_time(snapshot.name) is not None]
    if not made:
        return 0.0
    time = automatic_time(max(made, key=lambda snapshot: snapshot.head).name) or 0
    return max(0.0, every_seconds - max(0.0, now_ns / 1e9 - time))
