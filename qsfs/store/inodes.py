"""The live inode objects: one per inode, shared by everything that works on it.

A row is encoded once per group, when the group is sealed, so that a write costs no encoding.
"""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakValueDictionary

from qsfs.store.layers import Layers
from qsfs.store.schema import Inode, Table, u64

CACHED_INODES = 20_000


class Inodes:
    """Looks up, changes and writes back inodes."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._live: WeakValueDictionary[int, Inode] = WeakValueDictionary()
        self._recent: OrderedDict[int, Inode] = OrderedDict()
        self._changed: dict[int, Inode] = {}

    def get(self, number: int) -> Inode | None:
        """The inode, or None if there is none of this number."""
        inode = self._recent.get(number)
        if inode is not None:
            return inode
        inode = self._live.get(number)
        if inode is None:
            row = self._layers.get(Table.INODES, u64(number))
            if row is None:
                return None
            inode = Inode.decode(number, row)
            self._live[number] = inode
        self._keep(inode)
        return inode

    def add(self, inode: Inode) -> None:
        """Takes a new inode in."""
        self._live[inode.number] = inode
        self._keep(inode)
        self.touch(inode)

    def touch(self, inode: Inode) -> None:
        """Takes note that the object was changed: its row is written with the open group."""
        if inode.number not in self._changed:
            self._changed[inode.number] = inode
            self._layers.open.inodes.add(inode.number)

    def remove(self, number: int) -> None:
        """Deletes the inode's row with the open group."""
        self._changed.pop(number, None)
        self._recent.pop(number, None)
        self._live.pop(number, None)
        self._layers.delete(Table.INODES, u64(number))

    def forget(self, number: int) -> None:
        """Drops a stand-in for an inode that is gone: no row is written for it."""
        self._changed.pop(number, None)

    def write_back(self) -> None:
        """Encodes every changed inode into the open group; called when it is sealed."""
        for number, inode in self._changed.items():
            self._layers.put(Table.INODES, u64(number), inode.encode())
        self._changed.clear()

    def _keep(self, inode: Inode) -> None:
        self._recent[inode.number] = inode
        if len(self._recent) > CACHED_INODES:
            self._recent.popitem(last=False)
