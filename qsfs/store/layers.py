"""The layers that a row may lie in: the open group, the committing group, then LMDB.

`Layers` is used by one thread (that of the file system).  Only `commit` of a sealed group runs
elsewhere, and touches nothing but the group and LMDB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from qsfs.errors import QsfsBug
from qsfs.store.environment import Environment, ReadView
from qsfs.store.group import COMMIT_KEY, WRITE_NUMBER_KEY, Group
from qsfs.store.schema import Table, read_plain_u64


class Rows(Protocol):
    """Tables that can be read and written: the layers, or a view with changes of its own on top."""

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The row at `key`, or None."""
        ...

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Sets a row."""
        ...

    def delete(self, table: Table, key: bytes) -> None:
        """Deletes a row; harmless if there is none."""
        ...

    def scan(
        self, table: Table, start: bytes, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop (None: to the end), in key order or its reverse."""
        ...


class Layers:
    """Rows as the file system sees them, and the groups that they are written to."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.view: ReadView = environment.read()
        commit = self.view.get(Table.LOCAL, COMMIT_KEY)
        number = self.view.get(Table.LOCAL, WRITE_NUMBER_KEY)
        self.committed_number = read_plain_u64(bytes(commit)) if commit is not None else 0
        self.committed_write_number = read_plain_u64(bytes(number)) if number is not None else 0
        self.open = Group(self.committed_number + 1)
        self.committing: Group | None = None

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The row at `key` as of now, or None."""
        rows = self.open.rows[table]
        if rows and key in rows:
            value: bytes | None = rows[key]
            return value
        if self.committing is not None:
            rows = self.committing.rows[table]
            if rows and key in rows:
                older: bytes | None = rows[key]
                return older
        row = self.view.get(table, key)
        return None if row is None else bytes(row)

    def any(self, table: Table) -> bool:
        """Whether the table may hold rows.  False is certain."""
        committing = self.committing
        return bool(
            self.open.rows[table] or (committing is not None and committing.rows[table]) or self.view.count(table)
        )

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Sets a row in the open group."""
        self.open.change(table, key, value)

    def delete(self, table: Table, key: bytes) -> None:
        """Deletes a row in the open group; harmless if there is none."""
        self.open.change(table, key, None)

    def scan(
        self, table: Table, start: bytes, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop in order, merged over the layers.

        The store must not be changed while the iterator is in use.
        """
        overlays = [self.open.rows[table]]
        if self.committing is not None:
            overlays.append(self.committing.rows[table])
        overlays = [o for o in overlays if o]
        stored: Iterator[Row] = (
            (key, bytes(value)) for key, value in self.view.scan(table, start, stop, reverse)
        )
        for overlay in reversed(overlays):
            stored = merge_rows(overlay_rows(overlay, start, stop, reverse), stored, reverse)
        return ((key, value) for key, value in stored if value is not None)

    def seal(self, write_number: int) -> Group:
        """Closes the open group for commit and opens the next; one commits at a time."""
        if self.committing is not None:
            raise QsfsBug("a group was sealed while another commits")
        group = self.open
        group.sealed_at = write_number
        self.committing = group
        self.open = Group(group.number + 1)
        return group

    def committed(self, group: Group) -> None:
        """Takes note that `group` is durable: reads go to LMDB for what it held."""
        self.committing = None
        self.committed_number = group.number
        self.committed_write_number = group.sealed_at
        self.renew_view()

    def renew_view(self) -> None:
        """Reads from the newest commit from here on, so that LMDB may reuse older pages."""
        self.view.close()
        self.view = self.environment.read()

    def close(self) -> None:
        """Ends the read view and closes the environment."""
        self.view.close()
        self.environment.close()


Row = tuple[bytes, bytes | None]


def overlay_rows(overlay: Any, start: bytes, stop: bytes | None, reverse: bool) -> Iterator[Row]:
    """The rows of one table's overlay in a range, deletions as None."""
    for key in overlay.irange(start, stop, inclusive=(True, False), reverse=reverse):
        yield key, overlay[key]


def merge_rows(upper: Iterator[Row], lower: Iterator[Row], reverse: bool) -> Iterator[Row]:
    """Both in key order; where both have a key, the upper row wins.  None marks a deletion."""
    above = next(upper, None)
    below = next(lower, None)
    while above is not None and below is not None:
        if above[0] == below[0]:
            yield above
            above, below = next(upper, None), next(lower, None)
        elif (above[0] < below[0]) != reverse:
            yield above
            above = next(upper, None)
        else:
            yield below
            below = next(lower, None)
    if above is not None:
        yield above
        yield from upper
    if below is not None:
        yield below
        yield from lower
