"""What every backend carries of heads and ownership comes back to those that lack it, and only by who owns."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import trio

from qsfs.daemon.copies_upkeep import LOOK_SECONDS, STEP_SECONDS, CopiesUpkeep
from qsfs.errors import BackendFull, BackendUnavailable
from qsfs.format.head import Fleet, Head, KeptGeneration, Owner, head_key
from qsfs.format.identity import identity_key, open_tombstone, tombstone_key
from qsfs.format.owner import owner_key
from qsfs.remote.base import PUBLISHED_KEY, encode_local_head
from qsfs.remote.publish import Published
from qsfs.remote.survey import find_newest
from tests.remote.harness import FSID, TIMING, Machine, World, make_head, make_world, plant

OLD = Owner(1, b"o" * 16)
IDENTITY = identity_key(FSID)


class Mount(Machine):
    """A machine that owns, and the upkeep of what it has published; `pins` are snapshots of older heads."""

    upkeep: CopiesUpkeep
    row: bytes | None = None
    pins: tuple[KeptGeneration, ...] = ()

    def local(self, name: bytes) -> bytes | None:
        assert name == PUBLISHED_KEY
        return self.row

    def note(self) -> None:
        """Records the last published head, as a mount does."""
        published = self.ownership.publisher.published
        sealed = next(sealed for sealed in self.spool if sealed.ref == published)
        self.row = encode_local_head(sealed, ours=True)

    async def begin(self, nursery: trio.Nursery) -> None:
        await self.own(nursery)
        self.note()
        await trio.sleep(2 * TIMING.grace)
        self.upkeep = CopiesUpkeep(self, self.members, self.ownership.publisher, self.world.keys, self.clock)
        self.forget_calls()

    def forget_calls(self) -> None:
        for backend in self.backends.values():
            backend.calls.clear()

    async def publish_next(self) -> Head:
        head = self.next_head()
        pinned = {kept.head for kept in self.pins}
        kept = (*self.pins, *(kept for kept in head.kept if kept.head not in pinned))
        head = dataclasses.replace(head, kept=tuple(sorted(kept, key=lambda entry: entry.head)))
        assert isinstance(await self.publish(head), Published)
        await trio.sleep(2 * TIMING.grace)
        self.note()
        return head

    async def rounds(self, count: int = 1) -> None:
        """As many looks as there are backends."""
        for _ in range(count * len(self.backends)):
            await self.upkeep.step()

    def wanted(self) -> set[bytes]:
        """The keys that every backend should carry."""
        publisher = self.ownership.publisher
        head = self.records.held(publisher.published)
        refs = {publisher.published, *(kept.head for kept in head.kept)}
        return {owner_key(FSID, publisher.owner), *(head_key(FSID, ref) for ref in refs)}

    def lacking(self) -> dict[int, set[bytes]]:
        held = {number: set(self.world.control_of(number).keys()) for number in self.backends}
        return {number: lack for number, keys in held.items() if (lack := self.wanted() - keys)}

    def sets(self) -> list[tuple[int, bytes]]:
        return [(n, key) for n, backend in self.backends.items() for call, key in backend.calls if call == "set"]


def empty(world: World, number: int) -> None:
    """The backend is as it was when it was made: it has its identity and nothing else."""
    store = world.control_of(number)
    for key in list(store.keys()):
        if key != IDENTITY:
            store.lose(key)


def snapshot(world: World) -> KeptGeneration:
    """A pinned generation of long ago, whose head lies on all."""
    sealed = plant(world, make_head(world, OLD, 3))
    return KeptGeneration(sealed.ref, 3, ("before-upgrade",))


@pytest.fixture
async def mount(autojump_clock, nursery) -> Mount:
    world = await make_world(5, k=2, m=1)
    pinned = snapshot(world)
    plant(world, make_head(world, OLD, 10, kept=(pinned,)))
    mount = Mount(world)
    mount.pins = (pinned,)
    await mount.begin(nursery)
    return mount


async def test_a_backend_that_was_away_gets_all_that_the_others_carry(mount, autojump_clock, caplog):
    """The owner record went out once, and the head of a snapshot, too: no later head brings them."""
    caplog.set_level(logging.INFO)
    world = mount.world
    empty(world, 5)
    await mount.publish_next()
    assert len(mount.lacking()[5]) == 4, "the owner record, the pinned head, and the two before"
    await mount.rounds()
    assert not mount.lacking()
    assert mount.upkeep.refilled == 4 and not mount.upkeep.warnings()
    lines = [record.message for record in caplog.records if "lacked, and has again" in record.message]
    assert len(lines) == 1 and "host5" in lines[0] and "owner record of epoch 2" in lines[0]
    assert mount.upkeep.status() == {"refilled": 4, "last": lines[0]}


async def test_backends_that_are_emptied_in_turn_lose_nothing(mount, autojump_clock):
    """Nothing changes meanwhile, so no head is published: what was there is all that there is."""
    async with trio.open_nursery() as upkeep:
        upkeep.start_soon(mount.upkeep.run)
        for number in mount.backends:
            empty(mount.world, number)
            await trio.sleep(2 * LOOK_SECONDS)
            assert not mount.lacking()
        upkeep.cancel_scope.cancel()
    restorer = Machine(mount.world, "restorer", seed=99)
    found = await find_newest(
        restorer.members, restorer.records, mount.world.code, restorer.clock, TIMING, tries=1
    )
    assert found.ref == mount.ownership.publisher.published


async def test_a_backend_that_is_back_is_looked_at_at_once(mount, autojump_clock):
    async with trio.open_nursery() as upkeep:
        upkeep.start_soon(mount.upkeep.run)
        await trio.sleep(20 * STEP_SECONDS)
        mount.members.by_number(3).failed(BackendUnavailable("backend x: gone"))
        empty(mount.world, 3)
        await trio.sleep(3 * STEP_SECONDS)
        assert mount.lacking()
        mount.members.by_number(3).succeeded()
        await trio.sleep(3 * STEP_SECONDS)
        assert not mount.lacking()
        upkeep.cancel_scope.cancel()


async def test_damage_is_refilled_too(mount, autojump_clock):
    """Also where the backend itself calls it whole: now and then one of them is read."""
    newest = mount.ownership.first_ref
    mount.world.control_of(2).rot(head_key(FSID, newest), lambda value: value[:-1] + b"?")
    right = mount.world.control_of(1).peek(head_key(FSID, mount.pins[0].head))
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    mount.world.control_of(4).put(head_key(FSID, mount.pins[0].head), wrong)
    await mount.rounds()
    assert mount.world.control_of(2).peek(head_key(FSID, newest)) == mount.spool[-1].value
    for _ in range(4):
        await trio.sleep(2 * LOOK_SECONDS)
        await mount.rounds()
    assert mount.world.control_of(4).peek(head_key(FSID, mount.pins[0].head)) == right


async def test_a_look_that_finds_all_of_it_costs_little(mount, autojump_clock):
    """One value of each backend is read, none is written, and nothing is looked at again before its time."""
    await mount.rounds(3)
    calls = [call for backend in mount.backends.values() for call, _ in backend.calls]
    assert calls.count("get") == 5 and "set" not in calls and "scan" not in calls
    assert calls.count("check") == 5 * (len(mount.wanted()) - 1)


async def test_who_was_taken_over_from_brings_nothing_and_is_fenced(mount, autojump_clock, nursery):
    """It would bring back what the new owner has let expire."""
    other = Machine(mount.world, "beta", seed=2)
    await other.own(nursery)
    await trio.sleep(2 * TIMING.grace)
    empty(mount.world, 5)
    mount.forget_calls()
    await mount.rounds()
    assert not mount.sets() and mount.ownership.publisher.fenced is not None
    with trio.fail_after(60):
        await mount.upkeep.run()


async def test_nothing_is_brought_without_a_quorum_that_confirms_it(mount, autojump_clock):
    """A machine that reaches few backends may have been taken over from on the others."""
    mount.cut_off(1, 2, 3)
    empty(mount.world, 5)
    for number in (1, 2, 3):
        mount.members.by_number(number).failed(BackendUnavailable("backend x: gone"))
    await mount.rounds()
    assert not mount.sets()
    assert set(mount.world.control_of(5).keys()) == {IDENTITY}
    mount.cut_off()
    for number in (1, 2, 3):
        mount.members.by_number(number).succeeded()
    await trio.sleep(60)
    await mount.rounds()
    assert not mount.lacking()


async def test_a_head_that_expires_meanwhile_does_not_come_back(mount, autojump_clock):
    """The snapshot is deleted, by the next head, between the look and what it leads to."""
    gone = head_key(FSID, mount.pins[0].head)
    mount.world.control_of(5).lose(gone)
    real = mount.ownership.publisher.as_owner

    async def late(*args, **settings):
        mount.pins = ()
        mount.ownership.publisher.as_owner = real
        for _ in range(3):
            await mount.publish_next()
        return await real(*args, **settings)

    mount.ownership.publisher.as_owner = late
    await mount.rounds()
    assert mount.ownership.publisher.as_owner == real, "it was about to be brought"
    await trio.sleep(120)
    await mount.rounds()
    assert all(mount.world.control_of(number).peek(gone) is None for number in mount.backends)


async def test_no_head_is_published_while_one_is_brought(mount, autojump_clock):
    """What the last one keeps stays kept until it is there."""
    mount.world.control_of(5).lose(head_key(FSID, mount.pins[0].head))
    seen = []

    def watch(call: str, key: bytes) -> None:
        if call == "set" and key == head_key(FSID, mount.pins[0].head):
            seen.append(mount.ownership.publisher._turn.locked())

    mount.backends[5].gate = watch
    await mount.rounds()
    assert seen == [True]


async def test_an_older_head_is_never_the_newest_of_a_backend(mount, autojump_clock):
    """The newest is stored first, and where that fails nothing older is."""
    empty(mount.world, 5)
    newest = head_key(FSID, mount.ownership.first_ref)

    def full(call: str, key: bytes) -> None:
        if call == "set" and key == newest:
            raise BackendFull("backend x: no room")

    mount.backends[5].gate = full
    await mount.rounds()
    assert set(mount.world.control_of(5).keys()) == {IDENTITY}
    mount.backends[5].gate = lambda call, key: None
    await trio.sleep(120)
    await mount.rounds()
    order = [key for call, key in mount.backends[5].calls if call == "set"]
    assert order[0] == newest and not mount.lacking()


async def test_a_backend_that_refuses_is_not_pressed(mount, autojump_clock):
    """It is asked again after growing pauses, not every few seconds for ever."""
    empty(mount.world, 5)
    refused = []

    def full(call: str, key: bytes) -> None:
        if call == "set":
            refused.append(trio.current_time())
            raise BackendFull("backend x: no room")

    mount.backends[5].gate = full
    async with trio.open_nursery() as upkeep:
        upkeep.start_soon(mount.upkeep.run)
        await trio.sleep(6 * 3600)
        upkeep.cancel_scope.cancel()
    late = [time for time in refused if time > refused[0] + 3 * 3600]
    assert 0 < len(late) <= 60


async def test_only_backends_that_the_published_head_names_get_anything(mount, autojump_clock):
    """One with the number of an entry and another identity is of no fleet, or of one that is not published."""
    member = mount.members.by_number(5)
    member.entry = dataclasses.replace(member.entry, identity=b"x" * 16)
    empty(mount.world, 5)
    for _ in range(3):
        await mount.rounds()
        await trio.sleep(2 * LOOK_SECONDS)
    assert set(mount.world.control_of(5).keys()) == {IDENTITY}


async def test_a_snapshot_whose_head_is_nowhere_is_told(mount, autojump_clock, expect_log):
    """Only once every backend of the fleet has said that it lacks it."""
    expect_log("before-upgrade is on no backend any more", logging.ERROR, count=1)
    for number in (2, 3, 4, 5):
        mount.world.control_of(number).lose(head_key(FSID, mount.pins[0].head))
    mount.cut_off(1)
    mount.members.by_number(1).failed(BackendUnavailable("backend x: gone"))
    await mount.rounds()
    assert not mount.upkeep.warnings()
    mount.cut_off()
    mount.members.by_number(1).succeeded()
    mount.world.control_of(1).lose(head_key(FSID, mount.pins[0].head))
    for _ in range(2):
        await trio.sleep(2 * LOOK_SECONDS)
        await mount.rounds()
    assert "before-upgrade" in mount.upkeep.warnings()[0]
    mount.pins = ()
    await mount.publish_next()
    await trio.sleep(2 * LOOK_SECONDS)
    await mount.rounds()
    assert not mount.upkeep.warnings()


async def test_more_than_one_look_may_bring_comes_with_the_next(mount, autojump_clock):
    """Work is bounded, and goes on."""
    pins = []
    for generation in range(20, 60):
        sealed = plant(mount.world, make_head(mount.world, OLD, generation))
        pins.append(KeptGeneration(sealed.ref, generation, (f"s{generation}",)))
    mount.pins = (*mount.pins, *pins)
    await mount.publish_next()
    empty(mount.world, 5)
    await mount.rounds()
    assert mount.lacking()
    await mount.rounds()
    assert not mount.lacking()




def tombstone(world: World, number: int) -> bytes | None:
    return world.control_of(number).peek(tombstone_key(FSID))


def give_up(mount: Mount) -> None:
    """The fleet is without backend 5 from the next head on."""
    fleet = mount.world.fleet
    mount.world.fleet = Fleet(fleet.number + 1, fleet.entries[:4])


async def test_a_backend_that_left_while_it_was_away_gets_its_tombstone_when_it_is_back(mount, autojump_clock):
    """It is told once; nothing else is brought there."""
    mount.cut_off(5)
    mount.members.by_number(5).failed(BackendUnavailable("backend x: gone"))
    empty(mount.world, 5)
    give_up(mount)
    await mount.publish_next()
    mount.members.adopt((mount.world.fleet,))
    await mount.rounds()
    assert tombstone(mount.world, 5) is None
    mount.cut_off()
    mount.members.by_number(5).succeeded()
    mount.forget_calls()
    await mount.rounds(2)
    stone = open_tombstone(tombstone_key(FSID), tombstone(mount.world, 5) or b"", mount.world.keys)
    assert (stone.number, stone.identity) == (5, mount.members.by_number(5).entry.identity)
    assert set(mount.world.control_of(5).keys()) == {IDENTITY, tombstone_key(FSID)}
    await trio.sleep(2 * LOOK_SECONDS)
    await mount.rounds(2)
    assert [number for number, key in mount.sets() if key == tombstone_key(FSID)] == [5]


async def test_no_tombstone_is_written_by_who_was_taken_over_from(mount, autojump_clock, nursery):
    """The new owner may have taken the backend in again."""
    give_up(mount)
    await mount.publish_next()
    mount.members.adopt((mount.world.fleet,))
    mount.members.by_number(5).failed(BackendUnavailable("backend x: gone"))
    await mount.rounds()
    other = Machine(mount.world, "beta", seed=2)
    await other.own(nursery)
    await trio.sleep(2 * TIMING.grace)
    mount.members.by_number(5).succeeded()
    await mount.upkeep.step()
    assert tombstone(mount.world, 5) is None and mount.ownership.publisher.fenced is not None


async def test_no_tombstone_is_written_while_the_fleet_is_being_changed(mount, autojump_clock):
    """What no published head names yet may be what the next one will."""
    give_up(mount)
    await mount.publish_next()
    both = (mount.world.fleet, dataclasses.replace(mount.world.fleet, number=9))
    head = dataclasses.replace(mount.next_head(), fleets=both)
    assert isinstance(await mount.publish(head), Published)
    mount.note()
    mount.members.adopt(both)
    await mount.rounds(2)
    assert tombstone(mount.world, 5) is None
