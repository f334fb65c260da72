"""The journal: two preallocated files of appends that make an fsync cost one write and one flush.

While a group fills, its fsyncs append to one file; with the next group the other is used, whose
appends a commit has made superfluous by then.  An append is a sector-aligned frame:

    offset  size  field
    0       4     magic "QJF1"
    4       4     payload length, u32
    8       8     sequence number, u64
    16      16    the mount's journal number (random; LMDB holds it; each mount renews it)
    32      8     xxh3-64 of header bytes 0..31 and the payload, u64
    40      ...   payload: records
    ...           zeros up to the next multiple of 512

all little-endian.  A record is kind u8, length u32, then as many bytes.  Each commit stores the
sequence number from which on appends hold more than it does.  Replay takes the frames from there on,
in sequence, and ends at the first that is torn, foreign or missing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64

from qsfs import failpoints
from qsfs.errors import CacheError
from qsfs.store.direct import DISK_FAILED, SECTOR, SectorFile

_HEADER = struct.Struct("<4sIQ16s")
_SUM = struct.Struct("<Q")
_HEAD = _HEADER.size + _SUM.size
_MAGIC = b"QJF1"
FIRST_SEQUENCE = 1
_RECORD = struct.Struct("<BI")


@dataclass(frozen=True, slots=True)
class Frame:
    """An append as it was read back."""

    sequence: int
    records: tuple[tuple[int, bytes], ...]


def encode_record(kind: int, body: bytes) -> bytes:
    """One record of a payload."""
    return _RECORD.pack(kind, len(body)) + body


def encode_frame(sequence: int, number: bytes, records: Sequence[bytes]) -> bytes:
    """An append of encoded records, padded to whole sectors."""
    payload = b"".join(records)
    header = _HEADER.pack(_MAGIC, len(payload), sequence, number)
    digest = xxh3_64(header)
    digest.update(payload)
    size = _HEAD + len(payload)
    return b"".join((header, _SUM.pack(digest.intdigest()), payload, bytes(-size % SECTOR)))


def decode_frames(content: bytes, number: bytes) -> Iterator[Frame]:
    """The frames at the start of a journal file that are whole, ours and in sequence."""
    offset, expected = 0, None
    while (found := _frame_at(content, offset, number)) is not None:
        frame, offset = found
        if expected is not None and frame.sequence != expected:
            return
        yield frame
        expected = frame.sequence + 1


def whole_frames(content: bytes, number: bytes) -> Iterator[Frame]:
    """All frames of a journal file that are whole and ours, also what lies behind a torn or an old one."""
    offset = 0
    while (offset := content.find(_MAGIC, offset)) >= 0:
        found = _frame_at(content, offset, number) if offset % SECTOR == 0 else None
        if found is None:
            offset += 1
        else:
            frame, offset = found
            yield frame


def _frame_at(content: bytes, offset: int, number: bytes) -> tuple[Frame, int] | None:
    """The whole frame of ours at `offset`, and where the next one begins."""
    if offset + _HEAD > len(content):
        return None
    magic, length, sequence, owner = _HEADER.unpack_from(content, offset)
    end = offset + _HEAD + length
    if magic != _MAGIC or owner != number or end > len(content):
        return None
    payload = content[offset + _HEAD : end]
    digest = xxh3_64(content[offset : offset + _HEADER.size])
    digest.update(payload)
    if digest.intdigest() != _SUM.unpack_from(content, offset + _HEADER.size)[0]:
        return None
    return Frame(sequence, tuple(_decode_records(payload))), end + -end % SECTOR


def _decode_records(payload: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset < len(payload):
        kind, length = _RECORD.unpack_from(payload, offset)
        offset += _RECORD.size
        yield kind, payload[offset : offset + length]
        offset += length


def in_order(files: Iterable[Sequence[Frame]], start: int) -> list[Frame]:
    """The frames from sequence number `start` on, up to the first that is missing.

    What lies before `start` is superfluous: frames of a committed group that the other group's
    appends have not overwritten yet, wholly or in part.  What follows a missing frame was never
    acknowledged, since an acknowledgement means that every earlier frame is durable too.
    """
    found = {frame.sequence: frame for frames in files for frame in frames}
    ordered: list[Frame] = []
    while (frame := found.get(start + len(ordered))) is not None:
        ordered.append(frame)
    return ordered


class Journal:
    """The two files, open for appending.  Not thread-safe: one writer at a time."""

    def __init__(self, directory: Path, size: int, number: bytes) -> None:
        """Opens or creates `journal.0` and `journal.1` of `size` / 2 bytes each, written through.

        `number` is the mount's own; frames of other numbers are never replayed.
        """
        self.number = number
        self.capacity = size // 2 - size // 2 % SECTOR
        self._files = [_open_file(path, self.capacity) for path in journal_paths(directory)]
        self._active = 0
        self._offset = 0
        self._sequence = FIRST_SEQUENCE
        self._unflushed: set[int] = set()

    def room(self) -> int:
        """Payload bytes that the active file can still take."""
        return max(0, self.capacity - self._offset - _HEAD - SECTOR)

    @property
    def next_sequence(self) -> int:
        """The sequence number of the next append."""
        return self._sequence

    def frame(self, records: Sequence[bytes]) -> tuple[int, int, bytes]:
        """Places an append: (file, offset, bytes) for `write`; the payload must fit `room`."""
        data = encode_frame(self._sequence, self.number, records)
        place = (self._active, self._offset, data)
        self._sequence += 1
        self._offset += len(data)
        return place

    def write(self, frames: Sequence[tuple[int, int, bytes]]) -> None:
        """Writes placed frames in order and flushes them.  Raises `CacheError` if the disk fails.

        An acknowledged frame implies that every frame before it is durable too.
        """
        try:
            for file, offset, data in _joined(frames):
                self._files[file].write(data, offset)
                self._unflushed.add(file)
            failpoints.hit("journal.written")
            for file in sorted(self._unflushed):
                self._files[file].flush()
            self._unflushed.clear()
        except OSError as error:
            raise CacheError(f"the journal cannot be written: {error}; {DISK_FAILED}") from error
        failpoints.hit("journal.flushed")

    def switch(self) -> None:
        """Goes on in the other file; what that held is superfluous since the last commit.

        A file without appends of this group is kept on with.
        """
        if self._offset:
            self._active ^= 1
            self._offset = 0

    def close(self) -> None:
        """Closes both files."""
        for file in self._files:
            file.close()


def read_frames(directory: Path, number: bytes, start: int) -> list[Frame]:
    """The frames that replay must consider, from sequence number `start` on; an absent file holds none."""
    files = (list(decode_frames(read_file(path) or b"", number)) for path in journal_paths(directory))
    return in_order(files, start)


def journal_paths(directory: Path) -> tuple[Path, ...]:
    """The two files."""
    return tuple(directory / f"journal.{i}" for i in range(2))


def read_file(path: Path) -> bytes | None:
    """All of a journal file, None if there is none.  Raises `CacheError` if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{path}: the journal cannot be read: {error.strerror}") from error


def _joined(frames: Sequence[tuple[int, int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
    """The same bytes in as few writes as there are gaps and changes of the file."""
    parts: list[bytes] = []
    at, begin, end = 0, 0, 0
    for file, offset, data in frames:
        if parts and (file, offset) != (at, end):
            yield at, begin, b"".join(parts)
            parts = []
        if not parts:
            at, begin = file, offset
        parts.append(data)
        end = offset + len(data)
    if parts:
        yield at, begin, b"".join(parts)


def _open_file(path: Path, capacity: int) -> SectorFile:
    try:
        return SectorFile(path, capacity)
    except OSError as error:
        raise CacheError(f"{path}: the journal cannot be made: {error}") from error
