"""The section "Rows" of `docs/format.md` is complete: a reader written from it alone reads the vectors.

Nothing of the package is imported here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from tests.format.test_independent import load

TIME = 1_700_000_000_123_456_789


def read_inode(key: bytes, row: bytes) -> dict[str, int]:
    assert (len(key), len(row), row[0]) == (8, 85, 1)
    names = ("mode", "owner", "group", "links", "device", "flags", "read", "modified", "changed")
    names += ("size", "pages", "next cookie", "parent")
    fields = struct.unpack("<IIIIQIqqqQQQQ", row[1:])
    return {"inode": int.from_bytes(key, "big"), **dict(zip(names, fields, strict=True))}


def read_entry(key: bytes, row: bytes) -> tuple[int, str, tuple[int, ...]]:
    assert len(row) == 17
    return int.from_bytes(key[:8], "big"), key[8:].decode(), struct.unpack("<QQB", row)


def read_extent(key: bytes, row: bytes) -> dict[str, int]:
    assert (len(key), len(row)) == (16, 41)
    inode, first = struct.unpack(">QQ", key)
    (write,) = struct.unpack("<Q", row[0:8])
    pages, skipped = struct.unpack("<II", row[8:16])
    (pack,) = struct.unpack("<Q", row[16:24])
    ordinal, offset, sealed, plain = struct.unpack("<IIII", row[24:40])
    found = {"inode": inode, "first": first, "write": write, "pages": pages, "skipped": skipped, "pack": pack}
    return found | {"ordinal": ordinal, "offset": offset, "sealed": sealed, "plain": plain, "codec": row[40]}


def read_pack(key: bytes, row: bytes) -> dict[str, Any]:
    assert (len(key), row[0]) == (8, 1)
    key_number, epoch, body, size, count = struct.unpack("<IQIIH", row[50:72])
    live, placed, looked, unnamed = struct.unpack("<QQQQ", row[72:104])
    places = struct.unpack(f"<{count}i", row[105:])
    found = {"number": int.from_bytes(key, "big"), "id": row[1:17], "digest": row[17:49], "kind": row[49]}
    found |= {"key": key_number, "epoch": epoch, "k": body / size, "size": size, "live": live}
    return found | {"placed": placed, "looked": looked, "unnamed": unnamed, "state": row[104], "places": places}


def read_truncations(key: bytes, row: bytes) -> tuple[int, list[tuple[int, ...]]]:
    assert (len(key), len(row) % 16) == (8, 0)
    return int.from_bytes(key, "big"), list(struct.iter_unpack("<QQ", row))


def read_counter(key: bytes, row: bytes) -> tuple[str, int]:
    assert len(row) == 8
    return key.decode(), int.from_bytes(row, "little")


def read_bytes(key: bytes, row: bytes) -> tuple[int, bytes, bytes]:
    return int.from_bytes(key[:8], "big"), key[8:], row


READERS: dict[int, Callable[[bytes, bytes], Any]] = {
    1: read_inode,
    2: read_entry,
    3: read_bytes,
    4: read_bytes,
    5: read_extent,
    6: read_pack,
    7: read_truncations,
    8: read_counter,
}
FILE = 2**40 + 5
NO_DATA = {"size": 0, "pages": 0, "device": 0, "flags": 0, "owner": 0, "group": 0}
EXPECTED: dict[str, Any] = {
    "inode of a file": {
        "inode": FILE,
        "mode": 0o104751,
        "owner": 1000,
        "group": 2**32 - 1,
        "links": 2,
        "device": 0,
        "flags": 4 | 64,
        "read": -1,
        "modified": TIME,
        "changed": TIME + 4,
        "size": 2**33 * 4096 + 9000,
        "pages": 3,
        "next cookie": 3,
        "parent": 0,
    },
    "inode of a directory": NO_DATA
    | {"inode": 6, "mode": 0o040755, "links": 2, "read": TIME, "modified": TIME + 1, "changed": TIME + 2}
    | {"next cookie": 5, "parent": 1},
    "inode of a device": NO_DATA
    | {"inode": 8, "mode": 0o020600, "links": 1, "read": 0, "modified": 0, "changed": 0}
    | {"device": 2**32 + 0x0501, "next cookie": 3, "parent": 0},
    "entry": (6, "größe", (FILE, 4, 0o10)),
    "xattr": (FILE, b"user.colour", b"\x00blue"),
    "symlink": (7, b"", b"../target"),
    "extent": {"inode": FILE, "first": 2**33, "write": 2**64 - 1, "pages": 3, "skipped": 2, "pack": 2**32 + 9}
    | {"ordinal": 11, "offset": 65_536, "sealed": 4_112, "plain": 6 * 4096, "codec": 1},
    "data pack": {"number": 2**32 + 9, "id": bytes(range(16, 32)), "digest": bytes(range(32, 64)), "kind": 1}
    | {"key": 2, "epoch": 2**63 + 7, "k": 4, "size": 262_144, "live": 4 * 4096, "placed": TIME}
    | {"looked": TIME + 1, "unnamed": 0, "state": 1 | 2 | 4, "places": (3, 0, 65_535, 4, 5, 6)},
    "metadata pack": {"number": 10, "id": bytes(range(64, 80)), "digest": bytes(range(80, 112)), "kind": 2}
    | {"key": 1, "epoch": 8, "k": 4, "size": 64, "live": 0, "placed": TIME + 2}
    | {"looked": 0, "unnamed": TIME + 3, "state": 0, "places": (1, -1, 2, 3, -1, 4)},
    "truncations": (FILE, [(2**33 + 3, 71), (0, 70)]),
    "counter": ("next-inode", FILE),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_read(name):
    """Every field of a row of every table lies where the page says."""
    stored = load("format-1-rows.json")["rows"][name]
    assert READERS[stored["table"]](bytes.fromhex(stored["key"]), bytes.fromhex(stored["row"])) == EXPECTED[name]


def test_there_is_a_row_of_every_table():
    stored = load("format-1-rows.json")["rows"]
    assert {row["table"] for row in stored.values()} == set(READERS)
    assert {name for name, row in stored.items() if row["row"] is not None} == set(EXPECTED)


def test_chunks_of_rows_read():
    """The chunks hold these rows, in one order or another, and one that was deleted."""
    stored = load("format-1-rows.json")
    found = []
    for chunk in map(bytes.fromhex, stored["chunks"]):
        assert chunk[0] == 1
        flat = msgpack.unpackb(chunk[1:])
        found += list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    rows = [
        (row["table"], bytes.fromhex(row["key"]), None if row["row"] is None else bytes.fromhex(row["row"]))
        for row in stored["rows"].values()
    ]
    assert sorted(found, key=str) == sorted(rows, key=str)
    assert sum(value is None for _, _, value in found) == 1
