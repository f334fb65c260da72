"""Backends as a drill gets them: nothing can be written, and some may count as down."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from qsfs.backend.contract import Backend
from qsfs.backend.wrapper import Call, WrappedBackend
from qsfs.errors import BackendUnavailable, ConfigError, QsfsBug
from qsfs.remote.members import Candidate

T = TypeVar("T")

_WRITES = ("set", "delete")


class _ReadOnly:
    """Refuses what would change a backend: a drill has no reason to."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        """See `Around`."""
        if call.kind in _WRITES:
            raise QsfsBug(f"backend {self._name}: a drill tried to change it ({call.kind}); nothing was sent")
        return await run()


class _Down:
    """Lets no call through."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        """See `Around`."""
        raise BackendUnavailable(f"backend {self._name}: counts as down in this drill")


def for_drill(candidates: Sequence[Candidate], down: Collection[str] = ()) -> list[Candidate]:
    """The candidates such that nothing can be written to them, and those named in `down` do not answer."""
    return [_wrapped(candidate, candidate.name in down) for candidate in candidates]


def choose_down(names: Sequence[str], count: int, named: Sequence[str], seed: int) -> tuple[str, ...]:
    """The backends that count as down: those `named` (by name or address), and `count` more by the seed.

    Raises `ConfigError` for a name that is not configured, or more than there are.
    """
    down = []
    for wanted in named:
        matches = [name for name in names if wanted in (name, name.rpartition("/")[0])]
        if not matches:
            raise ConfigError(f"backend {wanted} is not configured; configured are {', '.join(names)}")
        down += matches
    rest = [name for name in sorted(names) if name not in down]
    if count > len(rest):
        raise ConfigError(f"{count} backends cannot count as down: {len(rest)} are left of {len(names)}")
    return tuple(sorted({*down, *random.Random(seed).sample(rest, count)}))


def _wrapped(candidate: Candidate, down: bool) -> Candidate:
    def wrap(backend: Backend) -> Backend:
        return WrappedBackend(backend, _Down(backend.name) if down else _ReadOnly(backend.name))

    return replace(
        candidate,
        data=wrap(candidate.data),
        connect=lambda namespace: wrap(candidate.connect(namespace)),
    )
