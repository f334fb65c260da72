"""A bounded memory of what was touched lately: two sets, of which the older is dropped in turn."""

from __future__ import annotations

from collections.abc import Iterable

MOST = 500_000


class RecentSet:
    """Keys added since the turn before last.  `turn` ages them; a full set turns by itself."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._old: set[int] = set()

    def add(self, key: int) -> None:
        """Takes note of `key`."""
        self._new.add(key)
        if len(self._new) > MOST:
            self.turn()

    def add_all(self, keys: Iterable[int]) -> None:
        """Takes note of `keys`."""
        self._new.update(keys)
        if len(self._new) > MOST:
            self.turn()

    def __contains__(self, key: int) -> bool:
        return key in self._new or key in self._old

    def turn(self) -> None:
        """Forgets what was not added since the last turn."""
        self._old = self._new
        self._new = set()
