"""The schedules of ownership and heads that broke near misses of the design, each by name."""

from __future__ import annotations

import dataclasses

import pytest
import trio
import trio.testing

from qsfs import failpoints
from qsfs.errors import BackendUnavailable, Fenced, QuorumUnavailable, StaleCache
from qsfs.format.head import Fleet, HeadRef, KeptGeneration, Owner, parse_head_key
from qsfs.format.owner import parse_owner_key
from qsfs.remote.kept import kept_with
from qsfs.remote.mount_check import LocalState, accept_for_mount
from qsfs.remote.publish import NotYet, Published, Publisher
from qsfs.remote.survey import find_newest
from tests.remote.harness import TIMING, Machine, World, keys_of, make_head, make_world, plant

OLD = Owner(1, b"o" * 16)


async def owning_machine(world: World, nursery: trio.Nursery, name: str, seed: int) -> Machine:
    machine = Machine(world, name, seed=seed)
    await machine.own(nursery)
    return machine


async def newest(world: World, *lost: int) -> HeadRef:
    """What a restore finds without the given backends."""
    machine = Machine(world, "restorer", seed=99)
    machine.cut_off(*lost)
    found = await find_newest(machine.members, machine.records, world.code, machine.clock, TIMING, tries=1)
    return found.ref


async def test_acknowledgements_and_readings_of_different_backends_are_no_quorum(autojump_clock, nursery):
    """N = 3, Q = 2: B writes its record on 1 and 2 and reads on 2 and 3; A is on 1 before and on 3 after."""
    world = await make_world(3)
    plant(world, make_head(world, OLD, 10))
    a = await owning_machine(world, nursery, "a", 1)
    b = Machine(world, "b", seed=2)
    a.cut_off(2, 3)
    assert isinstance(await a.publish(eleven := a.next_head(), deadline=2.0), NotYet)

    def no_scan(call: str, key: bytes) -> None:
        if call == "scan":
            raise BackendUnavailable("1: breaks after the acknowledgement")

    def no_set(call: str, key: bytes) -> None:
        if call == "set":
            raise BackendUnavailable("3: the record does not arrive")

    b.backends[1].gate = no_scan
    b.backends[3].gate = no_set
    with pytest.raises(QuorumUnavailable):
        await b.own(nursery, deadline=10.0)
    acknowledged = {
        number
        for number, backend in b.backends.items()
        if any(call == "set" and parse_owner_key(key) for call, key in backend.calls)
    }
    assert acknowledged == {1, 2}, "the schedule did not happen"

    # B's record is on 1 and 2 now, so A may only count 3, with the 1 from before.
    a.cut_off(1, 2)
    assert isinstance(result := await a.publish(eleven), Published)
    assert await newest(world) == result.ref


async def test_a_restart_is_another_owner_and_no_head_overwrites_another(autojump_clock, nursery):
    """A sends head 11 to some, crashes, restarts, sends another head 11."""
    world = await make_world(3)
    plant(world, make_head(world, OLD, 10))
    a = await owning_machine(world, nursery, "a", 1)
    a.cut_off(2, 3)
    assert isinstance(await a.publish(deadline=2.0), NotYet)
    again = Machine(world, "a", seed=1, spool=a.spool)
    again.cut_off(1)
    await again.own(nursery)
    assert again.ownership is not None and a.ownership is not None
    assert again.ownership.owner != a.ownership.owner
    other = again.next_head()
    assert other.generation == 11
    await again.publish(other)
    await trio.testing.wait_all_tasks_blocked()
    keys = {key for store in world.control for key in keys_of(store) if parse_head_key(key)}
    assert len([key for key in keys if parse_head_key(key).ref.generation == 11]) == 2


def test_heads_sent_and_given_up_do_not_push_published_ones_out_of_the_kept_list():
    """Head 1 published, 2 and 3 sent and given up: the last two published generations stay kept."""

    def generation(number: int) -> KeptGeneration:
        return KeptGeneration(HeadRef(OLD, number, bytes([number]) * 32), number, ())

    zero, one, four = generation(0), generation(1), generation(4)
    kept = kept_with((zero,), [zero, one], {})
    assert kept == (zero, one)
    assert kept_with(kept, [zero, one, four], {}) == (one, four)


async def test_taking_over_ends_with_a_head_of_the_new_owner(autojump_clock, nursery):
    """B owns; then the head that paused A had under way lands everywhere: a restore still finds B's."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 10))
    a = await owning_machine(world, nursery, "a", 1)
    late = a.next_head()
    b = await owning_machine(world, nursery, "b", 2)
    plant(world, late)
    assert b.ownership is not None
    assert await newest(world) == b.ownership.first_ref


async def test_a_mount_whose_first_head_is_not_published_does_not_own(autojump_clock, nursery):
    """B's owner record counts with a quorum, its first head does not: B is not the owner."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 10))
    b = Machine(world, "b", seed=2)

    def no_heads(call: str, key: bytes) -> None:
        if call == "set" and parse_head_key(key):
            raise BackendUnavailable("the head does not arrive")

    for number in (1, 2):
        b.backends[number].gate = no_heads
    with pytest.raises(QuorumUnavailable):
        await b.own(nursery, deadline=5.0)


async def test_a_copy_of_a_running_machine_is_fenced_before_it_publishes(autojump_clock, nursery):
    """Two copies of one memory image publish under one owner: one of them gets nothing published."""
    world = await make_world(4)
    plant(world, make_head(world, OLD, 10))
    a = await owning_machine(world, nursery, "a", 1)
    twin = copy_running(a, world, nursery)
    first = await a.publish()
    assert isinstance(first, Published)
    with pytest.raises(Fenced, match="copy of this machine"):
        await twin.publish(twin.next_head(counters={"by": 2}))
    with pytest.raises(Fenced):
        await twin.publish(twin.next_head(counters={"by": 3}))
    assert isinstance(await a.publish(), Published), "the copy that published is not disturbed"


def copy_running(machine: Machine, world: World, nursery: trio.Nursery) -> Machine:
    """A copy of the machine's memory, taken while nothing is under way."""
    twin = Machine(world, machine.name, seed=machine.seed + 100, spool=list(machine.spool))
    assert machine.ownership is not None
    original = machine.ownership.publisher
    publisher = Publisher(
        original.owner,
        original.last_sent,
        members=twin.members,
        records=twin.records,
        code=world.code,
        clock=twin.clock,
        nursery=nursery,
        store_before_send=twin.store,
        timing=twin.timing,
    )
    publisher.published = original.published
    publisher._written = set(original._written)
    twin.ownership = dataclasses.replace(machine.ownership, publisher=publisher)
    return twin


async def test_what_one_mount_lets_expire_is_not_kept_by_the_next(autojump_clock, nursery):
    """The kept list is in the head: a new owner keeps what the head that it found names, and that head."""
    world = await make_world(3)
    pinned = KeptGeneration(HeadRef(OLD, 3, b"3" * 32), 3, ("before-upgrade",))
    head = make_head(world, OLD, 10, kept=(pinned,))
    sealed = plant(world, head)
    a = await owning_machine(world, nursery, "a", 1)
    assert a.ownership is not None
    assert [kept.head for kept in a.ownership.first.kept] == [pinned.head, sealed.ref]
    assert a.ownership.first.kept[0] == pinned


async def test_a_change_of_the_fleet_counts_with_a_quorum_of_both(autojump_clock, nursery):
    """Fleet 1 is {1, 2, 3}, fleet 2 is {3, 4, 5}: a head that names both needs two of each."""
    world = await make_world(5)
    one, two = split_fleet(world, (1, 2, 3), (3, 4, 5))
    plant(world, make_head(world, OLD, 10, fleets=(one,)))
    world.fleet = one
    a = Machine(world, "a", seed=1)
    a = grown(a, world, one, two)
    await a.own(nursery)
    both = a.next_head(fleets=(one, two))
    a.cut_off(4, 5)
    assert isinstance(result := await a.publish(both, deadline=3.0), NotYet)
    assert result.counted == {1, 2, 3} and "fleet 2: 1 of the 2" in result.reasons[0]
    a.cut_off(1, 4)
    assert isinstance(await a.publish(both), Published)
    # The next machine knows only fleet 1 and finds the change under way.
    b = grown(Machine(world, "b", seed=2), world, one, two)
    b.cut_off(4, 5)
    with pytest.raises(QuorumUnavailable, match="fleet 2"):
        await b.own(nursery, deadline=3.0)
    b.cut_off(4)
    ownership = await b.own(nursery)
    assert ownership.first.fleets == (one, two)
    # The second head names only the new fleet, and counts without the old one.
    b.cut_off(1, 2)
    assert isinstance(await b.publish(b.next_head(fleets=(two,))), Published)


async def test_a_takeover_from_the_old_list_finds_the_new_fleet(autojump_clock, nursery):
    """B only knows list F1; the newest head names F2: B counts, owns and publishes in F2."""
    world = await make_world(5)
    one, two = split_fleet(world, (1, 2, 3), (3, 4, 5))
    plant(world, make_head(world, OLD, 10, fleets=(one,)), (1, 2, 3))
    plant(world, make_head(world, OLD, 11, fleets=(two,)), (3, 4))
    world.fleet = one
    b = grown(Machine(world, "b", seed=2), world, one, two)
    b.cut_off(4, 5)
    with pytest.raises(QuorumUnavailable, match="fleet 2"):
        await b.own(nursery, deadline=3.0)
    b.cut_off(5)
    assert (await b.own(nursery)).first.fleets == (two,)


async def test_the_newest_fleet_is_that_of_the_newest_head_not_the_highest_number(autojump_clock, nursery):
    """An aborted change left a head that names fleet 9; later heads name fleet 1 again."""
    world = await make_world(5)
    one, nine = split_fleet(world, (1, 2, 3), (3, 4, 5), second=9)
    aborted = plant(world, make_head(world, OLD, 10, fleets=(one, nine)), (1, 2, 4))
    plant(world, make_head(world, OLD, 11, aborted.ref, fleets=(one,)), (1, 2, 3))
    world.fleet = one
    b = grown(Machine(world, "b", seed=2), world, one, nine)
    b.cut_off(4, 5)
    assert (await b.own(nursery)).first.fleets == (one,)


async def test_a_count_in_a_fleet_that_changes_meanwhile_is_worth_nothing(autojump_clock, nursery):
    """The owner record counted in fleet 1; by then the newest head names fleet 2 too: it is written anew."""
    world = await make_world(5)
    one, two = split_fleet(world, (1, 2, 3), (3, 4, 5))
    plant(world, make_head(world, OLD, 10, fleets=(one,)), (1, 2, 3))
    world.fleet = one
    changed = make_head(world, OLD, 11, fleets=(one, two))

    def change() -> None:
        plant(world, changed, (1, 2, 3, 4, 5))

    failpoints.arm("own.announce", change)
    b = grown(Machine(world, "b", seed=2), world, one, two)
    ownership = await b.own(nursery)
    assert ownership.first.fleets == (one, two)
    for number in (4, 5):
        records = [parse_owner_key(key) for key in keys_of(world.control_of(number))]
        assert ownership.owner in [named.owner for named in records if named]


def split_fleet(
    world: World, first: tuple[int, ...], second_numbers: tuple[int, ...], *, second: int = 2
) -> tuple[Fleet, Fleet]:
    entries = {entry.number: entry for entry in world.fleet.entries}
    return (
        Fleet(1, tuple(entries[number] for number in first)),
        Fleet(second, tuple(entries[number] for number in second_numbers)),
    )


def grown(machine: Machine, world: World, *fleets: Fleet) -> Machine:
    """The machine with connections to every backend of the world, while its world's fleet is the first."""
    entries = {entry.number: entry for fleet in fleets for entry in fleet.entries}
    everything = dataclasses.replace(world, fleet=Fleet(0, tuple(entries[n] for n in sorted(entries))))
    grown_machine = Machine(everything, machine.name, seed=machine.seed)
    grown_machine.world = world
    return grown_machine


async def test_a_healthy_machine_mounts_after_a_crash_between_sending_and_recording(autojump_clock, nursery):
    """Cut, head sent, crash before its record is committed: the newer head is in the spool, so it is ours."""
    world = await make_world(3)
    plant(world, make_head(world, OLD, 10))
    a = await owning_machine(world, nursery, "a", 1)
    assert a.ownership is not None
    base = a.ownership.first_ref
    assert isinstance(sent := await a.publish(), Published)
    local = LocalState(base, True, base, frozenset(sealed.ref for sealed in a.spool))
    again = Machine(world, "a", seed=5)
    ownership = await again.own(nursery, accept=accept_for_mount(lambda: local))
    assert ownership.found_ref == sent.ref
    # Without the spool the same machine could not tell itself from a rolled-back one.
    forgetful = dataclasses.replace(local, sent=frozenset())
    with pytest.raises(StaleCache):
        await Machine(world, "a", seed=6).own(nursery, accept=accept_for_mount(lambda: forgetful))
