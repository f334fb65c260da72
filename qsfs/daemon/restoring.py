"""`restore`: a generation into an empty cache directory; contents stay on the backends."""

from __future__ import annotations

from collections.abc import Callable

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.connect import links
from qsfs.daemon.lock import CacheLock
from qsfs.daemon.secret import read_secret
from qsfs.errors import CacheError
from qsfs.format.slots import Secret
from qsfs.remote.aside import set_aside
from qsfs.remote.readable import Wanted
from qsfs.remote.restore import Progress, RestoreReport, restore
from qsfs.store.limits import Limits


async def restore_file_system(
    config: Config,
    clock: Clock,
    progress: Callable[[str], None],
    *,
    wanted: Wanted | None = None,
    force: bool = False,
    aside: bool = False,
    secret: Secret | None = None,
) -> RestoreReport:
    """Restores what `config`'s backends hold; raises as `restore` does.

    `secret` opens it (default: the configured one); `wanted` is what is restored (default: the newest generation).
    With `aside`, local state that is there is moved beside the cache directory, once it is known what
    takes its place.  The directory
    is made if it is missing: a lost machine has none.
    """
    directory = config.cache.directory
    secret = read_secret(config, secret)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{directory}: cannot be made: {error.strerror}") from error

    def clear() -> None:
        moved = set_aside(directory, clock)
        if moved is not None:
            progress(f"the local state that was here is in {moved} now")

    limits = Limits.of(config.cache, config.flush.spool_bytes)
    lock = CacheLock(directory)
    try:
        found = links(config, clock)
        try:
            return await restore(
                found.candidates,
                secret=secret,
                directory=directory,
                limits=limits,
                clock=clock,
                wanted=wanted,
                force=force,
                clear=clear if aside else None,
                say=Told(progress).say,
            )
        finally:
            await found.aclose()
    finally:
        lock.release()


class Told:
    """Turns progress into a line for each new step and each tenth of it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._last: tuple[str, int] | None = None

    def say(self, progress: Progress) -> None:
        """Tells what is new."""
        tenth = progress.done * 10 // progress.total if progress.total else 0
        if (progress.step, tenth) == self._last:
            return
        self._last = (progress.step, tenth)
        share = f": {progress.done} of {progress.total}" if progress.total else ""
        self._tell(progress.step + share)
