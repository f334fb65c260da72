"""Read-only mounts of snapshots beside the mount of a configuration: each with a mount point and a cache of its own.

The cache of a snapshot lies in a directory of its name beside the configured cache; it can be had again, and
goes when the mount ends.  `mnt` in it is a link to the mount point, and says that it is such a cache.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from qsfs.config import Config
from qsfs.daemon.lock import CacheLock, holder
from qsfs.errors import CacheError, MountError, QsfsError
from qsfs.remote.snapshots import check_form

_SUFFIX = "-snapshots"
_LINK = "mnt"
_NEW_LINK = ".mnt"
_GOING = ".going-"
_LOCK = "mount.lock"


def cache_of(config: Config, name: str) -> Path:
    """Where the mount of the snapshot `name` keeps its cache.  Raises `ConfigError` for what is no name."""
    return _root(config) / check_form(name)


def beside(config: Config, name: str, mountpoint: Path, cache_bytes: int) -> Config:
    """The configuration of a read-only mount of the snapshot `name` on `mountpoint`."""
    return replace(
        config,
        filesystem=replace(config.filesystem, mountpoint=mountpoint),
        cache=replace(config.cache, directory=cache_of(config, name), size_bytes=cache_bytes),
        mount=replace(config.mount, read_only=True, follow=False),
        log=replace(config.log, file=None),
    )


def make(config: Config) -> None:
    """Makes the cache directory of a configuration that `beside` made.

    Raises `MountError` if that snapshot is mounted or being mounted, `CacheError` if the directory cannot be made or
    is something else.
    """
    place = config.cache.directory
    if holder(place) is not None:
        raise MountError(f"snapshot {place.name} is mounted already, on {mountpoint_of(place)}")
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(place) and {path.name for path in place.iterdir()} - {_LOCK, _NEW_LINK}:
            raise CacheError(
                f"{place}: is not the cache of a mount of a snapshot, and would be removed with it: move it elsewhere"
            )
        lock = CacheLock(place)
        try:
            _link(config)
        finally:
            lock.release()
    except OSError as error:
        raise CacheError(f"{place}: cannot be made: {error.strerror}") from error


def started(config: Config) -> None:
    """Notes where a mount is that has started: of two commands at a time, the other may have noted its own place."""
    try:
        _link(config)
    except OSError as error:
        raise CacheError(f"{config.cache.directory}: {error.strerror}") from error


def _link(config: Config) -> None:
    place = config.cache.directory
    (place / _NEW_LINK).unlink(missing_ok=True)
    (place / _NEW_LINK).symlink_to(config.filesystem.mountpoint)
    (place / _NEW_LINK).rename(place / _LINK)


def _is_ours(place: Path) -> bool:
    return (place / _LINK).is_symlink()


def remove(place: Path) -> None:
    """Removes the cache directory of a mount that has ended; one that has not keeps it, and so does anything else."""
    going = place.with_name(_GOING + place.name)
    if _is_ours(place):
        try:
            lock = CacheLock(place)
        except (MountError, CacheError):
            return
        try:
            shutil.rmtree(going, ignore_errors=True)
            # Whoever mounts it meanwhile, or after a crash, must not find half of it.
            with contextlib.suppress(OSError):
                place.rename(going)
            shutil.rmtree(going, ignore_errors=True)
        finally:
            lock.release()
    with contextlib.suppress(OSError):
        place.parent.rmdir()


def mountpoint_of(place: Path) -> Path:
    """Where the snapshot with the cache `place` is, or was, mounted."""
    try:
        return (place / _LINK).readlink()
    except OSError as error:
        raise CacheError(f"{place / _LINK}: {error.strerror}") from error


def mounted(config: Config) -> dict[str, Path]:
    """The snapshots that are mounted beside, and where."""
    found = {}
    with contextlib.suppress(OSError):
        for place in _root(config).iterdir():
            with contextlib.suppress(QsfsError):
                if holder(place) is not None:
                    found[place.name] = mountpoint_of(place)
    return found


def _root(config: Config) -> Path:
    directory = config.cache.directory
    return directory.with_name(directory.name + _SUFFIX)
