"""The state that lies in a cache directory already: refused, or set aside as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.errors import CacheError
from qsfs.remote.images import refuse_images

DIRECTORY = "restoring"
"""Where a store is built, below the cache directory."""
DATA = "data.mdb"
_SPOOL = "spool"
_JOURNALS = ("journal.0", "journal.1")
_STAYS = ("mount.lock", DIRECTORY)


def refuse_used(directory: Path) -> None:
    """Raises `CacheError` if a cache directory holds a file system, or what is left of one."""
    refuse_images(directory)
    if (directory / DATA).exists():
        raise CacheError(
            f"{directory}: holds the local state of a file system already; 'qsfs mount' uses it, 'qsfs "
            "restore --set-aside' moves it beside and restores"
        )
    spool = directory / _SPOOL
    if spool.is_dir() and any(spool.iterdir()):
        raise CacheError(
            f"{directory}: the spool holds what a former mount was sending; 'qsfs restore --set-aside' moves it beside"
        )
    if any((directory / name).exists() for name in _JOURNALS):
        raise CacheError(
            f"{directory}: holds the journal of a store that was being set aside; 'qsfs restore --set-aside' goes on "
            "with that"
        )


def set_aside(directory: Path, clock: Clock) -> Path | None:
    """Moves the whole state of a cache directory beside it; returns where, or None if there is none.

    One rename does it, that of the store: before it everything is in use as it was, after it nothing is, and
    what is left follows, also in a later call.  So no store is ever opened without its journal.
    The caller holds the mount lock, whose file stays.  Raises `CacheError`.
    """
    names = {path.name for path in directory.iterdir()} - {*_STAYS}
    if not names:
        return None
    begun = None if DATA in names else _begun(directory, names)
    aside = begun or directory.with_name(f"{directory.name}.aside-{clock.time_ns() // 1_000_000_000}")
    try:
        aside.mkdir(mode=0o700, exist_ok=aside == begun)
        # Before anything lies only there.
        flush_directory(aside.parent)
        for name in sorted(names, key=lambda name: (name != DATA, name)):
            (directory / name).rename(aside / name)
            if name == DATA:
                flush_directory(aside)
                flush_directory(directory)
                failpoints.hit("aside.store")
        flush_directory(aside)
        flush_directory(directory)
    except OSError as error:
        raise CacheError(f"{directory}: cannot be set aside in {aside}: {error.strerror}") from error
    return aside


def _begun(directory: Path, names: Collection[str]) -> Path | None:
    """Where the store of a directory lies from which `names` are left: the last that went, if it lacks all of them."""
    beside = directory.parent.iterdir()
    found = [path for path in beside if path.name.startswith(f"{directory.name}.aside-") and (path / DATA).exists()]
    last = max(found, key=lambda path: (len(path.name), path.name), default=None)
    if last is None or any((last / name).exists() for name in names):
        return None
    return last


def drop_second_names(directory: Path) -> None:
    """Takes away what beside a cache directory is another name of its own store: it could be opened twice.

    A rollback that ended before it had replaced the store leaves such a one.  The caller holds the mount lock, and
    has not opened the store.
    """
    for aside in directory.parent.glob(f"{directory.name}.aside-*"):
        drop_second_name(directory, aside)


def drop_second_name(directory: Path, aside: Path) -> None:
    """Takes `aside` away if what it has is the store of `directory`."""
    if (directory / DATA).exists() and (aside / DATA).exists() and (directory / DATA).samefile(aside / DATA):
        shutil.rmtree(aside, ignore_errors=True)


def flush_directory(directory: Path) -> None:
    """Makes the names in a directory durable.  Blocks; raises `OSError`."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
