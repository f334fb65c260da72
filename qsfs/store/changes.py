"""Namespace operations as changes of rows and single inode fields: applied live, journaled, replayed.

One operation is one `Change`: it takes effect at the end of its `with` block, wholly, under one
write number, and becomes one journal record.  A record holds single fields of inodes, never whole
rows: a file's size and times belong to its data, so that each file keeps a prefix of its writes.
"""

from __future__ import annotations

import stat
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgpack

from qsfs.errors import Corrupt, QsfsBug
from qsfs.store.schema import Inode, InodeFlag, Table, u64

if TYPE_CHECKING:
    from qsfs.store.store import Store

_FIELDS = (
    "mode",
    "uid",
    "gid",
    "nlink",
    "rdev",
    "flags",
    "atime_ns",
    "mtime_ns",
    "ctime_ns",
    "next_cookie",
    "parent",
)
_LOCAL_ONLY = int(InodeFlag.LOCAL_ONLY)
_TABLES = {int(table): table for table in Table}
_fields_of = attrgetter(*_FIELDS)
_DATA_FIELDS = _FIELDS.index("next_cookie")
_FIELD_NUMBER = {name: number for number, name in enumerate(_FIELDS)}
_PUT, _DELETE, _CREATE, _PATCH, _REMOVE = range(5)
# To make a packer takes longer than to pack an operation.  Changes are made by one thread.
_PACKER = msgpack.Packer()


class Change:
    """What one namespace operation changes: collected in a `with` block, applied wholly at its end."""

    __slots__ = ("_store", "data_of", "operations")

    def __init__(self, store: Store) -> None:
        self._store = store
        self.operations: list[tuple[Any, ...]] = []
        self.data_of: tuple[int, ...] = ()

    def __enter__(self) -> Change:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self.operations:
            return
        store = self._store
        number = store.next_write()
        apply(store, self.operations, number)
        store.layers.open.namespace_log.append((number, self.encode(number), self.data_of))

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Sets a row."""
        self.operations.append((_PUT, int(table), key, value))

    def delete(self, table: Table, key: bytes) -> None:
        """Deletes a row."""
        self.operations.append((_DELETE, int(table), key))

    def create(self, inode: Inode) -> None:
        """Adds an inode, empty of data."""
        self.operations.append((_CREATE, inode.number, _fields_of(inode)))

    def patch(self, number: int, **fields: int) -> None:
        """Sets single fields of an inode; size and allocation are the data's and not among them."""
        try:
            self.operations.append((_PATCH, number, {_FIELD_NUMBER[k]: v for k, v in fields.items()}))
        except KeyError as error:
            raise QsfsBug(f"inode field {error} cannot be patched") from None

    def remove(self, number: int) -> None:
        """Removes an inode with its symlink, xattrs and orphan row; its data are worked off later."""
        self.operations.append((_REMOVE, number))

    def with_data(self, number: int) -> None:
        """Whenever this change is journaled, the data of inode `number` are journaled with it."""
        self.data_of = (*self.data_of, number)

    def encode(self, write_number: int) -> bytes:
        """The journal record's body."""
        packed: bytes = _PACKER.pack((write_number, self.operations))
        return packed


def decode(body: bytes) -> tuple[int, list[tuple[Any, ...]]]:
    """Write number and operations of a namespace record; raises `Corrupt`."""
    try:
        write_number, operations = msgpack.unpackb(body, strict_map_key=False, use_list=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Corrupt(f"a journal record cannot be read: {error}") from error
    return write_number, operations


def apply(store: Store, operations: list[tuple[Any, ...]], write_number: int) -> None:
    """Makes the changes of one operation in the open group."""
    layers = store.layers
    for operation in operations:
        kind = operation[0]
        if kind == _PUT:
            layers.put(_TABLES[operation[1]], operation[2], operation[3])
        elif kind == _DELETE:
            layers.delete(_TABLES[operation[1]], operation[2])
        elif kind == _CREATE:
            fields = operation[2]
            inode = Inode(operation[1], *(*fields[:_DATA_FIELDS], 0, 0, *fields[_DATA_FIELDS:]))
            store.inodes.add(inode)
            store.extents.expect_none(inode.number)
            store.note_inode_number(inode.number)
        elif kind == _PATCH:
            _patch(store, operation[1], operation[2])
        elif kind == _REMOVE:
            _remove(store, operation[1], write_number)


def _patch(store: Store, number: int, fields: dict[int, int]) -> None:
    inode = store.inodes.get(number)
    if inode is None:
        raise QsfsBug(f"inode {number} is changed but does not exist")
    flags = inode.flags
    for field, value in fields.items():
        setattr(inode, _FIELDS[field], value)
    if (flags ^ inode.flags) & _LOCAL_ONLY:
        # With the flag, in live and replay: pages that were never uploaded must not pass for clean.
        store.blocks.mark_all(inode, dirty=not inode.flags & _LOCAL_ONLY)
    store.inodes.touch(inode)


def _remove(store: Store, number: int, write_number: int) -> None:
    inode = store.inodes.get(number)
    if inode is None:
        return
    layers = store.layers
    key = u64(number)
    store.forget_data(inode, write_number)
    store.inodes.remove(number)
    layers.delete(Table.ORPHANS, key)
    if stat.S_ISLNK(inode.mode):
        layers.delete(Table.SYMLINKS, key)
    if layers.any(Table.XATTRS):
        for name in [name for name, _ in layers.scan(Table.XATTRS, key, u64(number + 1))]:
            layers.delete(Table.XATTRS, name)
