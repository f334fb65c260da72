"""A block of a group has the newest bytes of each page, however it came: whole, page by page, or both."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qsfs.store.schema import BLOCK_PAGES, PAGE
from tests.core.machine import Machine

RUN = 8 * BLOCK_PAGES


@pytest.mark.parametrize("committed", [False, True], ids=["open", "committed"])
@pytest.mark.parametrize("seed", range(10))
def test_pages_and_whole_blocks_replace_each_other(tmp_path: Path, seed: int, committed: bool) -> None:
    """In one group, over what LMDB has or has not, also where pages in between are cut off."""
    choose = random.Random(seed)
    machine = Machine(tmp_path)
    number = machine.create("file")
    expected = bytearray(RUN * PAGE)
    machine.write(number, 0, bytes(expected))
    if committed:
        machine.commit()
    for _ in range(30):
        first = choose.randrange(RUN)
        if choose.randrange(6) == 0:
            machine.truncate(number, first)
            machine.truncate(number, RUN)
            expected[first * PAGE :] = bytes((RUN - first) * PAGE)
            continue
        if choose.randrange(2):
            first -= first % BLOCK_PAGES
        count = min(choose.choice((1, 2, BLOCK_PAGES, RUN // 2)), RUN - first)
        data = choose.randbytes(count * PAGE)
        machine.write(number, first, data)
        expected[first * PAGE : (first + count) * PAGE] = data
        assert machine.contents.read(machine.inode(number), 0, RUN * PAGE) == expected
    machine.commit()
    assert machine.contents.read(machine.inode(number), 0, RUN * PAGE) == expected
    machine.crash()
    assert machine.contents.read(machine.inode(number), 0, RUN * PAGE) == expected
    machine.close()
