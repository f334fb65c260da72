"""How much applications may still write while they are held back."""

from __future__ import annotations

from collections.abc import Callable


def _nothing() -> None:
    pass


class Allowance:
    """Unlimited until `hold_back`; then as many bytes as `grant` gives, until `let_go`.

    After `end` nobody is held back any more.  Whoever writes asks `used_up` before and calls `spend` after, so that
    one write may overdraw it.  `on_change` is called when there may be something to spend again.
    """

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = _nothing
        self._left: int | None = None
        self._ended = False

    @property
    def limited(self) -> bool:
        """Whether applications are held back."""
        return self._left is not None

    @property
    def used_up(self) -> bool:
        """Whether a write must wait."""
        return self._left is not None and self._left <= 0

    def hold_back(self) -> None:
        """From now on only what is granted may be written."""
        if self._left is None and not self._ended:
            self._left = 0

    def grant(self, count: int, most: int) -> None:
        """Adds so many bytes, if applications are held back, up to `most` in store."""
        if self._left is not None:
            self._left = min(most, self._left + count)
            self.on_change()

    def spend(self, count: int) -> None:
        """Takes note of so many bytes that were written."""
        if self._left is not None:
            self._left -= count

    def let_go(self) -> None:
        """Ends the holding back, until `hold_back` is called again."""
        if self._left is not None:
            self._left = None
            self.on_change()

    def end(self) -> None:
        """Ends it for good."""
        self._ended = True
        self.let_go()
