"""What many backends said, in one line that a person can read: equal reasons are told once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_NAMED = 8
"""So many names are all listed: somebody has to go to each.  Of more the first `NAMED`: one cause, likely."""
NAMED = 3

_PREFIX = "backend "


def listed(names: Iterable[str]) -> str:
    """`a, b, c` in order, each once; of more than `MOST_NAMED` some, and how many more."""
    found = sorted(set(names))
    if len(found) <= MOST_NAMED:
        return ", ".join(found)
    return f"{', '.join(found[:NAMED])} and {len(found) - NAMED} more"


def summary(errors: Iterable[object]) -> str:
    """The messages of `errors`, those of "backend NAME: REASON" grouped by reason; "" for none.

    The reason that most backends gave comes first; what names no backend comes before all.
    """
    others: dict[str, None] = {}
    groups: dict[str, list[str]] = {}
    for error in errors:
        name, colon, reason = str(error).removeprefix(_PREFIX).partition(": ")
        if colon and str(error).startswith(_PREFIX):
            groups.setdefault(reason, []).append(name)
        else:
            others[str(error)] = None
    told = [
        _told(reason, sorted(set(names)))
        for reason, names in sorted(groups.items(), key=lambda group: (-len(set(group[1])), group[0]))
    ]
    return "; ".join([*others, *told])


def _told(reason: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{_PREFIX}{names[0]}: {reason}"
    return f"{len(names)} backends: {reason} ({listed(names)})"
