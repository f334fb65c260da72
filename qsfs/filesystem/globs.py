"""Glob patterns over names and paths of bytes.

`*` and `?` match anything but `/`, `**` as a whole component matches any number of components,
`[...]` is a class (`[!...]` its complement).  Patterns are UTF-8; names need not be.
"""

from __future__ import annotations

import re

_ANY_COMPONENTS = "(?:[^/]+/)*"


def compile_glob(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression over `as_text` of a name or path."""
    components = pattern.strip("/").split("/")
    parts = []
    for number, component in enumerate(components):
        last = number == len(components) - 1
        if component == "**":
            parts.append(".*" if last else _ANY_COMPONENTS)
        else:
            parts.append(_translate(component) + ("" if last else "/"))
    return re.compile("".join(parts), re.DOTALL)


def as_text(name: bytes) -> str:
    """A name or path as text that a compiled glob matches; any bytes are allowed."""
    return name.decode("utf-8", "surrogateescape")


def _translate(component: str) -> str:
    """One component without `/` as a regular expression."""
    parts: list[str] = []
    at = 0
    while at < len(component):
        char = component[at]
        at += 1
        if char == "*":
            if parts[-1:] != ["[^/]*"]:
                parts.append("[^/]*")
        elif char == "?":
            parts.append("[^/]")
        elif char == "[" and (end := _class_end(component, at)) is not None:
            parts.append(_class(component[at:end]))
            at = end + 1
        else:
            parts.append(re.escape(char))
    return "".join(parts)


def _class_end(component: str, start: int) -> int | None:
    """Where the class that begins at `start` ends; None if it does not: then `[` stands for itself."""
    first = start + 1 if component[start : start + 1] == "!" else start
    end = component.find("]", first + 1)
    return None if end < 0 else end


def _class(text: str) -> str:
    """The inside of a glob class as a regular expression that never matches `/`."""
    negated, text = text.startswith("!"), text.removeprefix("!")
    members = text.replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[").replace("]", r"\]")
    members = re.sub(r"([&~|])", r"\\\1", members)
    return f"(?!/)[{'^' if negated else ''}{members}]"
