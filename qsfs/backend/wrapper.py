"""What all wrappers of a backend share: each call passes one place, in the backend and its sessions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from qsfs.backend.contract import Backend, BackendInfo, Buffer, ScanPage, Session, byte_length

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A call on its way: its name as in the contract, its key (scans: the cursor) and value."""

    kind: str
    key: bytes = b""
    value: Buffer | None = None

    @property
    def upload_bytes(self) -> int:
        """Bytes that the call carries to the backend, framing left out."""
        return len(self.key) + (0 if self.value is None else byte_length(self.value))


def download_bytes(result: object) -> int:
    """Bytes that a call's result carried from the backend, framing left out."""
    if isinstance(result, bytes):
        return len(result)
    if isinstance(result, ScanPage):
        return sum(len(entry.key) + 16 for entry in result.entries)
    return 0


class Around(Protocol):
    """What a wrapper does around a call."""

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        """Runs `run` (never, once or several times) and returns its result or another."""
        ...


class WrappedSession:
    """A session whose calls pass through `around`."""

    def __init__(self, inner: Session, around: Around) -> None:
        self._inner = inner
        self._around = around

    @property
    def name(self) -> str:
        """The name of what is wrapped."""
        return self._inner.name

    async def get(self, key: bytes) -> bytes | None:
        """See `Session`."""
        return await self._around.around(Call("get", key), lambda: self._inner.get(key))

    async def set(self, key: bytes, value: Buffer) -> None:
        """See `Session`."""
        await self._around.around(Call("set", key, value), lambda: self._inner.set(key, value))

    async def exists(self, key: bytes) -> bool:
        """See `Session`."""
        return await self._around.around(Call("exists", key), lambda: self._inner.exists(key))

    async def check(self, key: bytes) -> bool | None:
        """See `Session`."""
        return await self._around.around(Call("check", key), lambda: self._inner.check(key))

    async def delete(self, key: bytes) -> bool:
        """See `Session`."""
        return await self._around.around(Call("delete", key), lambda: self._inner.delete(key))

    async def scan(self, cursor: bytes | None = None) -> ScanPage:
        """See `Session`."""
        return await self._around.around(Call("scan", cursor or b""), lambda: self._inner.scan(cursor))

    async def rscan(self, cursor: bytes | None = None) -> ScanPage:
        """See `Session`."""
        return await self._around.around(Call("rscan", cursor or b""), lambda: self._inner.rscan(cursor))

    async def info(self) -> BackendInfo:
        """See `Session`."""
        return await self._around.around(Call("info"), self._inner.info)


class WrappedBackend(WrappedSession):
    """A backend whose calls, and those of its sessions, pass through `around`.

    Opening a session passes through `around` as a call of the kind `session`; the calls of each
    session pass through what `session_around` returns for it, by default `around` again.
    """

    def __init__(
        self, inner: Backend, around: Around, session_around: Callable[[], Around] | None = None
    ) -> None:
        super().__init__(inner, around)
        self._backend = inner
        self._session_around = session_around or (lambda: around)

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """See `Backend`."""
        async with contextlib.AsyncExitStack() as stack:
            session = await self._around.around(
                Call("session"), lambda: stack.enter_async_context(self._backend.session())
            )
            yield WrappedSession(session, self._session_around())

    def expect(self, key: bytes, value: bytes | None) -> None:
        """See `Backend`."""
        self._backend.expect(key, value)

    async def aclose(self) -> None:
        """See `Backend`."""
        await self._backend.aclose()


class Unchanged:
    """Does nothing around a call."""

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        """See `Around`."""
        return await run()
