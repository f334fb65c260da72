"""`qsfs sync --class`: how far everything accepted so far has got, and what keeps it from going on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from qsfs.daemon.committer import Committer
from qsfs.daemon.flushing import Flushing
from qsfs.errors import DataLost, QsfsError
from qsfs.remote.flush import Flusher
from qsfs.remote.members import State
from qsfs.remote.reasons import summary
from qsfs.values import counted

_WATCH_SECONDS = 0.5
_TRIED_SECONDS = 120.0
"""How long a backend counts as without room after it was seen so: it passes for one with room until a pack is tried."""
CLASSES = ("local", "written", "full")


async def sync_to(flushing: Flushing, committer: Committer, wanted: str, timeout: float | None) -> dict[str, Any]:
    """Waits until everything accepted so far is durable at class `wanted`, for at most `timeout` seconds.

    `class` of the result is what was reached ("" for nothing), `reached` whether that suffices, and
    `missing` what is not there yet.  Raises what says that it never will be (`Fenced`, `CacheError`).
    """
    reached = ""
    generation: int | None = None
    seen: dict[int, tuple[float, dict[str, Any]]] = {}

    async def go_on() -> None:
        nonlocal reached, generation
        await committer.commit()
        reached = "local"
        if wanted == "local":
            return
        flusher = await flushing.owned()
        done = await flusher.sync()
        generation, reached = done.generation, done.durability
        if wanted == "full" and reached != "full":
            await _full_told(flushing, flusher, seen)
            reached = "full"

    async def watch() -> None:
        # A backend passes for one with room again after a while, until it is tried.
        while True:
            seen.update(_troubles(flushing))
            await trio.sleep(_WATCH_SECONDS)

    failure: QsfsError | None = None
    with trio.move_on_after(float("inf") if timeout is None else timeout):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                await go_on()
            except QsfsError as error:
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    enough = reached in CLASSES and CLASSES.index(reached) >= CLASSES.index(wanted)
    result: dict[str, Any] = {"generation": generation, "class": reached, "wanted": wanted, "reached": enough}
    if not enough:
        seen.update(_troubles(flushing))
        result["missing"] = _missing(flushing, seen)
    return result


async def _full(flusher: Flusher, waits: Callable[[set[int]], None] = lambda _: None) -> None:
    """Waits until every pack that is not full now has all of its shards; raises why none will get any.

    `DataLost` if some never will, since what lives in them cannot be read any more.  `waits` hears again and again of
    the packs that are left.
    """
    incomplete = flusher.context.ledger.incomplete
    pending = set(incomplete)
    while pending := pending & incomplete.keys():
        flusher.raise_if_ended()
        if lost := len(pending & flusher.unreadable_packs):
            raise DataLost(
                f"{counted(lost, 'pack')} lost more shards than the code can replace and cannot become full: 'qsfs "
                "status' tells what of them is saved and what cannot be read; all else is published"
            )
        waits(pending)
        await trio.sleep(_WATCH_SECONDS)


async def _full_told(flushing: Flushing, flusher: Flusher, seen: dict[int, tuple[float, dict[str, Any]]]) -> None:
    """As `_full`; what it waits for is one of `flushing.full_waits` meanwhile.

    That is how many packs, the bytes that live in them, and why they are not full.
    """
    incomplete = flusher.context.ledger.incomplete
    told: dict[str, Any] = {}

    def waits(pending: set[int]) -> None:
        told["packs"], told["bytes"] = len(pending), sum(incomplete[number][0] for number in pending)
        told["why"] = _why_not_full(flushing, flusher, seen)
        flushing.full_waits[id(told)] = told

    try:
        await _full(flusher, waits)
    finally:
        flushing.full_waits.pop(id(told), None)


def _why_not_full(flushing: Flushing, flusher: Flusher, seen: dict[int, tuple[float, dict[str, Any]]]) -> str:
    """What keeps packs from becoming full; of backends that had no room when a shard was last tried, too."""
    since = trio.current_time() - _TRIED_SECONDS
    recent = {number: what for number, (when, what) in seen.items() if when >= since and what["full"]}
    troubles = recent | {number: what for number, (_, what) in _troubles(flushing).items()}
    found = summary(f"backend {what['name']}: {what['why']}" for _, what in sorted(troubles.items()))
    if found:
        return found
    able, n = sum(member.writable for member in flushing.members), flusher.context.uploader.code.n
    if able < n:
        return f"{able} backends take shards, and a pack has {n}"
    return "the shards that they lack are being made"


def _troubles(flushing: Flushing) -> dict[int, tuple[float, dict[str, Any]]]:
    """Backends in trouble now, by number: the running time now, and what is wrong."""
    found = {}
    for member in flushing.members:
        if member.state is State.UP and member.identified and not member.full:
            continue
        if member.full:
            why = "full"
        else:
            why = member.state.value if member.state is not State.UP else "not identified"
        error = "" if member.error is None else str(member.error).removeprefix(f"backend {member.name}: ")
        why = f"{why}: {error}" if error else why
        what = {"number": member.number, "name": member.name, "why": why, "full": member.full}
        found[member.number] = (trio.current_time(), what)
    return found


def _missing(flushing: Flushing, seen: dict[int, tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    flusher = flushing.flusher
    ledger = flusher.context.ledger if flusher is not None and flusher.knows_packs else None
    now = trio.current_time()
    return {
        "waiting": flushing.waits(),
        "packs_not_full": None if ledger is None else len(ledger.incomplete),
        "bytes_not_full": None if ledger is None else ledger.incomplete_bytes,
        "backends": [what | {"seconds_ago": round(now - when, 1)} for _, (when, what) in sorted(seen.items())],
    }
