"""Which archive some files belong to: labels are read, and what is wrong with each file is kept."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsfs.errors import ConfigError, Corrupt, FormatMismatch, KeyFileError, NotFound
from qsfs.format.archive import LABEL_SIZE, MAGIC, PUBLIC_SECRET, Archive, Label, is_public, open_label, read_label
from qsfs.format.shard import HEADER_SIZE, peek_shard
from qsfs.values import counted

SUFFIX = ".qsfs"
"""How the names of shard files end."""


class ShardFile:
    """One file that was given: what its labels say, and what turned out to be wrong with it."""

    def __init__(self, path: Path) -> None:
        """Opens it and reads its labels.  `OSError` if it cannot be opened."""
        self.path = path
        self.labels: list[Label] = []
        self.problems: list[str] = []
        self.newer: FormatMismatch | None = None
        self.archive_id: bytes | None = None
        self.number: int | None = None
        self.looks_like_one = path.name.endswith(SUFFIX)
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.size = os.fstat(self._handle).st_size
        self._look()

    def read(self, count: int, offset: int) -> bytes | str:
        """`count` bytes at `offset`, or why they cannot be read."""
        try:
            data = os.pread(self._handle, count, offset)
        except OSError as error:
            return f"unreadable ({error.strerror})"
        return data if len(data) == count else "cut short"

    def close(self) -> None:
        """Ends it."""
        os.close(self._handle)

    def _look(self) -> None:
        for where, offset in (("first", 0), ("last", max(0, self.size - LABEL_SIZE))):
            data = self.read(min(LABEL_SIZE, self.size), offset)
            if isinstance(data, str):
                self.problems.append(f"its {where} label is {data}")
                continue
            self.looks_like_one |= data[:8] == MAGIC
            try:
                self.labels.append(read_label(data, str(self.path)))
            except Corrupt:
                self.problems.append(f"its {where} label is rotten")
            except FormatMismatch as error:
                self.newer = error
        if self.labels:
            self.archive_id, self.number = self.labels[0].archive_id, self.labels[0].number
            return
        header = self.read(HEADER_SIZE, LABEL_SIZE)
        peeked = peek_shard(header) if isinstance(header, bytes) else None
        if peeked is not None:
            # Its shards can be good still; what they claim is checked when they are read.
            self.archive_id, self.number, self.looks_like_one = peeked.fsid, peeked.number, True


@dataclass(slots=True)
class Found:
    """An archive, the files that seem to hold its shards, and the others."""

    archive: Archive
    files: list[ShardFile]
    foreign: list[tuple[Path, str]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def missing(self) -> list[int]:
        """The numbers of shard files that are not among them."""
        there = {file.number for file in self.files}
        return [number for number in range(self.archive.code.n) if number not in there]


def open_files(paths: Iterable[Path]) -> tuple[list[ShardFile], list[tuple[Path, str]]]:
    """The files among `paths`, and what cannot be read, with the reason: a dead disk must not hide the others.

    Of directories, the files in them that look like shard files.  `ConfigError` for what is neither.
    """
    files: list[ShardFile] = []
    unreadable: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()
    try:
        for path in paths:
            try:
                found = path.stat()
                directory = stat.S_ISDIR(found.st_mode)
                listed = sorted(path.iterdir()) if directory else [path]
            except OSError as error:
                unreadable.append((path, error.strerror or str(error)))
                continue
            if not directory and not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{path}: is not a file; give shard files, or directories of them")
            for name in listed:
                try:
                    found = name.stat()
                    if not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                    file = ShardFile(name)
                except OSError as error:
                    unreadable.append((name, error.strerror or str(error)))
                    continue
                if directory and not file.looks_like_one:
                    file.close()
                    continue
                files.append(file)
    except BaseException:
        close_files(files)
        raise
    return files, unreadable


def close_files(files: Iterable[ShardFile]) -> None:
    """Ends all."""
    for file in files:
        file.close()


def find_archive(
    files: Sequence[ShardFile],
    secret: bytes | None,
    wanted: bytes | None = None,
    unreadable: Sequence[tuple[Path, str]] = (),
) -> Found:
    """The one archive among `files` that `secret` opens (None: one that was made without a key).

    `wanted` is the id of the one to take; without it there must be one only, or only one with enough files.
    Raises `NotFound`, `KeyFileError`, `ConfigError` where there are several, `FormatMismatch` for a newer one.
    """
    if not any(file.labels for file in files):
        for file in files:
            if file.newer is not None:
                raise file.newer
        reasons = "".join(f"; {path}: {why}" for path, why in unreadable)
        raise NotFound(f"no shard file of an archive is among what was given; give more files or directories{reasons}")
    opened: dict[bytes, Archive] = {}
    refused: dict[bytes, KeyFileError] = {}
    for file in files:
        for label in file.labels:
            _open(label, secret, opened, refused)
    numbers = {
        found: {file.number for file in files if file.archive_id == found and file.number is not None}
        for found in opened
    }
    if wanted is not None:
        if wanted not in opened:
            if wanted in refused:
                raise refused[wanted]
            raise NotFound(f"no file of archive {wanted.hex()} is among what was given")
        chosen = wanted
    elif not opened:
        raise next(iter(refused.values()), Corrupt("no label could be opened; give more of the shard files"))
    elif len(opened) == 1:
        chosen = next(iter(opened))
    else:
        enough = [found for found, archive in opened.items() if len(numbers[found]) >= archive.code.k]
        if len(enough) != 1:
            listed = "; ".join(
                f"{found.hex()} ({name_of(archive)}, {len(numbers[found])} of {archive.code.n} files)"
                for found, archive in opened.items()
            )
            raise ConfigError(f"these are files of several archives: {listed}; choose one with --id")
        chosen = enough[0]
    mine = [file for file in files if file.archive_id == chosen]
    foreign = [(file.path, _why_foreign(file, opened)) for file in files if file.archive_id != chosen]
    archive = opened[chosen]
    # Data shards first: with k of them nothing has to be computed.
    mine.sort(key=lambda file: (archive.code.n if file.number is None else file.number, str(file.path)))
    return Found(archive, mine, foreign, list(unreadable))


def name_of(archive: Archive) -> str:
    """The name of the file in the archive, for people."""
    return os.fsdecode(archive.manifest.name) or "without a name"


def _open(label: Label, secret: bytes | None, opened: dict[bytes, Archive], refused: dict[bytes, KeyFileError]) -> None:
    found = label.archive_id
    if found in opened:
        return
    try:
        opened[found] = open_label(label, PUBLIC_SECRET if secret is None else secret)
    except KeyFileError as error:
        if secret is None:
            refused[found] = KeyFileError(f"archive {found.hex()} is encrypted; give its key with --key-file")
        elif is_public(label):
            refused[found] = KeyFileError(f"archive {found.hex()} was made without a key; leave out --key-file")
        else:
            refused[found] = KeyFileError(str(error).replace("file system", "archive"))
    except (Corrupt, FormatMismatch):
        return


def _why_foreign(file: ShardFile, opened: dict[bytes, Archive]) -> str:
    if file.archive_id is None:
        return str(file.newer) if file.newer is not None else "not a shard file, or rotten beyond recognition"
    other = opened.get(file.archive_id)
    name = "" if other is None else f" ({name_of(other)})"
    return f"shard {file.number} of another archive, {file.archive_id.hex()}{name}"


def described(found: Found) -> str:
    """The archive in a line."""
    archive, manifest = found.archive, found.archive.manifest
    return (
        f"archive {manifest.archive_id.hex()}: {name_of(archive)}, {counted(manifest.length, 'byte')} in "
        f"{counted(manifest.packs, 'pack')}, {archive.code.k}+{archive.code.m} {archive.code.codec}"
    )
