"""Reading a data file again after a stop of any kind: what is whole in it, and what a crash tore.

A torn tail is cut off.  A damaged record in the middle costs that record only: the search goes on
at the next whole one.  Values that were not known to be durable when the server stopped are read
and checked; a torn one was never acknowledged as durable and is voided, so that the key's earlier
value stands.  Older values are not read: rot in them is for CHECK to find.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from qsfs.zdb.datafile import DataFile
from qsfs.zdb.record import (
    FILE_HEADER,
    FILE_MAGIC,
    FORMAT_VERSION,
    HEADER_BYTES,
    RECORD_MARK_BYTES,
    SEAL,
    VOID,
    Record,
    decode_record,
    value_checksum,
    with_flags,
)
from qsfs.zdb.settings import Unusable

_log = logging.getLogger(__name__)

_NEAR = HEADER_BYTES + 255
_FAR = 256 * 1024


def recover(file: DataFile, seed: int, *, last: bool) -> list[Record]:
    """Mends `file` and returns its records in order; `last` says that appends go on in it.

    Raises `Unusable` for a file of another version, and `OSError` only if the file cannot be read
    or written at all.
    """
    if not _has_header(file):
        if last:
            file.begin()
        return []
    records = list(_walk(file, seed))
    end = records[-1].end if records else FILE_HEADER.size
    if file.size > end and last:
        _log.warning("%s: cut %d bytes of a torn tail at %d", file.path, file.size - end, end)
        file.cut(end)
    durable = max((record.durable for record in records), default=0)
    torn = {
        record.offset
        for record in records
        if record.offset >= durable and not record.flags and not _value_is_whole(file, record)
    }
    while torn and records[-1].offset in torn and last:
        record = records.pop()
        torn.discard(record.offset)
        _log.warning("%s: cut the torn record at %d", file.path, record.offset)
        file.cut(record.offset)
    for record in records:
        if record.offset in torn:
            _log.warning("%s: voided the torn record at %d", file.path, record.offset)
            file.overwrite(record.offset, with_flags(record, VOID, seed))
    sealed = bool(records) and bool(records[-1].flags & SEAL)
    if not sealed:
        file.sync()
        if not last:
            file.seal(seed)
    file.durable = file.size
    return [record for record in records if record.offset not in torn and not record.flags & (SEAL | VOID)]


def _has_header(file: DataFile) -> bool:
    header = file.read(0, FILE_HEADER.size)
    if len(header) < FILE_HEADER.size:
        return False
    magic, version, _ = FILE_HEADER.unpack(header)
    if magic == FILE_MAGIC and version != FORMAT_VERSION:
        raise Unusable(f"{file.path} has version {version}; this server reads version {FORMAT_VERSION}")
    return True


def _walk(file: DataFile, seed: int) -> Iterator[Record]:
    offset = FILE_HEADER.size
    window, window_offset, reach = memoryview(b""), 0, _FAR
    while offset < file.size:
        start = offset - window_offset
        if not 0 <= start <= len(window) - _NEAR:
            window, window_offset, start = memoryview(file.read(offset, reach)), offset, 0
        record = decode_record(window[start:], offset, seed)
        if record is None or record.end > file.size:
            record = _next_whole(file, offset + 1, seed)
            if record is None:
                return
            _log.warning("%s: skipped %d damaged bytes at %d", file.path, record.offset - offset, offset)
        yield record
        reach = _FAR if record.value_length < _FAR // 8 else _NEAR
        offset = record.end


def _next_whole(file: DataFile, offset: int, seed: int) -> Record | None:
    while offset < file.size:
        window = file.read(offset, _FAR)
        at_end = not window or offset + len(window) >= file.size
        place = window.find(RECORD_MARK_BYTES)
        while place >= 0 and (at_end or place <= len(window) - _NEAR):
            record = decode_record(memoryview(window)[place:], offset + place, seed)
            if record is not None and record.end <= file.size:
                return record
            place = window.find(RECORD_MARK_BYTES, place + 1)
        if at_end:
            return None
        offset += place if place >= 0 else len(window) - 1
    return None


def _value_is_whole(file: DataFile, record: Record) -> bool:
    if record.value_length == 0:
        return True
    return value_checksum(file.read(record.value_offset, record.value_length)) == record.value_checksum
