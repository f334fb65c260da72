"""What machines log in a history: bad backends are complained of, bugs fail it."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from tests.simulation.engine import Trace

_BUGS = re.compile(r"internal error|unexpectedly|its row says that nothing lives in it|is lost\b|Traceback")


class _Judge(logging.Handler):
    def __init__(self, trace: Trace, allowed: str) -> None:
        super().__init__(logging.WARNING)
        self._trace = trace
        self._allowed = allowed
        self.bugs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._trace.event(message)
        if self._allowed and re.search(self._allowed, message):
            return
        if record.exc_info or _BUGS.search(message):
            self.bugs.append(self.format(record))


@contextlib.contextmanager
def judged(trace: Trace, allowed: str = "") -> Iterator[None]:
    """Raises at the end of the block if something was logged that no fault of a backend explains.

    What matches the pattern `allowed` is no bug.
    """
    logger, judge = logging.getLogger("qsfs"), _Judge(trace, allowed)
    logger.addHandler(judge)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(judge)
        logger.propagate = before
    assert not judge.bugs, f"logged: {judge.bugs[0]}"
