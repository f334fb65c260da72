"""Measures a directory, alone or against others, in turn; see `scripts/bench --help`."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from drift import run_drift
from journal_sizes import journal_table, measure_journal
from measures import MEASURES, MIB, Measure
from remote import PARTS, measure_remote, remote_table
from watch import Watch, daemon_of

from qsfs.cli.output import format_table
from qsfs.values import format_size, parse_size

FLOOR = "floor"


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if arguments.remote:
        report = measure_remote(
            Path(arguments.directory),
            arguments.size,
            arguments.rounds or 1,
            rtt_ms=arguments.rtt,
            codec=arguments.codec,
            only=select_names(arguments.only, list(PARTS)),
        )
        print(json.dumps(report, indent=2) if arguments.json else remote_table(report))
        return 0
    if arguments.journal:
        report = measure_journal(Path(arguments.directory), arguments.rounds or 5, arguments.size)
        print(json.dumps(report, indent=2) if arguments.json else journal_table(report))
        return 0
    if arguments.drift:
        output = Path(arguments.output or Path(arguments.directory) / "drift")
        return run_drift(
            Path(arguments.directory), arguments.minutes, arguments.size, output, as_json=arguments.json
        )
    chosen = select(arguments.only)
    with contextlib.ExitStack() as stack:
        targets = {"DIR": stack.enter_context(workspace(Path(arguments.directory)))}
        if arguments.against:
            targets["AGAINST"] = stack.enter_context(workspace(Path(arguments.against)))
        if arguments.floor:
            disk = Path(arguments.floor_disk or arguments.against or arguments.directory)
            targets[FLOOR] = stack.enter_context(floor(disk))
        rounds = arguments.rounds or (3 if len(targets) > 1 else 1)
        results = measure(chosen, targets, arguments.size, rounds, quiet=arguments.json)
    report = {
        "directory": arguments.directory,
        "against": arguments.against,
        "size": arguments.size,
        "rounds": rounds,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "measures": results,
    }
    print(json.dumps(report, indent=2) if arguments.json else table(arguments, rounds, results))
    return 0 if all(None not in result["median"].values() for result in results) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measure the file system that holds DIR. Machines differ from day to day, so what "
        "counts is the ratio within one run: to the floor (an empty file system in memory behind the same "
        "binding) and to the local disk. Each round measures all in turn; medians are printed.",
        epilog="measures: " + "; ".join(f"{measure.name} ({measure.what})" for measure in MEASURES),
    )
    add = parser.add_argument
    add("directory", metavar="DIR", nargs="?", default=".", help="default: here")
    add("--against", metavar="OTHERDIR", help="a directory to compare with, such as one on the disk")
    add("--floor", action="store_true", help="compare with the floor")
    add("--floor-disk", metavar="PATH", help="where the floor's fsync appends (default: OTHERDIR, else DIR)")
    add("--remote", action="store_true", help="instead: make a file system on 24 backends below DIR; flush it, read it")
    add("--drift", action="store_true", help="instead: mixed load on a file system below DIR; does anything drift?")
    add("--journal", action="store_true", help="instead: fsyncs of up to 16MiB by the journal and by commits")
    add("--minutes", type=float, default=30.0, metavar="N", help="--drift: how long; default: 30")
    add("--output", metavar="PREFIX", help="--drift: writes PREFIX.json and PREFIX.svg; default: DIR/drift")
    add("--rounds", type=int, default=0, metavar="N", help="default: 1; 3 when comparing, 5 with --journal")
    add("--size", type=parse_size, default=256 * MIB, metavar="SIZE", help="of the files; default: 256MiB")
    add("--only", metavar="NAME,...", help=f"only these measures; with --remote of {', '.join(PARTS)}")
    add("--rtt", type=float, default=40.0, metavar="MS", help="--remote: the delayed round trip; default: 40")
    add("--codec", default="zfec", metavar="NAME", help="--remote: the erasure codec; default: zfec")
    add("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.size < MIB:
        parser.error("--size: at least 1MiB")
    if (arguments.remote or arguments.drift or arguments.journal) and (arguments.against or arguments.floor):
        parser.error("--remote, --drift and --journal go with neither --against nor --floor")
    if arguments.drift and (arguments.size < 16 * MIB or arguments.minutes <= 0):
        parser.error("--drift: --size of at least 16MiB, and --minutes above 0")
    if not Path(arguments.directory).is_dir():
        parser.error(f"{arguments.directory} is not a directory")
    return arguments


def select(only: str | None) -> list[Measure]:
    known = {measure.name: measure for measure in MEASURES}
    return [known[name] for name in select_names(only, list(known))]


def select_names(only: str | None, known: list[str]) -> list[str]:
    """The names that `only` lists, all where it is None; ends the program at one that is not known."""
    if not only:
        return known
    wanted = [name.strip() for name in only.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        sys.exit(f"bench: no measure '{unknown[0]}'; there are: {', '.join(known)}")
    return wanted


@contextlib.contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """A directory of our own below `directory`, removed at the end."""
    place = Path(tempfile.mkdtemp(prefix="qsfs-bench-", dir=directory))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def floor(disk: Path) -> Iterator[Path]:
    """The mounted floor; its append file lies on `disk`."""
    with workspace(disk) as aside, tempfile.TemporaryDirectory(prefix="qsfs-floor-") as parent:
        mountpoint = Path(parent) / "mnt"
        mountpoint.mkdir()
        program = Path(__file__).with_name("floor.py")
        process = subprocess.Popen(
            [sys.executable, str(program), str(mountpoint), str(aside / "appended")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                sys.exit("bench: the floor could not be mounted; see above")
            yield mountpoint
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if mountpoint.is_mount():
                subprocess.run(["fusermount3", "-uz", str(mountpoint)], check=False)


def measure(
    chosen: list[Measure], targets: dict[str, Path], size: int, rounds: int, *, quiet: bool
) -> list[dict[str, object]]:
    """Every measure, `rounds` times on each target in turn; a target that fails a measure gets none.

    `cpu` is what the daemon behind a target took: microseconds for each unit of what was done.
    """
    results = []
    daemons = {name: daemon_of(directory) for name, directory in targets.items()}
    for item in chosen:
        runs: dict[str, list[float]] = {name: [] for name in targets}
        costs: dict[str, list[float]] = {name: [] for name in targets}
        failed: dict[str, str] = {}
        for turn in range(rounds):
            order = list(targets.items())
            for name, directory in order[turn % len(order) :] + order[: turn % len(order)]:
                if not quiet and sys.stderr.isatty():
                    sys.stderr.write(f"\r\033[K{item.name} round {turn + 1}/{rounds} {name}")
                with workspace(directory) as place:
                    watch = Watch(daemons[name])
                    try:
                        done = item.run(place, size, watch)
                        runs[name].append(done / watch.seconds)
                        if watch.cpu_seconds is not None:
                            costs[name].append(watch.cpu_seconds / done * 1e6)
                    except OSError as error:
                        failed[name] = str(error)
        if not quiet and sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
        medians = {
            name: None if name in failed else statistics.median(values) for name, values in runs.items()
        }
        cpu = {
            name: None if name in failed or not values else statistics.median(values)
            for name, values in costs.items()
        }
        results.append(
            {
                "name": item.name, "unit": item.unit, "what": item.what,
                "median": medians, "ratio": ratios(medians), "runs": runs, "errors": failed,
                "cpu": cpu, "cpu_ratio": ratios(cpu),
            }
        )  # fmt: skip
    return results


def ratios(figures: dict[str, float | None]) -> dict[str, float | None]:
    """The figure of DIR as a multiple of each other's."""
    mine = figures["DIR"]
    return {
        name: mine / other if mine is not None and other else None
        for name, other in figures.items()
        if name != "DIR"
    }


def table(arguments: argparse.Namespace, rounds: int, results: list[dict]) -> str:
    """The report for people."""
    names = list(results[0]["median"]) if results else []
    headers = ["measure", "unit"]
    for name in names:
        headers += [name] + ([] if name == "DIR" else ["ratio"])
    served = [name for name in names if any(result["cpu"][name] is not None for result in results)]
    for name in served:
        headers += [f"CPU {name}"] + ([] if name == "DIR" else ["ratio"])
    rows = []
    for result in results:
        row: list[object] = [result["what"], result["unit"]]
        for name in names:
            row.append(number(result["median"][name]))
            if name != "DIR":
                ratio = result["ratio"][name]
                row.append(None if ratio is None else f"{ratio:.2f}")
        for name in served:
            row.append(number(result["cpu"][name]))
            if name != "DIR":
                ratio = result["cpu_ratio"][name]
                row.append(None if ratio is None else f"{ratio:.2f}")
        rows.append(row)
    lines = [f"DIR      {Path(arguments.directory).absolute()}"]
    if arguments.against:
        lines.append(f"AGAINST  {Path(arguments.against).absolute()}")
    lines += [f"{rounds} rounds, files of {format_size(arguments.size)}; a ratio above 1: DIR is faster"]
    if served:
        lines += ["CPU: microseconds of the daemon's processor time for one (file, page, MiB, transaction)"]
    lines += [""]
    lines.append(format_table(headers, rows))
    for result in results:
        lines += [f"{result['name']} on {name}: {error}" for name, error in result["errors"].items()]
    return "\n".join(lines)


def number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
