"""Walks over part of the tree in short steps, for commands that take directories."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from itertools import islice

from qsfs.daemon.paths import find
from qsfs.errors import NotFound
from qsfs.filesystem.tree import Tree
from qsfs.store.schema import Inode

_ENTRIES = 64


def resolve(tree: Tree, path: str) -> Inode:
    """The inode at `path`, given from the root of the file system.  Raises `NotFound`."""
    inode = find(tree, path.encode("utf-8", "surrogateescape"))
    if inode is None:
        raise NotFound(f"{path or '/'}: no such file on this mount: it was removed, or never was")
    return inode


def walk(tree: Tree, root: Inode) -> Iterator[list[int]]:
    """Inode numbers of everything at and below `root`, some at a time, a file with several names once.

    The tree may change between two steps: what is moved meanwhile may be missed or met twice.
    """
    yield [root.number]
    if not stat.S_ISDIR(root.mode):
        return
    stack = [(root.number, 0)]
    linked: set[int] = set()
    while stack:
        number, after = stack.pop()
        if tree.store.inode(number) is None:
            continue
        batch = list(islice(tree.entries(number, after), _ENTRIES))
        found = []
        below = []
        for _, name, entry in batch:
            child = tree.child(number, name, entry)
            if stat.S_ISDIR(child.mode):
                below.append((child.number, 0))
            elif child.nlink > 1:
                if child.number in linked:
                    continue
                linked.add(child.number)
            found.append(child.number)
        if len(batch) == _ENTRIES:
            stack.append((number, batch[-1][0]))
        stack += below
        yield found
