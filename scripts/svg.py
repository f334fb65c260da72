"""Small plots as SVG, without a library: panels of lines over time, and bars of ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_COLOURS = ("#1f5fa8", "#d1641b", "#3f8f3f", "#8a4fa3")
_STYLE = (
    "<style>text{font:11px sans-serif;fill:#222}"
    ".t{font-weight:bold}.e{text-anchor:end}.m{text-anchor:middle}</style>"
)
_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP = 760, 118, 60, 12, 24


@dataclass(frozen=True)
class Line:
    """A line of a panel: its name, and (x, y) points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A title that names the unit, and the lines; y begins at 0."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Bar:
    """A named ratio."""

    name: str
    ratio: float


def panels(given: Sequence[Panel], x_title: str) -> str:
    """The panels one below the other over the same x axis."""
    last = max((x for panel in given for line in panel.lines for x, _ in line.points), default=1.0) or 1.0
    height = _TOP + _PANEL * len(given) + 24
    out: list[str] = []
    for index, panel in enumerate(given):
        out += _panel(panel, _TOP + index * _PANEL, last)
    step = nice(last / 6)
    for tick in range(int(last / step) + 1):
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * tick * step / last
        out.append(f'<text class="m" x="{x:.1f}" y="{height - 22}">{tick * step:g}</text>')
    out.append(f'<text class="m" x="{_WIDTH / 2}" y="{height - 6}">{escape(x_title)}</text>')
    return _document(_WIDTH, height, out)


def bars(given: Sequence[Bar], title: str) -> str:
    """A bar for each ratio, with a line at 1."""
    left, row, top = 300, 18, 34
    most = max([1.0, *(bar.ratio for bar in given)])
    scale = (_WIDTH - left - 50) / most
    height = top + row * len(given) + 8
    out = [f'<text class="t" x="8" y="18">{escape(title)}</text>']
    for index, bar in enumerate(given):
        y = top + index * row
        colour = _COLOURS[0] if bar.ratio >= 1 else _COLOURS[1]
        out += [
            f'<text class="e" x="{left - 8}" y="{y + 11}">{escape(bar.name)}</text>',
            f'<rect x="{left}" y="{y + 1}" width="{bar.ratio * scale:.1f}" height="12" fill="{colour}"/>',
            f'<text x="{left + bar.ratio * scale + 4:.1f}" y="{y + 11}">{bar.ratio:.2f}</text>',
        ]
    x = left + scale
    out.append(f'<path d="M{x:.1f} {top - 6}V{height - 6}" stroke="#222" stroke-dasharray="3 2"/>')
    out.append(f'<text class="m" x="{x:.1f}" y="{top - 9}">1</text>')
    return _document(_WIDTH, height, out)


def nice(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least * (1 - 1e-9)), 10 * power)


def _panel(panel: Panel, top: float, last: float) -> Iterable[str]:
    height = _PANEL - 34
    most = nice(max((y for line in panel.lines for _, y in line.points), default=1.0))
    out = [f'<text class="t" x="{_LEFT}" y="{top - 6}">{escape(panel.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = top + height * (1 - share)
        out.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        out.append(f'<text class="e" x="{_LEFT - 6}" y="{y + 4:.1f}">{most * share:,g}</text>')
    for number, line in enumerate(panel.lines):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(
            f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * x / last:.1f},{top + height * (1 - y / most):.1f}"
            for x, y in line.points
        )
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        x = _WIDTH - _RIGHT - 90 * (len(panel.lines) - 1 - number)
        out.append(f'<text class="e" x="{x}" y="{top - 6}" style="fill:{colour}">{escape(line.name)}</text>')
    return out


def _document(width: int, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{_STYLE}<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
