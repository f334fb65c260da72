"""Owning: what is read, written and published before a mount may call itself the owner."""

from __future__ import annotations

import re

import pytest
import trio

from qsfs import failpoints
from qsfs.errors import Fenced, FormatMismatch, NotFound, QuorumUnavailable, SplitHeads, StaleCache
from qsfs.format import seal as seal_module
from qsfs.format.head import Head, HeadRef, Owner, parse_head_key
from qsfs.format.owner import OwnerRecord, owner_key, parse_owner_key, seal_owner_record
from qsfs.remote.base import LocalHead
from qsfs.remote.mount_check import LocalState, accept_for_mount
from qsfs.remote.newest import Judgement, describe_head
from qsfs.remote.ownership import Ownership, OwnUnfinished
from qsfs.remote.publish import Published
from qsfs.remote.survey import find_newest
from tests.remote.harness import FSID, TIMING, Machine, World, keys_of, make_head, make_world, plant

OLD = Owner(3, b"o" * 16)


def announce(world: World, owner: Owner, *numbers: int) -> None:
    key, value = seal_owner_record(OwnerRecord(FSID, owner, 1, "other-host"), world.keys, world.clock)
    for number in numbers:
        world.control_of(number).put(key, value)


def written(world: World) -> set[bytes]:
    """Owner records and heads on any backend."""
    return {
        key
        for store in world.control
        for key in keys_of(store)
        if parse_owner_key(key) or parse_head_key(key)
    }


@pytest.mark.parametrize("shared", [False, True])
async def test_a_mount_owns_by_publishing_the_newest_head_as_its_own(autojump_clock, nursery, shared):
    world = await make_world(4, shared=shared)
    old = make_head(world, OLD, 7)
    sealed = plant(world, old, (1, 2, 3))
    machine = Machine(world)
    ownership = await machine.own(nursery)
    assert ownership.owner.epoch == 4
    assert ownership.found == old and ownership.found_ref == sealed.ref
    assert ownership.first.generation == 7 and ownership.first.predecessor == sealed.ref
    assert [stored.ref for stored in machine.spool] == [ownership.first_ref]
    assert ownership.publisher.published == ownership.first_ref
    assert isinstance(await machine.publish(), Published)
    await trio.sleep(machine.timing.grace)
    for store in world.control:
        assert {stored.key for stored in machine.spool} <= set(store.keys())


async def test_the_epoch_is_above_all_seen_in_records_and_in_heads(autojump_clock, nursery):
    world = await make_world(3)
    plant(world, make_head(world, OLD, 7))
    announce(world, Owner(8, b"x" * 16), 1, 2)
    machine = Machine(world)
    machine.cut_off(3)
    assert (await machine.own(nursery)).owner.epoch == 9


async def test_nothing_is_written_below_a_quorum(autojump_clock, nursery):
    """Waiting for the backends of a whole night must not leave a record for each attempt."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    before = written(world)
    machine = Machine(world)
    machine.cut_off(1, 2)
    begin = trio.current_time()
    with pytest.raises(QuorumUnavailable, match=r"2 of the 3 backends needed \(of 4\).*connection refused"):
        await machine.own(nursery, deadline=7.0)
    assert trio.current_time() - begin == pytest.approx(7.0, abs=0.01)
    assert written(world) == before and not machine.spool


async def test_no_head_anywhere_refuses(autojump_clock, nursery):
    """A takeover that finds no head has nothing to take over; unknown is told apart from absent."""
    world = await make_world(4)
    machine = Machine(world)
    with pytest.raises(NotFound, match="nothing to own"):
        await machine.own(nursery)
    machine.cut_off(1, 2)
    with pytest.raises(QuorumUnavailable):
        await machine.own(nursery, deadline=3.0)
    assert not written(world)
    machine.cut_off()
    for number in (1, 2):
        sealed = plant(world, make_head(world, OLD, 7), (number,))
        world.control_of(number).rot(sealed.key, lambda value: value[:-1] + b"?")
    with pytest.raises(QuorumUnavailable):
        await machine.own(nursery, deadline=3.0)


async def test_below_a_quorum_an_old_head_is_not_taken_for_the_newest(autojump_clock, nursery):
    """The one backend that answers missed the last head: that makes this machine no rolled-back one."""
    world = await make_world(3)
    old = plant(world, make_head(world, OLD, 7)).ref
    base = plant(world, make_head(world, OLD, 8, old), (1, 2)).ref
    machine = Machine(world)
    machine.cut_off(1, 2)
    accept = accept_for_mount(lambda: LocalState(base, True, base))
    with pytest.raises(QuorumUnavailable):
        await machine.own(nursery, accept=accept, deadline=3.0)
    machine.cut_off(1)
    assert (await machine.own(nursery, accept=accept)).found_ref == base


async def test_an_own_that_cannot_publish_goes_on_with_the_head_that_it_sent(autojump_clock, nursery):
    """Each new attempt would store, and send, another head that may be found by others."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    machine = Machine(world)
    failpoints.arm("own.announced", lambda: machine.cut_off(1, 2, 3))
    with pytest.raises(OwnUnfinished) as caught:
        await machine.own(nursery, deadline=5.0)
    for _ in range(3):
        again = caught.value.again
        with pytest.raises(OwnUnfinished) as caught:
            await again(5.0)
    assert len(machine.spool) == 1
    machine.cut_off()
    owned = await caught.value.again(5.0)
    assert [sealed.ref for sealed in machine.spool] == [owned.first_ref]
    assert owned.publisher.published == owned.first_ref and owned.found.generation == 7


async def test_an_own_that_goes_on_is_refused_once_another_mount_owns(autojump_clock, nursery):
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    machine = Machine(world)
    failpoints.arm("own.announced", lambda: machine.cut_off(1, 2, 3))
    with pytest.raises(OwnUnfinished) as caught:
        await machine.own(nursery, deadline=5.0)
    failpoints.disarm_all()
    machine.cut_off(4)
    await Machine(world, "b", seed=5).own(nursery)
    machine.cut_off()
    with pytest.raises(Fenced, match="another mount"):
        await caught.value.again(5.0)


async def test_a_refused_head_leaves_no_owner_record(autojump_clock, nursery):
    """Else the real owner would be fenced by a clone that was not even allowed to mount."""
    world = await make_world(3)
    plant(world, make_head(world, OLD, 7))
    before = written(world)

    def refuse(head: Head, judgement: Judgement) -> None:
        raise StaleCache("not ours")

    with pytest.raises(StaleCache):
        await Machine(world).own(nursery, accept=refuse)
    assert written(world) == before


async def test_the_newest_head_is_read_again_after_the_record_was_written(autojump_clock, nursery):
    """A publishes between B's first reading and its record: B goes on from A's head, and asks again."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    b = Machine(world, "b", seed=2)
    asked: list[int] = []
    failpoints.arm("own.announce", lambda: plant(world, make_head(world, OLD, 8), (1, 2, 3)) and None)
    ownership = await b.own(nursery, accept=lambda head, judgement: asked.append(head.generation))
    assert asked == [7, 8]
    assert ownership.found.generation == ownership.first.generation == 8


async def test_a_larger_owner_that_appears_and_publishes_wins(autojump_clock, nursery):
    """The other mount announced itself above us meanwhile; while we wait it publishes: it is the owner."""
    world = await make_world(3)
    base = plant(world, make_head(world, OLD, 7)).ref
    other = Owner(50, b"z" * 16)

    async def other_publishes() -> None:
        await trio.sleep(machine.timing.grace / 2)
        plant(world, make_head(world, other, 7, base))

    def other_announces() -> None:
        announce(world, other, 1, 2, 3)
        nursery.start_soon(other_publishes)
        failpoints.disarm("own.announce")

    machine = Machine(world)
    failpoints.arm("own.announce", other_announces)
    with pytest.raises(StaleCache):
        await machine.own(nursery, accept=accept_for_mount(lambda: LocalState(base, True, base)))
    assert not machine.spool


async def test_a_record_of_an_attempt_that_died_is_outbid(autojump_clock, nursery):
    """This machine crashed while it owned; its next attempt sees that record only after its own."""
    world = await make_world(3)
    base = plant(world, make_head(world, OLD, 7)).ref
    failpoints.arm("own.announce", lambda: announce(world, Owner(4, b"\xff" * 16), 1, 2, 3))
    machine = Machine(world)
    ownership = await machine.own(nursery, accept=accept_for_mount(lambda: LocalState(base, True, base)))
    assert ownership.owner.epoch == 5


async def test_a_mount_that_is_outbid_again_and_again_gives_up(autojump_clock, nursery):
    world = await make_world(3)
    plant(world, make_head(world, OLD, 7))
    epochs = iter(range(50, 1000, 10))
    failpoints.arm("own.announce", lambda: announce(world, Owner(next(epochs), b"z" * 16), 1, 2, 3))
    machine = Machine(world)
    with pytest.raises(Fenced, match="epoch 80"):
        await machine.own(nursery)
    assert not machine.spool


async def test_a_larger_head_that_appears_meanwhile_wins(autojump_clock, nursery):
    world = await make_world(3)
    plant(world, make_head(world, OLD, 7))
    failpoints.arm(
        "own.announce", lambda: plant(world, make_head(world, Owner(50, b"z" * 16), 7), (1, 2)) and None
    )
    machine = Machine(world)
    machine.cut_off(3)
    with pytest.raises(Fenced, match="epoch 50"):
        await machine.own(nursery)


async def test_a_head_of_the_chosen_owner_that_was_not_written_here_is_a_copy(autojump_clock, nursery):
    """A machine copied between choosing its owner and publishing: the copy was faster."""
    world = await make_world(3)
    plant(world, make_head(world, OLD, 7))

    def copy_was_faster() -> None:
        (named,) = (parse_owner_key(key) for key in written(world) if parse_owner_key(key))
        plant(world, make_head(world, named.owner, 7))

    failpoints.arm("quorum_write.acknowledged", copy_was_faster)
    with pytest.raises(Fenced, match="copy of this machine"):
        await Machine(world).own(nursery)


async def test_a_record_that_rotted_does_not_let_its_backend_count(autojump_clock, nursery):
    """B's record on 1 rots before A publishes there: 1 may not count for A, though it acknowledges."""
    world = await make_world(3)
    plant(world, make_head(world, OLD, 7))
    a = Machine(world, "a", seed=1)
    await a.own(nursery)
    other = Owner(77, b"b" * 16)
    announce(world, other, 1)
    world.control_of(1).rot(owner_key(FSID, other), lambda value: value[:-1] + b"?")
    a.cut_off(2)
    result = await a.publish(deadline=3.0)
    assert result.counted == {3}


async def test_a_backend_that_lost_its_identity_does_not_count(autojump_clock, nursery, expect_log):
    """Re-created and empty, it would acknowledge and show nothing."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    world.control_of(1).clear()
    expect_log("has lost the identity of entry 1.*nothing is stored there", count=1)
    machine = Machine(world)
    machine.cut_off(2)
    with pytest.raises(QuorumUnavailable, match="host1:9900/qsfs-heads: has lost the identity of entry 1"):
        await machine.own(nursery, deadline=5.0)
    assert not machine.members.by_number(1).identified
    assert not written_on(world, 1)


async def test_swapped_backends_do_not_count(autojump_clock, nursery, expect_log):
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    world.control[0], world.control[1] = world.control[1], world.control[0]
    expect_log("backends were swapped.*nothing is stored there", count=2)
    with pytest.raises(QuorumUnavailable, match="is entry 2 of the fleet, not 1: backends were swapped"):
        await Machine(world).own(nursery, deadline=5.0)


def written_on(world: World, number: int) -> list[bytes]:
    return [key for key in keys_of(world.control_of(number)) if parse_owner_key(key) or parse_head_key(key)]


async def test_a_newer_version_of_qsfs_on_the_backends_stops_the_mount(autojump_clock, nursery, monkeypatch):
    world = await make_world(3)
    plant(world, make_head(world, OLD, 7))
    monkeypatch.setattr(seal_module, "FORMAT_VERSION", 2)
    announce(world, Owner(9, b"n" * 16), 1, 2, 3)
    monkeypatch.undo()
    with pytest.raises(FormatMismatch):
        await Machine(world).own(nursery)


async def test_a_takeover_stops_at_two_lines_of_heads(autojump_clock, nursery):
    world = await make_world(3)
    one = plant(world, make_head(world, OLD, 7))
    two = plant(world, make_head(world, OLD, 7, counters={"by": 2}))
    newest = max(one.ref, two.ref)
    local = LocalState(newest, False)
    with pytest.raises(SplitHeads):
        await Machine(world).own(nursery, accept=accept_for_mount(lambda: local, takeover=True))
    assert not any(parse_owner_key(key) for key in written(world))


async def test_a_takeover_goes_on_from_the_head_that_a_person_chose_and_a_third_stops_it(autojump_clock, nursery):
    """Rejected is only what the person saw, be it the larger, or rotten meanwhile.  Afterwards nothing asks."""
    world = await make_world(3)
    root = plant(world, make_head(world, OLD, 6)).ref
    chosen = plant(world, make_head(world, OLD, 7, root))
    other = plant(world, make_head(world, OLD, 8, root, counters={"by": 2}))
    third = plant(world, make_head(world, OLD, 7, root, counters={"by": 3}))
    world.control_of(1).rot(other.key, lambda value: value[:-1] + b"?")
    accept = accept_for_mount(lambda: LocalState(chosen.ref, False), takeover=True)

    async def take_over(*rejected: HeadRef) -> Ownership:
        return await Machine(world).own(nursery, accept=accept, rejected=frozenset(rejected))

    with pytest.raises(SplitHeads):
        await take_over()
    with pytest.raises(SplitHeads) as caught:
        await take_over(other.ref)
    assert set(caught.value.digests) == {ref.digest.hex() for ref in (chosen.ref, third.ref)}
    ownership = await take_over(other.ref, third.ref)
    assert ownership.found_ref == chosen.ref and ownership.first.predecessor == chosen.ref
    machine = Machine(world, "restorer")
    found = await find_newest(machine.members, machine.records, world.code, machine.clock, TIMING)
    assert found.ref == ownership.first_ref


async def test_a_takeover_goes_on_from_the_head_that_was_restored_though_nobody_who_has_it_answers(
    autojump_clock, nursery
):
    """It was sent to one backend, whose answer the restore had; an older one on all others is no newer generation."""
    world = await make_world(4)
    older = plant(world, make_head(world, OLD, 7))
    head = make_head(world, OLD, 8, older.ref)
    sealed = plant(world, head, (4,))
    machine = Machine(world)
    machine.cut_off(4)
    local = LocalState(sealed.ref, False)
    ownership = await machine.own(
        nursery,
        accept=accept_for_mount(lambda: local, takeover=True),
        restored=LocalHead(sealed, head, ours=False),
    )
    assert ownership.first.predecessor == sealed.ref
    assert ownership.first.generation == 8


@pytest.mark.parametrize("generation", [7, 8, 9])
async def test_a_takeover_is_refused_where_the_backends_show_another_line(autojump_clock, nursery, generation):
    """Older, as old or newer than what was restored: it does not descend from that, so something may be lost."""
    world = await make_world(4)
    older = plant(world, make_head(world, OLD, 7), (4,))
    head = make_head(world, OLD, 8, older.ref)
    sealed = plant(world, head, (4,))
    other = plant(world, make_head(world, OLD, generation, counters={"by": 2}), (1, 2, 3))
    machine = Machine(world)
    machine.cut_off(4)
    local = LocalState(sealed.ref, False)
    with pytest.raises(StaleCache, match=re.escape(describe_head(other.ref))):
        await machine.own(
            nursery,
            accept=accept_for_mount(lambda: local, takeover=True),
            restored=LocalHead(sealed, head, ours=False),
        )
    assert not any(parse_owner_key(key) for key in written(world))


async def test_the_owner_is_fenced_by_the_next_one_at_its_next_head(autojump_clock, nursery):
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    a, b = Machine(world, "a", seed=1), Machine(world, "b", seed=2)
    await a.own(nursery)
    assert isinstance(await a.publish(), Published)
    ownership = await b.own(nursery)
    assert ownership.found.generation == 8 and ownership.owner.epoch == a.ownership.owner.epoch + 1
    with pytest.raises(Fenced, match="on 'b' has taken over"):
        await a.publish()
    assert isinstance(await b.publish(), Published)


async def test_two_mounts_that_own_at_once_end_with_one_owner(autojump_clock, nursery):
    """Whoever has the larger owner may go on; the other one gives up, or is fenced at its next head."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 7))
    machines = [Machine(world, name, seed=seed) for seed, name in enumerate("ab", start=1)]
    for machine in machines:
        for number, backend in machine.backends.items():
            backend.delay = lambda call, pause=number * machine.seed / 50: pause
    owning: list[Machine] = []

    async def run(machine: Machine) -> None:
        try:
            await machine.own(nursery)
        except (Fenced, QuorumUnavailable):
            return
        owning.append(machine)

    async with trio.open_nursery() as both:
        for machine in machines:
            both.start_soon(run, machine)
    assert owning
    publishing = []
    for machine in owning:
        try:
            publishing.append(await machine.publish())
        except Fenced:
            continue
    assert len(publishing) == 1
