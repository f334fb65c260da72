"""Draws what `scripts/bench --json` printed: `.venv/bin/python scripts/plot.py BENCH.json [OTHER] > FILE.svg`.

OTHER is what DIR is compared with: `floor` (default) or `AGAINST`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from drift import drift_svg
from svg import Bar, bars

TITLES = {
    "floor": "qsfs as a multiple of the floor (rates; above 1: qsfs is faster)",
    "AGAINST": "qsfs as a multiple of the local disk (rates; above 1: qsfs is faster)",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="plot", description="Draw the report of scripts/bench as SVG.")
    parser.add_argument("report", type=Path, metavar="BENCH.json")
    parser.add_argument("other", nargs="?", choices=list(TITLES), default="floor")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    if "thirds" in report:
        sys.stdout.write(drift_svg(report))
        return 0
    given = ratio_bars(report, arguments.other)
    if not given:
        parser.error(f"{arguments.report} compares nothing with {arguments.other}")
    sys.stdout.write(bars(given, TITLES[arguments.other]))
    return 0


def ratio_bars(report: dict[str, Any], other: str) -> list[Bar]:
    """A bar for each measure that has a ratio to `other`."""
    return [
        Bar(result["what"], result["ratio"][other])
        for result in report["measures"]
        if result["ratio"].get(other) is not None
    ]


if __name__ == "__main__":
    sys.exit(main())
