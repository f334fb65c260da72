"""A group holds on to no more than twice the memory that it counts for, however its bytes came."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qsfs.store.block import Block
from qsfs.store.schema import BLOCK_PAGES, PAGE
from tests.core.machine import Machine

MIB_PAGES = (1 << 20) // PAGE


def held_bytes(blocks: dict[int, Block]) -> int:
    """The bytes of all buffers that blocks refer to, each whole and counted once."""
    buffers: dict[int, int] = {}
    for block in blocks.values():
        for index in range(BLOCK_PAGES):
            page = block.page(index)
            if page is None:
                continue
            owner = page.obj if isinstance(page, memoryview) else page
            assert isinstance(owner, bytes)
            buffers[id(owner)] = len(owner)
    return sum(buffers.values())


@pytest.mark.parametrize("seed", range(5))
def test_long_writes_that_overlap(tmp_path: Path, seed: int) -> None:
    """Each replaces nearly all of the one before: the rest must not keep that alive, nor lose its checksums."""
    source = random.Random(seed)
    machine = Machine(tmp_path)
    file = machine.create("a")
    content = bytearray()
    for first in range(0, 32 * BLOCK_PAGES, BLOCK_PAGES * source.choice((1, 2, 3))):
        data = source.randbytes(MIB_PAGES * PAGE)
        machine.write(file, first, data)
        content[first * PAGE :] = data
        group = machine.store.layers.open
        assert held_bytes(group.blocks) <= 2 * group.bytes
        if machine.store.group_is_full():
            break
    machine.write(file, 1, data[:PAGE])
    content[PAGE : 2 * PAGE] = data[:PAGE]
    machine.commit()
    assert machine.read(file) == content
    machine.close()
