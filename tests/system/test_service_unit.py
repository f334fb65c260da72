"""The systemd unit: its command line, run as systemd runs it, is ready, stops, and survives a crash.

systemd itself does not run here; its side of the protocol (the notify socket, SIGTERM, the restart
after SIGKILL) is played by the test.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import FileSystem

pytestmark = pytest.mark.mount

UNIT = Path(__file__).parents[2] / "systemd" / "qsfs@.service"
PATIENCE = 120


def exec_start() -> list[str]:
    """What the unit runs, after the program's name."""
    [line] = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    return shlex.split(line.removeprefix("ExecStart="))[1:]


class Unit:
    """The unit's process, with the socket that it notifies."""

    def __init__(self, fs: FileSystem) -> None:
        address = fs.directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address.unlink(missing_ok=True)
        self._socket.bind(str(address))
        self._socket.settimeout(PATIENCE)
        words = [word.replace("/etc/qsfs/%i.toml", str(fs.config)) for word in exec_start()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qsfs.cli.main", *words],
            env=os.environ | {"NOTIFY_SOCKET": str(address)},
            stderr=subprocess.DEVNULL,
        )
        fs.adopt(self.process.pid)

    def wait_for(self, state: str) -> None:
        """Returns once the service has sent a message with the line `state`."""
        while state not in self._socket.recv(65536).decode().splitlines():
            pass

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._socket.close()


@contextmanager
def started(fs: FileSystem) -> Iterator[Unit]:
    unit = Unit(fs)
    try:
        unit.wait_for("READY=1")
        yield unit
    finally:
        unit.close()


def test_the_service_says_ready_once_mounted_and_stops_in_order_on_sigterm(scratch: Path) -> None:
    with FileSystem(scratch) as fs:
        fs.format()
        with started(fs) as unit:
            (fs.mountpoint / "file").write_text("written under systemd")
            unit.process.send_signal(signal.SIGTERM)
            unit.wait_for("STOPPING=1")
            assert unit.process.wait(PATIENCE) == 0
        assert not fs.mountpoint.is_mount()
        with started(fs):
            assert (fs.mountpoint / "file").read_text() == "written under systemd"


def test_a_restart_after_a_crash_clears_the_dead_mount(scratch: Path) -> None:
    with FileSystem(scratch) as fs:
        fs.format()
        with started(fs):
            with (fs.mountpoint / "file").open("w") as file:
                file.write("synced")
                file.flush()
                os.fsync(file.fileno())
            fs.kill()
        with started(fs):
            assert (fs.mountpoint / "file").read_text() == "synced"
