"""What `df` shows: the room on the backends in terms of application data, answered from memory."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from qsfs.backend.contract import BackendInfo
from qsfs.errors import BackendError
from qsfs.filesystem.needs import NeedRoom
from qsfs.filesystem.space import SpaceReport
from qsfs.format.erasure import CodeParams
from qsfs.remote.capacity import largest_share
from qsfs.remote.members import ACTIVE, Member, Members
from qsfs.remote.placement import group_of
from qsfs.store.schema import BLOCK_SIZE, PAGE, Table
from qsfs.store.store import NEXT_INODE, Store

_log = logging.getLogger(__name__)

_REFRESH_SECONDS = 60.0
_ASK_SECONDS = 10.0
_FILES = 1 << 40


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a backend said of itself, and the bytes that had been sent there by then."""

    info: BackendInfo
    sent_bytes: int


class DaemonSpace:
    """Asks the backends for their room once a minute; reports from what they said last, and what was sent since.

    Nothing new is made in the room that is kept for what the kernel may still hand over of data that it
    told applications are written.  `may_come` says whether waiting for more room has a point.
    """

    def __init__(
        self,
        store: Store,
        members: Members,
        code: CodeParams,
        sent_bytes: Callable[[str], int],
        may_come: Callable[[], bool],
    ) -> None:
        """`sent_bytes` says how much went to the backend of a name since the daemon began."""
        self._store = store
        self._members = members
        self._code = code
        self._sent_bytes = sent_bytes
        self._may_come = may_come
        self._answers: dict[int, _Answer] = {}

    async def run(self) -> None:
        """Refreshes until cancelled."""
        while True:
            async with trio.open_nursery() as nursery:
                for member in self._members:
                    nursery.start_soon(self._ask, member)
            await trio.sleep(_REFRESH_SECONDS)

    async def _ask(self, member: Member) -> None:
        # Before the question: what arrives while it is under way counts twice rather than not at all.
        sent = self._sent_bytes(member.name)
        try:
            with trio.move_on_after(_ASK_SECONDS):
                self._answers[member.number] = _Answer(await member.data.info(), sent)
        except BackendError as error:
            _log.debug("backend %s: its room is not known: %s", member.name, error)

    def report(self) -> SpaceReport:
        """Total and free bytes of application data; local data that are not uploaded count as used.

        Free is what still finds a place: packs take a shard's room on n backends each.  Used is what lies on
        the backends, what is not deleted yet and what snapshots hold too.  A backend that never answered
        counts as the average of those that did; while none has, the room is that of the cache.
        """
        k, n = self._code.k, self._code.n
        groups, used = self._room()
        if groups:
            left = largest_share(groups, min(n, sum(map(len, groups)))) * k
            total = left + used * k // n
            free_bytes = max(0, left - self._waiting_bytes())
        else:
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

    def _room(self) -> tuple[list[list[int]], int]:
        """Free bytes of each backend, by group, and the bytes that lie on all of them; nothing if none answered."""
        free: defaultdict[str, list[int]] = defaultdict(list)
        unknown: list[str] = []
        used = 0
        for member in self._members:
            takes = member.entry.state == ACTIVE
            answer = self._answers.get(member.number)
            if answer is None:
                unknown += [group_of(member)] if takes else []
                continue
            sent = self._sent_bytes(member.name) - answer.sent_bytes
            used += answer.info.data_bytes + sent
            if takes:
                free[group_of(member)].append(0 if answer.info.locked else max(0, answer.info.free_bytes - sent))
        known = [room for group in free.values() for room in group]
        for group in unknown if known else ():
            free[group].append(sum(known) // len(known))
        return list(free.values()), used

    def _waiting_bytes(self) -> int:
        """Bytes that are local and not uploaded, as an upper bound."""
        layers = self._store.layers
        groups = sum(group.bytes for group in (layers.open, layers.committing) if group is not None)
        return layers.view.count(Table.DIRTY) * BLOCK_SIZE + groups

    def group_is_full(self) -> bool:
        """Whether a change of any kind must wait until the next group begins."""
        return self._store.group_is_full()

    def has_room(self) -> bool:
        """Whether new files may be made.  Raises `NeedRoom` while room may come."""
        store = self._store
        if store.group_is_full():
            raise NeedRoom
        if store.expected_bytes() < store.limits.new_bytes:
            return True
        if self._may_come():
            raise NeedRoom
        return False
