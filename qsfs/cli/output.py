"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from typing import Any


def print_json(value: Any) -> None:
    """Prints `value` as one JSON document; what JSON does not know is printed as its text."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, default=_plain)
    sys.stdout.write("\n")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of aligned columns; numbers and what looks like them to the right."""
    cells = [list(headers), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    to_the_right = [
        bool(rows) and all(_is_number(row[column]) for row in cells[1:]) for column in range(len(headers))
    ]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def format_time(seconds: float) -> str:
    """A time since 1970 for people, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _text(cell: object) -> str:
    return "-" if cell is None else str(cell)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell[:1].isdigit() or (cell[:1] == "-" and cell[1:2].isdigit())


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes | bytearray) else str(value)
