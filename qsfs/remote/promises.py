"""`redundant_groups` and `redundant_nodes`: what is promised to be survivable, against what placement can keep.

The rules of `placement` bound how many shards of a pack one group and one node get.  So what the loss of the worst
groups or nodes takes of a pack that was placed with all backends up follows from the fleet alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qsfs.format.erasure import CodeParams
from qsfs.remote.losses import LossTable
from qsfs.values import counted


@dataclass(frozen=True, slots=True)
class Place:
    """What fails together with a backend; "" is a group or a node of its own."""

    group: str
    node: str


@dataclass(frozen=True, slots=True)
class Promises:
    """How many whole groups, and nodes, may be lost without losing anything that is full."""

    groups: int = 0
    nodes: int = 0

    def __bool__(self) -> bool:
        return bool(self.groups or self.nodes)

    def broken(self, places: Sequence[Place], code: CodeParams) -> list[str]:
        """Which promises a fleet of backends at these places cannot keep, a sentence each; none if all hold."""
        if not self or len(places) < code.n:
            return []
        return [
            sentence
            for kind, promised, worst in zip(
                ("group", "node"), (self.groups, self.nodes), most_shards(places, code.n), strict=True
            )
            if promised
            for sentence in _broken(kind, promised, worst, code)
        ]

    def broken_by(self, table: LossTable) -> list[str]:
        """Which promises the recorded placement of packs breaks; full packs and others apart."""
        found = []
        for kind, promised, there in (("group", self.groups, table.groups), ("node", self.nodes, table.nodes)):
            if not promised:
                continue
            for which, full in (("full packs", True), ("all packs (some are not full)", False)):
                may = table.any_may_be_lost(kind, full_only=full)
                if may is not None and may < min(promised, there):
                    found.append(
                        f"redundant_{kind}s = {promised} does not hold: {which} survive the loss of any "
                        f"{counted(max(0, may), kind)}; 'qsfs placement check' shows which"
                    )
                    break
        return found


def most_shards(places: Sequence[Place], n: int) -> tuple[list[int], list[int]]:
    """The most shards of a pack that each group, and each node, gets while all backends take them; largest first."""
    groups = Counter(place.group or f"\0{index}" for index, place in enumerate(places))
    nodes = Counter(place.node or f"\0{index}" for index, place in enumerate(places))
    in_a_group = -(-n // len(groups))
    while sum(min(size, in_a_group) for size in groups.values()) < n:
        in_a_group += 1
    in_a_node = 1
    while _room(places, in_a_group, in_a_node) < n and in_a_node < n:
        in_a_node += 1
    return (
        sorted((min(size, in_a_group) for size in groups.values()), reverse=True),
        sorted((min(size, in_a_node) for size in nodes.values()), reverse=True),
    )


def _room(places: Sequence[Place], in_a_group: int, in_a_node: int) -> int:
    """How many shards find a place under both bounds."""
    groups: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for index, place in enumerate(places):
        group, node = place.group or f"\0{index}", place.node or f"\0{index}"
        if groups[group] < in_a_group and nodes[node] < in_a_node:
            groups[group] += 1
            nodes[node] += 1
    return groups.total()


def _broken(kind: str, promised: int, worst: Sequence[int], code: CodeParams) -> list[str]:
    lost = sum(worst[:promised])
    if lost <= code.m:
        return []
    holds = 0
    while sum(worst[: holds + 1]) <= code.m:
        holds += 1
    return [
        f"redundant_{kind}s = {promised} cannot be kept: the loss of {counted(promised, kind)} may take {lost} shards "
        f"of a pack, more than m = {code.m}; with {counted(len(worst), kind)} {holds} can be promised: spread the "
        f"backends over more {kind}s, or choose more parity shards"
    ]
