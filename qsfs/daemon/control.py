"""The control socket: one JSON object a line, one request, one answer.

    -> {"command": "status"}
    <- {"ok": true, "result": {...}}
    <- {"ok": false, "error": "Fenced", "message": "...", "exit_code": 10}

The socket lies in the cache directory, mode 0600; a stale one is removed at start (the mount lock
says that nobody listens on it).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import trio

from qsfs.daemon.lock import require_access
from qsfs.errors import DeadlineExceeded, MountError, NotRunning, QsfsError, error_of

_log = logging.getLogger(__name__)
SOCKET = "control.sock"
"""Its name in the cache directory."""
_LONGEST_LINE = 1 << 20

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]


class Pending:
    """Requests that are being answered, so that a daemon that ends can answer them first."""

    def __init__(self) -> None:
        self._count = 0
        self._none = trio.Event()

    def __enter__(self) -> None:
        self._count += 1

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        self._none.set()
        self._none = trio.Event()

    async def answered(self) -> None:
        """Waits until nothing is being answered."""
        while self._count:
            await self._none.wait()


async def serve(
    path: Path,
    handlers: Mapping[str, Handler],
    pending: Pending,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers requests on a Unix socket at `path` until cancelled."""
    path.unlink(missing_ok=True)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The path may be longer than a socket address: bind by way of the open directory.
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            await listening.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        path.chmod(0o600)
        listening.listen(16)
    except OSError as error:
        listening.close()
        raise MountError(f"{path}: the control socket cannot be made: {error}") from error

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError), pending:
                await _answer(stream, handlers)

    try:
        await trio.serve_listeners(answer, [trio.SocketListener(listening)], task_status=task_status)  # type: ignore[arg-type]
    finally:
        path.unlink(missing_ok=True)


async def _answer(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    line = await _read_line(stream)
    if line is None:
        return
    try:
        request = json.loads(line)
        handler = handlers[request["command"]]
    except (ValueError, KeyError, TypeError):
        await _send(stream, {"ok": False, "error": "QsfsError", "message": "unknown request", "exit_code": 1})
        return
    try:
        reply = {"ok": True, "result": await handler(request)}
    except QsfsError as error:
        reply = {
            "ok": False,
            "error": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
        }
    except Exception as error:  # noqa: BLE001 - one request must not end the daemon
        _log.exception("control request %s failed", request.get("command"))
        reply = {"ok": False, "error": "QsfsBug", "message": f"internal error: {error!r}", "exit_code": 70}
    await _send(stream, reply)


async def _send(stream: trio.SocketStream, reply: Mapping[str, Any]) -> None:
    await stream.send_all(json.dumps(reply, default=str).encode() + b"\n")


async def _read_line(stream: trio.SocketStream) -> bytes | None:
    buffer = bytearray()
    while not buffer.endswith(b"\n"):
        chunk = await stream.receive_some(65536)
        if not chunk or len(buffer) > _LONGEST_LINE:
            return None
        buffer += chunk
    return bytes(buffer)


def ask(cache: Path, command: str, *, timeout: float | None = None, **arguments: Any) -> Any:
    """Asks the daemon of the cache directory `cache`; blocks.

    Raises `NotRunning` if none runs, `CacheError` if it is another user's, `DeadlineExceeded` if it does
    not answer within `timeout` seconds, or the typed error that the daemon reports.
    """
    try:
        with _connected(cache, timeout) as connection:
            connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"{cache / SOCKET}: the daemon did not answer within {timeout:g} s; see its log"
        ) from error
    if not line:
        raise NotRunning(f"{cache / SOCKET}: the daemon ended before it answered; see its log")
    reply = json.loads(line)
    if not reply["ok"]:
        raise error_of(reply["error"], reply["message"])
    return reply["result"]


def require_running(cache: Path) -> None:
    """Raises `NotRunning` if no daemon serves the cache directory `cache`, `CacheError` if it is another user's."""
    with _connected(cache, None):
        pass


@contextlib.contextmanager
def _connected(cache: Path, timeout: float | None) -> Iterator[socket.socket]:
    require_access(cache)
    path = cache / SOCKET
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        with connection:
            directory = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
            try:
                connection.connect(f"/proc/self/fd/{directory}/{path.name}")
            finally:
                os.close(directory)
            yield connection
    except TimeoutError:
        raise
    except FileNotFoundError as error:
        raise NotRunning(f"{cache}: not mounted: no daemon runs here; 'qsfs mount' starts it") from error
    except ConnectionRefusedError as error:
        raise NotRunning(
            f"{cache}: the daemon has died; see its log, 'qsfs mount' clears its dead mount and starts again"
        ) from error
    except OSError as error:
        raise NotRunning(f"{path}: no daemon answers ({error.strerror}); is it mounted?") from error
