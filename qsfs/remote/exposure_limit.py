"""Keeping exposure below a limit (`[flush] exposure_seconds`, `exposure_bytes`): cuts early enough, else an alarm.

What a cut covers is not safe before its head is published, and writes go on meanwhile.  So a cut begins
when what the next one takes, going by the last ones, would bring exposure to its limit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from qsfs.clock import Clock
from qsfs.config import FlushConfig
from qsfs.remote.exposure import Exposure
from qsfs.remote.exposure_age import ExposureAge
from qsfs.values import format_duration, format_size

_log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often exposure is looked at."""
_IDLE_SECONDS = 1.0
_MARGIN = 1.5
"""A generation may take so many times what the last ones took."""
_FORGETTING = 0.3


class ExposureLimit:
    """Judges exposure of the class `written` against limits, 0 for none.  For the event loop's thread.

    What no cut can hold, writes of atomic-sync files before their sync, is not counted: give `look` the rest.
    """

    def __init__(self, seconds: float, size: int, age: ExposureAge, clock: Clock) -> None:
        self.seconds = seconds
        self.size = size
        self.problem = ""
        self._age = age
        self._clock = clock
        # Until one was made.
        self._cut_seconds = seconds / 4
        self._rate = 0.0
        self._last = (clock.monotonic(), 0)
        self._began = 0.0
        self._told = False

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return bool(self.seconds or self.size)

    def begin(self) -> None:
        """A generation begins."""
        self._began = self._clock.monotonic()
        self._age.begin()

    def cut(self) -> None:
        """Its cut is taken now."""
        self._age.cut()

    def ended(self, *, new: bool) -> None:
        """It ended, as `ExposureAge.ended`."""
        self._age.ended(new=new)
        if new:
            seconds = self._clock.monotonic() - self._began
            # What took long is believed at once, and forgotten slowly.
            self._cut_seconds = max(seconds, self._cut_seconds + _FORGETTING * (seconds - self._cut_seconds))

    def look(self, exposed: int, base_ns: int, why: str) -> bool:
        """Whether a cut should begin now, with `exposed` bytes; `base_ns` as for `ExposureAge.look`.

        Sets `problem` while a limit is exceeded, `why` telling what is in the way, and logs its begin and end.
        """
        self._learn(self._clock.monotonic(), exposed)
        exposed, age = self._age.look(exposed, base_ns)
        self._judge(exposed, age, why)
        ahead = _MARGIN * self._cut_seconds + LOOK_SECONDS
        # Not before a quarter: where the limit cannot be kept, cuts do not follow one another without end.
        old = bool(self.seconds) and age >= max(self.seconds - ahead, self.seconds / 4)
        # At the half at the latest: a burst may come.
        much = bool(self.size) and exposed >= min(self.size / 2, max(self.size - self._rate * ahead, self.size / 4))
        return bool(exposed) and (old or much)

    def _learn(self, now: float, exposed: int) -> None:
        # Over less one write would pass for a flood.
        if now - self._last[0] >= LOOK_SECONDS / 2:
            rate = max(0.0, (exposed - self._last[1]) / (now - self._last[0]))
            self._rate = max(rate, self._rate + _FORGETTING * (rate - self._rate))
            self._last = (now, exposed)

    def _judge(self, exposed: int, age: float, why: str) -> None:
        over = []
        if self.size and exposed > self.size:
            over.append(f"{format_size(exposed)} (limit: [flush] exposure_bytes, {format_size(self.size)})")
        if self.seconds and age > self.seconds:
            over.append(
                f"what was written {format_duration(age)} ago (limit: [flush] exposure_seconds, "
                f"{format_duration(self.seconds)})"
            )
        if not over:
            if self._told:
                _log.info("exposure is below its limit again")
            self.problem, self._told = "", False
            return
        self.problem = (
            f"no published head has {' and '.join(over)}: it would be lost with this machine; "
            f"{why or f'a generation takes {format_duration(self._cut_seconds)}'}; bring backends back, "
            "or give more bandwidth or a higher limit"
        )
        if not self._told:
            self._told = True
            _log.warning("%s", self.problem)


class ExposureWatch:
    """The limits of one mount that flushes, and how old what is exposed gets.

    `base_ns` gives the time of the last published cut, `why` what flushing waits for.
    """

    def __init__(
        self,
        config: FlushConfig,
        exposure: Exposure,
        clock: Clock,
        *,
        base_ns: Callable[[], int],
        why: Callable[[], list[str]],
    ) -> None:
        self.limit = ExposureLimit(config.exposure_seconds, config.exposure_bytes, exposure.age, clock)
        self._exposure = exposure
        self._base_ns = base_ns
        self._why = why
        self._base: object = None

    @property
    def pause(self) -> float:
        """After how many seconds to ask `presses` again."""
        return LOOK_SECONDS if self.limit.limited else _IDLE_SECONDS

    def begin(self, base: object) -> None:
        """A generation begins, after that of `base`."""
        self._base = base
        self._exposure.age.look(self._exposure.coverable_bytes, self._base_ns())
        self.limit.begin()

    def cut(self) -> None:
        """Its cut is taken now."""
        self.limit.cut()

    def ended(self, base: object) -> None:
        """It ended, and the last published one is now that of `base`: the same, if nothing was new."""
        self.limit.ended(new=base is not self._base)

    def presses(self) -> bool:
        """Whether exposure comes near its limit, if it has one; alarms where it is beyond."""
        why = "; ".join(self._why()) if self.limit.limited else ""
        return self.limit.look(self._exposure.coverable_bytes, self._base_ns(), why)

    async def look(self) -> None:
        """Looks while a generation is waited for."""
        self.presses()
