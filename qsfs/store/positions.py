"""Where a remote row stands among all rows: the order in which a snapshot of the metadata is divided.

A position is one byte, the row's *space*, and the row's key.  The tables that say something of an
inode share a space, so that all its rows stand together: what one of them is in a generation
depends on the others (`snapshot.CommittedState`).  Only extents have a space of their own: one
file may have millions.  Positions are part of the format of heads.
"""

from __future__ import annotations

from qsfs.store.schema import Table

SPACES: dict[int, int] = {
    Table.INODES: 1,
    Table.ENTRIES: 2,
    Table.XATTRS: 1,
    Table.SYMLINKS: 1,
    Table.EXTENTS: 5,
    Table.PACKS: 6,
    Table.TRUNCATIONS: 1,
    Table.COUNTERS: 8,
}
"""The space of each table that a generation holds."""
INODE_SPACE = SPACES[Table.INODES]
INODE_TABLES = tuple(table for table in sorted(Table) if SPACES.get(table) == INODE_SPACE)
PREFIXES: dict[int, bytes] = {table: bytes((space,)) for table, space in SPACES.items()}
_UNKNOWN = b"\xff"


def position_of(table: int, key: bytes) -> bytes:
    """The position of a row; rows of tables that are not known stand last."""
    return PREFIXES.get(table, _UNKNOWN) + key
