"""A stream to n shard files: read by packs, sealed and encoded by threads, written in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from qsfs.clock import Clock
from qsfs.codec.files import NewFiles, told
from qsfs.errors import ConfigError
from qsfs.format.archive import (
    LABEL_SIZE,
    PUBLIC_SECRET,
    Manifest,
    build_archive_pack,
    create_archive,
    encode_label,
    pack_bytes,
)
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.keys import KeyRing
from qsfs.format.shard import encode_shards
from qsfs.format.units import PAGE

Say = Callable[[int], None]
"""Is told how many bytes of the file are done."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is encoded: an open file or pipe, and what is kept of its attributes."""

    stream: BinaryIO | RawIOBase
    name: bytes
    mode: int = 0o644
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `encode` made: the manifest, the shard files by number, and the bytes in all of them."""

    manifest: Manifest
    files: tuple[Path, ...]
    stored_bytes: int


def shard_paths(directories: Sequence[Path], name: str, n: int) -> list[Path]:
    """Where the n shard files go: NAME.NUMBER.qsfs, spread over the directories in turn."""
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        raise ConfigError(f"'{name}' cannot be the name of shard files; choose one with --name")
    digits = max(2, len(str(n - 1)))
    return [directories[number % len(directories)] / f"{name}.{number:0{digits}d}.qsfs" for number in range(n)]


def shard_mode(mode: int, *, public: bool) -> int:
    """The permission bits (before the umask) of the shard files of a file with `mode`.

    What anyone may read that has the shard files is not for more people than the file was.
    """
    return mode & 0o666 if public else 0o666


def losses_survived(directories: int, code: CodeParams) -> int:
    """How many of the directories, whichever, may be lost together."""
    counts = sorted((len(range(i, code.n, directories)) for i in range(directories)), reverse=True)
    lost = 0
    for survived, count in enumerate(counts):
        lost += count
        if lost > code.m:
            return survived
    return directories


def encode(
    source: Source,
    paths: Sequence[Path],
    *,
    secret: bytes,
    code: CodeParams,
    clock: Clock,
    level: int = 1,
    threads: int | None = None,
    force: bool = False,
    say: Say = lambda done: None,
) -> Encoded:
    """Reads `source` to its end and makes shard file i at `paths[i]`.

    The files appear when all of them are whole and durable.  Memory is bounded by a few packs.  Raises
    `ConfigError` if one exists already (unless `force`), `DependencyMissing` without the codec's library,
    `QsfsError` for what the operating system refuses.
    """
    coder = Code(code)
    superblock, keys = create_archive(secret, code, clock)
    files = NewFiles(paths, clock, mode=shard_mode(source.mode, public=secret == PUBLIC_SECRET), force=force)
    try:
        for file in files.files:
            file.skip(LABEL_SIZE)
        length, packs, digest, stored = _packs(source, files, coder, keys, clock, level, threads, say)
        manifest = Manifest(keys.fsid, length, packs, digest, source.name, source.mode, source.mtime_ns)
        for file, label in zip(files.files, encode_label(superblock, keys, manifest, clock), strict=True):
            file.write_at(label, 0)
            file.write(label)
        files.publish()
    finally:
        files.close()
    return Encoded(manifest, tuple(paths), stored + 2 * LABEL_SIZE * code.n)


def _packs(
    source: Source,
    files: NewFiles,
    coder: Code,
    keys: KeyRing,
    clock: Clock,
    level: int,
    threads: int | None,
    say: Say,
) -> tuple[int, int, bytes, int]:
    """Writes all packs; returns the length, the number of packs, the digest and the bytes written."""
    size = pack_bytes(coder.params)
    workers = threads or os.cpu_count() or 1
    hasher = blake3()
    length = packs = stored = written = 0

    def values_of(position: int, data: bytes) -> list[bytes]:
        pack = build_archive_pack(
            position, position * size // PAGE, data, keys=keys, code=coder.params, clock=clock, level=level
        )
        return encode_shards(pack, coder, keys)

    def write_first() -> None:
        nonlocal stored, written
        count, future = waiting.popleft()
        for file, value in zip(files.files, future.result(), strict=True):
            file.write(value)
            stored += len(value)
        written += count
        say(written)

    waiting: deque[tuple[int, Future[list[bytes]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while data := _read(source, size):
                hasher.update(data)
                waiting.append((len(data), pool.submit(values_of, packs, data)))
                length += len(data)
                packs += 1
                if len(waiting) > workers:
                    write_first()
            while waiting:
                write_first()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return length, packs, hasher.digest(), stored


def _read(source: Source, size: int) -> bytes:
    """`size` bytes, fewer only at the end: a pipe gives what it has."""
    parts: list[bytes] = []
    while size:
        with told(os.fsdecode(source.name), "cannot be read; no shard file was made"):
            part = source.stream.read(size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
