"""Glob patterns over names and paths of bytes.

`*` and `?` match anything but `/`, `**` as a whole component matches any number of components,
`[...]` is a class (`[!...]` its complement).  Patterns are UTF-8; names need not be.

What lies between two stars has a fixed length, so its leftmost match is as good as any other and is
never given up (an atomic group): no pattern takes more than quadratic time.
"""

from __future__ import annotations

import re


def compile_glob(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression over `as_text` of a name or path."""
    segments: list[list[str]] = [[]]
    for component in pattern.strip("/").split("/"):
        if component == "**":
            segments.append([])
        else:
            segments[-1].append(_translate(component))
    first, *others = segments
    if not others:
        return re.compile("/".join(first), re.DOTALL)
    parts = [component + "/" for component in first]
    *middle, last = others
    parts += ["(?>(?:[^/]+/)*?" + "".join(f"{c}/" for c in segment) + ")" for segment in middle if segment]
    parts.append("(?:[^/]+/)*" + "/".join(last) if last else ".+")
    return re.compile("".join(parts), re.DOTALL)


def as_text(name: bytes) -> str:
    """A name or path as text that a compiled glob matches; any bytes are allowed."""
    return name.decode("utf-8", "surrogateescape")


def _translate(component: str) -> str:
    """One component without `/` as a regular expression."""
    pieces = [""]
    at = 0
    while at < len(component):
        char = component[at]
        at += 1
        if char == "*":
            pieces.append("")
        elif char == "?":
            pieces[-1] += "[^/]"
        elif char == "[" and (end := _class_end(component, at)) is not None:
            pieces[-1] += _class(component[at:end])
            at = end + 1
        else:
            pieces[-1] += re.escape(char)
    first, *others = pieces
    if not others:
        return first
    *middle, last = others
    return first + "".join(f"(?>[^/]*?{piece})" for piece in middle if piece) + "[^/]*" + last


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
