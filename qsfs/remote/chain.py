"""What a head lists: the metadata packs of the full snapshot and of the deltas since."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qsfs.format.extent import PackRef
from qsfs.format.head import Head, MetadataPack

MOST_DELTAS = 512
"""Deltas after which a full snapshot is written whatever they weigh: a restore reads them one by one."""
_LEAST_SNAPSHOT = 4 << 20
"""Bytes that a smaller snapshot counts as when deltas are weighed against it."""


@dataclass(frozen=True, slots=True)
class ListedPack:
    """A written metadata pack: its number in the local table, and what a head says of it."""

    number: int
    ref: PackRef
    chunks: int


Packs = tuple[ListedPack, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """The snapshot and the deltas of a generation, in the order in which a restore applies them."""

    snapshot: Packs
    deltas: tuple[Packs, ...]

    @classmethod
    def of_head(cls, head: Head, number_of: Callable[[MetadataPack], int]) -> Chain:
        """What `head` lists."""

        def listed(packs: Iterable[MetadataPack]) -> Packs:
            return tuple(ListedPack(number_of(pack), pack.ref, pack.chunks) for pack in packs)

        return cls(listed(head.snapshot), tuple(listed(delta) for delta in head.deltas))

    def wants_snapshot(self, ratio: float) -> bool:
        """Whether the deltas outweigh the snapshot by `ratio`, or are too many."""
        weight = sum(pack.ref.body_length for delta in self.deltas for pack in delta)
        snapshot = sum(pack.ref.body_length for pack in self.snapshot)
        return weight > ratio * max(snapshot, _LEAST_SNAPSHOT) or len(self.deltas) >= MOST_DELTAS

    def followed_by(self, *deltas: Packs) -> Chain:
        """The chain with `deltas` behind it."""
        return Chain(self.snapshot, (*self.deltas, *(delta for delta in deltas if delta)))

    def all_packs(self) -> list[ListedPack]:
        """Every pack that is listed."""
        return [*self.snapshot, *(pack for delta in self.deltas for pack in delta)]


class FreshSnapshot:
    """A full snapshot that is read over many commits while generations go on.

    A row that is read early may change later.  Then it lies in the delta of a generation that is
    recorded after the reading began: those deltas are collected here, and follow the snapshot in the
    first head that lists it.
    """

    def __init__(self) -> None:
        self.since: list[Packs] = []
        self.packs: Packs | None = None

    def chain(self, delta: Packs) -> Chain:
        """The chain of the first generation that lists this snapshot; its cut began after it was written."""
        return Chain(self.packs or (), ()).followed_by(*self.since, delta)


def listed_ids(head: Head) -> frozenset[bytes]:
    """The ids of the metadata packs that a head lists."""
    return frozenset(pack.ref.pack_id for packs in (head.snapshot, *head.deltas) for pack in packs)
