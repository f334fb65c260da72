"""What a drill reads, and what it found: the plan, the tally, and what of it is proven.  No I/O.

Three results of reading are never mixed: what was read and verified, what did not come (nothing is
known of it), and what is positively lost or wrong.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

MOST_NAMED = 20
"""Problems of one kind that are named; all are counted."""
LEAST_EXTENTS = 64
"""A sample of a file system that has so many holds at least so many extents, however small the share."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`share` of all extents is read (1: all of them), chosen by `seed`."""

    share: float
    seed: int

    def chooser(self, extents: int) -> Chooser:
        """Chooses among so many extents, asked for in their order."""
        return Chooser(self, extents)


class Chooser:
    """Says of one extent after the other whether it belongs to the sample: never to none of them."""

    def __init__(self, plan: Plan, extents: int) -> None:
        self.wanted = extents if plan.share >= 1 else min(extents, max(LEAST_EXTENTS, round(plan.share * extents)))
        self._left = extents
        self._random = random.Random(plan.seed)

    def next(self) -> bool:
        """Whether the next extent is read.  Exactly `wanted` of all are."""
        chosen = self._random.random() * self._left < self.wanted
        self._left -= 1
        self.wanted -= chosen
        return chosen


class Verdict(Enum):
    """What a drill says in one word.  `FAILED`: something is lost, wrong or differs from the mount."""

    PROVEN = "proven"
    NOT_PROVEN = "not proven"
    FAILED = "failed"


@dataclass(slots=True)
class Problems:
    """Things that went wrong in one way: how many, and the first of them in words."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    @property
    def wants_names(self) -> bool:
        """Whether the next one is still named."""
        return len(self.named) < MOST_NAMED

    def add(self, what: str) -> None:
        """Counts one more."""
        self.count += 1
        if self.wants_names:
            self.named.append(what)


@dataclass(slots=True)
class Compared:
    """Pages that were read here and asked for at the mount.

    `remote`: the mount holds them on the backends only, so there is nothing to compare; `changed`:
    they were written again since the generation, or are gone.
    """

    same: int = 0
    remote: int = 0
    changed: int = 0
    differ: Problems = field(default_factory=Problems)


@dataclass(slots=True)
class ComparedRows:
    """Rows of names and attributes that were asked for at the mount.

    `changed`: they are not the same there, and may have changed since the generation; `differ`: they have not
    changed since, and are not the same.
    """

    same: int = 0
    changed: int = 0
    differ: Problems = field(default_factory=Problems)
    failure: str = ""


@dataclass(slots=True)
class Tally:
    """What reading the contents gave.  `gave_up`: so little came that the rest was not tried.

    `spares` counts the packs that were looked at by how many more of their shards may be lost (below 0:
    too few are left, or answered), `not_looked` those of which it did not become known in time;
    `unlisted` counts shards that backends positively lack.
    """

    all_extents: int = 0
    all_bytes: int = 0
    chosen_extents: int = 0
    chosen_bytes: int = 0
    read_extents: int = 0
    read_bytes: int = 0
    downloaded_bytes: int = 0
    decoded_packs: int = 0
    seconds: float = 0.0
    gave_up: bool = False
    missing: Problems = field(default_factory=Problems)
    lost: Problems = field(default_factory=Problems)
    wrong: Problems = field(default_factory=Problems)
    spares: Counter[int] = field(default_factory=Counter)
    not_looked: int = 0
    unlisted: int = 0
    compared: Compared | None = None
    compare_failure: str = ""
    rows: ComparedRows | None = None

    @property
    def whole(self) -> bool:
        """Whether all contents were read, not a sample."""
        return self.read_extents == self.all_extents

    @property
    def verdict(self) -> Verdict:
        """What was shown of what was to be read."""
        differ = 0 if self.compared is None else self.compared.differ.count
        differ += 0 if self.rows is None else self.rows.differ.count
        if self.lost.count or self.wrong.count or differ:
            return Verdict.FAILED
        return Verdict.PROVEN if self.read_extents == self.chosen_extents else Verdict.NOT_PROVEN

    @property
    def bytes_per_second(self) -> float | None:
        """Contents read in a second; None where too little was read to tell."""
        return self.read_bytes / self.seconds if self.read_bytes and self.seconds > 0 else None

    @property
    def seconds_for_all(self) -> float | None:
        """How long reading all contents takes at that rate."""
        rate = self.bytes_per_second
        return None if rate is None else self.all_bytes / rate
