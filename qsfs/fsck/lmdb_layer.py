"""Layer 1: the LMDB file and its rows.

The file is verified byte by byte before LMDB itself opens it: a damaged tree may crash the process
that walks it.  Then every row of every table is read and decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from lmdb.verify import VerifyError, verify

from qsfs.errors import CacheError, Corrupt, FormatMismatch, QsfsError
from qsfs.format.units import FSID_SIZE
from qsfs.fsck.report import Layer, Report
from qsfs.store.block import ALL_PAGES
from qsfs.store.environment import Environment, ReadView
from qsfs.store.group import COMMIT_KEY, WRITE_NUMBER_KEY
from qsfs.store.schema import (
    REMOTE_TABLES,
    VALUE_SIZE,
    BlockRow,
    Entry,
    ExtentRow,
    Inode,
    PackRow,
    Table,
    decode_truncations,
    read_plain_u64,
)
from qsfs.store.start import ROW_BYTES
from qsfs.store.store import FSID_KEY

DATA = "data.mdb"
_SHOWN_KEY = 64
_LARGEST_NUMBER = 2**62


def check_lmdb(directory: Path, map_bytes: int, report: Report) -> Environment | None:
    """Verifies the file and opens it read-only; None where that cannot be done, with the reason reported."""
    path = directory / DATA
    if not path.exists():
        report.fail(f"{directory}: there is no file system here; run 'qsfs restore' or 'qsfs format'")
        return None
    try:
        problems: list[str] = verify(str(path), subdir=False)  # type: ignore[no-untyped-call]
    except VerifyError as error:
        problems = [str(error)]
    except OSError as error:
        report.fail(f"{path}: cannot be read: {error.strerror}")
        return None
    except (struct.error, ValueError, IndexError, MemoryError, RecursionError, OverflowError) as error:
        problems = [f"it cannot be walked: {error!r}"]
    for problem in problems:
        report.add(
            Layer.LMDB,
            "lmdb-structure",
            f"{path}: {problem}; set the cache directory aside and run 'qsfs restore'",
        )
    if problems:
        report.fail("the layers above LMDB, because its file is damaged")
        return None
    try:
        return Environment(directory, map_bytes, readonly=True)
    except FormatMismatch as error:
        report.fail(str(error))
    except (CacheError, QsfsError) as error:
        report.add(Layer.LMDB, "lmdb-open", f"{error}; set the cache directory aside and run 'qsfs restore'")
    return None


def check_rows(view: ReadView, report: Report) -> None:
    """Decodes every row of every table."""
    for table in Table:
        check = _CHECKS[table]
        count = 0
        for key, value in view.scan(table, b"", None):
            count += 1
            problem = check(key, value)
            if problem:
                name = table.name.lower()
                report.add(
                    Layer.LMDB,
                    "row",
                    f"table {name}, key {key[:_SHOWN_KEY].hex()}: {problem}",
                    {"table": name, "key": key.hex()},
                )
        report.checked["rows"] += count
    fsid = view.get(Table.LOCAL, FSID_KEY)
    if fsid is None or len(fsid) != FSID_SIZE:
        report.add(Layer.LMDB, "local-fsid", "the store does not say which file system it belongs to")
    for number in (COMMIT_KEY, WRITE_NUMBER_KEY):
        row = view.get(Table.LOCAL, number)
        if row is None or len(row) != 8 or read_plain_u64(bytes(row)) >= _LARGEST_NUMBER:
            report.add(
                Layer.LMDB,
                "local-number",
                f"the store's last {number.decode()} number is missing or cannot be: set the cache directory "
                "aside and run 'qsfs restore'",
            )


_Check = Callable[[bytes, memoryview], str | None]


def _key_of(size: int, longer: bool = False) -> _Check:
    def check(key: bytes, value: memoryview) -> str | None:
        if len(key) != size and not (longer and len(key) > size):
            return f"a key of {len(key)} bytes cannot be"
        return None

    return check


def _decoded(key: _Check, decode: Callable[[bytes], object]) -> _Check:
    def check(name: bytes, value: memoryview) -> str | None:
        wrong = key(name, value)
        if wrong:
            return wrong
        try:
            decode(bytes(value))
        except Corrupt as error:
            return str(error)
        return None

    return check


def _sized(key: _Check, size: int) -> _Check:
    def check(name: bytes, value: memoryview) -> str | None:
        return key(name, value) or (
            f"a value of {len(value)} bytes, not {size}" if len(value) != size else None
        )

    return check


def _block(key: bytes, value: memoryview) -> str | None:
    if len(key) != 16:
        return f"a key of {len(key)} bytes cannot be"
    try:
        row = BlockRow.decode(value)
    except Corrupt as error:
        return str(error)
    if not row.resident or row.resident & ~ALL_PAGES or row.dirty & ~row.resident:
        return f"resident {row.resident:#06b} and dirty {row.dirty:#06b} cannot be"
    return None


def _mark(key: bytes, value: memoryview) -> str | None:
    if len(key) < 2 or key[0] not in REMOTE_TABLES:
        return "marks a row of no remote table as changed"
    return None if len(value) == 8 else f"a mark of {len(value)} bytes cannot be"


def _start(key: bytes, value: memoryview) -> str | None:
    return _TWO(key, value) or (None if 0 < len(value) <= ROW_BYTES else f"a bitmap of {len(value)} bytes cannot be")


def _any(key: bytes, value: memoryview) -> str | None:
    return None


_ONE, _TWO, _NAMED = _key_of(8), _key_of(16), _key_of(8, longer=True)

_CHECKS: dict[Table, _Check] = {
    Table.INODES: _decoded(_ONE, lambda row: Inode.decode(0, row)),
    Table.ENTRIES: _decoded(_NAMED, Entry.decode),
    Table.XATTRS: _NAMED,
    Table.SYMLINKS: _ONE,
    Table.EXTENTS: _decoded(_TWO, lambda row: ExtentRow.decode(0, row)),
    Table.PACKS: _decoded(_ONE, PackRow.decode),
    Table.TRUNCATIONS: _decoded(_ONE, decode_truncations),
    Table.COUNTERS: _sized(_any, 8),
    Table.COOKIES: _TWO,
    Table.ORPHANS: _ONE,
    Table.BLOCKS: _block,
    Table.VALUES: _sized(_TWO, VALUE_SIZE),
    Table.DIRTY: _TWO,
    Table.CHANGED: _mark,
    Table.SPILL_BLOCKS: _decoded(_TWO, BlockRow.decode),
    Table.SPILL_VALUES: _sized(_TWO, VALUE_SIZE),
    Table.SPILL_COVERED: _sized(_ONE, 8),
    Table.LOCAL: _any,
    Table.START: _start,
}
