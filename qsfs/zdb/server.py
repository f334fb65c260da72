"""The server: instances on consecutive ports in one process, each with a directory of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from qsfs.clock import Clock, SystemClock
from qsfs.errors import ConfigError
from qsfs.zdb.client import Client
from qsfs.zdb.commands import NAMESPACE_GONE, execute
from qsfs.zdb.instance import DEFAULT, Instance, InstanceOptions
from qsfs.zdb.protocol import Argument, ProtocolError, RequestParser, error

_log = logging.getLogger(__name__)

MIN_DATASIZE = 512 * 1024
MAX_DATASIZE = 4 * 1024 * 1024 * 1024 - 1

_FLUSH_BYTES = 64 * 1024
_FLUSH_REQUESTS = 64


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class ServeOptions:
    """What `qsfs zdb` serves.

    Instance i listens on `listen`:`port` + i and keeps its data in `data`/<port>.  `sync` makes
    every append durable before it is answered.  Without `admin_password` everyone is admin, as in
    0-db.  `default_maxsize` bounds the live bytes of each default namespace (0: no bound),
    `datasize` is where data files are rotated.  With `port` 0 the kernel chooses each port, and
    the directory is named after the instance's position.
    """

    data: Path
    listen: str = "127.0.0.1"
    port: int = 9900
    instances: int = 1
    sync: bool = False
    admin_password: str = ""
    default_maxsize: int = 0
    datasize: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise ConfigError("zdb: at least one instance is needed")
        if self.port and not 1 <= self.port <= 65536 - self.instances:
            raise ConfigError(f"zdb: {self.instances} ports from {self.port} on are too many; lower --port")
        if not MIN_DATASIZE <= self.datasize <= MAX_DATASIZE:
            raise ConfigError(f"zdb: datasize must lie between {MIN_DATASIZE} and {MAX_DATASIZE} bytes")
        if self.default_maxsize < 0:
            raise ConfigError("zdb: the maxsize of the default namespace cannot be negative")


class Server:
    """Open instances and their listeners; made by `open_server`."""

    def __init__(self, pairs: list[tuple[Instance, list[trio.SocketListener]]]) -> None:
        self._pairs = pairs

    @property
    def ports(self) -> list[int]:
        """The port of each instance."""
        return [listeners[0].socket.getsockname()[1] for _, listeners in self._pairs]

    async def serve_forever(self) -> None:
        """Answers clients until cancelled."""
        async with trio.open_nursery() as nursery:
            for instance, listeners in self._pairs:
                nursery.start_soon(instance.run_background)
                nursery.start_soon(trio.serve_listeners, _handler(instance), listeners)


@contextlib.asynccontextmanager
async def open_server(options: ServeOptions, clock: Clock) -> AsyncIterator[Server]:
    """Opens every instance and its port; at the end puts everything on the disk and closes it.

    Clients may connect at once; they are answered by `serve_forever`.  Raises `ConfigError`.
    """
    pairs: list[tuple[Instance, list[trio.SocketListener]]] = []
    try:
        for position in range(options.instances):
            instance = _open(options, position, clock)
            pairs.append((instance, []))
            port = options.port + position if options.port else 0
            pairs[-1][1].extend(await _listen(options.listen, port))
        yield Server(pairs)
    finally:
        with trio.CancelScope(shield=True):
            for instance, listeners in pairs:
                for listener in listeners:
                    await listener.aclose()
                instance.close()


async def serve(
    options: ServeOptions,
    *,
    clock: Clock | None = None,
    task_status: trio.TaskStatus[list[int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; then everything appended is put on the disk and all files are closed.

    Reports the ports once every instance accepts connections.  Raises `ConfigError` if a directory
    or a port cannot be used.
    """
    async with open_server(options, clock or SystemClock()) as server:
        task_status.started(server.ports)
        await server.serve_forever()


async def run(options: ServeOptions, *, announce: Callable[[str], None] = _print) -> None:
    """Serves until SIGTERM or SIGINT; announces in one line that all instances are ready.

    Raises `ConfigError` if a directory or a port cannot be used.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_server(options, SystemClock()) as server, trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_forever)
            announce(f"zdb: ready on {options.listen}, ports {_span(server.ports)}, data in {options.data}")
            number = await anext(signals)
            _log.info("zdb: stopping on %s", signal.Signals(number).name)
            nursery.cancel_scope.cancel()


async def serve_client(instance: Instance, stream: trio.SocketStream) -> None:
    """Answers one connection until it ends."""
    instance.counters.clients += 1
    client = Client(instance, instance.namespaces[DEFAULT], admin=not instance.admin_password)
    try:
        await _answer(client, stream)
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as failure:
        _log.debug("zdb: connection lost: %s", failure)
    except Exception:  # noqa: BLE001 - one client's request must not end the server
        _log.exception("zdb: a request failed unexpectedly; its connection is closed")
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)


async def _answer(client: Client, stream: trio.SocketStream) -> None:
    parser = RequestParser()
    counters = client.instance.counters
    out = bytearray()
    pending = 0

    async def flush() -> None:
        nonlocal pending
        pending = 0
        if out:
            content = bytes(out)
            out.clear()
            counters.sent_bytes += len(content)
            await stream.send_all(content)

    while True:
        try:
            arguments = parser.next_request()
        except ProtocolError as failure:
            out += failure.reply
            await flush()
            return
        if arguments is None:
            await flush()
            received = await _receive(stream, parser)
            if received == 0:
                return
            counters.received_bytes += received
            continue
        if not await _reply(client, arguments, stream, out, flush):
            return
        pending += 1
        if len(out) >= _FLUSH_BYTES or pending >= _FLUSH_REQUESTS:
            await flush()
            await trio.lowlevel.checkpoint()


async def _reply(
    client: Client,
    arguments: list[Argument],
    stream: trio.SocketStream,
    out: bytearray,
    flush: Callable[[], Awaitable[None]],
) -> bool:
    reply = await execute(client, arguments)
    if reply is None:
        out += error(NAMESPACE_GONE)
        await flush()
        return False
    if isinstance(reply, bytes):
        out += reply
        return True
    head, value, tail = reply
    out += head
    if len(value) < _FLUSH_BYTES:
        out += value
    else:
        await flush()
        client.instance.counters.sent_bytes += len(value)
        await stream.send_all(value)
    out += tail
    return True


async def _receive(stream: trio.SocketStream, parser: RequestParser) -> int:
    received, *_ = await stream.socket.recvmsg_into(parser.buffers())
    parser.received(received)
    return received


def _handler(instance: Instance) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def handle(stream: trio.SocketStream) -> None:
        await serve_client(instance, stream)

    return handle


def _open(options: ServeOptions, position: int, clock: Clock) -> Instance:
    name = str(options.port + position if options.port else position)
    return Instance.open(
        options.data / name,
        InstanceOptions(options.sync, options.admin_password, options.default_maxsize, options.datasize),
        clock,
        identity=position,
    )


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as failure:
        advice = "choose another --port" if failure.errno == errno.EADDRINUSE else "see --listen"
        raise ConfigError(f"zdb: cannot listen on {host}:{port}: {failure}; {advice}") from failure


def _span(ports: list[int]) -> str:
    return str(ports[0]) if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"
