"""What DEL has deleted on each backend, and a 0-db therefore keeps on its disk: it appends, and never compacts.

A 0-db tells the bytes of live values and the free bytes of its disk, and nobody but its administrator what its
files take.  So this is counted by who deletes, for each backend by its identity, since this local store began; it
is a lower bound: what another machine deleted, or shards of abandoned cuts, are not in it.

Such space comes back only with the namespace (NSDEL).  A namespace is not moved by itself: the fleet entry in every
head names address, namespace and identity, and so does the configuration; superblock, identity and perhaps the
heads lie in it beside the data.  A move behind the back of the fleet would leave restores, readers and other
mounts, which know backends by those alone, with a namespace that is gone, and pack rows of kept generations with
a place that is another.  So it is a change of the fleet like any other (`fleet_change`): a fresh namespace is added,
the old one drained and retired, then deleted by its operator.
"""

from __future__ import annotations

from qsfs.errors import QsfsError
from qsfs.format import schema
from qsfs.remote.members import Member, Members
from qsfs.store.store import Store

DELETED_PREFIX = b"deleted:"
"""LOCAL rows: the prefix, the number of a fleet entry, u32 big-endian -> msgpack array: 1, its identity, bytes."""
_SCHEMA = 1


def deleted_key(number: int) -> bytes:
    """The key in LOCAL."""
    return DELETED_PREFIX + number.to_bytes(4, "big")


class Unreclaimed:
    """Bytes deleted on each backend."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, member: Member, size: int) -> None:
        """Takes note of `size` bytes that a backend has deleted, with the next commit."""
        if size:
            row = [_SCHEMA, member.entry.identity, min(self.bytes(member) + size, schema.U64)]
            self._store.set_local(deleted_key(member.number), schema.pack(row))

    def bytes(self, member: Member) -> int:
        """What was deleted on a backend, as far as is known here; 0 for one that took another's number."""
        row = self._store.local(deleted_key(member.number))
        if row is None:
            return 0
        try:
            fields = schema.record(row, _SCHEMA, 3, "deleted bytes in the local store")
            identity, size = fields.binary(), fields.integer()
        except QsfsError:
            return 0
        return size if identity == member.entry.identity else 0

    def report(self, members: Members) -> list[dict[str, str | int]]:
        """Each backend on which anything was deleted, the most first."""
        found = [(self.bytes(member), member.name) for member in members]
        return [{"backend": name, "bytes": size} for size, name in sorted(found, reverse=True) if size]
