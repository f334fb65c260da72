"""`python -m tests.support.workload NAME DIR ACKFILE --seed S --count N`; with `--verify` it judges instead.

Verifying prints one line for each thing that is wrong and exits with 1; a run exits with 0 when all its
steps are done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.support.workload.registry import WORKLOADS, run, verify


def main() -> int:
    """Runs or verifies one workload."""
    parser = argparse.ArgumentParser(prog="workload")
    parser.add_argument("name", choices=sorted(WORKLOADS))
    parser.add_argument("directory", type=Path, help="where to write, on the mount")
    parser.add_argument("acks", type=Path, help="what was promised, outside the mount")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--count", type=int, default=0, help="steps; 0 runs until killed")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the workload")
    parser.add_argument("--echo", action="store_true", help="print each acknowledged step")
    parser.add_argument("--verify", action="store_true", help="judge what a run left")
    chosen = parser.parse_args()
    if chosen.verify:
        problems = verify(chosen.directory, chosen.acks)
        print("\n".join(problems or ["everything is as promised"]))
        return 1 if problems else 0
    options = {key: _value(text) for key, _, text in (option.partition("=") for option in chosen.option)}
    run(
        chosen.name,
        chosen.directory,
        chosen.acks,
        seed=chosen.seed,
        count=chosen.count,
        echo=chosen.echo,
        **options,
    )
    return 0


def _value(text: str) -> object:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.isdigit() else text


if __name__ == "__main__":
    sys.exit(main())
