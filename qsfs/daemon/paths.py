"""Paths for people: which inode a path names, and a path that names an inode."""

from __future__ import annotations

from qsfs.filesystem.tree import Tree
from qsfs.store.schema import ROOT_INODE, Entry, Inode, Table, split_u64

_MOST_ENTRIES = 50_000


def find(tree: Tree, path: bytes) -> Inode | None:
    """The inode at `path`, given from the root; None if there is none.  Symlinks are not followed."""
    number = ROOT_INODE
    for name in path.split(b"/"):
        if not name:
            continue
        entry = tree.find(number, name)
        if entry is None:
            return None
        number = entry.inode
    return tree.store.inode(number)


def path_of(tree: Tree, number: int) -> str:
    """One path of an inode for a message; empty if it has none, or is not found within a bounded search."""
    for count, (key, row) in enumerate(tree.store.scan(Table.ENTRIES, b"", None)):
        if Entry.decode(row).inode == number:
            path = tree.path_in(split_u64(key), key[8:])
            return "" if path is None else path.decode("utf-8", "backslashreplace")
        if count > _MOST_ENTRIES:
            break
    return ""
