"""How owner records name this machine to other machines."""

from __future__ import annotations

import socket


def host_name() -> str:
    """The host's name."""
    return socket.gethostname()
