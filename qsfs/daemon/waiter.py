"""Satisfies what operations need: pages from the backends, room in the cache."""

from __future__ import annotations

from qsfs.daemon.keeper import Keeper
from qsfs.filesystem.needs import Need, NeedPages, NeedRoom
from qsfs.filesystem.posix import PosixError
from qsfs.fuse.state import MountState
from qsfs.remote.fetch import Fetcher


class DaemonWaiter:
    """What FUSE handlers wait with.  Waits for room end with EIO once the mount cannot write any more."""

    def __init__(self, keeper: Keeper, fetcher: Fetcher, state: MountState) -> None:
        self._keeper = keeper
        self._fetcher = fetcher
        self._state = state

    async def satisfy(self, need: Need) -> None:
        """Returns when the operation should be tried again; raises what the application shall get."""
        if isinstance(need, NeedPages):
            await self._fetcher.fetch(need.inode, need.first, need.count)
        elif isinstance(need, NeedRoom):
            self._state.check_write()
            await self._keeper.room()
        else:
            raise PosixError(5)
