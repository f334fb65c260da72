"""What a fetch consists of: an extent on its way, and a stream of extents ahead of a reader."""

from __future__ import annotations

import trio

from qsfs.errors import QsfsError
from qsfs.remote.stored import StoredPack
from qsfs.store.schema import ExtentRow


class Job:
    """One extent on its way; `readers` counts who waits for it.

    It is `held` if it is to stay with the reader of packs, not installed, while no page is needed; `arrived` once
    the backends have given it and only the local store may keep it back.
    `stream` is set while it takes a place among what is fetched ahead.
    """

    __slots__ = ("arrived", "done", "error", "held", "inode", "needed", "pack", "readers", "row", "scope", "stream")

    def __init__(self, inode: int, row: ExtentRow, *, held: bool) -> None:
        self.inode = inode
        self.row = row
        self.held = held
        self.arrived = False
        self.needed: set[int] = set()
        self.readers = 0
        self.pack: StoredPack | None = None
        self.stream: Stream | None = None
        self.error: QsfsError | None = None
        self.done = trio.Event()
        self.scope = trio.CancelScope()


class Stream:
    """What is fetched ahead of one reader: it ends with the first extent that does not come."""

    __slots__ = ("failed",)

    def __init__(self) -> None:
        self.failed = False


JobKey = tuple[int, int, int]
Wanted = dict[JobKey, tuple[ExtentRow, set[int]]]


def page_name(job: Job, path: str) -> str:
    """The first page that is needed of an extent, for people."""
    name = f"{path} (inode {job.inode})" if path else f"inode {job.inode}"
    return f"{name}, page {min(job.needed, default=job.row.first)}"
