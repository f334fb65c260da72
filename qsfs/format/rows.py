"""Metadata rows as chunks: each chunk is one extent of a metadata pack.

A chunk is one version byte and one msgpack array: table number, key, value, table number, ...
where the value nil says that the row was deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from qsfs.errors import Corrupt, FormatMismatch, QsfsBug
from qsfs.format import schema
from qsfs.format.units import Buffer

Row: TypeAlias = tuple[int, bytes, bytes | None]
"""(table number 0 to 255, key, value or None for deleted)."""

_VERSION = 1
_ROW_OVERHEAD = 12
_CHUNK_OVERHEAD = 6


def encode_rows(rows: Iterable[Row], chunk_bytes: int) -> Iterator[bytes]:
    """Chunks of at most `chunk_bytes`, in the order of `rows`; a larger row is a chunk of its own."""
    flat: list[int | bytes | None] = []
    size = _CHUNK_OVERHEAD
    for table, key, value in rows:
        if not 0 <= table <= 255:
            raise QsfsBug(f"table number {table} is out of range")
        length = len(key) + (0 if value is None else len(value)) + _ROW_OVERHEAD
        if flat and size + length > chunk_bytes:
            yield _chunk(flat)
            flat = []
            size = _CHUNK_OVERHEAD
        flat += (table, key, value)
        size += length
    if flat:
        yield _chunk(flat)


def decode_rows(chunk: Buffer) -> Iterator[Row]:
    """The rows of one chunk.  `Corrupt` if it is none; `FormatMismatch` if it is of a newer version."""
    if len(chunk) == 0:
        raise Corrupt("a chunk of metadata rows is empty")
    if chunk[0] > _VERSION:
        raise FormatMismatch(f"a chunk of metadata rows has version {chunk[0]}; use a newer qsfs")
    flat = schema.unpack(memoryview(chunk)[1:], "a chunk of metadata rows")
    if chunk[0] != _VERSION or type(flat) is not list or len(flat) % 3:
        raise Corrupt("a chunk of metadata rows has a broken structure")
    elements = iter(flat)
    for table, key, value in zip(elements, elements, elements, strict=True):
        if (
            type(table) is not int
            or not 0 <= table <= 255
            or type(key) is not bytes
            or (value is not None and type(value) is not bytes)
        ):
            raise Corrupt("a chunk of metadata rows holds something that is no row")
        yield table, key, value


def _chunk(flat: list[int | bytes | None]) -> bytes:
    return bytes((_VERSION,)) + schema.pack(flat)
