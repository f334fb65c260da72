"""A 0-db namespace as a backend: the calls of the contract as 0-db commands, on a pool of links."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import AsyncIterator

from qsfs.backend.contract import (
    BackendInfo,
    Buffer,
    ScanEntry,
    ScanPage,
    Session,
    check_key,
    check_value,
)
from qsfs.backend.link import Argument, Refusal, Reply, Target
from qsfs.backend.zdb_pool import DedicatedLink, LinkPool, backend_error
from qsfs.clock import Clock, SystemClock
from qsfs.errors import BackendUnavailable

DEFAULT_CONNECTIONS = 3
DEFAULT_CALL_TIMEOUT_S = 30.0
DEFAULT_CONNECT_TIMEOUT_S = 5.0

_NO_MORE_DATA = "No more data"
_KEY_NOT_FOUND = "Key not found"


class _ZdbCalls(abc.ABC):
    """The calls of the contract as 0-db commands."""

    def __init__(self, name: str, namespace: str) -> None:
        self._name = name
        self._namespace = namespace

    @property
    def name(self) -> str:
        """`host:port/namespace`."""
        return self._name

    @abc.abstractmethod
    async def _exchange(self, *arguments: Argument) -> Reply:
        """One request; raises `Refusal` or `BackendError`."""

    async def get(self, key: bytes) -> bytes | None:
        """See `Session`."""
        check_key(self._name, key)
        reply = await self._request("GET", key)
        if reply is None or isinstance(reply, bytes):
            return reply
        raise self._malformed("GET")

    async def set(self, key: bytes, value: Buffer) -> None:
        """See `Session`.  0-db answers nil to a value that it holds already: that is success."""
        check_value(self._name, key, value)
        content = value if isinstance(value, bytes) else memoryview(value).cast("B")
        reply = await self._request("SET", key, content)
        if reply is not None and reply != key:
            raise self._malformed("SET")

    async def exists(self, key: bytes) -> bool:
        """See `Session`."""
        check_key(self._name, key)
        reply = await self._request("EXISTS", key)
        if reply not in (0, 1):
            raise self._malformed("EXISTS")
        return bool(reply)

    async def check(self, key: bytes) -> bool | None:
        """See `Session`; a value that the backend cannot read at all is `BackendUnavailable`."""
        check_key(self._name, key)
        reply = await self._request("CHECK", key)
        if reply is None:
            return None
        if reply == -1:
            raise BackendUnavailable(f"backend {self._name}: it cannot read the value of {key.hex()}")
        if reply not in (0, 1):
            raise self._malformed("CHECK")
        return bool(reply)

    async def delete(self, key: bytes) -> bool:
        """See `Session`."""
        check_key(self._name, key)
        try:
            await self._exchange("DEL", key)
        except Refusal as refusal:
            if str(refusal) == _KEY_NOT_FOUND:
                return False
            raise backend_error(self._name, str(refusal)) from None
        return True

    async def scan(self, cursor: bytes | None = None) -> ScanPage:
        """See `Session`."""
        return await self._page("SCAN", cursor)

    async def rscan(self, cursor: bytes | None = None) -> ScanPage:
        """See `Session`."""
        return await self._page("RSCAN", cursor)

    async def info(self) -> BackendInfo:
        """See `Session`."""
        reply = await self._request("NSINFO", self._namespace)
        if not isinstance(reply, bytes):
            raise self._malformed("NSINFO")
        lines = (line.partition(": ") for line in reply.decode("utf-8", "replace").splitlines())
        fields = {name: value for name, separator, value in lines if separator}
        try:
            return _info(fields)
        except (KeyError, ValueError):
            raise self._malformed("NSINFO") from None

    async def _request(self, *arguments: Argument) -> Reply:
        try:
            return await self._exchange(*arguments)
        except Refusal as refusal:
            raise backend_error(self._name, str(refusal)) from None

    async def _page(self, command: str, cursor: bytes | None) -> ScanPage:
        try:
            reply = await self._exchange(command, *([] if cursor is None else [cursor]))
        except Refusal as refusal:
            if str(refusal) == _NO_MORE_DATA:
                return ScanPage(None, ())
            raise backend_error(self._name, str(refusal)) from None
        try:
            after, rows = reply
            entries = tuple(ScanEntry(bytes(key), int(size), int(time_s)) for key, size, time_s in rows)
            return ScanPage(bytes(after), entries) if entries else ScanPage(None, ())
        except (TypeError, ValueError):
            raise self._malformed(command) from None

    def _malformed(self, command: str) -> BackendUnavailable:
        return BackendUnavailable(f"backend {self._name}: no sensible answer to {command}; is it a 0-db?")


class ZdbBackend(_ZdbCalls):
    """A namespace of a 0-db at `host`:`port`.

    Keeps up to `connections` connections, opened when needed.  A call waits at most
    `call_timeout` seconds, connecting and waiting for a free connection included.
    """

    def __init__(
        self,
        host: str,
        port: int,
        namespace: str,
        *,
        password: str = "",
        admin_password: str = "",
        clock: Clock | None = None,
        connections: int = DEFAULT_CONNECTIONS,
        call_timeout: float = DEFAULT_CALL_TIMEOUT_S,
        connect_timeout: float = DEFAULT_CONNECT_TIMEOUT_S,
    ) -> None:
        shown = f"[{host}]" if ":" in host else host
        super().__init__(f"{shown}:{port}/{namespace}", namespace)
        self._pool = LinkPool(
            self.name,
            Target(host, port, namespace, password, admin_password),
            clock=clock or SystemClock(),
            connections=connections,
            call_timeout=call_timeout,
            connect_timeout=connect_timeout,
        )

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """See `Backend`."""
        async with self._pool.dedicated() as link:
            yield _ZdbSession(self.name, self._namespace, link)

    def expect(self, key: bytes, value: bytes | None) -> None:
        """See `Backend`."""
        self._pool.expect(key, value)

    async def aclose(self) -> None:
        """See `Backend`."""
        await self._pool.aclose()

    async def _exchange(self, *arguments: Argument) -> Reply:
        return await self._pool.call(*arguments)


class _ZdbSession(_ZdbCalls):
    def __init__(self, name: str, namespace: str, link: DedicatedLink) -> None:
        super().__init__(name, namespace)
        self._link = link

    async def _exchange(self, *arguments: Argument) -> Reply:
        return await self._link.call(*arguments)


def _info(fields: dict[str, str]) -> BackendInfo:
    data_bytes = int(fields["data_size_bytes"])
    limit_bytes = int(fields["data_limits_bytes"])
    disk_free = int(fields.get("data_disk_freespace_bytes", str(1 << 62)))
    quota_free = max(0, limit_bytes - data_bytes) if limit_bytes else disk_free
    return BackendInfo(
        entries=int(fields["entries"]),
        data_bytes=data_bytes,
        limit_bytes=limit_bytes,
        disk_free_bytes=disk_free,
        free_bytes=min(disk_free, quota_free),
        locked=fields.get("locked") == "yes",
        worm=fields.get("worm") == "yes",
    )
