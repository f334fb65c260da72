"""Values as people write them: sizes, durations, addresses; each reader checks one kind.

Readers take what TOML (or a command line) delivered and return the typed value; they raise
`ValueError` with what is wrong and what would be right.  The caller adds which key and which file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Credential:
    """A secret that systemd hands to the service, by its name in the unit; as text `credential:NAME`."""

    name: str

    def __str__(self) -> str:
        return f"{CREDENTIAL}{self.name}"


CREDENTIAL = "credential:"

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kib": 1 << 10,
    "kb": 1000,
    "m": 1 << 20,
    "mib": 1 << 20,
    "mb": 1000**2,
    "g": 1 << 30,
    "gib": 1 << 30,
    "gb": 1000**3,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 1000**4,
}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: object) -> int:
    """Whole bytes from an integer or text such as "20GiB", "512 MiB", "4096".  Raises `ValueError`."""
    if isinstance(value, str):
        if value.lstrip().startswith("-"):
            raise ValueError(f'"{value}" is negative; a size is at least 0')
        found = _QUANTITY.fullmatch(value)
        unit = _SIZE_UNITS.get(found.group(2).lower()) if found else None
        if found is None or unit is None:
            raise ValueError(f'"{value}" is not a size; write bytes or a number with KiB, MiB, GiB or TiB')
        amount = float(found.group(1)) * unit if "." in found.group(1) else int(found.group(1)) * unit
        return int(amount)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{_shown(value)} is not a size; write whole bytes or text such as \"20GiB\"")
    if value < 0:
        raise ValueError(f"{value} is negative; a size is at least 0")
    return value


def parse_duration(value: object, unit: str = "s") -> float:
    """Seconds from a number (counted in `unit`) or text such as "30s", "10min", "24h".

    Raises `ValueError`.
    """
    if isinstance(value, str):
        found = _QUANTITY.fullmatch(value)
        factor = _DURATION_UNITS.get(found.group(2).lower() or unit) if found else None
        if found is None or factor is None:
            raise ValueError(f'"{value}" is not a duration; write a number with ms, s, min, h or d')
        return float(found.group(1)) * factor
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{_shown(value)} is not a duration; write a number or text such as \"30s\"")
    if value < 0:
        raise ValueError(f"{value} is negative; a duration is at least 0")
    return float(value) * _DURATION_UNITS[unit]


def parse_address(value: object) -> tuple[str, int]:
    """Host and port from "HOST:PORT" or "[IPV6]:PORT".  Raises `ValueError`."""
    if not isinstance(value, str):
        raise ValueError(f'{_shown(value)} is not an address; write "HOST:PORT"')
    host, colon, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not colon or not host or re.search(r"[\s/\[\]@]", host) or (":" in host and not bracketed):
        raise ValueError(f'"{value}" is not an address; write "HOST:PORT" or "[IPV6]:PORT"')
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f'"{value}": the port must be a number from 1 to 65535')
    return host, int(port)


def counted(number: int, what: str) -> str:
    """`1 shard`, `1,200 shards`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def format_size(count: float) -> str:
    """A size for people: "512 B", "64.0 MiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    step = 0
    while abs(count) >= 1024 and step < len(units) - 1:
        count /= 1024
        step += 1
    return f"{count:.0f} B" if step == 0 else f"{count:.1f} {units[step]}"


def format_duration(seconds: float) -> str:
    """A duration for people: "0.8 s", "12 s", "3 min 20 s", "5 h 2 min", "3 d 4 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for large, small, name, rest in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            major, minor = divmod(whole, large)
            return f"{major} {name} {minor // small} {rest}" if minor // small else f"{major} {name}"
    return f"{whole} s"


def text(value: object) -> str:
    """Any text without control characters."""
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is not text; put it in quotes")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError(f"{value!r} holds a control character")
    return value


def word(value: object) -> str:
    """A name of 1 to 128 characters without blanks or slashes."""
    checked = text(value)
    if not 0 < len(checked) <= 128 or re.search(r"[\s/]", checked):
        raise ValueError(f'"{checked}" is not a name: 1 to 128 characters, no blanks, no "/"')
    return checked


CODECS = {"zfec": "zfec", "isa-l": "isa_l_rs_cauchy", "isa_l_rs_cauchy": "isa_l_rs_cauchy"}
"""Erasure codecs as people may name them, and as the format does."""


def codec(value: object) -> str:
    """The format's name of an erasure codec that is named.  Raises `ValueError`."""
    checked = text(value)
    if checked not in CODECS:
        raise ValueError(f'"{checked}" is not a codec: "zfec" or "isa-l"')
    return CODECS[checked]


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{_shown(value)} must be true or false")
    return value


def fraction(value: object) -> float:
    """A number from 0 to 1."""
    return float(number(0.0, 1.0)(value))


def secret_file(value: object) -> Path | Credential:
    """A path, or `credential:NAME` for a secret that systemd hands over.  Raises `ValueError`."""
    if not isinstance(value, str) or not value.startswith(CREDENTIAL):
        path: Path = file_path(value)
        return path
    name = value.removeprefix(CREDENTIAL)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f'"{value}" names no credential; write credential:NAME as the unit calls it')
    return Credential(name)


def file_path(value: object) -> Path:
    """A path; `~` is the home directory.  Not resolved."""
    checked = text(value)
    if not checked:
        raise ValueError("an empty path")
    return Path(checked).expanduser()


def number(low: float, high: float) -> Reader:
    """A reader of numbers from `low` to `high`; whole ones where both bounds are whole."""
    whole = isinstance(low, int) and isinstance(high, int)

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{_shown(value)} is not a {'whole ' if whole else ''}number")
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range; it can be {low} to {high}")
        return value if whole else float(value)

    return read


def size(low: int) -> Reader:
    """A reader of sizes of at least `low` bytes."""

    def read(value: object) -> int:
        amount = parse_size(value)
        if not low <= amount < 1 << 63:
            raise ValueError(f"{_shown(value)} is out of range; it can be {format_size(low)} or more")
        return amount

    return read


def duration(low: float, high: float, unit: str = "s") -> Reader:
    """A reader of durations from `low` to `high` seconds; plain numbers count in `unit`."""

    def read(value: object) -> float:
        seconds = parse_duration(value, unit)
        if not low <= seconds <= high:
            bounds = f"{format_duration(low)} to {format_duration(high)}"
            raise ValueError(f"{_shown(value)} is out of range; it can be {bounds}")
        return seconds

    return read


def choice(*names: str) -> Reader:
    """A reader of one of `names`."""

    def read(value: object) -> str:
        if value not in names:
            raise ValueError(f"{_shown(value)} is not one of {', '.join(names)}")
        return str(value)

    return read


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
