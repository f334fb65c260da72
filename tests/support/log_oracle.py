"""The log as a witness: a warning of qsfs that no test declared fails the test that caused it.

Every record at WARNING or above of a logger at or below "qsfs" counts, whatever handlers and levels of
output a test sets up.  A test declares what it expects with the fixture `expect_log`; what it declared and
never came fails it too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest

LOGGER = "qsfs"


@dataclass
class Expectation:
    """What a test declared: records whose message matches `pattern` (`re.search`)."""

    pattern: str
    level: int | None
    count: int | None
    optional: bool
    seen: int = 0

    def takes(self, record: logging.LogRecord) -> bool:
        """Whether it covers `record`; counts it if so."""
        if self.level is not None and record.levelno != self.level:
            return False
        if not re.search(self.pattern, record.getMessage()):
            return False
        self.seen += 1
        return True


class LogOracle:
    """The pytest plugin that keeps watch."""

    def __init__(self) -> None:
        self._records: list[logging.LogRecord] = []
        self._expected: list[Expectation] = []
        self._factory = logging.getLogRecordFactory()
        self._failed = False

    def install(self) -> None:
        """Begins to see all records."""
        self._factory = logging.getLogRecordFactory()
        logging.setLogRecordFactory(self._make)

    def uninstall(self) -> None:
        """Sees no more."""
        logging.setLogRecordFactory(self._factory)

    def expect(
        self, pattern: str, level: int | None = None, *, count: int | None = None, optional: bool = False
    ) -> None:
        """Declares records: at least one, exactly `count`, or with `optional` any number."""
        self._expected.append(Expectation(pattern, level, count, optional))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        """Starts a test with a clean slate; what its fixtures log counts."""
        self._records.clear()
        self._expected.clear()
        self._failed = True
        result = yield
        self._failed = False
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        """Judges a test that passed otherwise."""
        self._failed = True
        result = yield
        self._judge(finished=False)
        self._failed = False
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Generator[None, None, None]:
        """Judges what its fixtures logged while they ended."""
        result = yield
        if not self._failed:
            self._judge(finished=True)
        return result

    def _make(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._factory(*args, **kwargs)
        if record.levelno >= logging.WARNING and f"{record.name}.".startswith(f"{LOGGER}."):
            self._records.append(record)
        return record

    def _judge(self, *, finished: bool) -> None:
        records, self._records = self._records, []
        faults = [
            f"undeclared log: {_describe(record)}"
            for record in records
            if not sum(expectation.takes(record) for expectation in self._expected)
        ]
        for expectation in self._expected:
            wanted = expectation.count
            if wanted is not None and (expectation.seen > wanted or (finished and expectation.seen < wanted)):
                faults.append(
                    f"log /{expectation.pattern}/: declared {wanted} times, came {expectation.seen}"
                )
            elif finished and wanted is None and not expectation.seen and not expectation.optional:
                faults.append(f"log /{expectation.pattern}/: declared, but never came")
        if faults:
            pytest.fail("\n".join(faults), pytrace=False)


def _describe(record: logging.LogRecord) -> str:
    place = f"{record.name} ({record.filename}:{record.lineno})"
    return f"{record.levelname} {place}: {record.getMessage()}"
