"""How much one cut may seal, so that its read transaction stays short on this machine."""

from __future__ import annotations

READ_SECONDS = 2.5
"""How long the transaction of a cut should take at most; LMDB reuses nothing meanwhile."""
_LEAST = 4 << 20
_WORTH_MEASURING = 8 << 20


class Pace:
    """`most_bytes` is the bound for the next cut, never above the configured one."""

    def __init__(self, cut_bytes: int) -> None:
        self.most_bytes = cut_bytes
        self._configured = cut_bytes

    def sealed(self, size: int, seconds: float) -> None:
        """Learns from a cut of `size` bytes that took so long."""
        if size < _WORTH_MEASURING or seconds <= 0:
            self.most_bytes = min(self._configured, 2 * self.most_bytes)
            return
        possible = int(size / seconds * READ_SECONDS)
        self.most_bytes = max(_LEAST, min(self._configured, possible, 2 * max(self.most_bytes, size)))

    def too_scattered(self) -> None:
        """A cut found more extents or rows than it may seal: the next takes less at a time."""
        self.most_bytes = max(_LEAST, self.most_bytes // 2)
