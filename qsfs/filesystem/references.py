"""Who still uses an inode: the kernel's lookup counts, and inodes that have no name left.

An inode whose last name goes while it is open or known to the kernel becomes an orphan: a row in
ORPHANS, removed with the inode once nothing uses it, or by the next mount.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import islice

from qsfs.filesystem.interfaces import Change
from qsfs.filesystem.needs import Need
from qsfs.filesystem.tree import Tree
from qsfs.store.schema import Inode, Table, split_u64, u64

log = logging.getLogger(__name__)

_BATCH = 256


class References:
    """Counts the kernel's references, and removes orphans when the last is gone."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._lookups: dict[int, int] = {}
        self._orphans: set[int] = set()
        self._unused: set[int] = set()

    @property
    def known(self) -> int:
        """How many inodes the kernel knows."""
        return len(self._lookups)

    @property
    def orphans(self) -> int:
        """How many inodes live without a name."""
        return len(self._orphans)

    def looked_up(self, number: int) -> None:
        """Counts one more reference that the kernel was given."""
        self._lookups[number] = self._lookups.get(number, 0) + 1

    def forget(self, counts: Iterable[tuple[int, int]]) -> None:
        """Gives references back; what nobody uses any more is removed by `collect`."""
        gone = []
        for number, count in counts:
            left = self._lookups.get(number, 0) - count
            if left > 0:
                self._lookups[number] = left
                continue
            self._lookups.pop(number, None)
            gone.append(number)
        for number in gone:
            self._note_unused(number)
            self._tree.forget_name(number)

    def closed(self, number: int) -> None:
        """Takes note that a handle was closed; what nobody uses any more is removed by `collect`."""
        self._note_unused(number)

    def unnamed(self, change: Change, inode: Inode) -> None:
        """Within the change that takes an inode's last name: removes it, or makes it an orphan."""
        number = inode.number
        if number in self._lookups or self._tree.contents.is_open(number):
            change.put(Table.ORPHANS, u64(number), b"")
            self._orphans.add(number)
        else:
            change.remove(number)
            self._tree.contents.forget(number)

    def collect(self, pause: Callable[[], bool] = lambda: False) -> bool:
        """Removes the orphans that nobody uses any more, in one change for each batch, until `pause` says so.

        Returns whether some are left.
        A `Need` leaves them for the next call: forgetting must not be repeated.  One that cannot be
        removed for another reason stays an orphan until the next mount, and the reason is raised once
        the others are gone.
        """
        failures: list[Exception] = []
        size = _BATCH
        while self._unused and not pause():
            batch = list(islice(self._unused, size))
            try:
                self._remove(batch)
            except Need:
                break
            except Exception as error:  # noqa: BLE001 - one that stays must not hold up the others
                if len(batch) > 1:
                    size = 1
                    continue
                failures.append(error)
            self._unused.difference_update(batch)
            self._orphans.difference_update(batch)
        if failures:
            raise failures[0] if len(failures) == 1 else ExceptionGroup("orphans that stay", failures)
        return bool(self._unused)

    def remove_orphans(self) -> int:
        """At mount: removes the inodes that a former mount left without a name; returns how many.

        One that cannot be removed is logged, and left to the next mount.
        """
        removed, start = 0, u64(0)
        while True:
            rows = islice(self._tree.store.scan(Table.ORPHANS, start, None), _BATCH)
            batch = [split_u64(key) for key, _ in rows]
            if not batch:
                return removed
            try:
                self._remove(batch)
                removed += len(batch)
            except Exception:  # noqa: BLE001 - as above
                removed += sum(map(self._remove_alone, batch))
            start = u64(batch[-1] + 1)

    def _remove_alone(self, number: int) -> bool:
        try:
            self._remove([number])
        except Exception:
            log.exception("inode %d has no name left and cannot be removed; run 'qsfs fsck'", number)
            return False
        return True

    def _note_unused(self, number: int) -> None:
        if number not in self._orphans or number in self._lookups:
            return
        if not self._tree.contents.is_open(number):
            self._unused.add(number)

    def _remove(self, numbers: list[int]) -> None:
        with self._tree.store.change() as change:
            for number in numbers:
                inode = self._tree.store.inode(number)
                if inode is None or inode.nlink:
                    change.delete(Table.ORPHANS, u64(number))
                else:
                    change.remove(number)
        for number in numbers:
            if self._tree.store.inode(number) is None:
                self._tree.contents.forget(number)
