"""Keeps the policy flags of inodes in step with the rules, the names and each other.

Flags are decided where a file gets or loses a name.  What cannot be decided there is worked off in
the background: a changed configuration and a renamed directory (by walks), a file that leaves
atomic sync (when nothing of it is uncovered), and a file with several names of which one went (at
once if this mount has seen its other names, else by a walk).

One row of LOCAL holds the fingerprint of the rules that hold everywhere.  It is deleted in the
change that makes it untrue, so a crash costs one walk, never a wrong flag that nobody looks for.
"""

from __future__ import annotations

import stat
from collections import deque
from dataclasses import dataclass

from qsfs.filesystem.interfaces import Change
from qsfs.filesystem.policies import Policies, safer, settle
from qsfs.filesystem.policy_walk import PolicyWalk
from qsfs.filesystem.tree import Tree
from qsfs.store.schema import ROOT_INODE, Inode, InodeFlag, Table

RULES_KEY = b"policies"

_MAX_LINKED = 100_000
_RECHECK_SECONDS = 3600.0

Name = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    """What still differs from the rules.

    `waiting` files keep atomic sync until they are synced; `directories` are queued for a walk, of
    which `visited` entries are done; `recheck` says that a walk will look at files that lost a name.
    """

    waiting: tuple[int, ...]
    directories: int
    visited: int
    recheck: bool


class PolicyKeeper:
    """Decides flags for the namespace and works off what is left."""

    def __init__(self, tree: Tree, policies: Policies) -> None:
        self._tree = tree
        self._policies = policies
        self._waiting: dict[int, int] = {}
        self._queue: deque[int] = deque()
        self._walk: PolicyWalk | None = None
        self._linked: dict[int, set[Name]] = {}
        self._recheck = False
        self._rechecked_at = float("-inf")
        self._recorded = tree.store.get(Table.LOCAL, RULES_KEY) == policies.fingerprint
        if not self._recorded:
            self._queue.append(ROOT_INODE)

    # decisions: called before the change, whose flags they return

    def for_new(self, parent: int, name: bytes) -> int:
        """The flags of a new regular file."""
        flags = self._policies.flags(name, lambda: self._tree.path_in(parent, name))
        return flags | self.for_new_directory(parent)

    def for_new_directory(self, parent: int) -> int:
        """The flags of a new directory: what was pinned by hand holds for what is made there."""
        directory = self._tree.store.inode(parent)
        return 0 if directory is None else directory.flags & InodeFlag.PINNED_BY_HAND

    def for_link(self, inode: Inode, parent: int, name: bytes) -> int:
        """The flags of a file that gets one more name."""
        if not stat.S_ISREG(inode.mode):
            return inode.flags
        if inode.number in self._linked or len(self._linked) < _MAX_LINKED:
            self._linked.setdefault(inode.number, set()).add((parent, name))
        return self._settle(inode, safer(inode.flags, self.for_new(parent, name)))

    def for_rename(self, inode: Inode, old: Name, new: Name) -> int:
        """The flags of a file that moves from one name to another."""
        if not stat.S_ISREG(inode.mode):
            return inode.flags
        wanted = self.for_new(*new)
        if inode.nlink > 1:
            names = self._linked.get(inode.number)
            if names is not None:
                names.discard(old)
                names.add(new)
            wanted = safer(inode.flags, wanted)
            self._recheck = self._policies.has_rules
        return self._settle(inode, wanted)

    def for_unlink(self, inode: Inode, parent: int, name: bytes) -> int:
        """The flags of a file that loses one of its names and keeps others."""
        if not stat.S_ISREG(inode.mode) or inode.nlink < 2:
            return inode.flags
        names = self._linked.get(inode.number, set())
        names.discard((parent, name))
        if inode.nlink > 2:
            return inode.flags
        self._linked.pop(inode.number, None)
        for other in names:
            entry = self._tree.find(*other)
            if entry is not None and entry.inode == inode.number:
                return self._settle(inode, self.for_new(*other))
        self._recheck = self._policies.has_rules
        return inode.flags

    def gone(self, number: int) -> None:
        """Lets go of a file that has no name left."""
        self._linked.pop(number, None)
        self._waiting.pop(number, None)

    # within a change

    def note(self, change: Change) -> None:
        """Within a change after decisions: if some of them are left open, makes that durable."""
        if self._recorded and (self._waiting or self._recheck):
            self._unrecord(change)

    def directory_moved(self, change: Change, number: int) -> None:
        """Within the change that renames a directory: queues what lies below it."""
        if self._policies.needs_path or self._walk is not None:
            self._queue.append(number)
            self._unrecord(change)

    # background

    def step(self, limit: int = 256) -> bool:
        """Works off about `limit` files; True when nothing is left to do now.

        May raise a `Need`: satisfy it and call again.
        """
        self._apply_waiting(limit)
        if self._walk is None and self._queue:
            self._walk = PolicyWalk(self._tree, self._policies, self._queue[0], self._assign)
        if self._walk is not None:
            if not self._walk.step(limit):
                return False
            if self._queue.popleft() == ROOT_INODE:
                self._rechecked_at = self._tree.store.clock.monotonic()
            self._walk = None
            if self._queue:
                return False
        if self._recheck and self._tree.store.clock.monotonic() - self._rechecked_at >= _RECHECK_SECONDS:
            self._recheck = False
            self._queue.append(ROOT_INODE)
            return False
        if not self._recorded and not self._waiting and not self._recheck:
            with self._tree.store.change() as change:
                change.put(Table.LOCAL, RULES_KEY, self._policies.fingerprint)
            self._recorded = True
        return True

    def status(self) -> PolicyStatus:
        """What still differs."""
        visited = self._walk.visited if self._walk is not None else 0
        return PolicyStatus(tuple(self._waiting), len(self._queue), visited, self._recheck)

    def _apply_waiting(self, limit: int) -> None:
        for number in list(self._waiting)[:limit]:
            inode = self._tree.store.inode(number)
            if inode is None or not inode.nlink:
                del self._waiting[number]
            elif not self._tree.contents.has_uncovered(number):
                self._assign(inode, self._waiting[number])

    def _assign(self, inode: Inode, wanted: int) -> None:
        flags = self._settle(inode, wanted)
        if flags != inode.flags:
            with self._tree.store.change() as change:
                change.patch(inode.number, flags=flags)

    def _settle(self, inode: Inode, wanted: int) -> int:
        flags = settle(self._tree.contents, inode, wanted)
        if flags & ~InodeFlag.PINNED_BY_HAND != wanted & ~InodeFlag.PINNED_BY_HAND:
            self._waiting[inode.number] = wanted
        else:
            self._waiting.pop(inode.number, None)
        return flags

    def _unrecord(self, change: Change) -> None:
        change.delete(Table.LOCAL, RULES_KEY)
        self._recorded = False
