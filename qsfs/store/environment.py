"""The LMDB environment: opening, named databases, versions, used space.

LMDB runs with its durable defaults: no `writemap`, no `nosync` (but while a store is built), locks on.
The map is sized once, from the configured bound, so that LMDB itself can never grow past it.  One
environment is open in a process; write transactions live on one thread; a read transaction is renewed
with every commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from qsfs.errors import CacheError, Corrupt, FormatMismatch
from qsfs.store.direct import DISK_FAILED
from qsfs.store.schema import LOCAL_SCHEMA_VERSION, PAGE, Table

_SCHEMA_KEY = b"schema"
_TURN_KEY = b"turn"
_OLDEST_SCHEMA = 1
_LATER_TABLES = frozenset((Table.START,))
"""Tables that a store of the oldest schema lacks."""


class StoreFull(CacheError):
    """LMDB found no free page within its map: pages freed lately may not be reused yet."""


class Usage(NamedTuple):
    """Bytes of LMDB pages that hold something, the free list not counted: all, and those of the trees.

    The rest are the pages of values, which a commit never copies.
    """

    all: int
    trees: int


class Environment:
    """An open LMDB environment with one named database per table."""

    def __init__(self, directory: Path, map_bytes: int, *, readonly: bool = False, durable: bool = True) -> None:
        """Opens (and unless `readonly` creates) the environment in `directory`.

        Without `durable` a commit waits for no disk: for a store that is nothing before `flush` has returned.
        Raises `CacheError` if LMDB cannot open it, `FormatMismatch` if its schema is newer.
        """
        self.directory = directory
        self._views: set[ReadView] = set()
        self.map_bytes = map_bytes - map_bytes % PAGE
        try:
            self.env: lmdb.Environment = lmdb.open(
                str(directory),
                map_size=self.map_bytes,
                max_dbs=64,
                max_readers=64,
                mode=0o600,
                readahead=False,
                meminit=False,
                readonly=readonly,
                create=not readonly,
                sync=durable,
            )
            self.databases: dict[Table, Any] = {}
            if readonly:
                for table in Table:
                    with contextlib.suppress(*_missing(table)):
                        self.databases[table] = self.env.open_db(table.name.lower().encode(), create=False)
            else:
                with self.env.begin(write=True) as txn:
                    for table in Table:
                        self.databases[table] = self.env.open_db(table.name.lower().encode(), txn=txn)
        except lmdb.Error as error:
            raise CacheError(f"{directory}: LMDB cannot open the local store: {error}") from error
        self._check_schema(readonly)

    def _check_schema(self, readonly: bool) -> None:
        local = self.databases[Table.LOCAL]
        with self.env.begin(db=local, write=not readonly) as txn:
            row = txn.get(_SCHEMA_KEY)
            version = int.from_bytes(row or b"", "little")
            known = _OLDEST_SCHEMA <= version <= LOCAL_SCHEMA_VERSION
            if not readonly and (row is None or (known and version < LOCAL_SCHEMA_VERSION)):
                txn.put(_SCHEMA_KEY, LOCAL_SCHEMA_VERSION.to_bytes(4, "little"))
                return
        if not known:
            self.close()
            raise FormatMismatch(
                f"{self.directory}: the local store has schema {version}, this qsfs knows {_OLDEST_SCHEMA} to "
                f"{LOCAL_SCHEMA_VERSION}; use the qsfs version that wrote it"
            )

    def read(self) -> ReadView:
        """A new read view of the last commit.  The caller closes it within seconds.  Raises `CacheError`."""
        try:
            view = ReadView(self, self.env.begin(buffers=True))
        except (lmdb.Error, OSError) as error:
            raise CacheError(f"{self.directory}: the local store cannot be read: {error}") from error
        self._views.add(view)
        return view

    @property
    def readers(self) -> int:
        """How many read views are open."""
        return len(self._views)

    def _closed(self, view: ReadView) -> None:
        self._views.discard(view)

    @contextmanager
    def write(self, *, buffers: bool = False) -> Iterator[Any]:
        """A write transaction; commits durably at the end of the block, or aborts on an exception.

        With `buffers` rows are read as memoryviews, which the next change in the transaction may kill.
        Raises `StoreFull` for a full map and `CacheError` for whatever else LMDB reports; nothing of
        the transaction is in the store then.
        """
        try:
            begin: Any = self.env.begin
            with begin(write=True, buffers=buffers) as txn:
                yield txn
        except lmdb.MapFullError as error:
            raise StoreFull(f"{self.directory}: the local store is full ({error})") from error
        except lmdb.CorruptedError as error:
            raise Corrupt(f"{self.directory}: LMDB: {error}; run 'qsfs fsck'") from error
        except (lmdb.Error, OSError) as error:
            raise CacheError(f"{self.directory}: the local commit failed: {error}; {DISK_FAILED}") from error

    def flush(self) -> None:
        """Makes all commits durable, also those of an environment that is not.  Raises `CacheError`."""
        try:
            self.env.sync(True)
        except (lmdb.Error, OSError) as error:
            raise CacheError(
                f"{self.directory}: the local store cannot be flushed: {error}; {DISK_FAILED}"
            ) from error

    def release_freed(self) -> None:
        """Commits nothing, so that pages which the last commits freed may be reused by the next.

        LMDB reuses what a transaction freed only two transactions later, and later still while a
        reader is open.  Raises as `write`.
        """
        for turn in range(2):
            with self.write() as txn:
                txn.put(_TURN_KEY, bytes((turn,)), db=self.databases[Table.LOCAL])

    def usage(self) -> Usage:
        """What the last commit uses."""
        with self.env.begin() as txn:
            return self.usage_in(txn)

    def usage_in(self, txn: Any) -> Usage:
        """What a transaction uses, with its own changes."""
        trees = values = 0
        for database in self.databases.values():
            stat = txn.stat(database)
            trees += stat["branch_pages"] + stat["leaf_pages"]
            values += stat["overflow_pages"]
        return Usage((trees + values) * PAGE, trees * PAGE)

    def close(self) -> None:
        """Closes the environment; every view must be closed before."""
        self.env.close()


def _missing(table: Table) -> tuple[type[Exception], ...]:
    """What may be raised where an old store that is only read lacks a table."""
    return (lmdb.NotFoundError,) if table in _LATER_TABLES else ()


class ReadView:
    """One read transaction.  Values are memoryviews into the map: copy what must outlive the view.

    A table that a store which is only read lacks has no rows for `scan`.
    """

    def __init__(self, environment: Environment, txn: Any) -> None:
        self._environment = environment
        self._databases = environment.databases
        self._counts: dict[Table, int] = {}
        self.txn = txn

    def get(self, table: Table, key: bytes) -> memoryview | None:
        """The row at `key`, or None."""
        row: memoryview | None = self.txn.get(key, db=self._databases[table])
        return row

    def get_all(self, table: Table, keys: Sequence[bytes]) -> list[tuple[memoryview, memoryview]]:
        """The rows at those of `keys` that there are, in their order."""
        with self.txn.cursor(self._databases[table]) as cursor:
            found: list[tuple[memoryview, memoryview]] = cursor.getmulti(keys)
            return found

    def scan(
        self, table: Table, start: bytes, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, memoryview]]:
        """Rows with start <= key < stop (None: to the end), in key order or its reverse."""
        if table not in self._databases:
            return
        with self.txn.cursor(self._databases[table]) as cursor:
            if not reverse:
                if not cursor.set_range(start):
                    return
                for key, value in cursor.iternext():
                    name = bytes(key)
                    if stop is not None and name >= stop:
                        return
                    yield name, value
                return
            if stop is None or not cursor.set_range(stop):
                if not cursor.last():
                    return
            elif not cursor.prev():
                return
            for key, value in cursor.iterprev():
                name = bytes(key)
                if name < start:
                    return
                yield name, value

    def count(self, table: Table) -> int:
        """Number of rows in `table`."""
        count = self._counts.get(table)
        if count is None:
            count = self._counts[table] = int(self.txn.stat(self._databases[table])["entries"])
        return count

    def close(self) -> None:
        """Ends the transaction; views of its values are dead from here on."""
        self.txn.abort()
        self._environment._closed(self)
