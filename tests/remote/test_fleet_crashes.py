"""A machine dies at every step of a change of the fleet: what it leaves is a state that others, and it, go on from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qsfs import failpoints
from qsfs.format.fleet import DRAINING
from qsfs.format.identity import identity_key, open_identity
from qsfs.remote.members import State
from tests.remote.fleet_machine import FleetMachine, Site, dying, make_site
from tests.remote.flush_machine import crash, newest_head, restore
from tests.remote.flushing import pack_rows, page, until

STEPS = (
    "commit.before",
    "commit.applied",
    "commit.done",
    "drain.moved",
    "fleet.changed",
    "fleet.ordered",
    "fleet.reserved",
    "flush.cut.sealed",
    "flush.head.sent",
    "flush.packs.uploaded",
    "flush.recorded",
    "flush.spool.cleared",
    "join.marked",
    "join.prepared",
    "join.records",
    "publish.published",
    "publish.sealed",
    "publish.send",
    "publish.stored",
    "quorum_write.acknowledged",
    "spool.head.before",
    "spool.head.stored",
    "superblock.stored",
)
"""Failpoints that a change passes."""
SOME = 1
"""Of a step that is passed many times the first and last so many are died at."""

AFTER = ["host1", "host2", "host3", "host4", "host6", "host7"]


class Watch:
    """Counts the steps of a change, and dies at one of them."""

    def __init__(self, machine: FleetMachine, deadly: tuple[str, int] | None = None) -> None:
        self.passed: Counter[str] = Counter()
        self.deadly = deadly
        for name in STEPS:
            failpoints.arm(name, partial(self.note, name))
        for server in ("host1", "host5", "host6"):
            for backend in machine.links[server]:
                backend.gate = partial(self._call, server)

    def note(self, step: str) -> None:
        self.passed[step] += 1
        if self.deadly == (step, self.passed[step]):
            crash()

    def _call(self, server: str, call: str, key: bytes) -> None:
        if call in ("set", "delete"):
            self.note(f"{call} at {server} of {key[:7].decode()}")


def files_of(site: Site) -> dict[str, bytes]:
    return restore(site.everything).files


async def prepare(site: Site, machine: FleetMachine) -> None:
    """A file system of five with a file in it; the configuration is another one from then on."""
    async with machine.flushing() as flusher:
        machine.write(machine.create("a"), 0, page("a") * 100)
        await flusher.sync()
    machine.configured = AFTER


async def die_in_a_change(site: Site, machine: FleetMachine, deadly: tuple[str, int] | None) -> Counter[str]:
    """Adds two servers and drains one; ends at a step of that, or at the end of it."""
    watch: Watch | None = None
    with dying():
        async with machine.flushing():
            await machine.settled()
            watch = Watch(machine, deadly)
            try:
                await machine.apply()
            finally:
                failpoints.disarm_all()
                for pair in machine.links.values():
                    for backend in pair:
                        backend.gate = lambda call, key: None
    assert watch is not None
    failpoints.disarm_all()
    return watch.passed


async def check_state(site: Site) -> None:
    """Whoever looks now finds the old fleet, both or the new one, all of its servers, and every byte."""
    newest = newest_head(site.everything)
    assert newest is not None
    fleets = newest[1].fleets
    assert [len(fleet.entries) for fleet in fleets] in ([5], [5, 7], [7])
    assert files_of(site) == {"a": page("a") * 100}
    carried = {}
    key = identity_key(site.world.keys.fsid)
    for name in site.names:
        value = site.data(name).peek(key)
        if value is not None:
            identity = open_identity(key, value, site.world.keys)
            carried[identity.number] = identity.identity
    for fleet in fleets:
        assert all(carried[entry.number] == entry.identity for entry in fleet.entries)


async def go_on(site: Site, machine: FleetMachine) -> None:
    """A mount ends the change that it finds, or makes it; then it publishes in the new fleet."""
    async with machine.flushing() as flusher:
        await machine.settled()
        await machine.apply()
        (fleet,) = machine.fleets
        named = {entry.address.partition(":")[0]: entry for entry in fleet.entries}
        assert set(named) >= set(AFTER)
        assert "host5" not in named or named["host5"].state == DRAINING
        assert len({entry.number for entry in fleet.entries}) == len(fleet.entries)
        machine.write(machine.create("b"), 0, page("b") * 40)
        await flusher.sync()
    wanted = {"a": page("a") * 100, "b": page("b") * 40}
    assert files_of(site) == wanted
    # With as many lost as the new fleet withstands the newest generation is still found.
    looking = FleetMachine(site, machine.directory.with_name("looking"), machine.virtual, seed=77)
    looking.configured = site.names
    looking.down("host1", "host6")
    found = await looking.find()
    assert found.judgement.withstands >= 0 and found.head.fleets == (fleet,)


async def steps_of_a_change(directory: Path, clock: MockClock) -> list[tuple[str, int]]:
    site = await make_site(5, 2)
    machine = FleetMachine(site, directory / "counting", clock)
    await prepare(site, machine)
    passed = await die_in_a_change(site, machine, None)
    assert passed["publish.published"] == 2 and passed["fleet.changed"] == 1
    return [
        (step, turn)
        for step, count in sorted(passed.items())
        for turn in range(1, count + 1)
        if turn <= SOME or turn > count - SOME
    ]


async def everywhere(
    directory: Path, clock: MockClock, then: Callable[[Site, FleetMachine, Path], object], every: int = 1
) -> None:
    steps = await steps_of_a_change(directory, clock)
    assert len(steps) > 50
    for index, deadly in enumerate(steps[::every]):
        site = await make_site(5, 2)
        machine = FleetMachine(site, directory / str(index), clock)
        await prepare(site, machine)
        try:
            await die_in_a_change(site, machine, deadly)
            await check_state(site)
            await then(site, machine, directory / f"{index}-other")  # type: ignore[misc]
        except BaseException as error:
            error.add_note(f"died at {deadly}")
            raise


async def test_the_machine_itself_goes_on_after_a_crash_at_any_step(tmp_path: Path, clock: MockClock):
    async def mount_again(site: Site, machine: FleetMachine, _: Path) -> None:
        await go_on(site, machine)

    await everywhere(tmp_path, clock, mount_again)


@pytest.mark.parametrize("step", ["drain.forgotten", "drain.moved", "flush.complete.stored"])
async def test_a_crash_while_shards_are_moved_or_made_again_loses_none(tmp_path: Path, clock: MockClock, step: str):
    site = await make_site(5, 2)
    machine = FleetMachine(site, tmp_path / "cache", clock)
    await prepare(site, machine)
    machine.configured = site.names
    with dying():
        async with machine.flushing():
            machine.down("host4")
            await until(lambda: machine.fleet_members.by_number(4).state is not State.UP)  # type: ignore[union-attr]
            failpoints.arm(step, crash)
            await machine.apply(drain=("host5",), lost=("host4",))
            await trio.sleep(20)
            pytest.fail(f"{step} was not passed")
    failpoints.disarm_all()
    machine.configured = [name for name in site.names if name != "host4"]
    async with machine.flushing() as flusher:
        await machine.settled()
        await until(lambda: flusher.drainer.left == {5: 0} and not flusher.context.ledger.incomplete)
        await flusher.sync()
        assert all(not {-1, 4, 5} & set(row.placement) for row in pack_rows(machine).values())
    site.data("host1").clear()
    assert files_of(site) == {"a": page("a") * 100}


async def test_another_machine_restores_and_takes_over_after_a_crash_at_any_step(tmp_path: Path, clock: MockClock):
    """It has the new configuration, no local state, and finds the change wherever it stopped."""

    async def take_over(site: Site, machine: FleetMachine, directory: Path) -> None:
        other = FleetMachine(site, directory, clock, seed=4)
        other.configured = site.names
        await other.restore_here()
        other.configured = AFTER
        await go_on(site, other)

    await everywhere(tmp_path, clock, take_over, every=2)
