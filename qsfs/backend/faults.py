"""Faults on demand, for tests and simulation: a backend that is down, slow, forgetful, lying or full.

Which calls are hit is decided by the seed, the call, its key and how often that call was made for
that key: the same for the same seed, however the scheduler orders the tasks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from qsfs.backend.contract import Backend
from qsfs.backend.wrapper import Call, WrappedBackend
from qsfs.errors import BackendFull, BackendUnavailable

T = TypeVar("T")


@dataclass
class Faults:
    """What is wrong with a backend; may be changed at any time.

    Shares are between 0 and 1.  `flap` is (seconds up, seconds down), repeated, by trio's clock.
    `injected` counts what was done, by the names of the fields below.
    """

    seed: int = 0
    down: bool = False
    """No call gets through; sessions break."""
    flap: tuple[float, float] | None = None
    """Down at times."""
    full: bool = False
    """Stores are refused for lack of room."""
    slow: float = 0.0
    """Seconds added to each call."""
    hang: float = 0.0
    """Share of calls that get no answer at all until they are cancelled; half of them took effect."""
    fail: float = 0.0
    """Share of calls that fail without effect."""
    fail_after: float = 0.0
    """Share of calls that take effect and then fail."""
    lose: float = 0.0
    """Share of stores that are acknowledged and forgotten."""
    flip: float = 0.0
    """Share of gets with one flipped bit."""
    truncate: float = 0.0
    """Share of gets that lack their end."""
    old: float = 0.0
    """Share of gets that answer what was there before the key's last change."""
    injected: Counter[str] = field(default_factory=Counter)

    def draw(self, name: str, call: Call, count: int) -> float:
        """A number in [0, 1) for the `count`-th such call."""
        text = f"{self.seed}/{name}/{call.kind}/{call.key.hex()}/{count}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "little") / 2**48

    def is_down(self) -> bool:
        """Whether the backend is unreachable now."""
        if self.down or self.flap is None:
            return self.down
        up, down = self.flap
        return trio.current_time() % (up + down) >= up


class _Injector:
    """The faults of one connection; `breaks` says that the first failure is also the last answer."""

    def __init__(self, faults: Faults, name: str, seen: _Seen, *, breaks: bool) -> None:
        self._faults = faults
        self._name = name
        self._seen = seen
        self._breaks = breaks
        self._broken = False

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        faults, count = self._faults, self._seen.count(call)
        if faults.slow:
            await trio.sleep(faults.slow)
        if self._broken or faults.is_down():
            await self._fail("down")
        if self._hit("fail", call, count):
            await self._fail("fail")
        if self._hit("hang", call, count):
            await self._hang(call, count, run)
        if call.kind == "set" and faults.full:
            faults.injected["full"] += 1
            await trio.lowlevel.checkpoint()
            raise BackendFull(f"backend {self._name}: no room (injected)")
        if call.kind == "set" and self._hit("lose", call, count):
            await trio.lowlevel.checkpoint()
            return None  # type: ignore[return-value]
        result = await run()
        self._seen.note_change(call, result)
        if faults.is_down():
            await self._fail("down")
        if self._hit("fail_after", call, count):
            await self._fail("fail_after")
        return self._distort(call, count, result) if call.kind == "get" else result

    def _distort(self, call: Call, count: int, result: Any) -> Any:
        if self._seen.changed(call.key) and self._hit("old", call, count):
            result = self._seen.earlier(call.key)
        if isinstance(result, bytes) and result:
            if self._hit("flip", call, count):
                position = int(self._faults.draw("flip at", call, count) * len(result) * 8)
                damaged = bytearray(result)
                damaged[position // 8] ^= 1 << position % 8
                result = bytes(damaged)
            if self._hit("truncate", call, count):
                result = result[: int(self._faults.draw("truncate at", call, count) * len(result))]
        return result

    async def _hang(self, call: Call, count: int, run: Callable[[], Awaitable[T]]) -> None:
        if self._faults.draw("hang with effect", call, count) < 0.5:
            self._seen.note_change(call, await run())
        await trio.sleep_forever()

    async def _fail(self, name: str) -> None:
        self._faults.injected[name] += 1
        self._broken = self._breaks
        await trio.lowlevel.checkpoint()
        raise BackendUnavailable(f"backend {self._name}: no answer (injected: {name})")

    def _hit(self, name: str, call: Call, count: int) -> bool:
        share = getattr(self._faults, name)
        if share and self._faults.draw(name, call, count) < share:
            if name not in ("fail", "fail_after"):
                self._faults.injected[name] += 1
            return True
        return False


class _Seen:
    def __init__(self) -> None:
        self._counts: Counter[tuple[str, bytes]] = Counter()
        self._values: dict[bytes, list[bytes | None]] = {}

    def count(self, call: Call) -> int:
        self._counts[call.kind, call.key] += 1
        return self._counts[call.kind, call.key]

    def note_change(self, call: Call, result: object) -> None:
        if call.kind == "set":
            self._values.setdefault(call.key, [None]).append(bytes(call.value or b""))
        elif call.kind == "delete" and result:
            self._values.setdefault(call.key, [None]).append(None)

    def changed(self, key: bytes) -> bool:
        return key in self._values

    def earlier(self, key: bytes) -> bytes | None:
        return self._values[key][-2]


def with_faults(backend: Backend, faults: Faults) -> Backend:
    """`backend`, as far as `faults` lets it work.  Sessions break at their first failure."""
    seen = _Seen()
    return WrappedBackend(
        backend,
        _Injector(faults, backend.name, seen, breaks=False),
        lambda: _Injector(faults, backend.name, seen, breaks=True),
    )
