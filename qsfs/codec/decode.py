"""Shard files to the stream again: every byte verified, every damage told, nothing half written left behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from qsfs.codec.packs import PackRead, PackReader
from qsfs.codec.survey import Found, ShardFile
from qsfs.errors import Corrupt, DataLost, QsfsError, Unavailable
from qsfs.format.archive import LABEL_SIZE
from qsfs.format.shard import OVERHEAD
from qsfs.values import counted

Say = Callable[[int], None]
"""Is told how many bytes of the file are done."""

_LISTED = 3


@dataclass(slots=True)
class FileReport:
    """What was found in one shard file: how many of its shards are not good, and which first."""

    path: Path
    number: int | None
    labels: tuple[str, ...]
    wrong: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, position: int, why: str) -> None:
        """Counts a shard that is not good."""
        self.wrong += 1
        if len(self.first) < _LISTED:
            self.first.append(f"pack {position} {why}")

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.wrong and not self.labels


@dataclass(slots=True)
class Report:
    """What a decoding or a check found: all files, missing numbers, and packs that cannot be decoded now."""

    found: Found
    files: list[FileReport]
    packs_read: int = 0
    lost: list[QsfsError] = field(default_factory=list)
    spare: int | None = None
    """How many more shard files may be lost, by the worst pack; None if not every shard was read."""

    @property
    def damaged(self) -> bool:
        """Whether anything is missing or wrong."""
        return bool(self.found.missing or self.lost) or not all(file.good for file in self.files)

    def sentences(self) -> list[str]:
        """What is missing, rotten or foreign, a line for each."""
        lines = [f"foreign: {path}: {why}" for path, why in self.found.foreign]
        lines += [f"unreadable: {path}: {why}" for path, why in self.found.unreadable]
        if self.found.missing:
            lines.append(f"missing: {_numbers(self.found.missing)} of {self.found.archive.code.n}")
        for file in self.files:
            if file.good:
                continue
            what = [*file.labels]
            if file.wrong:
                more = ", ..." if file.wrong > len(file.first) else ""
                what.append(f"{counted(file.wrong, 'shard')} not good ({', '.join(file.first)}{more})")
            lines.append(f"damaged: {file.path}: {'; '.join(what)}")
        return lines + [f"lost: {error}" for error in self.lost]

    def to_json(self) -> dict[str, object]:
        """The same for programs."""
        return {
            "archive": self.found.archive.manifest.archive_id.hex(),
            "packs": self.found.archive.manifest.packs,
            "packs_read": self.packs_read,
            "missing": self.found.missing,
            "files": [
                {
                    "path": str(file.path),
                    "number": file.number,
                    "good": file.good,
                    "labels": list(file.labels),
                    "shards_not_good": file.wrong,
                    "first": file.first,
                }
                for file in self.files
            ],
            "foreign": [{"path": str(path), "why": why} for path, why in self.found.foreign],
            "unreadable": [{"path": str(path), "why": why} for path, why in self.found.unreadable],
            "lost": [str(error) for error in self.lost],
            "spare": self.spare,
        }


def decode(
    found: Found,
    write: Callable[[bytes], None] | None,
    *,
    thorough: bool = True,
    threads: int | None = None,
    say: Say = lambda done: None,
    each: Callable[[PackRead], None] = lambda pack: None,
) -> Report:
    """Gives the verified bytes to `write` in order; without it only checks, also beyond packs that are lost.

    `each` sees every pack that decodes.  Raises, where the bytes cannot all be had, `Unavailable` if shard files that
    were not given (or not readable) can help and `DataLost` if not; `DependencyMissing` without the codec's library.
    What was written before that counts for nothing.
    """
    reader = PackReader(found, thorough=thorough)
    manifest, code = found.archive.manifest, found.archive.code
    reports = {file: FileReport(file.path, file.number, tuple(file.problems)) for file in found.files}
    report = Report(found, list(reports.values()))
    if manifest.packs and write is not None and code.n - len(found.missing) < code.k:
        raise Unavailable(
            f"archive {manifest.archive_id.hex()}: {counted(code.n - len(found.missing), 'shard file')} "
            f"of the {code.k} that are needed; bring {_some(code.k - code.n + len(found.missing))} of "
            f"{_numbers(found.missing)}"
        )
    hasher = blake3()
    done, end = 0, LABEL_SIZE
    with closing(reader.everything(threads)) as packs:
        for pack in packs:
            report.packs_read += 1
            for file, why in pack.wrong:
                reports[file].add(pack.position, why)
            if thorough:
                spare = len(pack.shards) - code.k
                report.spare = spare if report.spare is None else min(spare, report.spare)
            end = pack.offset + OVERHEAD + (pack.shard_size or 0)
            if pack.data is None:
                error = _lost(found, pack)
                if write is not None:
                    raise error
                report.lost.append(error)
                continue
            each(pack)
            hasher.update(pack.data)
            done += len(pack.data)
            if write is not None:
                write(pack.data)
            say(done)
    if report.packs_read < manifest.packs:
        report.lost.append(
            DataLost(f"no file tells where pack {report.packs_read} and what follows it begin; bring more shard files")
        )
    if report.lost:
        return report
    for file in found.files:
        if file.size > end + LABEL_SIZE:
            reports[file].labels += (f"{counted(file.size - end - LABEL_SIZE, 'byte')} too long",)
    if done != manifest.length or hasher.digest() != manifest.digest:
        raise Corrupt(
            f"archive {manifest.archive_id.hex()}: every pack is authentic, but together they are not the file that "
            "was encoded; keep the shard files and report this"
        )
    return report


def _lost(found: Found, pack: PackRead) -> QsfsError:
    code, missing = found.archive.code, found.missing
    unreadable = [file for file, why in pack.wrong if why.startswith("unreadable")]
    needed = code.k - len(pack.shards)
    where = f"archive {found.archive.keys.fsid.hex()}, pack {pack.position} of {found.archive.manifest.packs}"
    wrong = "; ".join(f"{file.path.name}: {why}" for file, why in pack.wrong[:20])
    text = f"{where}: {counted(len(pack.shards), 'good shard')} of the {code.k} that are needed ({wrong})"
    if len(missing) + len(unreadable) < needed:
        return DataLost(f"{text}; bring any older or other copies of these shard files")
    others = [f"make {_names(unreadable)} readable"] if unreadable else []
    if missing:
        others.insert(0, f"bring {_some(min(needed, len(missing)))} of {_numbers(missing)}")
    return Unavailable(f"{text}; {' or '.join(others)}")


def _names(files: list[ShardFile]) -> str:
    return ", ".join(file.path.name for file in files)


def _numbers(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    listed = ", ".join(
        f"{first}" if first == last else f"{first}, {last}" if last == first + 1 else f"{first} to {last}"
        for first, last in runs
    )
    return f"shard{'' if len(numbers) == 1 else 's'} {listed}"


def _some(count: int) -> str:
    return "any one" if count == 1 else f"any {count}"
