"""What request handlers ask of the daemon: to wait, to make durable, to say how it stands."""

from __future__ import annotations

from typing import Protocol

from qsfs.filesystem.needs import Need
from qsfs.filesystem.space import SpaceReport


class Waiter(Protocol):
    """Satisfies what an operation needs before it can go on."""

    async def satisfy(self, need: Need) -> None:
        """Returns when the operation should be tried again; raises what the application shall get."""


class Durability(Protocol):
    """Makes changes survive a power loss of this machine."""

    async def sync(self, number: int, data_only: bool) -> None:
        """Returns when an inode's writes received so far, and what reaches them, are durable."""

    async def sync_namespace(self) -> None:
        """Returns when all namespace operations received so far are durable."""


class Space(Protocol):
    """What room there is; all calls answer from memory."""

    def report(self) -> SpaceReport:
        """What statfs shows."""

    def group_is_full(self) -> bool:
        """Whether a change of any kind must wait, for a moment: the group that would take it is full."""

    def has_room(self) -> bool:
        """Whether new files may be made; a WRITE is accepted in any case.  May raise `NeedRoom`."""


class State(Protocol):
    """Whether the mount may change anything."""

    @property
    def writable(self) -> bool:
        """Whether changes are accepted."""

    def check_write(self) -> None:
        """Before a WRITE or FSYNC: raises EIO where it could not be kept."""

    def check_change(self) -> None:
        """Before a change of names or attributes: raises EROFS (fenced, read-only) or EIO (failed)."""
