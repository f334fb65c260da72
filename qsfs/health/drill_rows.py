"""Comparing names and attributes of a restored generation with those that a running mount holds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

import trio
from xxhash import xxh3_64_intdigest

from qsfs.errors import QsfsError
from qsfs.format.head import HeadRef
from qsfs.health.drill_plan import ComparedRows, Plan
from qsfs.store.environment import Environment
from qsfs.store.schema import Inode, InodeFlag, Table, split_u64

TABLES = (Table.INODES, Table.ENTRIES, Table.XATTRS, Table.SYMLINKS)
_AT_ONCE = 256

Row = tuple[int, bytes, int]
"""Table, key and `sum_of` the row."""
CompareRows = Callable[[HeadRef, Sequence[Row], ComparedRows], Awaitable[None]]
"""Asks a running mount for the same rows, and adds what it says; raises `QsfsError` if it does not answer."""


def sum_of(table: int, key: bytes, row: bytes) -> int:
    """A checksum of what a row says that a restore brings back as it was.

    Not so the allocated pages of an inode, which are counted anew, and the size of a file that is kept local.
    """
    if table == Table.INODES:
        inode = Inode.decode(split_u64(key), row)
        inode.allocated = 0
        if inode.flags & InodeFlag.LOCAL_ONLY:
            inode.size = 0
        row = inode.encode()
    return xxh3_64_intdigest(row)


async def compare_rows(
    environment: Environment, ref: HeadRef, plan: Plan, compare: CompareRows, found: ComparedRows
) -> None:
    """Compares the rows that the plan chooses.  A mount that stops answering ends it; `found` says so."""
    for table in TABLES:
        view = environment.read()
        try:
            chooser = plan.chooser(view.count(table))
        finally:
            view.close()
        start = b""
        while True:
            rows: list[Row] = []
            view = environment.read()
            try:
                step = list(islice(view.scan(table, start, None), _AT_ONCE))
                for key, value in step:
                    # What the restore itself changed (files put aside) is marked, and not the generation's.
                    marked = view.get(Table.CHANGED, bytes((table,)) + key) is not None
                    if chooser.next() and not marked:
                        rows.append((int(table), key, sum_of(table, key, bytes(value))))
            finally:
                view.close()
            if rows:
                try:
                    await compare(ref, rows, found)
                except QsfsError as error:
                    found.failure = str(error)
                    return
            await trio.lowlevel.checkpoint()
            if len(step) < _AT_ONCE:
                break
            start = step[-1][0] + b"\0"
