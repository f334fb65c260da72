"""`drill`: a restore into a scratch directory, beside a running mount or without one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon import control
from qsfs.daemon.comparing import MOST_EXTENTS
from qsfs.daemon.connect import links, read_secret
from qsfs.daemon.lock import CacheLock, holder
from qsfs.daemon.restoring import Told
from qsfs.errors import CacheError, QsfsError
from qsfs.format.head import HeadRef
from qsfs.format.slots import Secret
from qsfs.health.drill import DrillResult, drill
from qsfs.health.drill_backends import choose_down, for_drill
from qsfs.health.drill_plan import Compared, ComparedRows, Plan
from qsfs.health.drill_read import Compare, ReadExtent
from qsfs.health.drill_rows import CompareRows, Row
from qsfs.remote.readable import Wanted
from qsfs.store.limits import Limits

_PREFIX = "qsfs-drill-"
_YOUNG_SECONDS = 60.0
_ASK_SECONDS = 60.0
_AT_ONCE = 16
"""Extents in one question, so that one answer is short work for the mount."""
assert _AT_ONCE <= MOST_EXTENTS


@dataclass(frozen=True, slots=True)
class Wishes:
    """What an operator asks for: see `qsfs drill --help`."""

    plan: Plan
    wanted: Wanted = field(default_factory=Wanted)
    down: int = 0
    down_named: tuple[str, ...] = ()
    scratch: Path | None = None
    ask_mount: bool = True


async def drill_file_system(
    config: Config, clock: Clock, wishes: Wishes, progress: Callable[[str], None], *, secret: Secret | None = None
) -> DrillResult:
    """Drills what `config`'s backends hold; raises as `health.drill.drill`, and `KeyboardInterrupt` on a signal.

    `secret` opens it (default: the configured one).  However it ends, the scratch directory goes.  The cache
    directory is not touched.
    """
    secret = read_secret(config, secret)
    names = [backend.name for backend in config.backends]
    down = choose_down(names, wishes.down, wishes.down_named, wishes.plan.seed)
    if down:
        progress(f"counted as down (seed {wishes.plan.seed}): {', '.join(down)}")
    compare = None
    if wishes.ask_mount:
        try:
            compare = await trio.to_thread.run_sync(_compare_with, config.cache.directory)
        except QsfsError as error:
            # The drill needs neither the mount nor this machine's cache.
            progress(f"nothing is compared with a mount: {error}")
    found = links(config, clock)
    try:
        with _scratch(wishes.scratch, clock) as directory:
            async with _ended_by_signals():
                return await drill(
                    for_drill(found.candidates, down),
                    secret=secret,
                    directory=directory,
                    limits=Limits.of(config.cache, config.flush.spool_bytes),
                    clock=clock,
                    plan=wishes.plan,
                    wanted=wishes.wanted,
                    down=down,
                    compare=compare,
                    compare_names=None if compare is None else _compare_rows_with(config.cache.directory),
                    say=Told(progress).say,
                    deadline_seconds=config.fetch.deadline_seconds,
                )
    finally:
        await found.aclose()
    raise KeyboardInterrupt


@contextlib.contextmanager
def _scratch(parent: Path | None, clock: Clock) -> Iterator[Path]:
    """A private, locked directory that is gone after the block.  Raises `CacheError` if there can be none.

    What drills left there that were killed goes too.
    """
    where = parent or Path(os.environ.get("TMPDIR", "/var/tmp"))
    _sweep(where, clock.time_ns() / 1e9)
    try:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=where))
    except OSError as error:
        raise CacheError(f"{where}: no scratch directory can be made: {error.strerror}; give --scratch") from error
    try:
        lock = CacheLock(directory)
        try:
            yield directory
        finally:
            lock.release()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sweep(where: Path, now: float) -> None:
    """Removes the scratch directories of this user that no living drill has locked."""
    with contextlib.suppress(OSError):
        for path in where.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError, QsfsError):
                found = path.lstat()
                old = now - found.st_mtime > _YOUNG_SECONDS  # a drill that begins has no lock yet
                if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and old and holder(path) is None:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.asynccontextmanager
async def _ended_by_signals() -> AsyncIterator[None]:
    """Cancels the block on SIGINT, SIGTERM or SIGHUP: what it began in threads ends first."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


def _compare_with(cache: Path) -> Compare:
    """What asks the mount of a cache directory.  Raises `QsfsError` if none answers there."""
    control.ask(cache, "status", timeout=_ASK_SECONDS)

    async def compare(extents: Sequence[ReadExtent], compared: Compared) -> None:
        for start in range(0, len(extents), _AT_ONCE):
            await trio.to_thread.run_sync(_ask, cache, extents[start : start + _AT_ONCE], compared)

    return compare


def _compare_rows_with(cache: Path) -> CompareRows:
    async def compare(ref: HeadRef, rows: Sequence[Row], found: ComparedRows) -> None:
        generation = [ref.owner.epoch, ref.owner.mount_id.hex(), ref.generation, ref.digest.hex()]
        asked = [(table, key.hex(), f"{value:x}") for table, key, value in rows]

        def ask() -> Any:
            return control.ask(cache, "compare", timeout=_ASK_SECONDS, generation=generation, rows=asked)

        answer = await trio.to_thread.run_sync(ask)
        found.same += answer["same"]
        found.changed += answer["changed"]
        for what in answer["differ"]:
            found.differ.add(what)

    return compare


def _ask(cache: Path, extents: Sequence[ReadExtent], compared: Compared) -> None:
    asked = [
        {
            "inode": extent.inode,
            "first": extent.first,
            "pack": extent.pack_id.hex(),
            "ordinal": extent.ordinal,
            "sums": [f"{value:x}" for value in extent.sums],
        }
        for extent in extents
    ]
    answer = control.ask(cache, "compare", timeout=_ASK_SECONDS, extents=asked)
    compared.same += answer["same"]
    compared.remote += answer["remote"]
    compared.changed += answer["changed"]
    for page in answer["differ"]:
        compared.differ.add(f"inode {page['inode']}, page {page['page']}: {page['why']}")
