"""An LMDB environment: each step is one transaction that adds, changes and deletes records.

Option `mode`: "default" (what qsfs itself uses), "writemap" (Casper's `storage.lmdb`), "manual" (Casper's
`data.lmdb`: WRITEMAP, MAP_ASYNC and NOMETASYNC with a forced sync after each commit), "nosync" (acknowledges
without ever having synced: a liar, to see that its lies are found).  `single` is the name of a file to use
instead of a directory with LMDB's own names (data.mdb, lock.mdb).  `large` is a number of records of 9 kB that
each step writes anew besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
from lmdb import verify as offline

from tests.support.workload.acks import Acks, Promises
from tests.support.workload.records import bulk, changes, compare, state_after

MODES: dict[str, dict[str, bool]] = {
    "default": {},
    "writemap": {"writemap": True},
    "manual": {"writemap": True, "map_async": True, "metasync": False},
    "nosync": {"sync": False},
}
TIP = b"tip"

_check: Callable[..., list[Any]] = offline.verify


def run(
    directory: Path,
    acks: Acks,
    steps: Iterable[int],
    seed: str,
    *,
    mode: str = "default",
    single: str = "",
    map_size: int = 1 << 30,
    large: int = 0,
) -> None:
    """Commits one transaction a step and acknowledges it once it was synced as its mode asks."""
    environment = open_environment(directory, single, map_size=map_size, **MODES[mode])
    records: dict[bytes, bytes] = {}
    try:
        for step in steps:
            acks.begin(step)
            with environment.begin(write=True) as transaction:
                for key, value in changes(seed, step, records):
                    if value is None:
                        transaction.delete(key)
                        del records[key]
                    else:
                        transaction.put(key, value)
                        records[key] = value
                for key, value in bulk(seed, step, large):
                    transaction.put(key, value)
                transaction.put(TIP, str(step).encode())
            if mode == "manual":
                environment.sync(True)
            acks.ack(step)
    finally:
        environment.close()


def verify(directory: Path, promises: Promises) -> list[str]:
    """The structure, without the engine; then that the records are those of one step."""
    single = promises.options.get("single", "")
    path = directory / (single or "data.mdb")
    if not path.exists():
        return [f"{path} is missing"] if promises.acked >= 0 else []
    if problems := check_structure(path):
        # Until the first commit has returned, LMDB does not promise a valid file.
        return problems if promises.acked >= 0 else []
    environment = open_environment(directory, single, map_size=promises.options.get("map_size", 1 << 30))
    try:
        with environment.begin() as transaction:
            found = dict(transaction.cursor())
    finally:
        environment.close()
    tip = int(found.pop(TIP, b"-1"))
    if not promises.acked <= tip <= promises.begun:
        return [f"{path} is as of step {tip}; acknowledged was {promises.acked}, begun {promises.begun}"]
    expected = state_after(promises.seed, tip)
    if tip >= 0:
        expected |= bulk(promises.seed, tip, promises.options.get("large", 0))
    return compare(str(path), expected, found)


def open_environment(directory: Path, single: str, **options: Any) -> lmdb.Environment:
    """Opens the environment in `directory`, or the single file of that name in it."""
    return lmdb.open(str(directory / single), subdir=not single, **options)


def check_structure(path: Path) -> list[str]:
    """What the offline checker finds wrong with a data file; unlike the engine it survives any damage."""
    try:
        problems = _check(str(path), subdir=False)
    except offline.VerifyError as error:
        problems = [error]
    return [f"{path}: {problem}" for problem in problems]
