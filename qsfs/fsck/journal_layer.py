"""The journal: what the next mount will replay, and whether it can.

After a crash the last fsyncs lie in the journal alone.  The check looks at the last commit and only
reads the journal; a repair changes neither its files nor the rows that make it valid, so the next
mount replays it on top of what was mended.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qsfs.errors import CacheError, Corrupt
from qsfs.fsck.report import Layer, Report, Severity
from qsfs.store import replay
from qsfs.store.environment import ReadView
from qsfs.store.group import JOURNAL_START_KEY, WRITE_NUMBER_KEY
from qsfs.store.journal import (
    FIRST_SEQUENCE,
    Frame,
    decode_frames,
    in_order,
    journal_paths,
    read_file,
    whole_frames,
)
from qsfs.store.schema import Table, read_plain_u64
from qsfs.store.store import JOURNAL_KEY


def check_journal(view: ReadView, directory: Path, report: Report) -> None:
    """Reads and decodes what waits in the journal; adds findings of the kinds `journal-...`."""
    row = view.get(Table.LOCAL, JOURNAL_KEY)
    if row is None:
        return
    number = bytes(row)
    contents = [content for path in journal_paths(directory) if (content := _content(path, report)) is not None]
    first = _number(view, JOURNAL_START_KEY, FIRST_SEQUENCE)
    floor = _number(view, WRITE_NUMBER_KEY, 0)
    waiting = in_order([list(decode_frames(content, number)) for content in contents], first)
    _check_waiting(waiting, floor, report)
    end = first + len(waiting)
    beyond = sum(frame.sequence >= end for content in contents for frame in whole_frames(content, number))
    if beyond:
        report.add(
            Layer.LMDB,
            "journal-gap",
            f"append {end} of the journal is torn or missing, and {beyond} whole ones follow, which will not be "
            "replayed: after a power cut they are of fsyncs that had not returned; after anything else the disk "
            "has damaged the journal, check it",
            {"missing": end, "following": beyond},
            severity=Severity.WARNING,
        )


def _content(path: Path, report: Report) -> bytes | None:
    try:
        content = read_file(path)
    except CacheError as error:
        report.add(
            Layer.LMDB,
            "journal-unreadable",
            f"{error}; what was fsynced since the last commit may lie there: copy the cache directory before "
            "anything else is tried",
        )
        return None
    if content is None:
        report.add(
            Layer.LMDB,
            "journal-missing",
            f"{path}: is not there; after a crash, what was fsynced since the last commit is lost with it",
            severity=Severity.WARNING,
        )
    return content


def _check_waiting(frames: Iterable[Frame], floor: int, report: Report) -> None:
    """Decodes what will be replayed: the appends with anything newer than the last commit."""
    appends = size = 0
    for frame in frames:
        try:
            newest = replay.newest_write(frame)
        except Corrupt as error:
            report.add(
                Layer.LMDB,
                "journal-append",
                f"append {frame.sequence} of the journal is whole and cannot be replayed: {error}; mount with the "
                "version that wrote it",
                {"append": frame.sequence},
            )
            continue
        report.checked["journal appends"] += 1
        if newest > floor:
            appends += 1
            size += sum(len(body) for _, body in frame.records)
    if appends:
        report.add(
            Layer.LMDB,
            "journal-waiting",
            f"the last mount did not end in order: {appends} appends of the journal ({size} bytes) can be read and "
            "will be replayed by the next mount; all else here is of the last commit before them",
            {"appends": appends, "bytes": size},
            severity=Severity.NOTE,
        )


def _number(view: ReadView, name: bytes, otherwise: int) -> int:
    row = view.get(Table.LOCAL, name)
    return read_plain_u64(bytes(row)) if row is not None and len(row) == 8 else otherwise
