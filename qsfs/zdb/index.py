"""The index of a namespace: where each key's value lies, and the order in which values were stored."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

Place = tuple[int, int]
"""Data file number and offset of a record in it; later records have larger places."""

_ENTRY_BYTES = 250


@dataclass(slots=True)
class Entry:
    """A live key: where its record is, its value's length, when it was stored (Unix seconds)."""

    key: bytes
    place: Place
    length: int
    time_s: int


class Index:
    """Live keys, in memory, in the order of their places."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._order: list[Entry] = []
        self.data_bytes = 0
        self.stored = 0

    def __len__(self) -> int:
        """How many keys are live."""
        return len(self._entries)

    @property
    def memory_bytes(self) -> int:
        """About how much memory the index takes."""
        return len(self._order) * _ENTRY_BYTES

    def get(self, key: bytes) -> Entry | None:
        """The entry of `key`, if it is live."""
        return self._entries.get(key)

    def put(self, entry: Entry) -> None:
        """Adds or replaces a key; its place must be larger than all before."""
        self.remove(entry.key)
        self._entries[entry.key] = entry
        self._order.append(entry)
        self.data_bytes += entry.length
        self.stored += 1

    def remove(self, key: bytes) -> None:
        """Forgets `key`, if it is live."""
        old = self._entries.pop(key, None)
        if old is None:
            return
        self.data_bytes -= old.length
        if len(self._order) > 2 * len(self._entries) + 64:
            self._order = [entry for entry in self._order if self._entries.get(entry.key) is entry]

    def after(self, place: Place | None) -> Iterator[Entry]:
        """Live entries behind `place` (`None`: from the oldest), oldest first."""
        start = 0 if place is None else bisect_right(self._order, place, key=_place)
        return self._live(range(start, len(self._order)))

    def before(self, place: Place | None) -> Iterator[Entry]:
        """Live entries before `place` (`None`: from the newest), newest first."""
        end = len(self._order) if place is None else bisect_left(self._order, place, key=_place)
        return self._live(range(end - 1, -1, -1))

    def _live(self, positions: range) -> Iterator[Entry]:
        for position in positions:
            entry = self._order[position]
            if self._entries.get(entry.key) is entry:
                yield entry


def _place(entry: Entry) -> Place:
    return entry.place
