"""The records that the database workloads keep: what a step changes follows from the seed and the step."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tests.support.workload.acks import content

LARGEST = 9000


def changes(seed: str, step: int, records: dict[bytes, bytes]) -> Iterable[tuple[bytes, bytes | None]]:
    """What step `step` does to `records`, which holds what the steps before it left; None deletes."""
    choose = random.Random(f"{seed}/{step}")
    keys = sorted(records)
    for number in range(choose.randint(1, 8)):
        size = choose.choice((10, 120, 600, 2500, LARGEST))
        yield f"{step:08}.{number}".encode(), content(size, seed, step, number)
    for key in choose.sample(keys, min(len(keys), choose.randint(0, 3))):
        yield key, content(choose.randint(1, LARGEST), seed, step, key.decode(), "again")
    for key in choose.sample(keys, min(len(keys), choose.randint(0, 3))):
        yield key, None


def bulk(seed: str, step: int, count: int) -> Iterable[tuple[bytes, bytes]]:
    """`count` large records that each step writes anew."""
    for number in range(count):
        yield f"bulk.{number:06}".encode(), content(LARGEST, seed, step, number, "bulk")


def state_after(seed: str, last: int) -> dict[bytes, bytes]:
    """The records after steps 0 to `last`, without those in bulk."""
    records: dict[bytes, bytes] = {}
    for step in range(last + 1):
        for key, value in changes(seed, step, records):
            if value is None:
                del records[key]
            else:
                records[key] = value
    return records


def compare(name: str, expected: dict[bytes, bytes], found: dict[bytes, bytes]) -> list[str]:
    """One sentence for each record that is missing, other than expected, or never written."""
    problems = [f"{name}: record {key.decode()} is missing" for key in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name}: record {key!r} does not belong there" for key in sorted(found.keys() - expected.keys())
    ]
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            problems.append(
                f"{name}: record {key.decode()} holds {len(found[key])} bytes that it must not hold"
            )
    return problems
