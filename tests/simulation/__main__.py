"""`python -m tests.simulation`: lives through histories, and says how to repeat one that fails."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.simulation import engine
from tests.simulation.cluster import prepare
from tests.simulation.history import History
from tests.support.scratch import begin_session, scratch_directory, session_directory, sweep, sweep_abandoned


def live(seed: int, steps: int = 0, *, keep: bool = False) -> tuple[str, Counter[str], engine.Trace, str]:
    """One history: the digest of its events, what happened how often, the events, and what is broken ("": nothing)."""
    prepare()
    trace = engine.Trace(keep)
    counts: Counter[str] = Counter()
    broken = ""
    with scratch_directory("sim") as root:

        async def main() -> None:
            nonlocal counts
            history = History(seed, root, trace, steps)
            counts = history.ledger.counts
            await history.run()

        try:
            engine.run(seed, main)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            broken = "".join(traceback.format_exception(error))
    return trace.digest, counts, trace, broken


def main(arguments: list[str]) -> int:
    """The command; returns how many histories broke a promise, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, help="one history, told in full")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=0, help="default: as the seed says")
    parser.add_argument("--trace", action="store_true", help="every call as well")
    options = parser.parse_args(arguments)
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.count)
    # Histories are short and leave cycles: the youngest are looked at less often.
    gc.set_threshold(20_000, 20, 100)
    total: Counter[str] = Counter()
    failed = 0
    begin = time.perf_counter()
    for seed in seeds:
        digest, counts, trace, broken = live(seed, options.steps, keep=options.trace)
        total += counts
        if options.seed is not None:
            print("\n".join(trace.lines if options.trace else trace.notes))
            print(f"seed {seed}: {digest}")
        if broken:
            failed += 1
            print(f"{broken}\nseed {seed} broke a promise; it is repeated by: {command(seed, options.steps)}")
    seconds = time.perf_counter() - begin
    print(f"{len(seeds)} histories, {failed} failed, {seconds / len(seeds):.3f} s each")
    print(", ".join(f"{name} {count}" for name, count in sorted(total.items())))
    return min(failed, 1)


def command(seed: int, steps: int = 0) -> str:
    """What repeats a history."""
    return f"python -m tests.simulation --seed {seed}" + (f" --steps {steps}" if steps else "")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of bytes are walked in the order of their hashes.
        memory = Path("/dev/shm")
        place = {"TMPDIR": str(memory)} if os.access(memory, os.W_OK) else {}
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            {**os.environ, **place, "PYTHONHASHSEED": "0"},
        )
    begin_session()
    sweep_abandoned()
    status = main(sys.argv[1:])
    sweep(session_directory())
    sys.exit(status)
