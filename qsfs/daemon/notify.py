"""Tells systemd how the service is (sd_notify), if it asked for that; otherwise does nothing."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(message: str) -> None:
    """Sends a state such as `READY=1` or `STATUS=...` to `$NOTIFY_SOCKET`."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(message.encode(), address)
