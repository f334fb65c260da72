"""How much finds a place on backends that are filled unequally: pure arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_RESIDUE = 1 << 16
"""What is left of rounding is no more than the share divided by this; nor is more than that worth a step."""


def largest_share(free: Collection[Sequence[int]], n: int) -> int:
    """Bytes of each of the `n` shards that packs together can have in backends with so many `free` bytes, by group.

    No backend takes more than one shard of a pack, so what one has more than the others stays unused: the
    largest share x has sum(min(free, x)) >= n x.  A group takes at most ceil(n / groups) shards, so what it has
    more than the others stays unused too, until backends are full and as few others are left as make the
    bound grow; see `placement.assign`.  It ends with fewer than `n` backends that have room.
    """
    rest = [[room for room in group if room > 0] for group in free]
    bound = -(-n // max(1, len(rest)))
    share = 0
    while sum(map(len, rest)) >= n:
        while sum(min(len(group), bound) for group in rest) < n:
            bound += 1
        step = _step(rest, bound, n)
        if step <= share // _RESIDUE:
            break
        share += step
        rest = [_without(group, step, bound, share // _RESIDUE) for group in rest]
    return share


def _step(rest: Sequence[Sequence[int]], bound: int, n: int) -> int:
    """The largest share with this bound: then some group has nothing that the bound leaves it."""
    low, high = 0, sum(map(sum, rest)) // n + 1
    while high - low > 1:
        middle = (low + high) // 2
        if sum(min(sum(min(room, middle) for room in group), bound * middle) for group in rest) >= n * middle:
            low = middle
        else:
            high = middle
    return low


def _without(group: Sequence[int], share: int, bound: int, residue: int) -> list[int]:
    """What backends of a group still have after such a share, each having given by what it had.

    Rounded against them, and without what is no more than a residue: so a step that takes anything ends some.
    """
    had = sum(min(room, share) for room in group)
    given = min(had, bound * share)
    left = (room + -min(room, share) * given // had for room in group)
    return [room for room in left if room > residue]
