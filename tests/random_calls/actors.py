"""Processes that make the calls: one for each actor and each side, its root directory the case's."""

from __future__ import annotations

import errno
import os
import pickle
import select
import signal
import socket
import struct
import traceback
from pathlib import Path
from typing import Any

from tests.random_calls.calls import Calls

PATIENCE = 120.0
IDS: dict[str, tuple[int, tuple[int, ...]]] = {"root": (0, ()), "user": (61001, (61010,))}
"""User id, which is the group id too, and supplementary groups."""

_LENGTH = struct.Struct("<I")
_ours: set[socket.socket] = set()


class ActorGone(AssertionError):
    """A process that makes calls died or does not come back."""


class Actor:
    """One process; `call` makes a call there."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self._root = root
        ours, theirs = socket.socketpair()
        self.process = os.fork()
        if self.process == 0:
            for other in (*_ours, ours):
                other.close()
            _serve(theirs, name, root)
        theirs.close()
        _ours.add(ours)
        self._link = ours

    def call(self, name: str, *arguments: Any) -> Any:
        """What the call returned, or the name of its error code.

        Raises `ActorGone` if it does neither, `AssertionError` for what is no answer of a system call.
        """
        _send(self._link, (name, arguments))
        if not select.select([self._link], [], [], PATIENCE)[0]:
            raise ActorGone(f"{name}{arguments} as {self.name} in {self._root} does not come back")
        answer = _receive(self._link)
        if answer is None:
            status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
            self.process = 0
            why = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            raise ActorGone(f"{name}{arguments} as {self.name} in {self._root} ended the process: {why}")
        kind, value = answer
        if kind == "broken":
            raise AssertionError(f"{name}{arguments} as {self.name} in {self._root}:\n{value}")
        return value

    def end(self) -> None:
        """Ends the process, and with it its open files."""
        _ours.discard(self._link)
        self._link.close()
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.process = 0


def _serve(link: socket.socket, name: str, root: Path) -> None:
    """Makes calls until the other side closes the link.  Never returns."""
    try:
        os.chroot(root)
        os.chdir("/")
        os.umask(0o022)
        number, groups = IDS[name]
        os.setgroups(groups)
        os.setresgid(number, number, number)
        os.setresuid(number, number, number)
        calls = Calls()
        while (request := _receive(link)) is not None:
            _send(link, _answer(calls, *request))
    finally:
        os._exit(0)


def _answer(calls: Calls, name: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "result", getattr(calls, name)(*arguments)
    except OSError as error:
        return "result", errno.errorcode.get(error.errno or 0, str(error))
    except ValueError as error:
        # What Python refuses by itself: a map longer than its file.
        return "result", str(error)
    except BaseException:
        return "broken", traceback.format_exc()


def _send(link: socket.socket, message: Any) -> None:
    data = pickle.dumps(message)
    link.sendall(_LENGTH.pack(len(data)) + data)


def _receive(link: socket.socket) -> Any:
    """The next message; None if there is none any more."""
    head = _exactly(link, _LENGTH.size)
    if head is None:
        return None
    data = _exactly(link, _LENGTH.unpack(head)[0])
    return None if data is None else pickle.loads(data)


def _exactly(link: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        try:
            part = link.recv(size)
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
