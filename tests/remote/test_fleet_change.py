"""Changes of the fleet on a flushing machine: what they do, what they refuse, and what they wait for."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qsfs import failpoints
from qsfs.backend.memory import MemoryBackend, MemoryStore
from qsfs.errors import AlreadyFormatted, BackendError, ConfigError, StaleCache
from qsfs.format.fleet import DRAINING
from qsfs.format.head import parse_head_key
from qsfs.format.identity import identity_key, open_identity, open_tombstone, tombstone_key
from qsfs.format.owner import parse_owner_key
from qsfs.format.superblock import SUPERBLOCK_KEY
from qsfs.remote.draining import LATE_SECONDS
from qsfs.remote.fleet_change import held_back
from qsfs.remote.fleet_plan import FleetPlan
from qsfs.remote.identity import find_members, write_identity
from qsfs.remote.members import Candidate, State
from qsfs.remote.rollback import LEFT_BEHIND
from qsfs.store.packs import set_placement
from qsfs.store.schema import PackState
from tests.remote.fleet_machine import FleetMachine, Site, dying, make_site
from tests.remote.flush_machine import crash, newest_head, restore
from tests.remote.flushing import pack_rows, page, until
from tests.remote.harness import FaultyBackend, keys_of, make_world
from tests.remote.small_fs import add_superblock


@pytest.fixture
async def site(clock: MockClock) -> Site:
    return await make_site(5, 2)


@pytest.fixture
def machine(site: Site, clock: MockClock, tmp_path: Path) -> FleetMachine:
    return FleetMachine(site, tmp_path / "cache", clock)


def numbers(machine: FleetMachine) -> list[int]:
    (fleet,) = machine.fleets
    return [entry.number for entry in fleet.entries]


def shards(site: Site, name: str) -> list[bytes]:
    return [key for key in keys_of(site.data(name)) if key.startswith(b"qsfs:s:")]


def both(site: Site, name: str) -> set[bytes]:
    return {*keys_of(site.data(name)), *keys_of(site.control(name))}


async def test_new_backends_join_and_take_shards(site: Site, machine: FleetMachine, clock):
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 40)
        await flusher.sync()
        machine.configured = site.names
        plan = await machine.apply()
        assert [one.name for one in plan.added] == ["host6:9900/qsfs", "host7:9900/qsfs"]
        assert numbers(machine) == [1, 2, 3, 4, 5, 6, 7] and machine.fleets[0].number == 2
        machine.write(machine.create("b"), 0, page("b") * 400)
        await flusher.sync()
        assert not (await machine.apply()).changes, "what is configured is there now"
    assert restore(site.everything).files == {"a": page("a") * 40, "b": page("b") * 400}
    assert shards(site, "host6") and shards(site, "host7")


async def test_a_new_backend_carries_what_every_one_does(site: Site, machine: FleetMachine, clock):
    """Identity, superblock, our owner record, the newest head and the kept ones, before a head names it."""
    async with machine.flushing() as flusher:
        for name in "abc":
            machine.create(name)
            await flusher.sync()
        machine.configured = site.names[:6]
        generations = flusher.generations
        assert generations is not None
        wanted = {kept.head for kept in generations.kept} | {generations.base.sealed.ref}
        seen: list[set[bytes]] = []
        failpoints.arm("join.prepared", lambda: seen.append(both(site, "host6")))
        await machine.apply()
        key = identity_key(machine.world.keys.fsid)
        assert {key, SUPERBLOCK_KEY} <= seen[0]
        assert {named.ref for k in seen[0] if (named := parse_head_key(k))} == wanted
        assert [named.owner for k in seen[0] if (named := parse_owner_key(k))] == [machine.publisher.owner]
        for store in (site.data("host6"), site.control("host6")):
            assert open_identity(key, store.peek(key) or b"", machine.world.keys).number == 6


async def test_no_shard_goes_to_a_backend_that_no_head_names_yet(site: Site, machine: FleetMachine, clock):
    """Else a restore would not count it, and a pack would be full in name only."""
    placed: list[int] = []
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 40)
        machine.configured = site.names
        failpoints.arm("flush.head.sent", lambda: placed.append(len(shards(site, "host6"))))
        await machine.apply()
        assert len(placed) >= 2 and placed[0] == 0
        await flusher.sync()


async def retired(machine: FleetMachine) -> FleetPlan:
    """What `fleet apply` does once it retires something; until then it says that second looks are waited for."""
    there = set(pack_rows(machine))
    plan = await machine.apply()
    assert not plan.retired
    while not plan.retired:
        assert any("not looked at a second time yet" in note for note in plan.notes)
        await trio.sleep(30)
        plan = await machine.apply()
    assert all(row.state & PackState.LOOKED for number, row in pack_rows(machine).items() if number in there)
    return plan


async def test_a_draining_backend_takes_nothing_is_emptied_and_retired(site: Site, machine: FleetMachine, clock):
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 200)
        await flusher.sync()
        machine.configured = site.names
        await machine.apply(drain=("host1",))
        assert machine.fleets[0].draining == {1}
        machine.write(machine.create("b"), 0, page("b") * 200)
        await flusher.sync()
        before = shards(site, "host1")
        await until(lambda: flusher.drainer.left == {1: 0})
        assert shards(site, "host1") == before, "what is moved stays where older generations look for it"
        assert all(1 not in row.placement and -1 not in row.placement for row in pack_rows(machine).values())
        assert not (await machine.apply(drain=("host1",))).changes, "while it is configured it stays"

        machine.configured = site.names[1:]
        plan = await retired(machine)
        assert [entry.number for entry in plan.retired] == [1] and numbers(machine) == [2, 3, 4, 5, 6, 7]
        keys = machine.world.keys
        stone = tombstone_key(keys.fsid)
        assert open_tombstone(stone, site.data("host1").peek(stone) or b"", keys).number == 1
        assert machine.fleet_members.by_number(1) is None
        await flusher.sync()
    site.data("host1").clear()
    site.data("host2").clear()
    assert restore(site.everything).files == {"a": page("a") * 200, "b": page("b") * 200}


async def test_one_that_is_not_configured_drains_before_it_is_retired(site: Site, machine: FleetMachine, clock):
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 200)
        await flusher.sync()
        machine.configured = site.names[1:]
        plan = await machine.apply()
        assert not plan.retired and "keep it in the configuration" in " ".join(plan.notes)
        assert machine.fleets[0].entry(1).state == DRAINING  # type: ignore[union-attr]
        held = await machine.plan()
        assert not held.retired and any("not retired yet" in note for note in held.notes)
        await until(lambda: flusher.drainer.left == {1: 0})
        assert (await retired(machine)).retired


async def test_nothing_is_retired_for_acknowledgements_that_a_backend_may_lose(
    site: Site, machine: FleetMachine, clock, expect_log
):
    """What was moved is found where it went before the copies that were left may go; a restart counts anew."""
    expect_log("acknowledged it and has lost it")
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 200)
        await flusher.sync()
        await until(lambda: not flusher.context.ledger.looks)
        machine.configured = site.names
        await machine.apply(drain=("host1",))
        await until(lambda: flusher.drainer.left == {1: 0})
        for name in ("host6", "host7"):
            for key in shards(site, name):
                site.data(name).lose(key)
    async with machine.flushing() as flusher:
        machine.configured = site.names[1:]
        await until(lambda: flusher.drainer.left == {1: 0})
        plan = await retired(machine)
        assert flusher.status()["shards_found_missing"] and not flusher.context.ledger.incomplete
        assert [entry.number for entry in plan.retired] == [1]
        await flusher.sync()
    for name in ("host1", "host2"):
        site.data(name).clear()
    assert restore(site.everything).files == {"a": page("a") * 200}


async def test_a_shard_that_is_recorded_late_on_a_backend_that_left_is_made_again(
    site: Site, machine: FleetMachine, clock
):
    """An upload was under way when the fleet changed; whoever asks for the fleet meanwhile."""
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 200)
        await flusher.sync()
        machine.configured = site.names
        await machine.apply()
        machine.down("host1")
        machine.configured = site.names[1:]
        await trio.sleep(2 * LATE_SECONDS)
        await machine.apply(lost=("host1",))
        await flusher.drainer.count()
        await until(lambda: flusher.drainer.forgotten_shards and not flusher.context.ledger.incomplete)
        number, row = next(iter(pack_rows(machine).items()))
        set_placement(machine.store, number, (1, *row.placement[1:]), machine.clock.time_ns())
        await trio.sleep(2 * LATE_SECONDS)
        assert all(1 not in row.placement and -1 not in row.placement for row in pack_rows(machine).values())


async def test_a_draining_one_that_does_not_answer_is_emptied_from_the_others(site: Site, machine: FleetMachine, clock):
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 200)
        await flusher.sync()
        machine.configured = site.names
        await machine.apply(drain=("host1",))
        machine.down("host1")
        site.data("host1").clear()
        await until(lambda: flusher.drainer.left == {1: 0})
    assert restore(site.everything).files == {"a": page("a") * 200}


async def test_what_is_lost_leaves_at_once_and_its_shards_are_made_again(site: Site, machine: FleetMachine, clock):
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 200)
        await flusher.sync()
        assert any(1 in row.placement for row in pack_rows(machine).values())
        machine.configured = site.names
        with pytest.raises(ConfigError, match="--lost 1: host1:9900/qsfs answers"):
            await machine.apply(lost=("host1",))
        machine.down("host1")
        machine.configured = site.names[1:]
        await until(lambda: machine.fleet_members.by_number(1).state is not State.UP)  # type: ignore[union-attr]
        await machine.apply(lost=("host1",))
        assert numbers(machine) == [2, 3, 4, 5, 6, 7]
        await until(lambda: flusher.drainer.forgotten_shards)
        await until(lambda: not flusher.context.ledger.incomplete)
        assert all(1 not in row.placement and -1 not in row.placement for row in pack_rows(machine).values())
        await flusher.sync()
    for name in ("host1", "host2"):
        site.data(name).clear()
    assert restore(site.everything).files == {"a": page("a") * 200}


async def test_a_backend_that_was_emptied_is_noticed_and_taken_up_anew_when_told(
    site: Site, machine: FleetMachine, clock, expect_log
):
    expect_log(r"emptied or swapped since it was asked last", optional=True)
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 200)
        await flusher.sync()
        site.data("host1").clear()
        site.control("host1").clear()
        plan = await machine.plan()
        assert not plan.changes and "has lost the identity of entry 1" in " ".join(plan.notes), plan
        await until(lambda: not machine.fleet_members.by_number(1).identified)  # type: ignore[union-attr]
        plan = await machine.apply(lost=("host1",))
        assert numbers(machine) == [2, 3, 4, 5, 6], "a number is never used again"
        await until(lambda: flusher.drainer.forgotten_shards and not flusher.context.ledger.incomplete)


async def test_groups_and_weights_are_changes_of_the_fleet(site: Site, machine: FleetMachine, clock):
    async with machine.flushing() as flusher:
        plan = await machine.plan()
        plan.kept[0] = plan.kept[0].__class__(**{**_fields(plan.kept[0]), "group": "g", "weight": 3})
        await machine.change(plan)
        entry = machine.fleets[0].entry(1)
        assert entry is not None and (entry.group, entry.weight) == ("g", 3) and machine.fleets[0].number == 2
        assert machine.fleet_members.by_number(1).entry == entry  # type: ignore[union-attr]
        await flusher.sync()


def _fields(entry: object) -> dict[str, object]:
    return {name: getattr(entry, name) for name in entry.__slots__}  # type: ignore[attr-defined]


async def test_a_backend_of_another_file_system_is_refused(site: Site, machine: FleetMachine, clock):
    other = await make_world(1, seed=9)
    other.keys = other.keys.__class__(b"another fs id..."[:16], [other.keys.current])
    add_superblock(other)
    site.data("host6").put(SUPERBLOCK_KEY, other.data[0].peek(SUPERBLOCK_KEY) or b"")
    machine.configured = site.names
    before = {name: site.data(name).keys() for name in ("host6", "host7")}
    async with machine.flushing() as flusher:
        with pytest.raises(AlreadyFormatted, match="host6"):
            await machine.apply()
        assert numbers(machine) == [1, 2, 3, 4, 5] and len(machine.fleet_members) == 5
        assert {name: site.data(name).keys() for name in before} == before, "nothing is left of the trial"
        await flusher.sync()


async def test_a_new_backend_that_fails_leaves_the_old_fleet(site: Site, machine: FleetMachine, clock):
    machine.configured = site.names

    def fail() -> None:
        machine.down("host7")

    async with machine.flushing() as flusher:
        failpoints.arm("join.records", fail)
        with pytest.raises(BackendError, match="host7"):
            await machine.apply()
        assert numbers(machine) == [1, 2, 3, 4, 5] and len(machine.fleet_members) == 5
        machine.create("a")
        await flusher.sync()
        failpoints.disarm_all()
        machine.down()
        await machine.apply()
        # Neither of the numbers that were tried before is used again.
        assert numbers(machine) == [1, 2, 3, 4, 5, 8, 9]


async def test_publishing_waits_for_a_quorum_of_both_fleets_and_names_what_is_missing(
    site: Site, machine: FleetMachine, clock
):
    """Four of five answer in the old fleet, which is enough, and four of seven in the new one, which is not."""
    machine.configured = site.names
    async with machine.flushing() as flusher, trio.open_nursery() as nursery:
        machine.create("a")
        await flusher.sync()
        failpoints.arm("fleet.ordered", lambda: machine.down("host5", "host6", "host7"))
        nursery.start_soon(machine.apply)
        await until(lambda: flusher.status()["waiting"])
        await until(lambda: "fleet 2" in flusher.status()["waiting"][0])
        told = flusher.status()["waiting"][0]
        assert "fleet 2: 4 of the 5 backends needed (of 7) answered, without" in told
        assert all(f"{number} host{number}:9900/qsfs" in told for number in (5, 6, 7)) and "fleet 1" not in told
        assert len(machine.fleets) == 1
        machine.down("host6", "host7")
        await until(lambda: len(machine.fleets) == 1 and machine.fleets[0].number == 2)


async def test_a_plan_whose_fleet_could_not_publish_is_refused_before_anything_is_done(
    site: Site, machine: FleetMachine, clock
):
    async with machine.flushing() as flusher:
        machine.configured = site.names[:2]
        with pytest.raises(ConfigError, match="2 backends would be left to take shards, and a pack has 3"):
            await machine.apply()
        await flusher.sync()
        assert machine.fleets[0].number == 1


async def test_nothing_is_retired_while_a_rollback_left_snapshots(site: Site, machine: FleetMachine, clock):
    """Packs of what a rollback left are not in the tables, so nobody knows that they were moved."""
    async with machine.flushing() as flusher:
        machine.create("a")
        await flusher.sync()
        generations = flusher.generations
        assert generations is not None
        assert held_back(machine.store, generations.kept) == ""
        machine.store.set_counter(LEFT_BEHIND, generations.base.head.generation)
        generations.pins = {generations.base.sealed.ref: ("friday",)}
        machine.create("b")
        await flusher.sync()
        assert "friday" in held_back(machine.store, generations.kept)
        machine.configured = site.names
        await machine.apply(drain=("host1",))
        await until(lambda: flusher.drainer.left == {1: 0})
        machine.configured = site.names[1:]
        plan = await machine.apply()
        assert not plan.retired and any("friday" in note for note in plan.notes)


async def test_a_leftover_of_an_unfinished_change_takes_nothing(site: Site, machine: FleetMachine, clock):
    """A backend with an identity of ours that no head names: nothing is stored there; the next change takes it."""
    machine.configured = site.names[:6]
    async with machine.flushing() as flusher:
        failpoints.arm("join.prepared", lambda: machine.down("host6"))
        failpoints.arm("fleet.ordered", _refuse)
        with pytest.raises(BackendError):
            await machine.apply()
        failpoints.disarm_all()
        machine.down()
    async with machine.flushing() as flusher:
        await machine.settled()
        if numbers(machine) == [1, 2, 3, 4, 5]:
            assert machine.fleet_members.by_number(6) is not None
            machine.write(machine.create("a"), 0, page("a") * 400)
            await flusher.sync()
            assert not shards(site, "host6")
        await machine.apply()
        newest = newest_head(site.everything)
        assert newest is not None and newest[1].fleets == machine.fleets
        machine.write(machine.create("b"), 0, page("b") * 400)
        await flusher.sync()
        assert shards(site, "host6")


def _refuse() -> None:
    raise BackendError("stop here")


# the schedules that broke near misses of the design


async def test_a_fleet_change_is_two_heads_so_that_a_takeover_from_the_old_list_finds_it(
    site: Site, machine: FleetMachine, clock, tmp_path: Path
):
    """A changes the fleet and dies between the two heads; B knows only the old list of backends.

    With one head, on the new fleet and a part of the old, B's quorum of the old could miss it. So it must find the
    first head, count in both fleets (which it cannot before it reaches the new one), and end the change itself.
    """
    old_list = site.names[:4]
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 40)
        await flusher.sync()
    b = FleetMachine(site, tmp_path / "b", clock, seed=4)
    await b.restore_here()
    with dying():
        async with machine.flushing():
            await machine.settled()
            machine.configured = site.names
            failpoints.arm("publish.published", crash)
            await machine.apply()
    failpoints.disarm_all()
    first = newest_head(site.everything)
    assert first is not None and [fleet.number for fleet in first[1].fleets] == [1, 2]

    b.configured = old_list
    with trio.move_on_after(60), contextlib.suppress(StaleCache):
        async with b.mounted():
            pytest.fail("it owns without a quorum of the new fleet")
    assert any("fleet 2" in wait for wait in b.waits)
    b.configured = site.names
    # What it restored is not the newest any more; that it is told, and restores again.
    with pytest.raises(StaleCache):
        async with b.mounted():
            pass
    c = FleetMachine(site, tmp_path / "c", clock, seed=5)
    c.configured = site.names
    await c.restore_here()
    async with c.flushing() as flusher:
        assert c.first.fleets == first[1].fleets, "it owns in both"
        await c.settled()
        assert numbers(c) == [1, 2, 3, 4, 5, 6, 7]
        await flusher.sync()
    assert restore(site.everything).files == {"a": page("a") * 40}


async def test_the_newest_fleet_is_that_of_the_newest_head_though_an_aborted_one_has_a_higher_number(
    site: Site, machine: FleetMachine, clock
):
    """The first head of a change reached one backend that then was away; the machine died and went on without it."""
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 40)
        await flusher.sync()
        machine.configured = site.names[:6]
        await machine.plan()

        def cut_off() -> None:
            for name, pair in machine.links.items():
                for backend in pair:
                    backend.down = name not in ("host6",)

        failpoints.arm("publish.send", cut_off)
        with trio.move_on_after(50):
            await machine.apply()
    failpoints.disarm_all()
    aborted = newest_head(site.everything)
    assert aborted is not None and [fleet.number for fleet in aborted[1].fleets] == [1, 2]
    machine.down("host6")
    async with machine.flushing() as flusher:
        assert [fleet.number for fleet in machine.fleets] == [1]
        machine.write(machine.create("b"), 0, page("b") * 40)
        await flusher.sync()
        machine.down()
    machine.configured = site.names[:5]
    async with machine.flushing() as flusher:
        assert [fleet.number for fleet in machine.fleets] == [1], "not the highest number"
        machine.configured = [*site.names[:5], "host7"]
        await machine.apply()
        assert machine.fleets[0].number == 3 and numbers(machine) == [1, 2, 3, 4, 5, 7], "no number twice"
        await flusher.sync()
    assert restore(site.everything).files == {"a": page("a") * 40, "b": page("b") * 40}


async def test_of_two_backends_with_one_number_the_newest_head_says_which_is_meant(site: Site, machine: FleetMachine):
    """A takeover gave a number again that a machine that died had given to a backend it never named."""
    number, other = site.world.fleet.entries[2], MemoryStore("host9:9900/qsfs", page_entries=4)
    rival = dataclasses.replace(number, identity=b"another identity", address="host9:9900")
    control = MemoryBackend(MemoryStore("heads"))
    await write_identity(rival, MemoryBackend(other), control, site.world.keys, site.world.clock)
    candidates = machine.candidates()
    stray = Candidate("a-host9:9900", "qsfs", FaultyBackend(other), lambda _: control)
    members, strangers = await find_members([stray, *candidates], site.world.keys, site.world.clock)
    assert not strangers and members.by_number(3).entry.identity == rival.identity  # type: ignore[union-attr]
    assert not members.adopt([site.world.fleet])
    assert members.by_number(3).entry == number  # type: ignore[union-attr]
