"""Making the tables of one generation those of another, by the rows that differ, in one transaction.

The tables are those of a `Rebuild` with `exact`: the rows of a generation, and what derives from them.  What derives
from rows that differ is made anew, and from nothing else: so the work is that of the difference.
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qsfs.errors import Corrupt
from qsfs.format.pack import PackKind
from qsfs.store.environment import Environment
from qsfs.store.positions import PREFIXES, position_of
from qsfs.store.schema import (
    PAGE,
    REMOTE_TABLES,
    ROOT_INODE,
    Entry,
    ExtentRow,
    Inode,
    InodeFlag,
    PackRow,
    Table,
    split_u64,
    u64,
    u64_pair,
)

Rows = Mapping[tuple[int, bytes], bytes | None]
"""Rows by table and key; None: deleted."""


class NotAdvanced(Exception):
    """The difference cannot be applied to what is there."""


class Advance:
    """Changes in one write transaction `txn`; `finish` comes last.  All calls block."""

    def __init__(self, environment: Environment, txn: Any) -> None:
        self._txn = txn
        self._tables = environment.databases
        # What was there of rows that changed: pages of an inode (None: no inode), live bytes of a pack, entries.
        self._inodes: dict[int, int | None] = {}
        self._packs: dict[int, int] = {}
        self._entries: dict[bytes, bytes | None] = {}
        # By how much the extents that changed change pages of inodes and live bytes of packs.
        self._pages: defaultdict[int, int] = defaultdict(int)
        self._live: defaultdict[int, int] = defaultdict(int)

    def replace(self, start: bytes, stop: bytes | None, rows: Rows) -> None:
        """Makes `rows`, which stand between two positions (None: the end), all that there is between them."""
        for table in sorted(REMOTE_TABLES):
            for key in list(self._keys(table, start, stop)):
                if rows.get((table, key)) is None:
                    self.put(table, key, None)
        for (number, key), value in sorted(rows.items()):
            self.put(Table(number), key, value)

    def put(self, table: Table, key: bytes, value: bytes | None) -> None:
        """Sets or deletes a row."""
        database = self._tables[table]
        old: bytes | None = self._txn.get(key, db=database)
        if old == value:
            return
        if table is Table.EXTENTS:
            self._count(key, old, -1)
            self._count(key, value, 1)
        elif table is Table.INODES:
            number = split_u64(key)
            self._inodes.setdefault(number, None if old is None else Inode.decode(number, old).allocated)
        elif table is Table.PACKS:
            self._packs.setdefault(split_u64(key), 0 if old is None else PackRow.decode(old).live)
        elif table is Table.ENTRIES:
            self._entries.setdefault(key, old)
        if value is None:
            self._txn.delete(key, db=database)
        else:
            self._txn.put(key, value, db=database)

    def finish(self, local: Mapping[bytes, bytes]) -> None:
        """Makes what derives from what changed, and sets rows of LOCAL.

        Raises `NotAdvanced` where cookies are not unique, which a restore mends, and `Corrupt` if there is no root.
        """
        for number in sorted({*self._inodes, *self._pages}):
            self._derive_inode(number)
        for number in sorted({*self._packs, *self._live}):
            self._derive_pack(number)
        self._derive_cookies()
        if self._txn.get(u64(ROOT_INODE), db=self._tables[Table.INODES]) is None:
            raise Corrupt("the generation holds no root directory: its rows are not a file system")
        for name, value in local.items():
            self._txn.put(name, value, db=self._tables[Table.LOCAL])

    def _count(self, key: bytes, row: bytes | None, sign: int) -> None:
        if row is not None:
            pages, pack = ExtentRow.pages_and_pack(row)
            self._pages[split_u64(key[:8])] += sign * pages
            self._live[pack] += sign * pages * PAGE

    def _derive_inode(self, number: int) -> None:
        row = self._txn.get(u64(number), db=self._tables[Table.INODES])
        if row is None:
            return
        inode = Inode.decode(number, row)
        before = self._inodes.get(number, inode.allocated)
        inode.allocated = self._pages_of(number) if before is None else before + self._pages[number]
        if stat.S_ISREG(inode.mode) and inode.flags & InodeFlag.LOCAL_ONLY:
            inode.size = 0
        self._txn.put(u64(number), inode.encode(), db=self._tables[Table.INODES])

    def _pages_of(self, number: int) -> int:
        """Of an inode that was not there the extents may have been: counted anew."""
        return sum(
            ExtentRow.pages_and_pack(value)[0] for _, value in self._scan(Table.EXTENTS, u64(number), u64(number + 1))
        )

    def _derive_pack(self, number: int) -> None:
        row = self._txn.get(u64(number), db=self._tables[Table.PACKS])
        if row is None:
            return
        pack = PackRow.decode(row)
        if pack.kind == PackKind.DATA:
            live = self._packs.get(number, pack.live) + self._live[number]
            self._txn.put(u64(number), replace(pack, live=live).encode(), db=self._tables[Table.PACKS])

    def _derive_cookies(self) -> None:
        cookies = self._tables[Table.COOKIES]
        for key, old in self._entries.items():
            if old is not None:
                self._txn.delete(u64_pair(split_u64(key[:8]), Entry.decode(old).cookie), db=cookies)
        for key in self._entries:
            row = self._txn.get(key, db=self._tables[Table.ENTRIES])
            if row is None:
                continue
            parent, cookie = split_u64(key[:8]), Entry.decode(row).cookie
            above = self._txn.get(u64(parent), db=self._tables[Table.INODES])
            if above is None or cookie >= Inode.decode(parent, above).next_cookie:
                raise NotAdvanced(f"the cookie of an entry in directory {parent} is not one that it gave")
            if not self._txn.put(u64_pair(parent, cookie), key[8:], db=cookies, overwrite=False):
                raise NotAdvanced(f"two entries in directory {parent} have one cookie")

    def _keys(self, table: Table, start: bytes, stop: bytes | None) -> Iterator[bytes]:
        """The keys of a table that stand between two positions."""
        prefix = PREFIXES[table]
        if start[:1] > prefix or (stop is not None and stop <= prefix):
            return
        begin = start[1:] if start[:1] == prefix else b""
        end = stop[1:] if stop is not None and stop[:1] == prefix else None
        for key, _ in self._scan(table, begin, end):
            yield key

    def _scan(self, table: Table, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(self._tables[table]) as cursor:
            if not cursor.set_range(start):
                return
            for key, value in cursor.iternext():
                if stop is not None and key >= stop:
                    return
                yield key, value


class ByPosition:
    """Rows in the order of their positions."""

    def __init__(self, rows: Rows) -> None:
        self._rows = sorted((position_of(table, key), table, key, value) for (table, key), value in rows.items())
        self._positions = [row[0] for row in self._rows]

    def between(self, start: bytes, stop: bytes | None) -> dict[tuple[int, bytes], bytes | None]:
        """Those from one position to another (None: to the end)."""
        begin = bisect_left(self._positions, start)
        end = len(self._rows) if stop is None else bisect_left(self._positions, stop)
        return {(table, key): value for _, table, key, value in self._rows[begin:end]}
