"""A set of page versions answers as a plain dictionary of pages would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qsfs.store.block import block_key
from qsfs.store.schema import BLOCK_PAGES
from qsfs.store.versions import PageVersions

runs = st.tuples(
    st.integers(1, 2),
    st.integers(0, 12),
    st.lists(st.integers(1, 3), min_size=1, max_size=10),
)


@given(st.lists(st.tuples(st.booleans(), runs), max_size=20))
def test_it_holds_what_was_added_last_and_not_discarded(steps: list[tuple[bool, tuple[int, int, list[int]]]]) -> None:
    versions = PageVersions()
    model: dict[tuple[int, int], int] = {}
    for adds, (inode, first, writes) in steps:
        pages = {(inode, page): write for page, write in enumerate(writes, first)}
        if adds:
            versions.add(inode, first, tuple(writes))
            model |= pages
        else:
            versions.discard(inode, first, tuple(writes))
            model = {page: write for page, write in model.items() if pages.get(page) != write}
    assert bool(versions) == bool(model)
    for inode in (1, 2):
        for block in range(6):
            for write in (1, 2, 3):
                bits = versions.held(block_key(inode, block), (write,) * BLOCK_PAGES)
                for index in range(BLOCK_PAGES):
                    assert bool(bits & 1 << index) == (model.get((inode, block * BLOCK_PAGES + index)) == write)
