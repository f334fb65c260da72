"""A file that enters or leaves `local_only`: what is uploaded follows the flag, also in a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsfs.clock import FixedClock
from qsfs.filesystem.contents import Contents
from qsfs.store.schema import PAGE, Inode, InodeFlag, Table
from qsfs.store.store import Store
from tests.core.history import LIMITS

NUMBER = 2


def commit(store: Store) -> None:
    group = store.seal()
    store.commit(group)
    store.committed(group)


def with_file(directory: Path, flags: int) -> Store:
    store = Store(directory, LIMITS, FixedClock())
    with store.change() as change:
        change.create(Inode(NUMBER, 0o100644, nlink=1, flags=flags))
    inode = store.inode(NUMBER)
    assert inode is not None
    Contents(store).write(inode, 0, b"x" * 5 * PAGE)
    commit(store)
    return store


def dirty_rows(store: Store) -> int:
    return sum(1 for _ in store.layers.view.scan(Table.DIRTY, b"", None))


@pytest.mark.parametrize("crash", [False, True])
def test_pages_of_a_file_that_leaves_local_only_are_dirty(tmp_path: Path, crash: bool) -> None:
    """Else nobody would upload them, and eviction would take them for clean."""
    store = with_file(tmp_path, InodeFlag.LOCAL_ONLY)
    assert dirty_rows(store) == 0
    with store.change() as change:
        change.patch(NUMBER, flags=0)
    if crash:
        frame = store.journal_frame(())
        assert frame is not None
        store.journal.write([frame])
        store.close()
        store = Store(tmp_path, LIMITS, FixedClock(1))
    commit(store)
    assert dirty_rows(store) == 2
    store.close()


def test_pages_of_a_file_that_enters_local_only_are_not_dirty(tmp_path: Path) -> None:
    store = with_file(tmp_path, 0)
    assert dirty_rows(store) == 2
    with store.change() as change:
        change.patch(NUMBER, flags=int(InodeFlag.LOCAL_ONLY))
    commit(store)
    assert dirty_rows(store) == 0
    store.close()
