"""How the pages of a block lie in its row and its value."""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from qsfs.store.block import ALL_PAGES
from qsfs.store.schema import PAGE, VALUE_SIZE, unpack_block

Rows = Sequence[tuple[memoryview, memoryview]]


def whole_blocks(rows: Rows, values: Rows) -> bytes | None:
    """The bytes of blocks with these rows and values, by key, if all are whole and intact.

    None calls for a closer look.  What is verified is the copy that is returned: it is in the processor's
    cache, and its pages lie in one piece.
    """
    if len(rows) != len(values):
        return None
    parts: list[memoryview | bytes] = []
    sums: list[int] = []
    for (_, row), (_, value) in zip(rows, values, strict=True):
        resident, _, a, b, c, d, _, _, _, _, tail = unpack_block(row)
        if resident != ALL_PAGES or len(value) != VALUE_SIZE:
            return None
        parts += (value, tail)
        sums += (a, b, c, d)
    whole = b"".join(parts)
    view = memoryview(whole)
    if [xxh3_64_intdigest(view[at : at + PAGE]) for at in range(0, len(whole), PAGE)] != sums:
        return None
    return whole
