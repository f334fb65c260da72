"""What `df` shows: the room on the backends in terms of application data, answered from memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from qsfs.backend.contract import BackendInfo
from qsfs.errors import BackendError
from qsfs.filesystem.needs import NeedRoom
from qsfs.filesystem.space import SpaceReport
from qsfs.format.erasure import CodeParams
from qsfs.remote.members import Member, Members
from qsfs.store.schema import PAGE, Table
from qsfs.store.store import NEXT_INODE, Store

_log = logging.getLogger(__name__)

_REFRESH_SECONDS = 60.0
_ASK_SECONDS = 10.0
_FILES = 1 << 40


class DaemonSpace:
    """Asks the backends for their room once a minute; reports from what they said last.

    Nothing new is made in the room that is kept for what the kernel may still hand over of data that it
    told applications are written.  `may_come` says whether waiting for more room has a point.
    """

    def __init__(
        self, store: Store, members: Members, code: CodeParams, may_come: Callable[[], bool]
    ) -> None:
        self._store = store
        self._members = members
        self._code = code
        self._may_come = may_come
        self._infos: dict[int, BackendInfo] = {}

    async def run(self) -> None:
        """Refreshes until cancelled."""
        while True:
            async with trio.open_nursery() as nursery:
                for member in self._members:
                    nursery.start_soon(self._ask, member)
            await trio.sleep(_REFRESH_SECONDS)

    async def _ask(self, member: Member) -> None:
        try:
            with trio.move_on_after(_ASK_SECONDS):
                self._infos[member.number] = await member.data.info()
        except BackendError as error:
            _log.debug("backend %s: its room is not known: %s", member.name, error)

    def info(self, number: int) -> BackendInfo | None:
        """What a backend last said of itself."""
        return self._infos.get(number)

    def report(self) -> SpaceReport:
        """Total and free bytes of application data; local data that are not uploaded count as used."""
        share = self._code.k / self._code.n
        free = sum(info.free_bytes for info in self._infos.values())
        used = sum(info.data_bytes for info in self._infos.values())
        free_bytes = int(free * share)
        total = int((free + used) * share)
        if not self._infos:
            limits = self._store.limits
            total = limits.full_bytes
            free_bytes = max(0, limits.full_bytes - self._store.used_bytes)
        files = self._store.layers.view.count(Table.INODES)
        last = self._store.counter(NEXT_INODE)
        return SpaceReport(
            total_bytes=total - total % PAGE,
            free_bytes=free_bytes - free_bytes % PAGE,
            files=files,
            free_files=max(0, _FILES - last),
        )

    def has_room(self) -> bool:
        """Whether new files may be made.  Raises `NeedRoom` while room may come."""
        store = self._store
        if store.group_is_full() and store.layers.committing is not None:
            raise NeedRoom
        if store.expected_bytes() < store.limits.new_bytes:
            return True
        if self._may_come():
            raise NeedRoom
        return False
