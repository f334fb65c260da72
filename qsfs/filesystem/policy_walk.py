"""A walk over part of the tree in bounded steps, which brings stored policy flags up to date.

The tree may change between two steps.  A directory is remembered by its number and the cookie of
the entry reached in it, so nothing that stays in place is skipped or met twice; what is moved
meanwhile gets its flags when it is moved.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from itertools import islice

from qsfs.filesystem.policies import Policies, safer
from qsfs.filesystem.tree import Tree
from qsfs.store.schema import Inode

Assign = Callable[[Inode, int], None]


class PolicyWalk:
    """Visits every regular file at or below a directory once."""

    def __init__(self, tree: Tree, policies: Policies, root: int, assign: Assign) -> None:
        """`assign` is called with a file and the flags that the rules want for it."""
        self._tree = tree
        self._policies = policies
        self._assign = assign
        self._stack: list[list[int]] = [[root, 0]]
        self._links: dict[int, tuple[int, int]] = {}
        self.visited = 0

    def step(self, limit: int) -> bool:
        """Visits about `limit` entries; True when the walk is over."""
        while self._stack and limit > 0:
            limit -= self._visit_directory(limit)
        if self._stack:
            return False
        for number, (_, wanted) in self._links.items():
            inode = self._tree.store.inode(number)
            if inode is not None and inode.nlink:
                self._assign(inode, safer(inode.flags, wanted))
        self._links.clear()
        return True

    def _visit_directory(self, limit: int) -> int:
        frame = self._stack[-1]
        number, after = frame
        inode = self._tree.store.inode(number)
        batch = list(islice(self._tree.entries(number, after), limit)) if inode is not None else []
        path = self._tree.path(number) if batch else None
        for done, (cookie, name, entry) in enumerate(batch, 1):
            child = self._tree.child(number, name, entry)
            if stat.S_ISREG(child.mode):
                self._visit_file(child, name, path + b"/" + name if path else name)
            frame[1] = cookie
            self.visited += 1
            if stat.S_ISDIR(child.mode):
                self._stack.append([child.number, 0])
                return done
        if len(batch) < limit:
            self._stack.pop()
        return max(len(batch), 1)

    def _visit_file(self, inode: Inode, name: bytes, path: bytes) -> None:
        wanted = self._policies.flags(name, lambda: path)
        seen, flags = self._links.get(inode.number, (0, wanted))
        flags = safer(flags, wanted)
        if seen + 1 >= inode.nlink:
            self._assign(inode, flags)
            self._links.pop(inode.number, None)
        else:
            self._links[inode.number] = (seen + 1, flags)
