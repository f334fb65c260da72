"""How the pages of a block lie in its row and its value."""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from qsfs.store.schema import PAGE, VALUE_SIZE, Page, unpack_block

_SECOND, _THIRD, _LAST = PAGE, 2 * PAGE, 3 * PAGE
_ALL = 0b1111


def whole_pages(row: memoryview, value: memoryview) -> tuple[Page, Page, Page, Page] | None:
    """The four pages of a block if all are resident and intact; None calls for a closer look.

    Written out: a sequential read spends most of its time here.
    """
    fields = unpack_block(row)
    if fields[0] != _ALL or len(value) != VALUE_SIZE:
        return None
    a, b, c = value[:_SECOND], value[_SECOND:_THIRD], value[_THIRD:_LAST]
    d = b"".join((value[_LAST:], fields[10]))
    if (
        xxh3_64_intdigest(a) != fields[2]
        or xxh3_64_intdigest(b) != fields[3]
        or xxh3_64_intdigest(c) != fields[4]
        or xxh3_64_intdigest(d) != fields[5]
    ):
        return None
    return a, b, c, d
