"""Old heads and owner records go once a newer head is published, and nothing else does."""

from __future__ import annotations

import trio

from qsfs import failpoints
from qsfs.format.head import HeadRef, KeptGeneration, Owner, parse_head_key
from qsfs.format.owner import OwnerRecord, parse_owner_key, seal_owner_record
from qsfs.remote.control import Listing
from qsfs.remote.publish import Published
from qsfs.remote.superseded import MOST_AT_ONCE, superseded
from tests.remote.harness import FSID, Machine, World, keys_of, make_head, make_world, plant

OLD, OURS, NEW = Owner(1, b"o" * 16), Owner(2, b"m" * 16), Owner(3, b"n" * 16)


def ref(generation: int, owner: Owner = OURS, branch: int = 0) -> HeadRef:
    return HeadRef(owner, generation, bytes([generation % 256, branch]) * 16)


def held(world: World, number: int) -> tuple[list[Owner], list[HeadRef]]:
    """Owner records and heads on a backend."""
    keys = keys_of(world.control_of(number))
    owners = [parse_owner_key(key) for key in keys]
    heads = [parse_head_key(key) for key in keys]
    return sorted(o.owner for o in owners if o), sorted(h.ref for h in heads if h)


async def test_only_what_the_published_head_supersedes_is_chosen(autojump_clock):
    world = await make_world(1)
    pinned = ref(3, OLD)
    head = make_head(world, OURS, 9, kept=tuple(KeptGeneration(r, 0, ()) for r in (pinned, ref(7), ref(8))))
    copy = ref(6, branch=1)
    heads = {ref(2, OLD), pinned, ref(12, OLD), *map(ref, range(4, 12)), copy, ref(1, NEW)}
    listing = Listing(frozenset({OLD, OURS, NEW}), frozenset(heads))
    written = set(map(ref, range(4, 12)))
    assert superseded(listing, head, ref(9), written) == (
        [OLD],
        [ref(2, OLD), ref(12, OLD), ref(4), ref(5), ref(6)],
    )
    without = Listing(listing.owners, listing.heads - {ref(9)})
    assert superseded(without, head, ref(9), written) == ([], [])


async def test_a_few_at_once(autojump_clock):
    world = await make_world(1)
    many = frozenset(ref(number, OLD) for number in range(200)) | {ref(9)}
    owners, heads = superseded(Listing(frozenset({OLD}), many), make_head(world, OURS, 9), ref(9), ())
    assert len(owners) + len(heads) == MOST_AT_ONCE and heads[0] == ref(0, OLD)


async def test_the_backends_list_no_more_than_is_kept(autojump_clock, nursery):
    for shared in (False, True):
        world = await make_world(3, shared=shared)
        machine = await owner_of(world, nursery)
        for _ in range(20):
            assert isinstance(result := await machine.publish(), Published)
            await trio.sleep(machine.timing.grace)
        for number in (1, 2, 3):
            owners, heads = held(world, number)
            assert owners == [machine.ownership.owner]
            assert [head.generation for head in heads] == [28, 29, 30]
        assert result.ref == heads[-1]
        for member in machine.members:
            assert member.index is None or len(member.index.keys) <= 5


async def test_between_any_two_deletions_the_published_head_is_wherever_something_goes(autojump_clock, nursery):
    """Who dies there has lost nothing: what is left of the older ones is deleted after a later head."""
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    assert machine.ownership is not None
    published = [machine.ownership.first_ref]
    seen = 0

    def look() -> None:
        nonlocal seen
        seen += 1
        assert all(published[-1] in held(world, number)[1] for number in (1, 2, 3))

    failpoints.arm("publish.superseded", look)
    for _ in range(4):
        result = await machine.publish()
        assert isinstance(result, Published)
        published.append(result.ref)
        await trio.sleep(machine.timing.grace)
    assert seen >= 3 * 3


async def owner_of(world: World, nursery: trio.Nursery) -> Machine:
    key, value = seal_owner_record(OwnerRecord(FSID, OLD, 1, "before"), world.keys, world.clock)
    for store in world.control:
        store.put(key, value)
    plant(world, make_head(world, OLD, 10))
    machine = Machine(world)
    await machine.own(nursery)
    return machine


async def test_a_backend_that_missed_heads_keeps_its_old_ones_until_it_has_a_newer(autojump_clock, nursery):
    """A restore from it alone still finds the newest that it ever had."""
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    assert isinstance(await machine.publish(), Published)
    await trio.sleep(1)
    machine.cut_off(1)
    for _ in range(5):
        assert isinstance(await machine.publish(), Published)
        await trio.sleep(1)
    assert [head.generation for head in held(world, 1)[1]] == [10, 10, 11]
    machine.cut_off()
    await trio.sleep(60)
    assert isinstance(await machine.publish(), Published)
    await trio.sleep(1)
    assert [head.generation for head in held(world, 1)[1]] == [17]
    assert [head.generation for head in held(world, 2)[1]] == [15, 16, 17]


async def test_heads_that_were_given_up_stay_until_a_newer_one_is_published(autojump_clock, nursery):
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    machine.cut_off(1, 2)
    for _ in range(3):
        await machine.publish(deadline=1.0)
    assert [head.generation for head in held(world, 4)[1]] == [10, 10, 11, 12, 13]
    machine.cut_off()
    assert isinstance(await machine.publish(), Published)
    await trio.sleep(1)
    assert [head.generation for head in held(world, 4)[1]] == [10, 10, 14]


async def test_a_mount_that_was_taken_over_from_deletes_nothing_of_the_new_owner(autojump_clock, nursery):
    """A is paused between publishing and deleting; B takes over; A's deletions land after B's heads."""
    world = await make_world(3)
    a = await owner_of(world, nursery)
    assert isinstance(await a.publish(), Published)
    await trio.sleep(1)
    for backend in a.backends.values():
        backend.delay = lambda call: 20.0 if call == "delete" else 0.0
    assert isinstance(await a.publish(), Published)
    b = Machine(world, "b", seed=2)
    await b.own(nursery)
    assert isinstance(result := await b.publish(), Published)
    await trio.sleep(200)
    deleted = [call for backend in a.backends.values() for call, _ in backend.calls if call == "delete"]
    assert deleted, "the schedule did not happen"
    for number in (1, 2, 3):
        owners, heads = held(world, number)
        assert owners == [b.ownership.owner]
        assert {head.owner for head in heads} <= {a.ownership.owner, b.ownership.owner}
        assert {b.ownership.first_ref, result.ref} <= set(heads)
