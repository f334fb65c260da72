"""Which backends take which shards: weighted rendezvous hashing, spread over groups.

Every pack ranks the backends by a hash of its id and theirs, weighted by free space, so that shares
follow the room there is and a change of the fleet moves little.  No two shards of a pack go to one
backend.  At most ceil(n / groups) go to one group; where that many cannot be had (groups of
different size, backends that are sick) the bound grows by as little as is needed.  Within that, as
few as possible go to one node.

Room is what a backend says is free, taken in steps: a pack's ranking changes only when a figure has
changed by an eighth, so that small movements (a compaction, another user) move nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import trio
from blake3 import blake3

from qsfs.clock import Clock
from qsfs.errors import BackendError
from qsfs.remote.members import ACTIVE, Member, Members

REFRESH_SECONDS = 60.0
"""How old what is known of a backend's free space may get while packs are uploaded."""
FULL_SECONDS = 5.0
"""The same while a backend is full: it is used again soon after it was given room."""
_LEAST_FREE = 1 << 20
"""More than any shard: a backend with less counts as full, and weighs next to nothing."""
_INFO_SECONDS = 10.0
_STEP = 8
"""A figure of free bytes counts for placement until it is off by one part in so many."""


class FreeSpace:
    """Free bytes of each backend, as it last said."""

    def __init__(self, members: Members, clock: Clock) -> None:
        self._members = members
        self._clock = clock
        self._said: dict[int, int] = {}
        self._free: dict[int, int] = {}
        self._asked = -math.inf

    def weight(self, member: Member) -> float:
        """Its configured weight times its free bytes, in steps; one that has not said counts as the average."""
        free = self._free.get(member.number)
        if free is None:
            free = sum(self._free.values()) // len(self._free) if self._free else _LEAST_FREE
        return max(1, member.entry.weight) * max(free, _LEAST_FREE)

    def free_bytes(self, number: int) -> int | None:
        """What backend `number` last said, or None."""
        return self._said.get(number)

    @property
    def stale(self) -> bool:
        """Whether it is time to ask again."""
        most = FULL_SECONDS if any(member.full for member in self._members) else REFRESH_SECONDS
        return self._clock.monotonic() >= self._asked + most

    async def refresh(self) -> None:
        """Asks every backend that answers.  Raises nothing of the backends'."""
        self._asked = self._clock.monotonic()
        async with trio.open_nursery() as nursery:
            for member in self._members:
                if member.ready:
                    nursery.start_soon(self._ask, member)

    async def _ask(self, member: Member) -> None:
        with trio.move_on_after(_INFO_SECONDS):
            try:
                free = (await member.data.info()).free_bytes
            except BackendError as error:
                member.failed(error)
                return
            self._said[member.number] = free
            self._weigh(member.number, free)
            member.succeeded()
            if free >= _LEAST_FREE:
                member.has_room()

    def _weigh(self, number: int, free: int) -> None:
        before = self._free.get(number)
        empty = free < _LEAST_FREE
        if before is None or empty != (before < _LEAST_FREE) or abs(free - before) * _STEP > before:
            self._free[number] = free


def score(pack_id: bytes, identity: bytes, weight: float) -> float:
    """The weighted rendezvous score of a backend for a pack; the largest go first."""
    number = int.from_bytes(blake3(pack_id + identity).digest(length=8), "big")
    return -weight / math.log((number + 0.5) / 2**64)


def ranking(pack_id: bytes, members: Collection[Member], free: FreeSpace) -> list[Member]:
    """`members` in the order in which the pack would take them."""
    scores = {m.number: score(pack_id, m.entry.identity, free.weight(m)) for m in members}
    return sorted(members, key=lambda m: (-scores[m.number], m.number))


def assign(
    shards: Sequence[int], ranked: Sequence[Member], holders: Collection[Member], *, n: int, groups: int
) -> dict[int, Member]:
    """A backend for as many of `shards` as there are backends in `ranked`, by shard number.

    `holders` already hold other shards of the pack and are not in `ranked`; `groups` is the number of
    groups in the fleet, `n` that of shards in a pack.
    """
    held = Counter(group_of(member) for member in holders)
    wanted = min(len(shards), len(ranked))
    bound = _bound(wanted, Counter(map(group_of, ranked)), held, -(-n // max(1, groups)))
    taken = Counter(member.entry.node for member in holders if member.entry.node)
    in_a_node = 1
    while True:
        chosen = _choose(wanted, ranked, held.copy(), bound, taken.copy(), in_a_node)
        # As nodes lie within groups, whoever comes first, as many are chosen as the bounds have room for.
        if len(chosen) == wanted or in_a_node > n:
            return dict(zip(shards, chosen, strict=False))
        in_a_node += 1


def _choose(
    wanted: int,
    ranked: Sequence[Member],
    held: Counter[str],
    in_a_group: int,
    taken: Counter[str],
    in_a_node: int,
) -> list[Member]:
    """The first of `ranked` that both bounds let through; `held` and `taken` count what groups and nodes have."""
    chosen: list[Member] = []
    for member in ranked:
        if len(chosen) == wanted:
            break
        group, node = group_of(member), member.entry.node
        if held[group] >= in_a_group or (node and taken[node] >= in_a_node):
            continue
        held[group] += 1
        if node:
            taken[node] += 1
        chosen.append(member)
    return chosen


def group_of(member: Member) -> str:
    """What the backend fails together with; one without a group is a group of its own."""
    return f"group {member.entry.group}" if member.entry.group else f"backend {member.number}"


def group_count(members: Collection[Member]) -> int:
    """The number of groups of backends that are there to take shards."""
    return len({group_of(member) for member in members if member.entry.state == ACTIVE})


def _bound(wanted: int, available: Mapping[str, int], held: Mapping[str, int], least: int) -> int:
    """The smallest bound per group, at least `least`, with which `wanted` shards find a place."""
    bound = least
    while sum(max(0, min(count, bound - held.get(group, 0))) for group, count in available.items()) < wanted:
        bound += 1
    return bound
