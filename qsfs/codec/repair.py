"""Shard files made again, byte for byte, from any k of the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qsfs.clock import Clock
from qsfs.codec.decode import Report, Say, decode
from qsfs.codec.encode import shard_mode, shard_paths
from qsfs.codec.files import NewFiles
from qsfs.codec.packs import PackRead
from qsfs.codec.survey import Found
from qsfs.errors import QsfsBug
from qsfs.format.archive import LABEL_SIZE, encode_label
from qsfs.format.erasure import Code
from qsfs.format.shard import encode_shard


def needing_repair(report: Report) -> list[int]:
    """The numbers of shards of which no good file was given."""
    good = {file.number for file in report.files if file.good}
    return [number for number in range(report.found.archive.code.n) if number not in good]


def repair(
    found: Found,
    numbers: Sequence[int],
    directories: Sequence[Path],
    name: str,
    *,
    clock: Clock,
    force: bool = False,
    threads: int | None = None,
    say: Say = lambda done: None,
) -> list[Path]:
    """Makes the shard files with these numbers in `directories`, and returns their paths.

    Only from what authenticates, and with the same shards as before: a file that turns up again later may be used
    together with its replacement.  Raises as `decode` and `NewFiles`.
    """
    archive = found.archive
    code = Code(archive.code)
    names = shard_paths([Path()], name, archive.code.n)
    paths = [directories[i % len(directories)] / names[number] for i, number in enumerate(numbers)]
    files = NewFiles(paths, clock, mode=shard_mode(archive.manifest.mode, public=archive.public), force=force)

    def add(pack: PackRead) -> None:
        if pack.ref is None:
            raise QsfsBug(f"pack {pack.position} was decoded without its reference")
        rebuilt = code.rebuild(pack.shards, numbers)
        for file, number in zip(files.files, numbers, strict=True):
            file.write(encode_shard(pack.ref, number, rebuilt[number], code, archive.keys))

    try:
        for file in files.files:
            file.skip(LABEL_SIZE)
        decode(found, lambda data: None, thorough=False, threads=threads, say=say, each=add)
        labels = list(encode_label(archive.superblock, archive.keys, archive.manifest, clock))
        for file, number in zip(files.files, numbers, strict=True):
            file.write_at(labels[number], 0)
            file.write(labels[number])
        files.publish()
    finally:
        files.close()
    return paths


def stem_of(found: Found) -> str:
    """What the names of the shard files begin with: as most of those given have it, else the archived file's name."""
    stems = [file.path.name.split(".qsfs")[0].rpartition(".")[0] for file in found.files]
    known = [stem for stem in stems if stem]
    return max(known, key=known.count) if known else os.fsdecode(found.archive.manifest.name)
