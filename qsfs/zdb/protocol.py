"""The wire form of requests and replies, without I/O.

`RequestParser` hands out the memory to receive into, so that a large value is received straight
into the buffer that its request will show: nothing is joined, nothing is copied twice.
"""

from __future__ import annotations

from collections.abc import Iterable

Argument = bytes | memoryview
"""One argument of a request.  A memoryview is valid until the parser is used again."""

MAX_ARGUMENTS = 1024
MAX_ARGUMENT_BYTES = 8 * 1024 * 1024
MAX_REQUEST_BYTES = 2 * MAX_ARGUMENT_BYTES

_LINE_BYTES = 32
_BUFFER_BYTES = 8192
_DIRECT_BYTES = 2048
_KEPT_BYTES = 1024 * 1024


class ProtocolError(Exception):
    """A request that cannot be parsed.  `reply` is the error to send before closing."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.reply = error(message)


class RequestParser:
    """Turns received bytes into requests: RESP arrays of bulk strings.

    Receive into `buffers()`, tell `received()` how much came, then call `next_request()` until it
    returns `None`.  After a `ProtocolError` the parser cannot be used any more.
    """

    def __init__(self) -> None:
        self._memory = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._memory)
        self._start = 0
        self._end = 0
        self._kept = bytearray()
        self._arguments: list[Argument] = []
        self._wanted = -1
        self._length = -1
        self._total = 0
        self._direct: memoryview | None = None
        self._filled = 0
        self._kept_in_use = False

    def buffers(self) -> list[memoryview]:
        """Where to put the next bytes, in this order; never empty."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._memory):
            rest = self._memory[self._start : self._end]
            self._memory[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        free = self._view[self._end :]
        if self._direct is not None and self._filled < len(self._direct):
            return [self._direct[self._filled :], free]
        return [free]

    def received(self, count: int) -> None:
        """Notes that `count` bytes were put into the `buffers()`."""
        if self._direct is not None:
            part = min(count, len(self._direct) - self._filled)
            self._filled += part
            count -= part
        self._end += count

    def next_request(self) -> list[Argument] | None:
        """The next whole request, or `None` until more was received; raises `ProtocolError`."""
        if self._wanted < 0:
            self._kept_in_use = False
            self._arguments = []
            self._total = 0
            count = self._number(b"*", "Malformed request, array expected")
            if count is None:
                return None
            if count < 1:
                raise ProtocolError("Missing arguments")
            if count > MAX_ARGUMENTS:
                raise ProtocolError("Too many arguments")
            self._wanted = count
        while len(self._arguments) < self._wanted:
            if not self._next_argument():
                return None
        self._wanted = -1
        return self._arguments

    def _next_argument(self) -> bool:
        if self._length < 0:
            length = self._number(b"$", "Malformed query string")
            if length is None:
                return False
            if length < 0:
                raise ProtocolError("Malformed query string")
            self._total += length
            if length > MAX_ARGUMENT_BYTES or self._total > MAX_REQUEST_BYTES:
                raise ProtocolError("Payload too big")
            self._length = length
            if length > _DIRECT_BYTES:
                self._begin_direct(length)
        available = self._end - self._start
        if self._direct is None:
            if available < self._length + 2:
                return False
            argument: Argument = bytes(self._view[self._start : self._start + self._length])
            self._start += self._length
        else:
            if self._filled < len(self._direct) or available < 2:
                return False
            argument = self._direct
            self._direct = None
        if self._memory[self._start : self._start + 2] != b"\r\n":
            raise ProtocolError("Malformed query string")
        self._start += 2
        self._length = -1
        self._arguments.append(argument)
        return True

    def _begin_direct(self, length: int) -> None:
        if self._kept_in_use or length > _KEPT_BYTES:
            memory = bytearray(length)
        else:
            if len(self._kept) < length:
                self._kept = bytearray(length)
            memory = self._kept
            self._kept_in_use = True
        self._direct = memoryview(memory)[:length]
        self._filled = min(length, self._end - self._start)
        self._direct[: self._filled] = self._view[self._start : self._start + self._filled]
        self._start += self._filled

    def _number(self, mark: bytes, complaint: str) -> int | None:
        if self._start == self._end:
            return None
        if self._memory[self._start] != mark[0]:
            raise ProtocolError(complaint)
        end = self._memory.find(b"\r\n", self._start, min(self._end, self._start + _LINE_BYTES))
        if end < 0:
            if self._end - self._start >= _LINE_BYTES:
                raise ProtocolError(complaint)
            return None
        digits = bytes(self._view[self._start + 1 : end])
        self._start = end + 2
        try:
            return int(digits)
        except ValueError:
            raise ProtocolError(complaint) from None


OK = b"+OK\r\n"
NIL = b"$-1\r\n"


def error(message: str) -> bytes:
    """An error reply; `message` as 0-db words it, without the dash."""
    return b"-%s\r\n" % message.encode()


def simple(text: bytes) -> bytes:
    """A status reply."""
    return b"+%s\r\n" % text


def integer(number: int) -> bytes:
    """An integer reply."""
    return b":%d\r\n" % number


def bulk(content: Argument) -> bytes:
    """A bulk reply."""
    return b"$%d\r\n%s\r\n" % (len(content), content)


def array(items: Iterable[bytes]) -> bytes:
    """An array reply of encoded `items`."""
    encoded = list(items)
    return b"*%d\r\n%s" % (len(encoded), b"".join(encoded))
