"""Publishing: what is sent, when it counts, and when a mount stops."""

from __future__ import annotations

import pytest
import trio

from qsfs.errors import BackendFull, BackendRefused, BackendUnavailable, Fenced, QsfsBug
from qsfs.format.head import Owner, parse_head_key
from qsfs.format.owner import OwnerRecord, owner_key, seal_owner_record
from qsfs.remote.members import State
from qsfs.remote.publish import NotYet, Published
from tests.remote.harness import FSID, Machine, World, keys_of, make_head, make_world, plant

OLD = Owner(1, b"o" * 16)


async def owner_of(world: World, nursery: trio.Nursery) -> Machine:
    plant(world, make_head(world, OLD, 10))
    machine = Machine(world)
    await machine.own(nursery)
    await trio.sleep(machine.timing.grace)
    for backend in machine.backends.values():
        backend.calls.clear()
    return machine


def sets(machine: Machine, number: int) -> list[bytes]:
    return [key for call, key in machine.backends[number].calls if call == "set"]


async def test_a_head_is_in_the_spool_before_it_is_sent(autojump_clock, nursery):
    """Else a crash between would make a healthy machine look like a rolled-back one."""
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    stored = trio.Event()

    async def store(sealed: object) -> None:
        await trio.sleep(3)
        assert not any(sets(machine, number) for number in machine.backends)
        stored.set()

    machine.ownership.publisher._store_before_send = store
    assert isinstance(await machine.publish(), Published)
    assert stored.is_set()


async def test_a_head_that_cannot_be_stored_is_not_sent_and_leaves_no_gap(autojump_clock, nursery):
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    publisher = machine.ownership.publisher
    before = publisher.last_sent

    async def full_disk(sealed: object) -> None:
        raise OSError(28, "no space")

    publisher._store_before_send, store = full_disk, publisher._store_before_send
    with pytest.raises(OSError, match="no space"):
        await machine.publish()
    assert publisher.last_sent == before and not any(sets(machine, number) for number in machine.backends)
    publisher._store_before_send = store
    assert isinstance(await machine.publish(), Published)


async def test_a_head_below_its_quorum_is_not_published_and_says_why(autojump_clock, nursery):
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    machine.cut_off(1, 2)
    result = await machine.publish(deadline=5.0)
    assert isinstance(result, NotYet) and result.counted == {3, 4}
    assert result.reasons[0] == (
        "fleet 1: 2 of the 3 backends needed (of 4) answered, without 1 host1:9900/qsfs, 2 host2:9900/qsfs"
    )
    assert "host1" in result.reasons[1] and "connection refused" in result.reasons[1]
    assert machine.ownership.publisher.published == machine.ownership.first_ref


async def test_a_head_given_again_is_the_same_bytes_and_earlier_counts_hold(autojump_clock, nursery):
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    machine.cut_off(1, 2)
    head = machine.next_head()
    assert isinstance(await machine.publish(head, deadline=5.0), NotYet)
    machine.cut_off(1, 3, 4)
    result = await machine.publish(head)
    assert isinstance(result, Published) and result.counted == {2, 3, 4}
    keys = {parse_head_key(key) for store in world.control for key in keys_of(store)}
    assert len({named.ref for named in keys if named and named.ref.generation == 11}) == 1
    assert len(machine.spool) == 2


async def test_backends_that_are_late_go_on_within_the_grace(autojump_clock, nursery):
    """N = 5, Q = 3: one of the two that were not waited for comes in time, the other does not."""
    world = await make_world(5, m=2)
    machine = await owner_of(world, nursery)
    grace = machine.timing.grace
    machine.backends[1].delay = lambda call: grace / 20
    machine.backends[2].delay = lambda call: grace
    result = await machine.publish()
    assert isinstance(result, Published) and result.missing == {1, 2}
    await trio.sleep(grace * 4)
    holders = {
        number
        for number in machine.backends
        if any(
            (named := parse_head_key(key)) and named.ref == result.ref
            for key in keys_of(world.control_of(number))
        )
    }
    assert holders == {1, 3, 4, 5}


@pytest.mark.parametrize("error", [BackendUnavailable, BackendRefused, BackendFull])
async def test_a_backend_that_fails_at_first_is_tried_again(autojump_clock, nursery, error):
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    failures = {1: 3, 2: 3}

    def gate(number: int):
        def fail(call: str, key: bytes) -> None:
            if call == "set" and failures[number]:
                failures[number] -= 1
                raise error("not now")

        return fail

    for number in failures:
        machine.backends[number].gate = gate(number)
    assert isinstance(await machine.publish(), Published)
    assert failures in ({1: 0, 2: 0}, {1: 1, 2: 0}, {1: 0, 2: 1})


async def test_a_connection_that_breaks_between_acknowledgement_and_reading_does_not_count(
    autojump_clock, nursery
):
    """The reading must come after the acknowledgement on the same connection."""
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    machine.cut_off(3)
    broken: list[bytes] = []

    def breaks(call: str, key: bytes) -> None:
        if call == "scan":
            broken.append(key)
            raise BackendUnavailable("connection lost")

    machine.backends[1].gate = breaks
    result = await machine.publish(deadline=3.0)
    assert isinstance(result, NotYet) and result.counted == {2}
    assert sets(machine, 1) and broken


async def test_a_silent_backend_ends_as_unknown_and_is_suspect(autojump_clock, nursery):
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    machine.backends[1].delay = lambda call: 1e9
    machine.cut_off(2)
    result = await machine.publish(deadline=machine.timing.attempt + 0.1)
    assert isinstance(result, NotYet)
    assert any("no answer in 5 s" in reason for reason in result.reasons)
    assert machine.members.by_number(1).state is State.SUSPECT


def announce(world: World, owner: Owner, *numbers: int) -> None:
    key, value = seal_owner_record(OwnerRecord(FSID, owner, 1, "other-host"), world.keys, world.clock)
    for number in numbers:
        world.control_of(number).put(key, value)


async def test_a_larger_owner_record_on_one_backend_fences(autojump_clock, nursery):
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    announce(world, Owner(99, b"b" * 16), 2)
    machine.cut_off(1)
    with pytest.raises(Fenced, match=r"on 'other-host' has taken over.*epoch 99"):
        await machine.publish()
    machine.cut_off()
    world.control_of(2).lose(owner_key(FSID, Owner(99, b"b" * 16)))
    with pytest.raises(Fenced):
        await machine.publish()


async def test_a_larger_owner_in_a_head_alone_fences(autojump_clock, nursery):
    """Its record may have been lost there; the head is enough."""
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    plant(world, make_head(world, Owner(99, b"b" * 16), 1), (2,))
    machine.cut_off(1)
    with pytest.raises(Fenced, match="epoch 99"):
        await machine.publish()


async def test_the_mount_ids_order_owners_of_one_epoch(autojump_clock, nursery):
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    epoch = machine.ownership.owner.epoch
    announce(world, Owner(epoch, bytes(16)), 1, 2, 3)
    assert isinstance(await machine.publish(), Published)
    announce(world, Owner(epoch, b"\xff" * 16), 1, 2, 3)
    with pytest.raises(Fenced):
        await machine.publish()


async def test_a_forged_larger_owner_does_not_fence_and_its_backend_does_not_count(autojump_clock, nursery):
    """Only sealed records count; but a backend that lists what it cannot prove may hide something."""
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    world.control_of(1).put(owner_key(FSID, Owner(99, b"b" * 16)), b"forged")
    result = await machine.publish()
    assert isinstance(result, Published) and 1 not in result.counted
    machine.cut_off(2)
    result = await machine.publish(deadline=3.0)
    assert isinstance(result, NotYet) and result.counted == {3, 4}
    assert any("may hold something newer" in reason for reason in result.reasons)


async def test_a_fence_seen_by_a_late_backend_is_reported_and_stops_the_next_head(autojump_clock, nursery):
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    seen: list[Fenced] = []
    publisher = machine.ownership.publisher
    publisher._on_fenced = seen.append
    announce(world, Owner(99, b"b" * 16), 1)
    machine.backends[1].delay = lambda call: 0.05
    assert isinstance(await machine.publish(), Published)
    await trio.sleep(machine.timing.grace)
    assert publisher.fenced is not None and seen == [publisher.fenced]
    with pytest.raises(Fenced):
        await machine.publish()


async def test_an_older_head_of_ours_by_a_copy_does_not_fence(autojump_clock, nursery):
    """It is not newer than our last published one: the copy has fenced itself."""
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    result = await machine.publish()
    assert isinstance(result, Published)
    plant(world, make_head(world, machine.ownership.owner, result.ref.generation, counters={"by": 2}))
    assert isinstance(await machine.publish(), Published)
    plant(world, make_head(world, machine.ownership.owner, result.ref.generation + 2, counters={"by": 2}))
    with pytest.raises(Fenced, match="copy of this machine"):
        await machine.publish(machine.next_head())


async def test_wherever_a_head_is_found_the_heads_sent_before_it_are_found_too(autojump_clock, nursery):
    """Heads 11 and 12 reached nobody; head 13 brings them along, so that its line has no gap."""
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    machine.cut_off(1, 2, 3, 4)
    for _ in range(2):
        assert isinstance(await machine.publish(deadline=1.0), NotYet)
    machine.cut_off(1, 2, 3)
    assert isinstance(await machine.publish(deadline=3.0), NotYet)
    held = [parse_head_key(key) for key in keys_of(world.control_of(4))]
    assert {named.ref.generation for named in held if named} == {10, 11, 12, 13}
    machine.cut_off()
    assert isinstance(await machine.publish(), Published)
    machine.backends[1].calls.clear()
    assert isinstance(await machine.publish(), Published)
    await trio.sleep(machine.timing.grace)
    assert len(sets(machine, 1)) == 1, "what is published is not sent again"


async def test_a_publication_without_time_leaves_nothing_running(autojump_clock, nursery):
    """It is over before the first conversation begins, and given again it keeps its grace."""
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    head = machine.next_head()
    assert isinstance(await machine.publish(head, deadline=0.0), NotYet)
    await trio.sleep(60)
    assert not any(backend.calls for backend in machine.backends.values())
    machine.backends[1].delay = lambda call: 100.0
    assert isinstance(await machine.publish(head, deadline=0.0), NotYet)
    assert isinstance(await machine.publish(head), Published)
    await trio.sleep(1000)
    assert not machine.backends[1].calls


async def test_nothing_more_is_sent_once_a_mount_is_fenced(autojump_clock, nursery):
    world = await make_world(4)
    machine = await owner_of(world, nursery)
    announce(world, Owner(99, b"b" * 16), 1)
    for number in (2, 3, 4):
        machine.backends[number].delay = lambda call: 1.0
    with pytest.raises(Fenced):
        await machine.publish()
    await trio.sleep(60)
    assert not any(sets(machine, number) for number in (2, 3, 4))


async def test_months_of_heads_do_not_stay_in_memory(autojump_clock, nursery):
    """What the backends no longer list is forgotten; the next head is judged all the same."""
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    for _ in range(40):
        assert isinstance(await machine.publish(), Published)
        await trio.sleep(machine.timing.grace)
    publisher = machine.ownership.publisher
    assert len(machine.records._facts) < 8 and len(publisher._written) < 8 and len(publisher.sent) == 1


async def test_a_cancelled_publication_leaves_nothing_running(autojump_clock, nursery):
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    for backend in machine.backends.values():
        backend.delay = lambda call: 0.4
    with trio.move_on_after(1.0) as scope:
        await machine.publish()
    assert scope.cancelled_caught
    calls = sum(len(backend.calls) for backend in machine.backends.values())
    await trio.sleep(60)
    assert sum(len(backend.calls) for backend in machine.backends.values()) == calls
    for backend in machine.backends.values():
        backend.delay = lambda call: 0.0
    assert isinstance(await machine.publish(), Published)


@pytest.mark.parametrize(
    "change", [{"owner": OLD}, {"predecessor": None}, {"generation": 10}, {"fsid": bytes(16)}]
)
async def test_a_head_that_does_not_follow_the_last_one_is_a_bug(autojump_clock, nursery, change):
    world = await make_world(3)
    machine = await owner_of(world, nursery)
    head = machine.next_head()
    wrong = type(head)(**{**{name: getattr(head, name) for name in head.__dataclass_fields__}, **change})
    with pytest.raises(QsfsBug):
        await machine.publish(wrong)
