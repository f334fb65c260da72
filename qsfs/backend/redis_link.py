"""One blocking connection to a 0-db by way of redis-py; the only module that imports it.

redis-py frames the requests and parses the replies.  Its own handshake (HELLO, CLIENT SETINFO, a
database number) and its reconnecting are not used, since a 0-db knows neither: see `Link.connect`.
All of its exceptions, and whatever a malformed reply makes it raise, end here as `LinkBroken` or
`Refusal`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import select
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Reply = Any
"""bytes, int, None or a list of replies."""

MAX_REPLY_BYTES = 16 * 1024 * 1024
"""More than any honest reply; a longer one breaks the connection instead of filling the memory."""

_READ_BYTES = 256 * 1024
_HEAD_BYTES = 64
_TOO_LONG = "the reply is longer than any that was asked for"


# Only the handshake that is not used here says who the client is; to find out took half a millisecond a link.
_WITHOUT_NAME: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(redis.connection.AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)


class LinkBroken(Exception):
    """The connection failed, or what came back is no reply; the link is closed."""


class Refusal(Exception):
    """The server answered with an error; its text.  The link remains usable."""


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
    """A connection.  Its methods block; only `abort` may be called while another one runs.

    `outdated`: whoever uses it shall not use it again.
    """

    def __init__(self, target: Target, *, connect_timeout: float, call_timeout: float) -> None:
        self._target = target
        self._connection = _Connection(  # type: ignore[no-untyped-call]
            **_WITHOUT_NAME,
            host=target.host,
            port=target.port,
            protocol=2,
            socket_connect_timeout=connect_timeout,
            socket_timeout=call_timeout,
            socket_keepalive=True,
            socket_read_size=_READ_BYTES,
            redis_connect_func=_begin,
        )
        self._aborted = False
        self.outdated = False

    def connect(self) -> None:
        """Connects, authenticates and selects the namespace; raises `LinkBroken` or `Refusal`."""
        target = self._target
        try:
            self._guarded(self._connection.connect)
            if target.admin_password:
                self._become_admin(target.admin_password)
            if target.namespace and target.password:
                self.call("SELECT", target.namespace, "SECURE", self._digest(target.password))
            elif target.namespace:
                self.call("SELECT", target.namespace)
            if target.namespace:
                self._refuse_sequential(self.call("NSINFO", target.namespace))
        except Refusal:
            self.close()
            raise

    def call(self, *arguments: bytes | memoryview | str) -> Reply:
        """One request and its reply."""
        return self._guarded(lambda: self._exchange(arguments))

    def is_stale(self) -> bool:
        """Whether an idle link was closed by the other side, or holds bytes that nobody asked for."""
        wire = self._connection.wire
        if wire is None or self._aborted:
            return True
        poll = select.poll()
        try:
            poll.register(wire, select.POLLIN)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True

    def abort(self) -> None:
        """Ends whatever the link is doing, from another thread; the link is then broken."""
        self._aborted = True
        wire = self._connection.wire
        if wire is not None:
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection."""
        self._aborted = True
        self._connection.disconnect()

    def _exchange(self, arguments: tuple[bytes | memoryview | str, ...]) -> Reply:
        wire = self._connection.wire
        if wire is None:
            raise LinkBroken("the connection is closed")
        wire.budget = MAX_REPLY_BYTES
        self._connection.send_command(*arguments)  # type: ignore[no-untyped-call]
        value = wire.take_value()
        return self._connection.read_response() if value is None else value

    def _digest(self, password: str) -> str:
        nonce = self.call("AUTH", "SECURE", "CHALLENGE")
        if not isinstance(nonce, bytes):
            raise LinkBroken("the server's challenge is malformed")
        return hashlib.sha1(nonce + b":" + password.encode()).hexdigest()

    def _become_admin(self, password: str) -> None:
        try:
            self.call("AUTH", "SECURE", self._digest(password))
        except Refusal as refusal:
            # Such a server takes everyone for admin.
            if str(refusal) != "Authentication disabled":
                raise

    def _refuse_sequential(self, description: Reply) -> None:
        if isinstance(description, bytes) and b"\nmode: sequential" in description:
            raise Refusal("Namespace is in sequential mode, where keys cannot be chosen")

    def _guarded(self, action: Any) -> Reply:
        try:
            if self._aborted:
                raise LinkBroken("the connection is closed")
            reply = action()
        except redis.ResponseError as refusal:
            raise Refusal(str(refusal)) from None
        except LinkBroken:
            self.close()
            raise
        except Exception as failure:
            self.close()
            raise LinkBroken(_reason(failure)) from failure
        if self._aborted:
            self.close()
            raise LinkBroken("the connection was given up")
        return reply


class _Wire(socket.socket):
    """A socket that gives up on replies longer than any honest one, and takes a value in two system calls.

    With each system call a thread gives the interpreter up and has to get it back, which among many threads
    costs more than the call.  A socket with a time limit of Python's makes two of one, and redis-py makes
    them for each piece as it arrives.  So the kernel keeps the time, and waits for the whole value.
    """

    budget = MAX_REPLY_BYTES
    _unread = b""

    def limit_time(self, seconds: float | None) -> None:
        """From now on a call that gets nowhere for so long raises `TimeoutError`; None: never."""
        self.settimeout(None)
        whole, part = divmod(round((seconds or 0) * 1_000_000), 1_000_000)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, part))

    def take_value(self) -> bytes | None:
        """The reply, if it is a value of some length; None if it is anything else: then it is still to be read."""
        head = self.recv(_HEAD_BYTES)
        start = head.find(b"\r\n") + 2
        if start > 3 and head[:1] == b"$" and head[1 : start - 2].isdigit():
            missing = int(head[1 : start - 2]) + 2 - (len(head) - start)
            if missing >= 2:
                rest = self._exactly(missing)
                if rest[-2:] != b"\r\n":
                    raise OSError(errno.EBADMSG, "the reply is malformed")
                return b"".join((head[start:], memoryview(rest)[:-2]))
        self._unread = head
        return None

    def _exactly(self, count: int) -> bytes:
        if count > self.budget:
            raise OSError(errno.EMSGSIZE, _TOO_LONG)
        content = self.recv(count, socket.MSG_WAITALL)
        while content and len(content) < count:
            more = self.recv(count - len(content), socket.MSG_WAITALL)
            content = content + more if more else b""
        if not content:
            raise OSError(errno.ECONNRESET, "the connection was closed in the middle of a reply")
        return content

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if self._unread:
            content, self._unread = self._unread, b""
            return content
        try:
            content = super().recv(size, flags)
        except BlockingIOError:
            raise TimeoutError from None
        self.budget -= len(content)
        if self.budget < 0:
            raise OSError(errno.EMSGSIZE, _TOO_LONG)
        return content

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        try:
            super().sendall(data, flags)
        except BlockingIOError:
            raise TimeoutError from None


class _Connection(redis.Connection):
    """redis-py's connection over a `_Wire`."""

    wire: _Wire | None = None

    def _connect(self) -> _Wire:
        plain = super()._connect()  # type: ignore[no-untyped-call]
        timeout = plain.gettimeout()
        self.wire = _Wire(fileno=plain.detach())
        self.wire.limit_time(timeout)
        return self.wire

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        super().disconnect(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.wire = None


def _begin(connection: Any) -> None:
    connection._parser.on_connect(connection)


def _reason(failure: Exception) -> str:
    if isinstance(failure, redis.TimeoutError | TimeoutError):
        return "no answer in time"
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    # redis-py adds the address, which whoever reports this names already.
    cause = failure.__context__
    if isinstance(failure, redis.ConnectionError) and isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    text = str(failure).strip().rstrip(".")
    return text or type(failure).__name__
