"""Building a local store from the rows of a generation, in a directory of its own.

Rows are loaded in bounded transactions in the order in which they come (a snapshot comes in key
order), then what is derived from them is made: cookies, allocated pages, live bytes of packs.
What a restore itself changes against the generation gets change marks, so that the next
generation carries it.  Nothing here is a store until `finish` has returned.
"""

from __future__ import annotations

import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qsfs import failpoints
from qsfs.errors import CacheError, Corrupt, FormatMismatch
from qsfs.format.head import Head, MetadataPack, SealedHead
from qsfs.format.pack import PackKind
from qsfs.format.rows import Row
from qsfs.remote.base import FIRST_COMMIT, base_rows
from qsfs.remote.generation import GENERATION
from qsfs.remote.packing import row_of
from qsfs.store.environment import Environment
from qsfs.store.schema import (
    BLOCK_SIZE,
    PAGE,
    REMOTE_TABLES,
    ROOT_INODE,
    SCHEMA_VERSION,
    Entry,
    ExtentRow,
    Inode,
    InodeFlag,
    PackRow,
    Table,
    plain_u64,
    read_plain_u64,
    split_u64,
    u64,
    u64_pair,
)
from qsfs.store.store import NEXT_INODE, NEXT_PACK

STEP_ROWS = 20_000
_LONGEST_KEY = 511
_LONGEST_NAME = 255
_NO_MORE = 1 << 64

Tick = Callable[[int], None]
"""Called with the number of rows done in a step."""


@dataclass(frozen=True, slots=True)
class AsideFile:
    """A file that was put beside its name; `path` is its old path from the root, `name` the new name."""

    path: str
    name: str


@dataclass(slots=True)
class Tally:
    """What a restore found and did.  `emptied`: files whose policy says that they are never uploaded."""

    files: int = 0
    directories: int = 0
    others: int = 0
    bytes: int = 0
    rows: int = 0
    emptied: int = 0
    aside: list[AsideFile] = field(default_factory=list)


class Rebuild:
    """A store being built.  All calls block: use them in worker threads, one at a time.

    With `exact` it is for reading only: files stay under their names whose policy is to be put beside
    (`restore_aside`), and nothing is prepared for a next generation.
    """

    def __init__(self, directory: Path, map_bytes: int, now_ns: int) -> None:
        """Makes an empty store in `directory`, which exists and is empty.  Raises `CacheError`."""
        self.tally = Tally()
        self.exact = False
        self._now_ns = now_ns
        self._environment = Environment(directory, map_bytes, durable=False)
        self._tables = self._environment.databases
        self._aside: set[int] = set()

    def close(self) -> None:
        """Closes the store; what is not finished is not one."""
        self._environment.close()

    # loading

    def load(self, rows: Iterable[Row]) -> None:
        """Applies rows in order.  Raises `Corrupt` for what no generation holds, `CacheError` for no room."""
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) >= STEP_ROWS:
                self._load(batch)
                batch = []
        self._load(batch)

    def _load(self, batch: list[Row]) -> None:
        tables: defaultdict[int, dict[bytes, bytes | None]] = defaultdict(dict)
        for number, key, value in batch:
            if number not in REMOTE_TABLES or not 1 <= len(key) <= _LONGEST_KEY:
                raise Corrupt(f"the generation holds a row that cannot be: table {number}, key {key.hex()}")
            tables[number][key] = value
        with self._write() as txn:
            for number, rows in tables.items():
                self._put_all(txn, Table(number), rows)
        self.tally.rows += len(batch)
        failpoints.hit("restore.rows")

    def _put_all(self, txn: Any, table: Table, rows: dict[bytes, bytes | None]) -> None:
        """Sets and deletes rows of one table; those behind all others are appended, which fills pages."""
        with txn.cursor(self._tables[table]) as cursor:
            kept = sorted((key, value) for key, value in rows.items() if value is not None)
            append = bool(kept) and (not cursor.last() or cursor.key() < kept[0][0])
            cursor.putmulti(kept, append=append)
        for key, value in rows.items():
            if value is None:
                txn.delete(key, db=self._tables[table])

    # finishing

    def finish(
        self,
        head: Head,
        sealed: SealedHead,
        tick: Tick = lambda rows: None,
        *,
        ours: bool = False,
        local: Mapping[bytes, bytes] | None = None,
    ) -> None:
        """Makes what is derived from the rows, and records `sealed` as the base.

        `ours`: this machine sends that head.  `local`: other rows of LOCAL that the store is to have.
        Raises `Corrupt` if the rows are no file system, `FormatMismatch` if of another layout.
        """
        if head.schema_version != SCHEMA_VERSION or head.block_size != BLOCK_SIZE:
            raise FormatMismatch(
                f"the generation has schema {head.schema_version} and blocks of {head.block_size} bytes, "
                f"this qsfs knows {SCHEMA_VERSION} and {BLOCK_SIZE}: use the qsfs that wrote it"
            )
        live: defaultdict[int, int] = defaultdict(int)
        highest = self._inodes(live, tick)
        waiting = self._entries(tick)
        self._put_aside(waiting, head.generation)
        next_pack = self._packs(head, live, tick)
        if not self.exact:
            self._counters(head, highest, next_pack)
        failpoints.hit("restore.derived")
        with self._write() as txn:
            for name, value in {**base_rows(head, sealed, ours=ours), **(local or {})}.items():
                txn.put(name, value, db=self._tables[Table.LOCAL])
        self._environment.flush()

    def _inodes(self, live: defaultdict[int, int], tick: Tick) -> int:
        """Counts allocated pages and live bytes anew, empties local-only files; returns the highest number in use."""
        highest, root = 0, False
        extents = self._extents(live, tick)
        number, pages = -1, 0
        for rows in self._steps(Table.INODES, tick):
            with self._write() as txn:
                for key, value in rows:
                    inode = Inode.decode(split_u64(key), value)
                    highest = max(highest, inode.number)
                    kind = stat.S_IFMT(inode.mode)
                    if kind == stat.S_IFREG:
                        if inode.flags & InodeFlag.LOCAL_ONLY:
                            inode.size = 0
                            self.tally.emptied += 1
                        if inode.flags & InodeFlag.RESTORE_ASIDE and not self.exact:
                            self._aside.add(inode.number)
                        self.tally.files += 1
                        self.tally.bytes += inode.size
                    elif kind == stat.S_IFDIR:
                        self.tally.directories += 1
                        root |= inode.number == ROOT_INODE
                    else:
                        self.tally.others += 1
                    while number < inode.number:
                        number, pages = next(extents, (_NO_MORE, 0))
                    inode.allocated = pages if number == inode.number else 0
                    row = inode.encode()
                    if row != value:
                        txn.put(key, row, db=self._tables[Table.INODES])
        if not root:
            raise Corrupt("the generation holds no root directory: its rows are not a file system")
        for _ in extents:
            pass
        return highest

    def _extents(self, live: defaultdict[int, int], tick: Tick) -> Iterator[tuple[int, int]]:
        """Each inode with extents and how many pages they have; adds what they have of each pack to `live`."""
        current, pages = b"", 0
        for rows in self._steps(Table.EXTENTS, tick):
            for key, value in rows:
                if key[:8] != current:
                    if current:
                        yield split_u64(current), pages
                    current, pages = key[:8], 0
                count, pack = ExtentRow.pages_and_pack(value)
                pages += count
                live[pack] += count * PAGE
        if current:
            yield split_u64(current), pages

    def _entries(self, tick: Tick) -> list[tuple[int, bytes, Entry]]:
        """Makes the cookies; returns the entries of files that are put aside."""
        waiting: list[tuple[int, bytes, Entry]] = []
        cookies = self._tables[Table.COOKIES]
        for rows in self._steps(Table.ENTRIES, tick):
            with self._write() as txn:
                parent, directory = -1, None
                for key, value in rows:
                    if split_u64(key) != parent:
                        parent = split_u64(key)
                        directory = self._inode(txn, parent)
                    name, entry = key[8:], Entry.decode(value)
                    taken = txn.get(u64_pair(parent, entry.cookie), db=cookies)
                    if directory is not None and (taken is not None or entry.cookie >= directory.next_cookie):
                        if taken is not None:
                            entry = replace(entry, cookie=directory.next_cookie)
                            self._change(txn, Table.ENTRIES, key, entry.encode())
                        directory.next_cookie = max(directory.next_cookie, entry.cookie + 1)
                        self._change(txn, Table.INODES, u64(parent), directory.encode())
                    txn.put(u64_pair(parent, entry.cookie), name, db=cookies)
                    if entry.inode in self._aside:
                        waiting.append((parent, name, entry))
        return waiting

    def _put_aside(self, waiting: list[tuple[int, bytes, Entry]], generation: int) -> None:
        with self._write() as txn:
            for parent, name, entry in waiting:
                path = self._path(txn, parent, name)
                new = self._free_name(txn, parent, name, generation)
                self._change(txn, Table.ENTRIES, u64(parent) + name, None)
                self._change(txn, Table.ENTRIES, u64(parent) + new, entry.encode())
                txn.put(u64_pair(parent, entry.cookie), new, db=self._tables[Table.COOKIES])
                inode = self._inode(txn, entry.inode)
                if inode is not None:
                    inode.flags &= ~InodeFlag.RESTORE_ASIDE
                    self._change(txn, Table.INODES, u64(inode.number), inode.encode())
                self.tally.aside.append(AsideFile(path, _shown(new)))

    def _free_name(self, txn: Any, parent: int, name: bytes, generation: int) -> bytes:
        """`NAME.restored-GENERATION`, or with a number behind it where that is taken."""
        base = re.sub(rb"\.restored-\d+(-\d+)?$", b"", name)
        turn = 1
        while True:
            suffix = f".restored-{generation}" + (f"-{turn}" if turn > 1 else "")
            new = base[: _LONGEST_NAME - len(suffix)] + suffix.encode()
            if txn.get(u64(parent) + new, db=self._tables[Table.ENTRIES]) is None:
                return new
            turn += 1

    def _packs(self, head: Head, live: defaultdict[int, int], tick: Tick) -> int:
        """Sets live bytes as counted and adds the head's own packs; returns the highest pack number."""
        listed = {} if self.exact else {pack.ref.pack_id: pack for pack in _listed(head)}
        highest = max(live, default=0)
        for rows in self._steps(Table.PACKS, tick):
            with self._write() as txn:
                for key, value in rows:
                    number, pack = split_u64(key), PackRow.decode(value)
                    highest = max(highest, number)
                    listed.pop(pack.pack_id, None)
                    if pack.kind == PackKind.DATA and pack.live != live.get(number, 0):
                        pack = replace(pack, live=live.get(number, 0))
                        txn.put(key, pack.encode(), db=self._tables[Table.PACKS])
        with self._write() as txn:
            for own in listed.values():
                highest += 1
                row = row_of(own.ref, own.placement, self._now_ns, live=own.ref.body_length)
                self._change(txn, Table.PACKS, u64(highest), row.encode())
        return highest

    def _counters(self, head: Head, highest_inode: int, highest_pack: int) -> None:
        """No number that the generation or the head knows to be used is used again."""
        table = self._tables[Table.COUNTERS]
        least = {name.encode(): value for name, value in head.counters.items()}
        known = ((NEXT_INODE, highest_inode), (NEXT_PACK, highest_pack), (GENERATION, head.generation))
        for name, value in known:
            least[name] = max(least.get(name, 0), value)
        with self._write() as txn:
            for name, value in least.items():
                row = txn.get(name, db=table)
                if row is None or len(row) != 8 or read_plain_u64(row) < value:
                    self._change(txn, Table.COUNTERS, name, plain_u64(value))

    # rows

    def _change(self, txn: Any, table: Table, key: bytes, value: bytes | None) -> None:
        """Sets or deletes a row, and marks it as changed since the generation."""
        if value is None:
            txn.delete(key, db=self._tables[table])
        else:
            txn.put(key, value, db=self._tables[table])
        txn.put(bytes((table,)) + key, u64(FIRST_COMMIT), db=self._tables[Table.CHANGED])

    def _inode(self, txn: Any, number: int) -> Inode | None:
        row = txn.get(u64(number), db=self._tables[Table.INODES])
        return None if row is None else Inode.decode(number, row)

    def _steps(self, table: Table, tick: Tick) -> Iterator[list[tuple[bytes, bytes]]]:
        """All rows of a table, some thousand at a time; what is read may be changed meanwhile."""
        start = b""
        while True:
            rows: list[tuple[bytes, bytes]] = []
            view = self._environment.read()
            try:
                for key, value in view.scan(table, start, None):
                    rows.append((key, bytes(value)))
                    if len(rows) >= STEP_ROWS:
                        break
            finally:
                view.close()
            if not rows:
                return
            yield rows
            tick(len(rows))
            start = rows[-1][0] + b"\0"

    def _path(self, txn: Any, parent: int, name: bytes) -> str:
        """The path of an entry from the root; as much of it as can be told."""
        parts = [name]
        seen = set()
        while parent != ROOT_INODE and parent not in seen:
            seen.add(parent)
            directory = self._inode(txn, parent)
            found = self._name_in(txn, directory.parent, parent) if directory is not None else None
            if directory is None or found is None:
                return "?/" + _shown(b"/".join(reversed(parts)))
            parts.append(found)
            parent = directory.parent
        return "/" + _shown(b"/".join(reversed(parts)))

    def _name_in(self, txn: Any, directory: int, inode: int) -> bytes | None:
        with txn.cursor(self._tables[Table.ENTRIES]) as cursor:
            prefix = u64(directory)
            if not cursor.set_range(prefix):
                return None
            for key, value in cursor.iternext():
                if key[:8] != prefix:
                    return None
                if Entry.decode(value).inode == inode:
                    return bytes(key[8:])
        return None

    def _write(self) -> Any:
        return _Room(self._environment)


class _Room:
    """A write transaction whose failure says what to do."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._inner = environment.write()

    def __enter__(self) -> Any:
        return self._inner.__enter__()

    def __exit__(self, *failure: Any) -> bool | None:
        try:
            return self._inner.__exit__(*failure)
        except CacheError as error:
            raise CacheError(
                f"{error}; where it is full, the metadata need a larger [cache] size than now"
            ) from error


def _listed(head: Head) -> Iterator[MetadataPack]:
    yield from head.snapshot
    for delta in head.deltas:
        yield from delta


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
