"""Trying backends before a format: reachable, writable, distinct, and free of other file systems."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from qsfs.backend.contract import Backend
from qsfs.clock import Clock
from qsfs.errors import (
    AlreadyFormatted,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    ConfigError,
    Corrupt,
    FormatMismatch,
)
from qsfs.format.head import parse_head_key, parse_owner_key
from qsfs.format.identity import parse_identity_key, parse_tombstone_key
from qsfs.format.shard import parse_shard_key
from qsfs.format.superblock import SUPERBLOCK_KEY, superblock_fsid
from qsfs.format.units import KEY_PREFIX
from qsfs.remote.members import Candidate
from qsfs.remote.reasons import listed, summary

CANARY_PREFIX = KEY_PREFIX + b"canary:"
"""Keys of the values with which a format tries its backends; they are deleted again."""

_CANARY_BYTES = 4096


@dataclass(slots=True)
class Trial:
    """What the trial of all backends found.

    `systems`: ids of the file systems of which something was met, with the backends that hold it;
    `unreadable`: backends with a superblock that is rotten or of a newer version; `foreign`: how many
    keys were met that qsfs did not write, by backend.
    """

    systems: dict[bytes, list[str]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    foreign: dict[str, int] = field(default_factory=dict)

    def require_free(self, force: bytes | None) -> None:
        """`AlreadyFormatted` unless nothing was found, or only what `force` names."""
        if not self.systems and not self.unreadable:
            return
        if force is not None and set(self.systems) == {force}:
            return
        found = [f"file system {fsid.hex()} on {listed(on)}" for fsid, on in sorted(self.systems.items())]
        if self.unreadable:
            found.append(f"a superblock that cannot be read on {listed(self.unreadable)}")
        advice = (
            "give its id to --force to format over it, and lose it"
            if len(self.systems) == 1 and force is None
            else "use other namespaces, or delete these"
        )
        raise AlreadyFormatted(f"the backends are not empty: {'; '.join(found)}; {advice}")


def check_candidates(candidates: Sequence[Candidate], shards: int) -> None:
    """`ConfigError` unless there are as many backends as a pack has shards, all with namespaces of their "
    "own."""
    if len(candidates) < shards:
        raise ConfigError(
            f"{len(candidates)} backends are configured, and a pack has {shards} shards, each on a backend "
            "of its own: "
            "add backends, or choose fewer data and parity shards"
        )
    spaces = Counter((c.address, c.namespace) for c in candidates)
    spaces.update(
        (c.address, c.control_namespace) for c in candidates if c.control_namespace not in ("", c.namespace)
    )
    twice = sorted(f"{address}/{namespace}" for (address, namespace), count in spaces.items() if count > 1)
    if twice:
        raise ConfigError(
            f"used more than once: {listed(twice)}; every backend needs namespaces of its own"
        )


async def try_backends(spaces: Sequence[Backend], clock: Clock, attempt_seconds: float) -> Trial:
    """Stores, reads back and deletes a value in every namespace, and looks for what is there already.

    Raises the backends' errors, all named in one, and `ConfigError` where two addresses lead to one
    namespace.  Nothing stays behind unless a backend fails in between.
    """
    trial = Trial()
    shared: list[str] = []
    canaries = {id(space): CANARY_PREFIX + clock.random_bytes(16).hex().encode() for space in spaces}
    content = clock.random_bytes(_CANARY_BYTES)

    async def look_and_store(space: Backend) -> None:
        await _look(space, trial)
        info = await space.info()
        if info.worm:
            raise BackendRefused(
                f"backend {space.name}: the namespace is write-once; qsfs must be able to delete what it "
                "collects"
            )
        await space.set(canaries[id(space)], content)

    async def read_back(space: Backend) -> None:
        key = canaries[id(space)]
        if await space.get(key) != content:
            raise BackendRefused(f"backend {space.name}: does not return what was stored; it cannot be used")
        newest = {entry.key for entry in (await space.rscan()).entries}
        others = {canaries[id(other)] for other in spaces if other is not space}
        shared.extend(space.name for _ in newest & others)
        if key not in newest:
            raise BackendRefused(
                f"backend {space.name}: does not list what was stored last; it cannot be used"
            )

    async def remove(space: Backend) -> None:
        await space.delete(canaries[id(space)])
        if await space.get(canaries[id(space)]) is not None:
            raise BackendRefused(f"backend {space.name}: still has what was deleted; it cannot be used")

    try:
        await everywhere(spaces, look_and_store, attempt_seconds)
        await everywhere(spaces, read_back, attempt_seconds)
    except BackendError:
        with contextlib.suppress(BackendError):
            await everywhere(spaces, remove, attempt_seconds)
        raise
    await everywhere(spaces, remove, attempt_seconds)
    if shared:
        raise ConfigError(
            f"{listed(shared)}: some of these are one and the same namespace under several "
            "addresses"
        )
    return trial


async def everywhere(
    spaces: Sequence[Backend], call: Callable[[Backend], Awaitable[None]], attempt_seconds: float
) -> None:
    """Runs `call` for all at once; raises one error that names every backend that failed."""
    errors: dict[str, BackendError] = {}

    async def run(space: Backend) -> None:
        try:
            with trio.fail_after(attempt_seconds):
                await call(space)
        except trio.TooSlowError:
            errors[space.name] = BackendUnavailable(
                f"backend {space.name}: no answer in {attempt_seconds:g} s"
            )
        except BackendError as error:
            errors[space.name] = error

    async with trio.open_nursery() as nursery:
        for space in spaces:
            nursery.start_soon(run, space)
    if errors:
        ordered = [error for _, error in sorted(errors.items())]
        raise type(ordered[0])(summary(ordered))


async def _look(space: Backend, trial: Trial) -> None:
    value = await space.get(SUPERBLOCK_KEY)
    if value is not None:
        try:
            trial.systems.setdefault(superblock_fsid(value), []).append(space.name)
        except (Corrupt, FormatMismatch):
            trial.unreadable.append(space.name)
    for page in (await space.scan(), await space.rscan()):
        for key in (entry.key for entry in page.entries):
            fsid = _fsid_of(key)
            if fsid is not None:
                trial.systems.setdefault(fsid, []).append(space.name)
            elif not key.startswith((CANARY_PREFIX, SUPERBLOCK_KEY)):
                trial.foreign[space.name] = trial.foreign.get(space.name, 0) + 1


def _fsid_of(key: bytes) -> bytes | None:
    for parse in (parse_head_key, parse_owner_key, parse_shard_key):
        named = parse(key)
        if named is not None:
            return named.fsid
    return parse_identity_key(key) or parse_tombstone_key(key)
