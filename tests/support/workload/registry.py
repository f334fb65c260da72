"""All workloads by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.workload import acks, casper, files, lmdb_writer, sqlite


class Workload(NamedTuple):
    """`run(directory, acks, steps, seed, **options)` writes; `verify(directory, promises)` judges."""

    run: Callable[..., None]
    verify: Callable[[Path, acks.Promises], list[str]]


WORKLOADS = {
    "files": Workload(files.run, files.verify),
    "lmdb": Workload(lmdb_writer.run, lmdb_writer.verify),
    "casper": Workload(casper.run, casper.verify),
    "sqlite": Workload(sqlite.run, sqlite.verify),
}


def run(
    name: str,
    directory: Path,
    ack_file: Path,
    *,
    seed: object = 0,
    count: int = 0,
    echo: bool = False,
    **options: Any,
) -> None:
    """Runs `count` steps (0: until killed) in `directory`, which is made where missing, after the ack file.

    Each run needs its own directory and ack file.  Raises what the file system makes it raise.
    """
    kept = acks.Acks(ack_file, name, str(seed), options, echo=echo)
    steps: Iterable[int] = range(count) if count else itertools.count()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        WORKLOADS[name].run(directory, kept, steps, str(seed), **options)
    finally:
        kept.close()


def verify(directory: Path, ack_file: Path) -> list[str]:
    """What is wrong in `directory` after the run that wrote `ack_file`; empty if all promises were kept.

    Without an ack file, or before the first step, a directory that was never made is not wrong.
    """
    if not ack_file.exists():
        return [f"{directory} exists, and no program has made it"] if directory.exists() else []
    promises = acks.read(ack_file)
    return WORKLOADS[promises.workload].verify(directory, promises)
