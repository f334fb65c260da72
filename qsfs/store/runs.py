"""Numbers of pages as runs of such that follow each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator


def runs(pages: Iterable[int], most: float = math.inf) -> Iterator[tuple[int, int]]:
    """The pages as runs [start, stop) of at most `most`, in order."""
    start = stop = -1
    for page in sorted(pages):
        if page != stop or stop - start >= most:
            if start >= 0:
                yield start, stop
            start = page
        stop = page + 1
    if start >= 0:
        yield start, stop
