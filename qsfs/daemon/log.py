"""Where the daemon's log goes: a file, or standard error, in the journal's priority form under systemd."""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from qsfs.config import LogConfig
from qsfs.errors import ConfigError

_PRIORITY = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One record, its lines prefixed with the priority that the journal reads."""
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


OWN_LOG_BYTES = 512 << 10
"""Largest size of `daemon.log` in the cache directory; the one before it is kept as `daemon.log.1`."""


def set_up(config: LogConfig, file: Path | None, *, most_bytes: int = 0) -> None:
    """Sends records of the configured level to `file`, or to standard error if it is None.

    A file that reaches `most_bytes`, unless that is 0, is begun anew, and the one before it is kept.
    Raises `ConfigError` if the file cannot be opened.
    """
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            handler = RotatingFileHandler(file, maxBytes=most_bytes, backupCount=1)
        except OSError as error:
            raise ConfigError(f"{file}: the log cannot be written: {error.strerror}") from error
    if file is None and "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
