"""`qsfs sync --class`: how far everything accepted so far has got, and what keeps it from going on."""

from __future__ import annotations

from typing import Any

import trio

from qsfs.daemon.committer import Committer
from qsfs.daemon.flushing import Flushing
from qsfs.errors import DataLost, QsfsError
from qsfs.remote.flush import Flusher
from qsfs.remote.members import State
from qsfs.values import counted

_WATCH_SECONDS = 0.5
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
            await _full(flusher)
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


async def _full(flusher: Flusher) -> None:
    """Waits until every pack that is not full now has all of its shards; raises why none will get any.

    `DataLost` if some never will, since what lives in them cannot be read any more.
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
        await trio.sleep(_WATCH_SECONDS)


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
        what = {"number": member.number, "name": member.name, "why": f"{why}: {error}" if error else why}
        found[member.number] = (trio.current_time(), what)
    return found


def _missing(flushing: Flushing, seen: dict[int, tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    flusher = flushing.flusher
    ledger = None if flusher is None else flusher.context.ledger
    now = trio.current_time()
    return {
        "waiting": flushing.waits(),
        "packs_not_full": 0 if ledger is None else len(ledger.incomplete),
        "bytes_not_full": 0 if ledger is None else ledger.incomplete_bytes,
        "backends": [what | {"seconds_ago": round(now - when, 1)} for _, (when, what) in sorted(seen.items())],
    }
