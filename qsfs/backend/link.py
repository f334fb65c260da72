"""One connection to a 0-db, on the event loop's own thread: requests, and replies as RESP2 has them.

https://redis.io/docs/latest/develop/reference/protocol-spec/ has the format.  It is spoken here because
nothing that is kept well speaks it on trio: with redis-py in threads a value of 256 KiB cost twice the CPU
(docs/performance.md), and hiredis allocates whatever length an array claims, which a backend that lies
makes seconds of.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio

Reply = Any
"""bytes, int, None or a list of replies; an `ErrorReply` only within a list."""
Argument = bytes | memoryview | str

MAX_REPLY_BYTES = 16 * 1024 * 1024
"""More than any honest reply; a longer one breaks the connection instead of filling the memory."""

_HEAD_BYTES = 64
_LIST_BYTES = 16 * 1024
_MAX_LINE = 4096
_MAX_DEPTH = 4
_LEAST_ITEM_BYTES = 4
_MOST_DIGITS = 19
_NONE = b"-1"
_SENT_APART = 4096
_TOO_LONG = "the reply is longer than any that was asked for"
_MALFORMED = "the reply is malformed"
_LATE = "no answer in time"
_GIVEN_UP = "the connection was given up"


class LinkBroken(Exception):
    """The connection failed, or what came back is no reply; the link is closed."""


class Refusal(Exception):
    """The server answered with an error; its text.  The link remains usable."""


class ErrorReply(str):
    """The text of an error reply."""


@dataclass(frozen=True)
class Target:
    """Where a link leads, and how it gets in.  Empty passwords: none is sent.

    `namespace` may be empty to stay in the server's default one without selecting it.
    """

    host: str
    port: int
    namespace: str = ""
    password: str = ""
    admin_password: str = ""


class Link:
    """A connection, for one caller at a time; only `close` may be called while another call runs.

    A call that is cancelled closes it.  Only connecting keeps time; for calls the caller does.
    `outdated`: whoever uses it shall not use it again.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._wire: _Wire | None = None
        self._closed = False
        self.outdated = False

    async def connect(self, threads: trio.CapacityLimiter, seconds: float) -> None:
        """Connects, authenticates and selects the namespace; raises `LinkBroken` or `Refusal`.

        A name is looked up in one of `threads`, since nothing can cut that short.  The look-up, each of the addresses
        found, and what is said then may take `seconds` each.
        """
        target = self._target
        try:
            self._wire = await _connected(target.host, target.port, threads, seconds)
        except OSError as failure:
            raise LinkBroken(_reason(failure)) from failure
        try:
            if self._closed:
                raise LinkBroken(_GIVEN_UP)
            with trio.move_on_after(seconds):
                await self._enter()
                return
            raise LinkBroken(_LATE)
        except BaseException:
            self.close()
            raise

    async def _enter(self) -> None:
        target = self._target
        if target.admin_password:
            await self._become_admin(target.admin_password)
        if target.namespace and target.password:
            await self.call("SELECT", target.namespace, "SECURE", await self._digest(target.password))
        elif target.namespace:
            await self.call("SELECT", target.namespace)
        if target.namespace:
            self._refuse_sequential(await self.call("NSINFO", target.namespace))

    async def call(self, *arguments: Argument) -> Reply:
        """One request and its reply."""
        wire = self._wire
        if wire is None:
            raise LinkBroken("the connection is closed")
        try:
            await wire.send(_request(arguments))
            reply = await wire.reply()
        except BaseException as failure:
            # An answer may still come, and would be taken for that of the next request.
            self.close()
            if isinstance(failure, OSError | trio.ClosedResourceError):
                raise LinkBroken(_reason(failure)) from failure
            raise
        if isinstance(reply, ErrorReply):
            raise Refusal(reply)
        return reply

    def is_stale(self) -> bool:
        """Whether an idle link was closed by the other side, or holds bytes that nobody asked for."""
        return self._wire is None or self._wire.has_news()

    def close(self) -> None:
        """Closes the connection; a call under way fails, and so does connecting."""
        self._closed = True
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    async def _digest(self, password: str) -> str:
        nonce = await self.call("AUTH", "SECURE", "CHALLENGE")
        if not isinstance(nonce, bytes):
            raise LinkBroken("the server's challenge is malformed")
        return hashlib.sha1(nonce + b":" + password.encode()).hexdigest()

    async def _become_admin(self, password: str) -> None:
        try:
            await self.call("AUTH", "SECURE", await self._digest(password))
        except Refusal as refusal:
            # Such a server takes everyone for admin.
            if str(refusal) != "Authentication disabled":
                raise

    def _refuse_sequential(self, description: Reply) -> None:
        if isinstance(description, bytes) and b"\nmode: sequential" in description:
            raise Refusal("Namespace is in sequential mode, where keys cannot be chosen")


class _Wire:
    """A connected socket, and the reply that is being read from it.  All failures are `OSError`."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._held = b""
        self._budget = 0
        self._low_water = 1

    async def send(self, parts: list[bytes | memoryview]) -> None:
        """Sends the request."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while parts:
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
                continue
            parts = _behind(parts, sent)

    async def reply(self) -> Reply:
        """Reads one reply."""
        self._held, self._budget = b"", MAX_REPLY_BYTES
        reply = await self._item(_MAX_DEPTH)
        if self._held:
            raise OSError(errno.EBADMSG, "the reply is followed by bytes that nobody asked for")
        return reply

    def has_news(self) -> bool:
        """Whether there is anything to read, an end or an error included."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Closes the socket, also under a task that waits for it."""
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    async def _item(self, depth: int) -> Reply:
        # Little of a long value comes with its first line, so that little of it is copied once more.
        line = await self._line(_HEAD_BYTES if depth == _MAX_DEPTH else _LIST_BYTES)
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return None if rest == _NONE else await self._value(_length(rest))
        if kind == b"+":
            return rest
        if kind == b":":
            return _number(rest)
        if kind == b"-":
            return ErrorReply(rest.decode("utf-8", "replace"))
        if kind != b"*" or not depth:
            raise OSError(errno.EBADMSG, _MALFORMED)
        if rest == _NONE:
            return None
        count = _length(rest)
        self._spend(_LEAST_ITEM_BYTES * count)
        return [await self._item(depth - 1) for _ in range(count)]

    async def _line(self, most: int) -> bytes:
        while (end := self._held.find(b"\r\n")) < 0:
            if len(self._held) > _MAX_LINE:
                raise OSError(errno.EBADMSG, _MALFORMED)
            # Waits first: an answer is hardly ever there yet, and a long list lets others go on.
            await self._wait(1)
            self._held += await self._some(most)
        line, self._held = self._held[:end], self._held[end + 2 :]
        self._spend(len(line))
        return line

    async def _value(self, length: int) -> bytes:
        self._spend(length)
        pieces = [self._held[:length]]
        missing = length - len(pieces[0])
        self._held = self._held[length:]
        while missing:
            piece = await self._some(missing, missing + 2)
            pieces.append(piece)
            missing -= len(piece)
        while len(self._held) < 2:
            self._held += await self._some(2 - len(self._held))
        end, self._held = self._held[:2], self._held[2:]
        if end != b"\r\n":
            raise OSError(errno.EBADMSG, _MALFORMED)
        return b"".join(pieces)

    def _spend(self, count: int) -> None:
        self._budget -= count
        if self._budget < 0:
            raise OSError(errno.EMSGSIZE, _TOO_LONG)

    async def _some(self, most: int, expected: int = 1) -> bytes:
        """At least one byte, and up to `most`; if none is there, waits for `expected` as far as the kernel has room."""
        while True:
            try:
                content = self._socket.recv(most)
            except BlockingIOError:
                await self._wait(expected)
                continue
            if not content:
                raise OSError(errno.ECONNRESET, "the connection was closed in the middle of a reply")
            return content

    async def _wait(self, count: int) -> None:
        if count != self._low_water:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._low_water = count
        await trio.lowlevel.wait_readable(self._socket)


async def _connected(host: str, port: int, threads: trio.CapacityLimiter, seconds: float) -> _Wire:
    """A connection to the first address of `host` that takes one within `seconds`."""
    failure = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    found: Sequence[Any] = ()
    with trio.move_on_after(seconds) as lookup:
        found = await _addresses(host, port, threads)
    if lookup.cancelled_caught:
        raise OSError(errno.ETIMEDOUT, "the name could not be looked up in time")
    for family, kind, protocol, _, address in found:
        connecting = socket.socket(family, kind, protocol)
        try:
            connecting.setblocking(False)
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            with trio.move_on_after(seconds):
                await _connect(connecting, address)
                return _Wire(connecting)
            failure = OSError(errno.ETIMEDOUT, _LATE)
        except OSError as error:
            failure = error
        except BaseException:
            connecting.close()
            raise
        connecting.close()
    raise failure


async def _connect(connecting: socket.socket, address: Any) -> None:
    try:
        connecting.connect(address)
    except BlockingIOError:
        await trio.lowlevel.wait_writable(connecting)
        error = connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error)) from None


async def _addresses(host: str, port: int, threads: trio.CapacityLimiter) -> Sequence[Any]:
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=numeric)
    except socket.gaierror:
        return await trio.to_thread.run_sync(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), abandon_on_cancel=True, limiter=threads
        )


def _request(arguments: Sequence[Argument]) -> list[bytes | memoryview]:
    """The buffers of a request in order; large arguments are not copied."""
    parts: list[bytes | memoryview] = []
    head = b"*%d\r\n" % len(arguments)
    for argument in arguments:
        content = argument.encode() if isinstance(argument, str) else argument
        head += b"$%d\r\n" % len(content)
        if len(content) < _SENT_APART:
            head += bytes(content) + b"\r\n"
        else:
            parts += [head, content]
            head = b"\r\n"
    return [*parts, head]


def _behind(parts: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What is left of the buffers when so many of their bytes are sent."""
    for index, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[index + 1 :]]
        sent -= len(part)
    return []


def _number(text: bytes) -> int:
    return -_length(text[1:]) if text.startswith(b"-") else _length(text)


def _length(text: bytes) -> int:
    if not text.isdigit() or len(text) > _MOST_DIGITS:
        raise OSError(errno.EBADMSG, _MALFORMED)
    return int(text)


def _reason(failure: Exception) -> str:
    if isinstance(failure, trio.ClosedResourceError):
        return _GIVEN_UP
    return (isinstance(failure, OSError) and failure.strerror) or str(failure) or type(failure).__name__
