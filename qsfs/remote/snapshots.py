"""Snapshots: generations that a head keeps under names.  Pure: which there are, and which one is meant.

A snapshot is a name in `KeptGeneration.pins`.  It holds once a head that carries it is published, and
until one is that does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qsfs.errors import ConfigError, LimitExceeded, NotFound
from qsfs.format.head import HeadRef, KeptGeneration

AUTOMATIC = "auto-"
"""How the names of automatic snapshots begin, and no other names."""
MOST_SNAPSHOTS = 1000
"""Names that a file system may have: every head lists them, and every reading of heads meets them."""
LONGEST_NAME = 64

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_LISTED = 20

Pins = Mapping[HeadRef, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A name, the head of the generation that it pins, and when that was cut."""

    name: str
    head: HeadRef
    time_ns: int

    @property
    def generation(self) -> int:
        """The number of the generation."""
        return self.head.generation


def snapshots_of(kept: Iterable[KeptGeneration]) -> list[Snapshot]:
    """All snapshots that a head's kept list holds, in the order in which they were cut."""
    return [Snapshot(name, entry.head, entry.time_ns) for entry in sorted(kept, key=_age) for name in entry.pins]


def check_form(name: str) -> str:
    """The name, if a snapshot may have it; else `ConfigError` with the rules."""
    if len(name) > LONGEST_NAME or _NAME.fullmatch(name) is None:
        raise ConfigError(
            f'"{name}" is not a name for a snapshot: 1 to {LONGEST_NAME} letters, digits, "." "_" "-", of which '
            "the first is a letter or digit"
        )
    return name


def check_name(name: str) -> str:
    """The name, if a person may give it to a snapshot; else `ConfigError` with the rules."""
    check_form(name)
    if name.isdigit():
        raise ConfigError(f'"{name}" looks like the number of a generation; give the snapshot a name with a letter')
    if name.startswith(AUTOMATIC):
        raise ConfigError(f'"{name}": names that begin with "{AUTOMATIC}" are those of automatic snapshots')
    return name


def check_new(name: str, taken: Iterable[str]) -> None:
    """Raises `ConfigError` if a snapshot has this name already, `LimitExceeded` if there are too many."""
    names = set(taken)
    if name in names:
        raise ConfigError(f'there is a snapshot "{name}" already; give another name, or delete that one')
    if len(names) >= MOST_SNAPSHOTS:
        raise LimitExceeded(f"there are {len(names)} snapshots, and {MOST_SNAPSHOTS} are possible: delete some")


def find_snapshot(kept: Iterable[KeptGeneration], name: str) -> KeptGeneration:
    """The kept generation that the snapshot `name` pins; `NotFound`, naming some that there are."""
    entries = list(kept)
    for entry in entries:
        if name in entry.pins:
            return entry
    names = [snapshot.name for snapshot in reversed(snapshots_of(entries))]
    there = ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")
    raise NotFound(f'there is no snapshot "{name}"; ' + (f"there are: {there}" if names else "there is none at all"))


def find_generation(kept: Iterable[KeptGeneration], generation: int) -> KeptGeneration:
    """The kept generation with this number; `NotFound`, naming those that are kept.

    A new owner's first head repeats the image and the number of the head that it found: then the newest
    of them is meant.
    """
    entries = sorted(kept, key=_age)
    found = [entry for entry in entries if entry.head.generation == generation]
    if found:
        return found[-1]
    if entries and generation > entries[-1].head.generation:
        raise NotFound(f"generation {generation} is not there yet; the newest is {entries[-1].head.generation}")
    there = list(dict.fromkeys(map(_described, entries)))
    shown = ", ".join(["...", *there[-_MOST_LISTED:]] if len(there) > _MOST_LISTED else there) or "none"
    raise NotFound(f"generation {generation} is not kept any more; kept are {shown}")


def find_kept(kept: Iterable[KeptGeneration], which: str) -> KeptGeneration:
    """The kept generation that `which`, a snapshot's name or a generation's number, means; `NotFound`.

    As those above it looks in `kept` alone, and a head does not list itself: see `readable.readable`.
    """
    if which.isascii() and which.isdigit():
        return find_generation(kept, int(which))
    return find_snapshot(kept, which)


def pins_of(kept: Iterable[KeptGeneration]) -> dict[HeadRef, tuple[str, ...]]:
    """The names by head, of the generations that have some."""
    return {entry.head: entry.pins for entry in kept if entry.pins}


def with_name(pins: Pins, head: HeadRef, name: str) -> dict[HeadRef, tuple[str, ...]]:
    """The pins, and `name` on `head`."""
    return {**pins, head: (*(pins.get(head, ())), name)}


def without_names(pins: Pins, names: Iterable[str]) -> dict[HeadRef, tuple[str, ...]]:
    """The pins but those with these names."""
    gone = set(names)
    left = {head: tuple(name for name in held if name not in gone) for head, held in pins.items()}
    return {head: held for head, held in left.items() if held}


def _age(entry: KeptGeneration) -> HeadRef:
    return entry.head


def _described(entry: KeptGeneration) -> str:
    return f"{entry.head.generation}" + (f" ({', '.join(entry.pins)})" if entry.pins else "")
