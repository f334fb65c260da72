"""The images of read-only mounts in a cache directory: what is cached of generations that nobody owns here.

They lie below `readers/`, each a store of its own, named after its head and size; `template` is that of the
next one (`qsfs.remote.template`).  A cache directory holds
them or the state of a writer, never both: a writer builds on nothing but its own state, and a reader
touches nothing of a writer.
"""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path

from qsfs.errors import CacheError
from qsfs.format.head import HeadRef

DIRECTORY = "readers"
_TEMPLATE = "template"
_DATA = "data.mdb"
_SPOOL = "spool"


def holds_images(directory: Path) -> bool:
    """Whether a cache directory is that of read-only mounts."""
    return (directory / DIRECTORY).is_dir()


def refuse_images(directory: Path) -> None:
    """Raises `CacheError` if a cache directory is that of read-only mounts: nothing in it is a writer's."""
    if holds_images(directory):
        raise CacheError(
            f"{directory}: the cache of read-only mounts, which own nothing: 'qsfs mount --read-only' uses it. "
            "Give a mount that writes another [cache] directory; this one may be deleted once it is unmounted"
        )


def refuse_writer(directory: Path) -> None:
    """Raises `CacheError` if a cache directory holds the state of a mount that writes."""
    spool = directory / _SPOOL
    if (directory / _DATA).exists() or (spool.is_dir() and any(spool.iterdir())):
        raise CacheError(
            f"{directory}: holds the local state of a mount that writes, which a read-only mount must not touch; "
            "use a configuration with another [cache] directory and mount point"
        )


def image_directory(directory: Path, ref: HeadRef, map_bytes: int) -> Path:
    """Where the image of head `ref` lies; one of another size is another image."""
    name = f"{ref.owner.epoch:x}-{ref.generation:x}-{ref.digest.hex()[:32]}-{map_bytes:x}"
    return directory / DIRECTORY / name


def latest_image(directory: Path, map_bytes: int, other_than: Path) -> Path | None:
    """The image of this size that was used last, but for one; None if there is none."""
    found = [data for data in (directory / DIRECTORY).glob(f"*-{map_bytes:x}/{_DATA}") if data.parent != other_than]
    return max(found, key=lambda data: data.stat().st_mtime_ns).parent if found else None


def template_directory(directory: Path) -> Path:
    """Where the template of a mount that follows lies, while it runs."""
    return directory / DIRECTORY / _TEMPLATE


def remove_others(directory: Path, keep: Container[Path | None]) -> None:
    """Deletes all images but those in `keep`, and what was left of others.  Blocks.  Raises `CacheError`."""
    place = directory / DIRECTORY
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        for path in place.iterdir():
            if path not in keep:
                shutil.rmtree(path)
    except OSError as error:
        raise CacheError(f"{place}: cannot be put in order: {error.strerror}") from error
