"""Plays one seed: what a failed test printed, or as long a game as there is time for.

python -m tests.fsx --seed 7 --operations 100000
"""

from __future__ import annotations

import argparse

from tests.fsx.game import Game, field_of_play
from tests.support import scratch


def main() -> None:
    """Plays, and says what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--games", type=int, default=1, help="so many seeds, from --seed on")
    arguments = parser.parse_args()
    with scratch.scratch_directory("fsx") as place, field_of_play(place) as fs:
        for seed in range(arguments.seed, arguments.seed + arguments.games):
            print(seed, Game(fs, seed, arguments.operations).play(), flush=True)


if __name__ == "__main__":
    main()
