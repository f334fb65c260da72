"""Rows of the store as a check reads them: what does not decode is left out, never raised.

Layer 1 has reported it; the layers above go on with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from qsfs.errors import Corrupt
from qsfs.store.environment import ReadView
from qsfs.store.schema import Inode, Table, Truncation, decode_truncations, split_u64, u64

T = TypeVar("T")


def decoded(
    view: ReadView, table: Table, key_size: int, decode: Callable[[bytes, bytes], T], longer: bool = False
) -> Iterator[tuple[bytes, T]]:
    """The rows of a table that can be decoded, in order of their keys."""
    for key, value in view.scan(table, b"", None):
        if len(key) != key_size and not (longer and len(key) > key_size):
            continue
        try:
            row = decode(key, bytes(value))
        except Corrupt:
            continue
        yield key, row


def inode_at(view: ReadView, number: int) -> Inode | None:
    """An inode, or None if it is absent or cannot be decoded."""
    row = view.get(Table.INODES, u64(number))
    try:
        return None if row is None else Inode.decode(number, bytes(row))
    except Corrupt:
        return None


def inode_exists(view: ReadView, number: int) -> bool:
    """Whether there is a row, whatever it holds."""
    return view.get(Table.INODES, u64(number)) is not None


def truncations_of(view: ReadView, number: int) -> tuple[Truncation, ...]:
    """The pending truncations of a file; none where they cannot be decoded."""
    row = view.get(Table.TRUNCATIONS, u64(number))
    try:
        return () if row is None else decode_truncations(bytes(row))
    except Corrupt:
        return ()


def decode_inode(key: bytes, row: bytes) -> Inode:
    """For `decoded`: an inode."""
    return Inode.decode(split_u64(key), row)


def shown(name: bytes) -> str:
    """A name for people: bytes that are no text are escaped."""
    return name.decode("utf-8", "backslashreplace")
