"""Where extents lie in the body of a pack: so that a cold read needs few shards."""

from __future__ import annotations

from collections.abc import Sequence

_SHARD_ROUNDING = 64
_ALIGNING_SHARE = 64
_ALIGNING_EXTENTS_PER_SHARD = 4


def place_extents(lengths: Sequence[int], tail: int, k: int) -> tuple[list[int], int]:
    """The offset in the body of each sealed extent, in order, and the size of a shard.

    `lengths` are sealed lengths, `tail` the bytes that index and trailer need at the end of the body.
    With few extents a shard, gaps of up to 1/64 of the body are spent if they at least halve the
    number of extents that cross a shard boundary: each crossing is a second GET for a cold read.
    """
    total = sum(lengths) + tail
    tight = _place(lengths, tail, k, _shard_size(total, k))
    if not 0 < len(lengths) <= _ALIGNING_EXTENTS_PER_SHARD * k:
        return tight[:2]
    spread = _place(lengths, tail, k, _shard_size(total + total // _ALIGNING_SHARE, k))
    return (spread if 2 * spread[2] <= tight[2] and spread[2] < tight[2] else tight)[:2]


def _shard_size(total: int, k: int) -> int:
    size = -(-total // k)
    return -(-size // _SHARD_ROUNDING) * _SHARD_ROUNDING


def _place(lengths: Sequence[int], tail: int, k: int, shard_size: int) -> tuple[list[int], int, int]:
    spare = shard_size * k - sum(lengths) - tail
    offsets: list[int] = []
    position = crossings = 0
    for length in lengths:
        room = -position % shard_size
        if 0 < room < length <= shard_size:
            if room <= spare:
                spare -= room
                position += room
            else:
                crossings += 1
        offsets.append(position)
        position += length
    return offsets, shard_size, crossings
