"""How old the oldest of what no published head has is, at most.

By running time: the wall clock may step.
"""

from __future__ import annotations

from qsfs.clock import Clock


class ExposureAge:
    """The age of what is exposed at class `written`.  For the event loop's thread.

    Give `look` all but what atomic-sync files wrote before their sync: no cut can hold that.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._exposed = 0
        self._begun = (0.0, 0)
        self._cut_at = 0.0
        self._floor = 0
        # Everything accepted before then is safe; None: not known yet.
        self._safe_at: float | None = None

    def begin(self) -> None:
        """A generation begins."""
        self._cut_at = self._clock.monotonic()
        self._begun = (self._cut_at, self._exposed)

    def cut(self) -> None:
        """Its cut is taken now: what was accepted before is in it."""
        self._cut_at = self._clock.monotonic()

    def ended(self, *, new: bool) -> None:
        """It ended: with a published head, or (not `new`) because there was nothing that a cut could hold.

        Then what is exposed nevertheless, such as files that are open and have no name, is not counted.
        """
        began, exposed = self._begun
        self._floor = 0 if new else exposed
        self._became_safe(self._cut_at if new else began)

    def _became_safe(self, at: float) -> None:
        self._safe_at = at if self._safe_at is None else max(self._safe_at, at)

    def look(self, exposed: int, base_ns: int | None) -> tuple[int, float]:
        """How many of `exposed` bytes a cut could hold, and how old in seconds the oldest of them is at most.

        `base_ns`, the wall time of the last published cut, counts only where none was seen and nothing was safe yet;
        without it the age is 0 then.
        """
        now = self._clock.monotonic()
        self._exposed = exposed
        self._floor = min(self._floor, exposed)
        exposed -= self._floor
        if not exposed:
            self._became_safe(now)
        elif self._safe_at is None and base_ns is not None:
            self._safe_at = now - max(0.0, (self._clock.time_ns() - base_ns) / 1e9)
        return exposed, 0.0 if self._safe_at is None else now - self._safe_at
