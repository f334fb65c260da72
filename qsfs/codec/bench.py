"""What the codec costs on this machine: each step alone on one thread, and all of it on all."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qsfs.clock import Clock
from qsfs.format import compression
from qsfs.format.archive import build_archive_pack, create_archive, pack_bytes
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.pack import open_body
from qsfs.format.shard import encode_shards, open_shard
from qsfs.format.units import MAX_EXTENT, Buffer

_LEAST_RUNS = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """Plain bytes a second of one step, in MB (10^6): by the clock, and for each second of CPU time."""

    codec: str
    step: str
    threads: int
    mb_per_second: float
    mb_per_cpu_second: float


def bench(codes: list[CodeParams], clock: Clock, *, seconds: float, level: int, threads: int) -> list[Measured]:
    """Measures each step for about `seconds`.  Half of the data compresses, half does not.

    Raises `DependencyMissing` or `FormatMismatch` for a code that is not to be had.
    """
    results: list[Measured] = []
    for code in codes:
        results += _of_code(code, clock, seconds, level, threads, first=not results)
    return results


def _of_code(
    code: CodeParams, clock: Clock, seconds: float, level: int, threads: int, *, first: bool
) -> list[Measured]:
    coder = Code(code)
    _, keys = create_archive(bytes(32), code, clock)
    size = pack_bytes(code)
    noise = clock.random_bytes(size)
    mixed = b"".join(noise[i : i + 2048] + bytes(2048) for i in range(0, size, 4096))

    def measure(step: str, call: Callable[[], object], many: int = 1) -> Measured:
        with ThreadPoolExecutor(many) as pool:
            runs, start, cpu = 0, clock.monotonic(), time.process_time()
            while runs < _LEAST_RUNS or clock.monotonic() - start < seconds:
                for future in [pool.submit(call) for _ in range(many)]:
                    future.result()
                runs += many
            wall, used = clock.monotonic() - start, time.process_time() - cpu
        done = runs * size / 1e6
        return Measured(code.codec, step, many, done / max(wall, 1e-9), done / max(used, 1e-9))

    def compress() -> None:
        for start in range(0, size, MAX_EXTENT):
            compression.compress(mixed[start : start + MAX_EXTENT], level)

    def build(data: bytes) -> list[bytes]:
        pack = build_archive_pack(0, 0, data, keys=keys, code=code, clock=clock, level=level)
        return encode_shards(pack, coder, keys)

    def open_all() -> None:
        shards = [open_shard(value, keys) for value in values[-code.k :]]
        body = b"".join(coder.decode({shard.number: shard.payload for shard in shards}))
        for _ in open_body(keys, shards[0].ref, body):
            pass

    shard = size // code.k
    pieces: list[Buffer] = [memoryview(noise)[i * shard : (i + 1) * shard] for i in range(code.k)]
    whole: list[Buffer] = [*pieces, *coder.encode(pieces)]
    worst = dict(list(enumerate(whole))[-code.k :])
    values = build(mixed)
    results = []
    if first:
        # These two do not depend on the codec.
        results.append(measure("compress", compress))
        sealing = lambda: build_archive_pack(  # noqa: E731
            0, 0, noise, keys=keys, code=code, clock=clock, level=level
        )
        results.append(measure("seal", sealing))
    results.append(measure("encode", lambda: coder.encode(pieces)))
    if code.m:
        results.append(measure("decode", lambda: coder.decode(worst)))
    for many in sorted({1, threads}):
        results.append(measure("file to shards", lambda: build(mixed), many))
        results.append(measure("shards to file", open_all, many))
    return results
