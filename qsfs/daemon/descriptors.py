"""Open files: a connection is one, so large fleets need more of them than most shells grant."""

from __future__ import annotations

import contextlib
import resource

from qsfs.errors import ConfigError

CONNECTIONS = 3
"""Connections, and so calls at a time, to each backend."""

_BESIDE = 2
"""More of them to each backend: for heads and owner records, and for a session of its own."""

_OTHERS = 256
"""What is open beside: the local store, journal, spool and images, and who asks the daemon something."""


def require_descriptors(backends: int) -> None:
    """Lets this process have as many open files as it may; `ConfigError` if those are too few for so many backends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = backends * (CONNECTIONS + _BESIDE) + _OTHERS
    if soft not in (resource.RLIM_INFINITY, hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise ConfigError(
            f"{backends} backends need up to {needed} open files, {CONNECTIONS + _BESIDE} connections each and "
            f"{_OTHERS} for all else, and this process may have {soft}: raise its hard limit, by LimitNOFILE= in a "
            "systemd unit, or 'nofile' in /etc/security/limits.conf and a new login"
        )
