"""Small archives to damage: two packs and a half, in a directory."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from qsfs.clock import FixedClock
from qsfs.codec.decode import Report, decode
from qsfs.codec.encode import Source, encode, shard_paths
from qsfs.codec.survey import close_files, find_archive, open_files
from qsfs.format.archive import LABEL_SIZE, pack_bytes
from qsfs.format.erasure import CodeParams
from qsfs.format.shard import HEADER_SIZE, OVERHEAD, peek_shard
from tests.format.samples import noise

SECRET = b"s" * 32
CODE = CodeParams(2, 4)


@dataclass
class Archive:
    """The paths of the shard files by number, and what they hold."""

    paths: list[Path]
    data: bytes
    archive_id: bytes

    def shard_at(self, number: int, position: int) -> tuple[int, int]:
        """Where the shard of a pack lies in its file: offset and length."""
        offset = LABEL_SIZE
        content = self.paths[number].read_bytes()
        while True:
            claim = peek_shard(content[offset : offset + HEADER_SIZE])
            length = claim.shard_size + OVERHEAD
            if position == 0:
                return offset, length
            offset, position = offset + length, position - 1

    def damage(self, number: int, offset: int, count: int = 1) -> None:
        """Flips bits of `count` bytes of a shard file."""
        content = bytearray(self.paths[number].read_bytes())
        for at in range(offset, min(offset + count, len(content))):
            content[at] ^= 0x5A
        self.paths[number].write_bytes(content)


def content(code: CodeParams = CODE, packs: float = 2.5) -> bytes:
    """Bytes of which the second pack compresses, so that shards have different sizes."""
    size = pack_bytes(code)
    data = bytearray(noise(int(size * packs) + 1, 5))
    data[size : 2 * size] = (b"height" * size)[: max(0, min(size, len(data) - size))]
    return bytes(data)


def make(
    directory: Path, code: CodeParams = CODE, data: bytes | None = None, *, seed: int = 1, secret: bytes = SECRET
) -> Archive:
    directory.mkdir(exist_ok=True, parents=True)
    data = content(code) if data is None else data
    paths = shard_paths([directory], "a", code.n)
    made = encode(Source(io.BytesIO(data), b"a"), paths, secret=secret, code=code, clock=FixedClock(seed), threads=2)
    return Archive(paths, data, made.manifest.archive_id)


def read(*paths: Path, thorough: bool = True, secret: bytes | None = SECRET, wanted: bytes | None = None):
    """The bytes and the report of a decoding."""
    files, unreadable = open_files(paths)
    try:
        parts: list[bytes] = []
        report = decode(find_archive(files, secret, wanted, unreadable), parts.append, thorough=thorough, threads=2)
        return b"".join(parts), report
    finally:
        close_files(files)


def check(*paths: Path) -> Report:
    """The report of a check."""
    files, _ = open_files(paths)
    try:
        return decode(find_archive(files, SECRET), None, threads=2)
    finally:
        close_files(files)
