"""What the journal holds of groups that were not committed, and its replay.

Records of an append, in order: namespace changes (`changes`), then for each file its truncations,
pages, size and times.  Replay builds the same changes in the open group, which is then committed
as one transaction together with a new journal number: a crash during replay repeats it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qsfs import failpoints
from qsfs.errors import Corrupt, QsfsBug
from qsfs.store import changes
from qsfs.store.block import block_key
from qsfs.store.group import Group, InodeLog
from qsfs.store.journal import Frame, encode_record
from qsfs.store.schema import BLOCK_PAGES, PAGE, Inode, Page

if TYPE_CHECKING:
    from qsfs.store.store import Store

NAMESPACE, TRUNCATE, PAGES, ATTRIBUTES = 1, 2, 3, 4

_TRUNCATE = struct.Struct("<QQQ")
_PAGE = struct.Struct("<QQQ")
_ATTRIBUTES = struct.Struct("<QQQqqq")


def log_of(group: Group, inode: int) -> InodeLog:
    """The data log of a file in `group`, made if absent."""
    log = group.data_log.get(inode)
    if log is None:
        log = group.data_log[inode] = InodeLog()
    return log


def data_bytes(group: Group, inode: int) -> int:
    """About how many bytes of records the file's unjournaled data in `group` make."""
    log = group.data_log.get(inode)
    if log is None:
        return 0
    return len(log.pages) * (PAGE + 32) + len(log.truncations) * 32 + 64


def take_data_records(store: Store, groups: Sequence[Group], number: int) -> list[bytes]:
    """The records of a file's unjournaled data; from here on they count as journaled."""
    logs = [log for log in (group.data_log.pop(number, None) for group in groups) if log is not None]
    inode = store.inodes.get(number)
    if not logs or inode is None:
        return []
    records = [
        encode_record(TRUNCATE, _TRUNCATE.pack(number, write, first))
        for log in logs
        for write, first in log.truncations
    ]
    pages: dict[int, int] = {}
    for log in logs:
        pages.update(log.pages)
    for page in sorted(pages):
        body = b"".join((_PAGE.pack(number, page, pages[page]), page_in_groups(store, number, page)))
        records.append(encode_record(PAGES, body))
    touched = max(log.touched for log in logs)
    if touched:
        attributes = (number, touched, inode.size, inode.mtime_ns, inode.ctime_ns, inode.atime_ns)
        records.append(encode_record(ATTRIBUTES, _ATTRIBUTES.pack(*attributes)))
    return records


def page_in_groups(store: Store, inode: int, page: int) -> Page:
    """The bytes of a page that the open or the committing group holds."""
    key, index = block_key(inode, page // BLOCK_PAGES), page % BLOCK_PAGES
    for group in (store.layers.open, store.layers.committing):
        block = group.blocks.get(key) if group is not None else None
        data = block.page(index) if block is not None else None
        if data is not None:
            return data
    raise QsfsBug(f"inode {inode}, page {page}: written but in no group")


def replay(store: Store, frames: Sequence[Frame]) -> None:
    """Applies what `frames` hold above the last commit's write number to the open group.

    Data of inodes that are gone by then are skipped.  The caller commits.  Raises `Corrupt` for a
    whole append that holds something else than records of ours.
    """
    floor = store.layers.committed_write_number
    for frame in frames:
        failpoints.hit("replay.frame")
        data = []
        for kind, body in frame.records:
            if kind == NAMESPACE:
                number, operations = changes.decode(body)
                if number > floor:
                    changes.apply(store, operations, number)
                    store.write_number = max(store.write_number, number)
            else:
                data.append((_write_number(kind, body), kind, body))
        # Truncations and pages of one file in the order in which they were accepted.
        for number, kind, body in sorted(data, key=lambda record: record[0]):
            if number > floor:
                _replay_data(store, number, kind, body)
                store.write_number = max(store.write_number, number)


def newest_write(frame: Frame) -> int:
    """The highest write number of an append, 0 if it holds nothing.  Raises `Corrupt` if it cannot be replayed."""
    newest = 0
    for kind, body in frame.records:
        number = changes.decode(body)[0] if kind == NAMESPACE else _write_number(kind, body)
        newest = max(newest, number)
    return newest


def _write_number(kind: int, body: bytes) -> int:
    try:
        if kind == TRUNCATE:
            return int(_TRUNCATE.unpack(body)[1])
        if kind == PAGES and len(body) == _PAGE.size + PAGE:
            return int(_PAGE.unpack_from(body)[2])
        if kind == ATTRIBUTES:
            return int(_ATTRIBUTES.unpack(body)[1])
    except struct.error as error:
        raise Corrupt(f"the journal holds a record of kind {kind} of the wrong size: {error}") from error
    raise Corrupt(f"the journal holds a record of unknown kind {kind}; use the qsfs version that wrote it")


def _replay_data(store: Store, number: int, kind: int, body: bytes) -> None:
    inode: Inode | None = store.inodes.get(int.from_bytes(body[:8], "little"))
    if inode is None:
        return
    if kind == TRUNCATE:
        store.cut_data(inode, _TRUNCATE.unpack(body)[2], number)
    elif kind == PAGES:
        page = _PAGE.unpack_from(body)[1]
        store.put_pages(inode, page, memoryview(body)[_PAGE.size :], number)
    else:
        _, _, inode.size, inode.mtime_ns, inode.ctime_ns, inode.atime_ns = _ATTRIBUTES.unpack(body)
    store.inodes.touch(inode)
