"""Latencies for `scripts/bench --remote`: of random reads, and of small durable writes beside a saturated writer."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from measures import MIB

READ = 128 << 10
_EXTENT = 256 << 10
_PAGE = 4096
_MOST_READS = 400


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Number, median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50_ms": ordered[len(ordered) // 2] * 1e3,
        "p99_ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3,
    }


def random_reads(file: Path, size: int) -> dict[str, float]:
    """Reads of 128 KiB, each of an extent that was not read before, one at a time."""
    places = list(range(0, size - _EXTENT + 1, _EXTENT))
    source = random.Random(size)
    source.shuffle(places)
    taken = []
    with _opened(file, os.O_RDONLY) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for start in places[:_MOST_READS]:
            offset = start + source.choice((0, READ))
            begin = time.perf_counter()
            found = os.pread(descriptor, READ, offset)
            taken.append(time.perf_counter() - begin)
            if len(found) != READ:
                raise OSError(f"{file}: {len(found)} bytes came back of {READ}")
    return percentiles(taken)


def durable_writes_beside_a_writer(directory: Path, size: int) -> dict[str, float]:
    """4 KiB written and synced again and again, while another thread writes `size` bytes as fast as it can.

    Also the rate of that thread, in MB (10^6) a second.
    """
    begin = time.perf_counter()
    writer = threading.Thread(target=_write, args=(directory / "stream", size))
    writer.start()
    taken = []
    source = random.Random(size)
    with _opened(directory / "synced", os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, os.urandom(MIB), 0)
        while writer.is_alive():
            content, place = os.urandom(_PAGE), source.randrange(MIB // _PAGE) * _PAGE
            start = time.perf_counter()
            os.pwrite(descriptor, content, place)
            os.fsync(descriptor)
            taken.append(time.perf_counter() - start)
            time.sleep(0.002)
    writer.join()
    return percentiles(taken) | {"stream_mb_per_second": size / 1e6 / (time.perf_counter() - begin)}


def _write(file: Path, size: int) -> None:
    with file.open("wb", buffering=0) as out:
        for _ in range(size // MIB):
            out.write(os.urandom(MIB))
        os.fsync(out.fileno())


@contextlib.contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(file, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
