"""`fsck`: the checks of `qsfs.fsck` on the configured file system, unmounted."""

from __future__ import annotations

from collections.abc import Callable

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.connect import links
from qsfs.daemon.formatting import local_store_exists
from qsfs.daemon.lock import CacheLock
from qsfs.daemon.secret import read_secret
from qsfs.errors import CacheError
from qsfs.format.slots import Secret
from qsfs.fsck.check import Backends, fsck
from qsfs.fsck.report import Report
from qsfs.remote.images import refuse_images
from qsfs.store.limits import Limits


async def check_file_system(
    config: Config,
    clock: Clock,
    *,
    deep: bool,
    repair: bool,
    local_only: bool,
    say: Callable[[str, int], None],
    secret: Secret | None = None,
) -> Report:
    """Checks, and with `repair` mends; `local_only` asks no backend.

    Raises `CacheError` if there is nothing to check, and `MountError` while it is mounted.
    """
    directory = config.cache.directory
    there = local_store_exists(directory)
    refuse_images(directory)
    if not there:
        raise CacheError(f"{directory}: no file system here; run 'qsfs restore' to check what backends hold")
    limits = Limits.of(config.cache, config.flush.spool_bytes)
    lock = CacheLock(directory)
    try:
        if local_only:
            return await fsck(directory, limits, clock=clock, backends=None, repair=repair, say=say)
        found = links(config, clock)
        try:
            return await fsck(
                directory,
                limits,
                clock=clock,
                backends=Backends(found.candidates, read_secret(config, secret)),
                deep=deep,
                repair=repair,
                say=say,
            )
        finally:
            await found.aclose()
    finally:
        lock.release()
