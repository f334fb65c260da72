"""Placement over groups, nodes and free space; promises that follow from it; what losses would take."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest

from qsfs.errors import ConfigError
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import FleetEntry
from qsfs.remote.losses import WORST, Loss, LossTable, domains, loss_of, single_losses, survives
from qsfs.remote.members import Members
from qsfs.remote.placement import FreeSpace, assign, group_count, ranking
from qsfs.remote.promises import Place, Promises, most_shards
from tests.remote.harness import make_world
from tests.remote.test_flush_upload import Fleet


def entry(number: int, group: str = "", node: str = "") -> FleetEntry:
    return FleetEntry(number, bytes([number]) * 16, f"host{number}:9900", "qsfs", "", group, node, 1, "active")


async def members_at(places: list[Place], k: int, m: int):
    world = await make_world(len(places), k=k, m=m, groups=tuple(place.group for place in places))
    fleet = Fleet(world)
    members = list(fleet.members)
    for member, place in zip(members, places, strict=True):
        member.entry = replace(member.entry, node=place.node)
    return members, FreeSpace(fleet.members, fleet.clock)


FLEETS = {
    "2 disks a node": [Place(f"g{i % 4}", f"n{i // 8}{i % 4}") for i in range(24)],
    "groups of different size": [Place("ab"[i % 5 == 0], f"n{i % 5}{i // 10}") for i in range(24)],
    "nodes without groups": [Place("", f"n{i % 10}") for i in range(22)],
    "some without a node": [Place(f"g{i % 5}", f"n{i % 5}" if i < 10 else "") for i in range(25)],
    "one node": [Place("g", "n") for _ in range(21)],
}


@pytest.mark.parametrize("places", FLEETS.values(), ids=FLEETS)
async def test_no_group_and_no_node_gets_more_than_the_promises_count_with(places, autojump_clock):
    """`Promises` computes from the fleet what placement really does: for any pack."""
    members, free = await members_at(places, 16, 4)
    in_groups, in_nodes = most_shards(places, 20)
    source = random.Random(3)
    for _ in range(100):
        ranked = ranking(source.randbytes(16), members, free)
        chosen = assign(range(20), ranked, [], n=20, groups=group_count(members))
        assert len({member.number for member in chosen.values()}) == 20
        for kind, worst in (("group", in_groups), ("node", in_nodes)):
            at = [places[member.number - members[0].number] for member in chosen.values()]
            counts = Counter(getattr(place, kind) or f"\0{i}" for i, place in enumerate(at))
            for count, bound in zip(sorted(counts.values(), reverse=True), worst, strict=False):
                assert count <= bound


async def test_shards_are_spread_over_nodes_within_a_group(autojump_clock):
    """Also the one shard that is given to a spare goes to the node that has the fewest."""
    places = [Place(f"g{i % 2}", f"n{i % 6}") for i in range(18)]
    members, free = await members_at(places, 4, 2)
    for seed in range(30):
        ranked = ranking(bytes([seed]) * 16, members, free)
        chosen = assign(range(6), ranked, [], n=6, groups=2)
        assert max(Counter(member.entry.node for member in chosen.values()).values()) == 1
        holders = list(chosen.values())[:5]
        rest = [member for member in ranked if member not in holders]
        (spare,) = assign([5], rest, holders, n=6, groups=2).values()
        assert spare.entry.node not in {member.entry.node for member in holders}


async def test_nodes_that_are_gone_do_not_keep_packs_from_being_written(autojump_clock):
    members, free = await members_at([Place("", f"n{i % 3}") for i in range(24)], 16, 4)
    left = [member for member in members if member.entry.node != "n0"]
    chosen = assign(range(20), ranking(b"x" * 16, left, free), [], n=20, groups=24)
    assert len(chosen) == 16


async def test_placement_does_not_flap_with_small_changes_of_free_space(autojump_clock):
    """A ranking stays while figures move by less than an eighth, and follows when they move further."""
    world = await make_world(6, k=2, m=1)
    fleet = Fleet(world)
    members = list(fleet.members)
    free = FreeSpace(Members(members), fleet.clock)
    room = {member.number: 1 << 40 for member in members}
    packs = [random.Random(4).randbytes(16) for _ in range(1)] + [bytes([i]) * 16 for i in range(200)]

    async def ranks() -> list[list[int]]:
        for number, bytes_free in room.items():
            free._weigh(number, bytes_free)
        return [[member.number for member in ranking(pack, members, free)] for pack in packs]

    before = await ranks()
    first = members[0].number
    for step in range(20):
        room[first] = (1 << 40) - (1 << 36) * (step % 2)
        assert await ranks() == before
    room[first] = 1 << 39
    after = await ranks()
    assert after != before
    room[first] = int((1 << 39) * 1.1)
    assert await ranks() == after
    room[first] = 0
    assert all(order[-1] == first for order in await ranks())


@pytest.mark.parametrize(
    ("groups", "count", "code", "holds"),
    [(5, 20, (16, 20), 1), (4, 20, (16, 20), 0), (20, 20, (16, 20), 4), (10, 20, (16, 20), 2), (3, 24, (4, 12), 2)],
)
def test_a_promise_of_groups_holds_exactly_as_far_as_parity_reaches(groups, count, code, holds):
    places = [Place(f"g{i % groups}", "") for i in range(count)]
    params = CodeParams(*code)
    if holds:
        assert Promises(groups=holds).broken(places, params) == []
    (sentence,) = Promises(groups=holds + 1).broken(places, params)
    assert f"redundant_groups = {holds + 1} cannot be kept" in sentence
    assert f"groups {holds} can be promised" in sentence


def test_promises_of_nodes_are_judged_apart_from_those_of_groups():
    places = [Place(f"g{i % 5}", f"n{i % 10}") for i in range(20)]
    code = CodeParams(16, 20)
    assert Promises(groups=1, nodes=2).broken(places, code) == []
    (sentence,) = Promises(groups=1, nodes=3).broken(places, code)
    assert "redundant_nodes = 3" in sentence and "may take 6 shards" in sentence
    assert Promises().broken(places, code) == []


# what-if


def brute(placements, entries, k, lost) -> list[int]:
    known = {entry.number for entry in entries}
    return [sum(number in known and number not in lost for number in placement) - k for placement in placements]


def test_losses_are_counted_as_by_hand():
    """Against a count that knows no masks, with missing shards, strangers, and backends that hold two shards."""
    entries = [entry(i + 1, f"g{i % 3}" if i < 9 else "", f"n{i // 2}" if i < 8 else "") for i in range(12)]
    code = CodeParams(4, 7)
    source = random.Random(5)
    placements = []
    for _ in range(60):
        placement = source.sample(range(1, 13), 7)
        for _ in range(source.randint(0, 2)):
            placement[source.randrange(7)] = source.choice([-1, -1, 99, placement[0]])
        placements.append(tuple(placement))
    losses = [*single_losses(entries), Loss("two", frozenset((1, 7))), Loss("nothing", frozenset())]
    table = LossTable(entries, code, losses)
    for number, placement in enumerate(placements):
        table.add(number.to_bytes(16, "big"), 100, placement)
    assert table.full == sum(-1 not in placement for placement in placements)
    for outcome in table.outcomes:
        spares = brute(placements, entries, 4, outcome.loss.numbers)
        assert outcome.spare == min(spares)
        assert outcome.lost_full + outcome.lost_written == sum(spare < 0 for spare in spares)
        assert outcome.lost_bytes == 100 * sum(spare < 0 for spare in spares)
        assert [spare for spare, _, _ in outcome.worst] == sorted(spares)[:WORST]
    for kind, places in (
        ("backend", [[e.number] for e in entries]),
        ("node", list(domains(entries, "node").values())),
        ("group", list(domains(entries, "group").values())),
    ):
        expected = -1
        for count in range(len(places) + 1):
            gone = [set().union(*chosen) for chosen in combinations(places, count)]
            if all(min(brute(placements, entries, 4, lost)) >= 0 for lost in gone):
                expected = count
            else:
                break
        assert table.any_may_be_lost(kind) == expected


def test_how_many_places_survive():
    assert survives([1] * 20, 4) == 4
    assert survives([4, 4, 4, 4, 4], 4) == 1
    assert survives([3, 3, 1], 2) == 0
    assert survives([1, 1], -1) == -1


def test_recorded_placements_break_promises_by_name():
    entries = [entry(i + 1, f"g{i % 3}") for i in range(6)]
    good, bad = (1, 2, 3, 4, 5, 6), (1, 4, 2, 3, 5, 1)
    table = LossTable(entries, CodeParams(4, 6), [])
    table.add(b"a" * 16, 1, good)
    assert Promises(groups=1).broken_by(table) == []
    table.add(b"b" * 16, 1, bad)
    (sentence,) = Promises(groups=1).broken_by(table)
    assert "redundant_groups = 1 does not hold: full packs survive the loss of any 0 groups" in sentence
    partly = LossTable(entries, CodeParams(4, 6), [])
    partly.add(b"a" * 16, 1, good)
    partly.add(b"c" * 16, 1, (1, 2, 3, 4, -1, 6))
    (sentence,) = Promises(groups=1).broken_by(partly)
    assert "all packs (some are not full) survive" in sentence


def test_what_is_lost_is_named_by_backend_group_and_node():
    entries = [entry(1, "a", "x"), entry(2, "a"), entry(3, "b", "x")]
    assert loss_of(entries, ["group:a"]).numbers == {1, 2}
    assert loss_of(entries, ["node:x"]).numbers == {1, 3}
    assert loss_of(entries, ["2", "host3:9900/qsfs"]).numbers == {2, 3}
    assert loss_of(entries, ["host3:9900"]).name == "host3:9900"
    for word in ("group:c", "node:", "4", "host9:9900"):
        with pytest.raises(ConfigError, match=f"--lose {word}"):
            loss_of(entries, [word])
    assert [loss.name for loss in single_losses(entries)] == [
        "group:a", "group:b", "node:x", "1 host1:9900/qsfs", "2 host2:9900/qsfs", "3 host3:9900/qsfs",
    ]  # fmt: skip
