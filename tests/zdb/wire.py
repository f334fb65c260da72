"""A raw connection to a server: what goes over the wire, unchanged by any client library."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import trio


class ErrorReply(str):
    """An error reply, without the dash."""

    __slots__ = ()


class Wire:
    """One connection; requests are sent as given."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, content: bytes) -> None:
        await self._stream.send_all(content)

    async def ask(self, *arguments: bytes | str | int) -> Any:
        """One request; its reply as bytes, int, None, list, `ErrorReply`, or str for a status."""
        await self.send(encode(*arguments))
        return await self.read()

    async def read(self) -> Any:
        line = await self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            return ErrorReply(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else await self._exactly(int(rest))
        assert kind == b"*", line
        return [await self.read() for _ in range(int(rest))]

    async def select_secure(self, namespace: str, password: str) -> Any:
        digest = await self.digest(password)
        return await self.ask("SELECT", namespace, "SECURE", digest)

    async def digest(self, password: str) -> str:
        nonce = await self.ask("AUTH", "SECURE", "CHALLENGE")
        return hashlib.sha1(f"{nonce}:{password}".encode()).hexdigest()

    async def at_end(self) -> bool:
        """Whether the server has closed the connection."""
        try:
            return not await self._stream.receive_some()
        except trio.BrokenResourceError:
            return True

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            await self._more()
        line, _, rest = bytes(self._buffer).partition(b"\r\n")
        self._buffer[:] = rest
        return line

    async def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count + 2:
            await self._more()
        content = bytes(self._buffer[:count])
        assert self._buffer[count : count + 2] == b"\r\n"
        del self._buffer[: count + 2]
        return content

    async def _more(self) -> None:
        received = await self._stream.receive_some()
        if not received:
            raise EOFError(bytes(self._buffer))
        self._buffer += received


def encode(*arguments: bytes | str | int) -> bytes:
    parts = [argument if isinstance(argument, bytes) else str(argument).encode() for argument in arguments]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


@contextlib.asynccontextmanager
async def wire(port: int) -> AsyncIterator[Wire]:
    """A connection to a local port."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        yield Wire(stream)
