"""A bounded number of places, given out in the order in which they were asked for."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Poked(Protocol):
    """Who asks for a place, and is told when to ask again."""

    def poke(self) -> None:
        """There may be a place now."""
        ...


class Slots:
    """`count` places.  `take` never waits: who gets none is poked when its turn has come."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._holders: set[Poked] = set()
        self._queue: OrderedDict[Poked, None] = OrderedDict()

    def take(self, who: Poked) -> bool:
        """Gives `who` a place if its turn has come, else queues it."""
        if who in self._holders:
            return True
        first = next(iter(self._queue), who)
        if self._free and first is who:
            self._queue.pop(who, None)
            self._free -= 1
            self._holders.add(who)
            self._poke_next()
            return True
        self._queue[who] = None
        return False

    def release(self, who: Poked) -> None:
        """Takes the place back, or `who` out of the queue."""
        self._queue.pop(who, None)
        if who in self._holders:
            self._holders.discard(who)
            self._free += 1
        self._poke_next()

    def _poke_next(self) -> None:
        if self._free and self._queue:
            next(iter(self._queue)).poke()
