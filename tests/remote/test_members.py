"""Members: states from recent results, and who is who by identity."""

from __future__ import annotations

import dataclasses

import pytest
import trio

from qsfs.backend.memory import MemoryBackend, MemoryStore
from qsfs.clock import FixedClock
from qsfs.errors import BackendFull, BackendUnavailable, Corrupt, NotFound, QsfsBug, WrongBackend
from qsfs.format.fleet import Fleet
from qsfs.format.identity import Tombstone, identity_key, seal_tombstone
from qsfs.remote import members as module
from qsfs.remote.identity import find_members, identify, read_identity, read_tombstone
from qsfs.remote.members import DRAINING, Candidate, Member, Members, State
from qsfs.remote.placement import FULL_SECONDS, FreeSpace
from tests.remote.harness import FSID, FaultyBackend, World, make_world


@pytest.fixture
def world() -> World:
    return trio.run(make_world, 3)


def member(world: World, number: int = 1) -> tuple[Member, FixedClock]:
    clock = FixedClock()
    backend = FaultyBackend(world.data[number - 1])
    control = FaultyBackend(world.control[number - 1])
    return Member(world.fleet.entries[number - 1], backend, control, clock), clock


def candidates(world: World) -> list[Candidate]:
    made = []
    for i, entry in enumerate(world.fleet.entries):
        data = FaultyBackend(world.data[i])
        made.append(
            Candidate(
                entry.address,
                entry.namespace,
                data,
                lambda name, i=i: FaultyBackend(world.control[i]),
                group="g",
            )
        )
    return made


def test_failures_in_a_row_take_a_member_down_and_one_answer_brings_it_back(world):
    one, clock = member(world)
    born = one.since_ns
    assert (one.state, one.error, one.ready) == (State.UP, None, True)
    clock.advance(10)
    for expected in (State.SUSPECT, State.SUSPECT, State.DOWN):
        one.failed(error := BackendUnavailable("no answer"))
        assert one.state is expected and one.error is error
    assert one.since_ns == born + 10 * 10**9
    assert not one.ready
    clock.advance(module.FIRST_PROBE_SECONDS * 4)
    assert one.ready
    one.succeeded()
    assert (one.state, one.error, one.since_ns) == (State.UP, None, clock.time_ns())


def test_probes_of_a_dead_member_get_rarer_up_to_a_bound(world):
    one, clock = member(world)
    for _ in range(3):
        one.failed(BackendUnavailable("no answer"))
    waits = []
    for _ in range(10):
        assert not one.ready
        waits.append(0)
        while not one.ready:
            clock.advance(0.5)
            waits[-1] += 0.5
        one.failed(BackendUnavailable("no answer"))
    assert waits[0] == module.FIRST_PROBE_SECONDS and waits[-1] == module.LAST_PROBE_SECONDS
    assert waits == sorted(waits)


def test_a_member_that_is_long_quiet_is_probed(world):
    """Else a backend that dies while nobody needs it stays up in the status."""
    one, clock = member(world)
    assert not one.due
    clock.advance(module.QUIET_SECONDS)
    assert one.due and one.state is State.UP
    one.succeeded()
    assert not one.due
    one.failed(BackendUnavailable("no answer"))
    assert one.due, "it is in trouble"


def test_many_calls_that_fail_together_do_not_make_probes_rarer(world):
    one, clock = member(world)
    for _ in range(40):
        one.failed(BackendUnavailable("no answer"))
    assert one.state is State.DOWN and not one.ready
    clock.advance(module.FIRST_PROBE_SECONDS)
    assert one.ready
    one.succeeded()
    for _ in range(3):
        one.failed(BackendUnavailable("no answer"))
    assert not one.ready, "an answer in between begins anew"
    clock.advance(module.FIRST_PROBE_SECONDS)
    assert one.ready


def test_a_full_member_is_up_and_takes_nothing(world):
    one, _ = member(world)
    one.identified = True
    assert one.writable
    one.failed(BackendFull("no room"))
    assert one.state is State.UP and one.full and not one.writable
    one.succeeded()
    assert one.full, "an answered read says nothing of room"
    one.succeeded(stored=True)
    assert one.writable


async def test_a_full_member_is_used_again_once_it_says_that_it_has_room(autojump_clock, world):
    one, clock = member(world)
    one.identified = True
    free = FreeSpace(Members([one]), clock)
    await free.refresh()
    one.failed(BackendFull("no room"))
    world.data[0].limit_bytes = 100
    clock.advance(FULL_SECONDS)
    assert free.stale
    await free.refresh()
    assert one.full, "less than a shard is no room"
    world.data[0].limit_bytes = 0
    await free.refresh()
    assert one.writable


def test_nothing_is_stored_where_the_identity_is_not_known_or_that_is_emptied(world):
    one, _ = member(world)
    assert not one.writable
    one.identified = True
    one.entry = dataclasses.replace(one.entry, state=DRAINING)
    assert not one.writable


async def test_a_probe_records_what_it_finds_and_raises_nothing(autojump_clock, world):
    one, _ = member(world)
    await one.probe()
    assert one.state is State.UP
    one.data.down = True  # type: ignore[attr-defined]
    await one.probe()
    assert one.state is State.SUSPECT


def test_members_are_found_by_number(world):
    all_members = Members(member(world, number)[0] for number in (3, 1))
    assert [one.number for one in all_members] == [1, 3] and len(all_members) == 2
    assert all_members.by_number(3).number == 3 and all_members.by_number(2) is None
    assert [one.number for one in all_members.of({1, 2})] == [1]
    with pytest.raises(QsfsBug):
        all_members.add(member(world, 3)[0])
    all_members.by_number(3).failed(BackendUnavailable("x"))
    assert [one.number for one in all_members.due()] == [3]
    assert all_members.remove(3).number == 3 and all_members.remove(3) is None


def test_the_newest_head_says_what_the_entries_are(world):
    all_members = Members([member(world, 1)[0], member(world, 2)[0]])
    entries = list(world.fleet.entries)
    entries[0] = dataclasses.replace(entries[0], group="moved")
    entries[1] = dataclasses.replace(entries[1], identity=b"another one here")
    missing = all_members.adopt([Fleet(2, tuple(entries))])
    assert all_members.by_number(1).entry.group == "moved"
    assert [entry.number for entry in missing] == [2, 3]
    assert all_members.by_number(2).entry.identity == world.fleet.entries[1].identity


def test_what_leaves_with_the_next_head_takes_nothing_for_whoever_finds_the_change(world):
    """A takeover in the middle: what is stored there would be one shard short once the fleet has changed."""
    all_members = Members([member(world, 1)[0], member(world, 2)[0]])
    for one in all_members:
        one.identified = True
    all_members.adopt([Fleet(1, world.fleet.entries), Fleet(2, world.fleet.entries[1:])])
    assert [one.writable for one in all_members] == [False, True]
    all_members.adopt([Fleet(1, world.fleet.entries)])
    assert all(one.writable for one in all_members)


async def test_every_configured_backend_is_asked_who_it_is(autojump_clock, world):
    found, strangers = await find_members(candidates(world), world.keys, world.clock)
    assert [one.entry.identity for one in found] == [entry.identity for entry in world.fleet.entries]
    assert all(one.identified for one in found) and not strangers
    assert (
        found.by_number(1).entry.control_namespace == "qsfs-heads" and found.by_number(1).entry.group == "g"
    )
    assert found.by_number(1).control.name.endswith("qsfs-heads") and found.by_number(1).index is None


async def test_the_stored_fleet_gives_the_entries(autojump_clock, world):
    found, _ = await find_members(candidates(world), world.keys, world.clock, fleets=[world.fleet])
    assert [one.entry for one in found] == list(world.fleet.entries)


async def test_a_moved_backend_is_known_by_its_identity(autojump_clock, world):
    configured = candidates(world)
    configured[0] = dataclasses.replace(configured[0], address="elsewhere:1")
    found, strangers = await find_members(configured, world.keys, world.clock, fleets=[world.fleet])
    assert found.by_number(1).identified and not strangers


async def test_a_backend_that_does_not_answer_is_taken_by_its_address_until_it_does(autojump_clock, world):
    configured = candidates(world)
    configured[1].data.down = True  # type: ignore[attr-defined]
    configured[2].data.delay = lambda call: 1e6  # type: ignore[attr-defined]
    found, strangers = await find_members(configured, world.keys, world.clock, fleets=[world.fleet])
    assert [one.identified for one in found] == [True, False, False] and not strangers
    assert found.by_number(2).state is State.SUSPECT and "no answer" in str(found.by_number(3).error)
    configured[1].data.down = False  # type: ignore[attr-defined]
    assert await identify(found.by_number(2), world.keys)
    assert found.by_number(2).identified and found.by_number(2).state is State.UP


async def test_without_a_stored_fleet_a_silent_backend_is_nobody(autojump_clock, world):
    configured = candidates(world)
    configured[1].data.down = True  # type: ignore[attr-defined]
    found, strangers = await find_members(configured, world.keys, world.clock)
    assert [one.number for one in found] == [1, 3]
    assert isinstance(strangers[0].error, BackendUnavailable)


async def test_an_emptied_backend_is_noticed(autojump_clock, world):
    world.data[0].clear()
    found, strangers = await find_members(candidates(world), world.keys, world.clock, fleets=[world.fleet])
    assert [one.number for one in found] == [2, 3]
    assert isinstance(strangers[0].error, WrongBackend) and "carries no identity" in str(strangers[0].error)
    one, _ = member(world)
    assert not await identify(one, world.keys)
    assert one.state is State.DOWN and isinstance(one.error, WrongBackend)


async def test_swapped_backends_are_told_apart(autojump_clock, world):
    configured = candidates(world)
    world.data[0], world.data[1] = world.data[1], world.data[0]
    swapped = [
        dataclasses.replace(configured[0], data=FaultyBackend(world.data[0])),
        dataclasses.replace(configured[1], data=FaultyBackend(world.data[1])),
        configured[2],
    ]
    found, _ = await find_members(swapped, world.keys, world.clock, fleets=[world.fleet])
    assert found.by_number(2).data.name == world.data[0].name, "each is who it says it is"
    one, _ = member(world)
    assert not await identify(one, world.keys)
    assert "is entry 2 of the fleet, not 1" in str(one.error)


async def test_a_copy_of_a_backend_is_not_a_second_one(autojump_clock, world):
    world.data[1].go_back_to(world.data[0])
    found, strangers = await find_members(candidates(world), world.keys, world.clock)
    assert [one.number for one in found] == [1, 3]
    assert "has the same identity as" in str(strangers[0].error)


async def test_absent_corrupt_and_unknown_identities_are_three_results(autojump_clock, world):
    backend = FaultyBackend(world.data[0])
    key = identity_key(FSID)
    assert (await read_identity(backend, world.keys)).number == 1
    world.data[0].rot(key, lambda value: value[:-1] + b"?")
    with pytest.raises(Corrupt):
        await read_identity(backend, world.keys)
    _, strangers = await find_members(candidates(world)[:1], world.keys, world.clock, fleets=[world.fleet])
    assert "does not authenticate" in str(strangers[0].error)
    world.data[0].lose(key)
    with pytest.raises(NotFound):
        await read_identity(backend, world.keys)
    backend.down = True
    with pytest.raises(BackendUnavailable):
        await read_identity(backend, world.keys)


async def test_a_retired_backend_carries_a_tombstone(autojump_clock, world):
    backend = MemoryBackend(MemoryStore())
    assert await read_tombstone(backend, world.keys) is None
    stone = Tombstone(FSID, b"i" * 16, 1, 5, "replaced")
    await backend.set(*seal_tombstone(stone, world.keys, world.clock))
    assert await read_tombstone(backend, world.keys) == stone


def test_a_backend_that_is_another_one_is_listed_anew(world, expect_log):
    """Where heads lie among the data: a cursor into a lost namespace would skip records in the new one."""
    clock = FixedClock()
    backend = FaultyBackend(world.data[0])
    one = Member(world.fleet.entries[0], backend, backend, clock, identified=True)
    assert one.index is not None
    one.index.cursor, one.index.keys = b"somewhere", {b"qsfs:h:"}
    one.failed(BackendUnavailable("no answer"))
    assert one.index.cursor == b"somewhere"
    expect_log("is another; nothing is stored there", count=1)
    one.not_ours(WrongBackend("is another"))
    assert (one.index.cursor, one.index.keys) == (None, set())


@pytest.mark.parametrize("apart", [True, False], ids=["control apart", "control shared"])
async def test_a_backend_that_is_emptied_while_it_is_in_use_is_not_used_again(
    autojump_clock, world, expect_log, apart
):
    """What is stored in an emptied namespace would be counted as stored, beside all that was lost."""
    data = FaultyBackend(world.data[0])
    control = FaultyBackend(world.control[0]) if apart else data
    if not apart:
        assert world.control[0] is not world.data[0]
    clock = FixedClock()
    one = Member(world.fleet.entries[0], data, control, clock)
    assert await identify(one, world.keys) and one.writable
    await one.data.set(b"k", b"v")
    store = world.control[0] if apart else world.data[0]
    earlier = store.copy()
    store.clear()
    expect_log("emptied or swapped.*nothing is stored there until", count=1)
    used = one.control if apart else one.data
    with pytest.raises(WrongBackend) as caught:
        await used.set(b"k", b"w")
    one.failed(caught.value)
    one.failed(caught.value)
    assert not one.writable and not one.identified and "emptied" in str(one.error)
    assert not await identify(one, world.keys)
    assert store.peek(b"k") is None
    store.go_back_to(earlier)
    clock.advance(module.LAST_PROBE_SECONDS)
    assert await identify(one, world.keys) and one.writable
