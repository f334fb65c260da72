"""What makes the image of one head that of another: which metadata packs are read, and what of them counts.

Pure, and true of any two heads, whatever lies between them: a generation is what the packs that its head lists
come to, in their order (`image`).  So where two heads list the same packs for a stretch of positions,
nothing differs there.  Where the new one lists deltas behind those of the old, these are laid over it.  Where
deltas were replaced by others (merged, as a rule) it is the same, provided that the new ones hold every key
that the old ones held: then nothing is left of those.  Where a range was read anew, it takes the place of
what there was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise

from qsfs.format.head import Head, MetadataPack
from qsfs.remote.chain import ranges_of
from qsfs.remote.image import Counting, Listed


@dataclass(frozen=True, slots=True)
class Anew:
    """Stretches that are replaced: from each of `starts` to its stop (None: the end), by what counts of `packs`."""

    stretches: tuple[tuple[bytes, bytes | None], ...]
    packs: tuple[Listed, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """First `anew`, then what counts of `deltas`, in order, everywhere.

    It holds only if what counts of `gone`, packs of the old head, has no key that `deltas` do not have.
    """

    anew: tuple[Anew, ...]
    deltas: tuple[Listed, ...]
    gone: tuple[Listed, ...]

    @property
    def listed(self) -> tuple[Listed, ...]:
        """All packs that are read."""
        return (*chain.from_iterable(part.packs for part in self.anew), *self.deltas, *self.gone)


def bytes_of(listed: Sequence[Listed]) -> int:
    """What packs weigh."""
    return sum(pack.ref.body_length for pack, _ in listed)


def difference(old: Head, new: Head) -> Difference:
    """What makes the image of `old` that of `new`."""
    before, after = _Ranges(old), _Ranges(new)
    starts = tuple(sorted({*before.starts, *after.starts}))
    stops = (*starts[1:], None)

    @cache
    def shared(since_before: int, since_after: int) -> int:
        """How many deltas from these on are the same in both."""
        both = list(zip(before.deltas[since_before:], after.deltas[since_after:], strict=False))
        return next((count for count, (one, other) in enumerate(both) if one != other), len(both))

    # For each stretch: the new head's range, whether that is new, and from which delta of each head on they differ.
    at = [after.at(start) for start in starts]
    replaced = [before.packs[before.at(start)] != after.packs[index] for start, index in zip(starts, at, strict=True)]
    gone_from, laid_from = [], []
    for start, index, is_new in zip(starts, at, replaced, strict=True):
        since_before, since_after = before.since[before.at(start)], after.since[index]
        same = 0 if is_new else shared(since_before, since_after)
        gone_from.append(len(before.deltas) if is_new else since_before + same)
        laid_from.append(since_after + same)
    anew = []
    for index in sorted({index for index, is_new in zip(at, replaced, strict=True) if is_new}):
        wanted = tuple(is_new and other == index for other, is_new in zip(at, replaced, strict=True))
        stretches = tuple((start, stop) for start, stop, it in zip(starts, stops, wanted, strict=True) if it)
        packs = after.listed[index]
        anew.append(Anew(stretches, tuple((pack, Counting(starts, wanted)) for pack in packs)))
    return Difference(tuple(anew), _from(new, starts, laid_from), _from(old, starts, gone_from))


class _Ranges:
    """The ranges of a head, with packs and deltas by their ids."""

    def __init__(self, head: Head) -> None:
        ranges = ranges_of(head)
        ends = list(accumulate((part.packs for part in ranges), initial=0))
        self.starts = tuple(part.start for part in ranges)
        self.since = tuple(part.since for part in ranges)
        self.listed = tuple(head.snapshot[begin:end] for begin, end in pairwise(ends))
        self.packs = tuple(map(_ids, self.listed))
        self.deltas = tuple(map(_ids, head.deltas))

    def at(self, position: bytes) -> int:
        """The range in which a position stands."""
        return bisect_right(self.starts, position) - 1


def _ids(packs: Sequence[MetadataPack]) -> tuple[bytes, ...]:
    return tuple(pack.ref.pack_id for pack in packs)


def _from(head: Head, starts: tuple[bytes, ...], first: Sequence[int]) -> tuple[Listed, ...]:
    """The deltas of a head from `first` on, which is told for each stretch."""
    found: list[Listed] = []
    for number in range(min(first), len(head.deltas)):
        counting = Counting(starts, tuple(number >= least for least in first))
        found += [(pack, counting) for pack in head.deltas[number]]
    return tuple(found)
