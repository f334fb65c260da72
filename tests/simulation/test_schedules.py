"""Schedules of deletion and ownership that need the whole system: who must not delete finds out before it does."""

from __future__ import annotations

import contextlib
from pathlib import Path

import trio

from qsfs.daemon import copies_upkeep
from qsfs.errors import Fenced
from qsfs.format.head import parse_head_key
from qsfs.format.owner import owner_key, parse_owner_key
from tests.simulation.directed import Directed, live
from tests.simulation.engine import thaw
from tests.simulation.machine import Life


async def _dead_packs(stage: Directed, life: Life, rounds: int = 5) -> None:
    """Packs die, and some may go with the next head."""
    for letter in "abcdefgh"[:rounds]:
        await stage.write(life, "f", 8, letter)
        await stage.publish(life)


async def _collect(life: Life) -> None:
    with contextlib.suppress(Fenced):
        await life.flushing.collect(dry_run=False)


def test_a_copy_of_the_machine_deletes_nothing_of_the_one_that_owns(scratch: Path, expect_log) -> None:
    """A copied machine mounts and owns; the original collects: it is fenced by the head that must come first."""
    expect_log("has taken over")

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await _dead_packs(stage, life)
        twin = stage.clone(stage.first)
        other = await stage.up(twin)
        await stage.write(other, "g", 8, "t")
        await stage.publish(other)
        before = set(stage.cluster.deleted)
        await stage.write(life, "f", 8, "z")
        with trio.move_on_after(120):
            await _collect(life)
        assert life.fenced is not None
        await trio.sleep(60)
        deleted_by_owner = stage.cluster.deleted - before
        assert not deleted_by_owner & stage.cluster.deleted_by.get(life.name, set())

    live(scratch, story)


def test_two_copies_that_sent_heads_end_in_a_choice_and_a_mount_that_writes(scratch: Path, expect_log) -> None:
    """Both boot at once, draw the same owner, and send heads at once: each stops; whichever is chosen goes on whole."""
    expect_log("a copy of this machine is running")

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await stage.write(life, "f", 8, "a")
        await stage.publish(life)
        life.cut_power()
        await life.ended.wait()
        twin = stage.clone(stage.first)
        stage.mount(stage.first)
        stage.mount(twin)
        lives = [await stage.up(stage.first), await stage.up(twin)]
        for one, letter in zip(lives, "bc", strict=True):
            await stage.write(one, "f", 8, letter)
        for one in lives:
            await stage.sync(one, 0.0)
        await trio.sleep(60)
        assert all(one.fenced is not None for one in lives)
        third = stage.new_machine()
        await stage.take_over(third, 600)
        other = await stage.up(third)
        assert stage.ledger.counts["chosen for a takeover"] == 1, "nobody was asked, or more than once"
        await stage.write(other, "g", 8, "d")
        await stage.publish(other)
        [(chosen, _)] = stage.ledger.choices
        assert chosen in stage.ledger.ancestors(stage.ledger.published[-1][1])

    live(scratch, story)


def test_an_owner_that_stood_still_deletes_nothing_after_a_takeover(scratch: Path, expect_log) -> None:
    """A stands still for hours with permission to delete; B takes over and pins; A goes on: what B keeps stays.

    What A had uploaded and named in no head are strays to B, whose retention time is over by then.
    """
    expect_log("has taken over")
    expect_log("acknowledged it and has lost it", optional=True)

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await _dead_packs(stage, life)
        life.frozen = True
        second = stage.new_machine()
        await stage.take_over(second, 600)
        other = await stage.up(second)
        await stage.write(other, "g", 8, "b")
        await stage.publish(other)
        await trio.sleep(4 * 3600)
        thaw(life)
        await stage.write(life, "f", 8, "z")
        await trio.sleep(120)
        assert life.fenced is not None

    live(scratch, story)


def test_a_shard_that_moved_stays_as_long_as_its_pack_is_named(scratch: Path) -> None:
    """A pack is completed elsewhere while a backend is away; the shard that came late there is deleted by nobody."""

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        stage.cluster.faults[1].slow = 50.0
        stage.cluster.faulty.add(1)
        await stage.write(life, "keep", 8, "k")
        await stage.publish(life)
        stage.cluster.heal()
        await trio.sleep(120)
        await _dead_packs(stage, life)
        await _collect(life)
        await trio.sleep(60)

    live(scratch, story)


def test_a_backend_that_forgets_the_new_owner_lets_nobody_publish_beside_it(scratch: Path, expect_log) -> None:
    """A reaches 3 of 6, B takes over with the other 3 and one of A's, and that one goes back to before: Q is 4.

    With a fence quorum of 3, A would publish at the only backend that has both, after it forgot B.
    """
    expect_log("has taken over")
    expect_log("acknowledged it and has lost it", optional=True)

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await stage.write(life, "f", 8, "a")
        await stage.publish(life)
        life.cut_off = frozenset(stage.cluster.numbers) - {1, 2, 3}
        stage.cluster.liars = frozenset({3})
        stage.cluster.remember(3)
        second = stage.new_machine()
        await stage.take_over(second, 600, frozenset({1, 2}))
        other = await stage.up(second)
        stage.cluster.go_back(3)
        await stage.write(life, "f", 8, "z")
        await stage.sync(life, 120)
        await stage.write(other, "g", 8, "b")
        await stage.publish(other)
        assert stage.ledger.published[-1][0] == other.name
        life.cut_off = frozenset()
        await trio.sleep(120)
        assert life.fenced is not None

    live(scratch, story, code=(2, 2, 6))


def test_backends_that_are_emptied_one_after_the_other_lose_no_head_and_no_owner_record(
    scratch: Path, expect_log, monkeypatch
) -> None:
    """B took over from A, which stands still; B has a snapshot, and nothing changes while all backends lose what they
    had of heads, each some time after the one before: A is fenced when it goes on, and all is restored without B.

    Heads that are published go to all, so without any only the upkeep brings back what was there.
    """
    expect_log("has taken over")
    monkeypatch.setattr(copies_upkeep, "LOOK_SECONDS", 20.0)

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await stage.write(life, "f", 8, "a")
        await stage.publish(life)
        life.frozen = True
        second = stage.new_machine()
        await stage.take_over(second, 600)
        other = await stage.up(second)
        await stage.snapshot(other, "keep", 600)
        assert "keep" in stage.ledger.snapshots
        for letter in "bcd":
            await stage.write(other, "f", 8, letter)
            await stage.publish(other)
        world, published = stage.cluster.world, len(stage.ledger.published)
        owner = owner_key(world.keys.fsid, stage.ledger.published[-1][1].owner)
        for number in stage.cluster.numbers:
            store = world.control_of(number)
            for key in list(store.keys()):
                if parse_head_key(key) or parse_owner_key(key):
                    store.lose(key)
            await trio.sleep(60)
        thaw(life)
        assert len(stage.ledger.published) == published
        fleet = [number for number in stage.cluster.numbers if number not in stage.cluster.spares]
        assert all(world.control_of(number).peek(owner) for number in fleet)
        await stage.write(life, "f", 8, "z")
        await stage.sync(life, 120)
        assert life.fenced is not None and other.fenced is None

    live(scratch, story)


def test_a_machine_that_is_alone_is_never_refused(scratch: Path) -> None:
    """Cut, head sent, crash before its record, again and again: it knows its own heads."""

    async def story(stage: Directed) -> None:
        for letter in "abcd":
            life = await stage.up(stage.first)
            await stage.write(life, "f", 2, letter)
            await stage.sync(life, 0.0)
            await trio.sleep(0.02)
            life.cut_power()
            await life.ended.wait()
        assert stage.first.error is None

    live(scratch, story)
