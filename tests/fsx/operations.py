"""What is done to the files, drawn from a seed: the same seed and count give the same operations anywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PAGE = 4096
HUGE = 1 << 40
_WORD = 8

# Policies that change how a file is written and synced; the names match those of the presets.
PLAIN, OTHER, ATOMIC, THROUGH = "plain", "other", "data.mdb", "through"
FILES = (PLAIN, OTHER, ATOMIC, THROUGH)
POLICIES = [{"match": THROUGH, "write_through": True}]

_WEIGHTS = {
    "read": 14,
    "write": 16,
    "append": 4,
    "map_read": 10,
    "map_write": 11,
    "truncate": 12,
    "copy": 5,
    "sync": 4,
    "reopen": 4,
    "drop": 6,
    "direct_read": 2,
    "direct_write": 2,
    "balloon": 2,
    "check": 1,
}

# What happens to the machine in the middle, once in about so many operations.
_EVENTS = {"publish": 350, "evict": 400, "remount": 3500, "kill": 3500, "restore": 5000}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: its number, what it does, to which file, and with what."""

    number: int
    kind: str
    file: str = ""
    offset: int = 0
    size: int = 0
    source: str = ""
    source_offset: int = 0
    variant: int = 0

    def __str__(self) -> str:
        words = [f"{self.number:>7} {self.kind}"]
        words += [f"{name}={value}" for name, value in self.details()]
        return " ".join(words)

    def details(self) -> Iterator[tuple[str, Any]]:
        """The fields that say something."""
        for name in ("file", "offset", "size", "source", "source_offset", "variant"):
            if value := getattr(self, name):
                yield name, value

    @property
    def on_machine(self) -> bool:
        """Whether it concerns everything."""
        return self.kind in _EVENTS

    def touches(self, file: str) -> bool:
        """Whether it may have to do with the contents of `file`."""
        return self.on_machine or self.file == file


def content(number: int, offset: int, size: int) -> bytes:
    """What operation `number` writes at `offset`: most say from where they are, some do not compress."""
    if number % 4 == 3:
        return random.Random(number).randbytes(size)
    word = b"%07x " % (number & 0xFFFFFFF)
    start = offset % _WORD
    return (word * (size // _WORD + 2))[start : start + size]


def operations(seed: int, count: int) -> Iterator[Operation]:
    """`count` operations; each fits the sizes that those before it left."""
    choose = random.Random(seed)
    longest = choose.choice((40_000, 200_000, 700_000))
    sizes = dict.fromkeys(FILES, 0)
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    for number in range(1, count + 1):
        event = _event(choose)
        if event:
            yield Operation(number, event)
            continue
        file = choose.choices(FILES, (5, 3, 3, 1))[0]
        kind = choose.choices(kinds, weights)[0]
        if file == THROUGH and kind.startswith("map"):
            # Written past the kernel's cache: such a file has no shared maps.
            kind = kind.removeprefix("map_")
        operation = _fitting(choose, number, kind, file, sizes, longest)
        _resize(operation, sizes)
        yield operation


def _event(choose: random.Random) -> str:
    for event, rarity in _EVENTS.items():
        if choose.randrange(rarity) == 0:
            return event
    return ""


def _fitting(
    choose: random.Random, number: int, kind: str, file: str, sizes: dict[str, int], longest: int
) -> Operation:
    held = sizes[file]
    variant = choose.randrange(4)
    if kind in ("read", "map_read", "direct_read"):
        offset = _place(choose, held)
        size = min(_length(choose), held - offset)
        if size <= 0 and kind != "read":
            return Operation(number, "read", file, 0, held)
        if kind == "direct_read":
            offset, size = offset - offset % PAGE, size + -size % PAGE
        return Operation(number, kind, file, offset, max(size, 0), variant=variant)
    if kind in ("write", "map_write", "direct_write"):
        # A file ends at `longest`; some writes leave a hole behind its end.
        offset = _place(choose, longest if choose.randrange(4) == 0 else held)
        size = max(1, min(_length(choose), longest - offset))
        if kind == "direct_write":
            offset, size = offset - offset % PAGE, size + -size % PAGE
        return Operation(number, kind, file, offset, size, variant=variant)
    if kind == "append":
        return Operation(number, kind, file, held, _length(choose) if held < longest else 1)
    if kind in ("truncate", "balloon"):
        to = choose.choice((0, held, choose.randint(0, longest), choose.randint(0, held), held - held % PAGE))
        to += choose.choice((0, 0, 0, 1, -1))
        return Operation(number, kind, file, min(max(0, to), longest), variant=variant)
    if kind == "copy":
        source = choose.choice(FILES)
        start = _place(choose, sizes[source])
        size = min(_length(choose), sizes[source] - start)
        if size <= 0:
            return Operation(number, "check", file)
        offset = min(_place(choose, held), longest - 1)
        if source == file and start < offset + size and offset < start + size:
            return Operation(number, "read", file, start, size)
        return Operation(number, kind, file, offset, size, source, start, variant)
    return Operation(number, kind, file, variant=variant)


def _place(choose: random.Random, size: int) -> int:
    """An offset up to `size`: anywhere, near a page's edge, or near the end."""
    where = choose.randrange(6)
    if where == 0:
        offset = size - choose.randint(0, min(size, 300))
    else:
        offset = choose.randint(0, size)
        if where < 4:
            offset += choose.randint(-3, 3) - offset % PAGE
    return min(max(0, offset), size)


def _length(choose: random.Random) -> int:
    return choose.choice(
        (choose.randint(1, 100), choose.randint(1, PAGE), PAGE, choose.randint(1, 5 * PAGE), choose.randint(1, 66_000))
    )


def _resize(operation: Operation, sizes: dict[str, int]) -> None:
    if operation.kind in ("write", "map_write", "direct_write", "append", "copy"):
        sizes[operation.file] = max(sizes[operation.file], operation.offset + operation.size)
    elif operation.kind in ("truncate", "balloon"):
        sizes[operation.file] = operation.offset


def story(told: Sequence[Operation], file: str, last: int = 60) -> str:
    """The operations that led to a wrong `file`, the last ones of them."""
    lines = [str(operation) for operation in told if operation.touches(file)]
    left_out = f"... and {len(lines) - last} before\n" if len(lines) > last else ""
    return left_out + "\n".join(lines[-last:])
