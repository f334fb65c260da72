"""Schedules of deletion and ownership that need the whole system: who must not delete finds out before it does."""

from __future__ import annotations

import contextlib
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.backend.wrapper import Call
from qsfs.daemon import copies_upkeep
from qsfs.errors import BackendUnavailable, Fenced
from qsfs.format.extent import PackKind
from qsfs.format.head import head_key, parse_head_key
from qsfs.format.identity import identity_key, open_identity
from qsfs.format.owner import owner_key, parse_owner_key
from qsfs.format.shard import parse_shard_key, shard_key
from qsfs.remote.image import packs_of
from qsfs.store.journal import decode_frames, journal_paths
from qsfs.store.schema import PackRow, Table
from qsfs.store.store import JOURNAL_KEY
from tests.simulation import checks
from tests.simulation.cluster import at_once
from tests.simulation.directed import Directed, live, live_packs
from tests.simulation.engine import HOST, thaw
from tests.simulation.fleets import Configuration
from tests.simulation.machine import Life


async def _dead_packs(stage: Directed, life: Life, rounds: int = 5) -> None:
    """Packs die, and some may go with the next head."""
    for letter in "abcdefgh"[:rounds]:
        await stage.write(life, "f", 8, letter)
        await stage.publish(life)
        await trio.sleep(2)


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


def test_an_owner_that_stood_still_deletes_nothing_that_the_next_one_keeps(scratch: Path, expect_log) -> None:
    """A stands still for an hour as it begins to delete; B takes over and pins; A goes on: what B keeps stays.

    What A had uploaded and named in no head are strays to B, whose retention time is over by then.
    """
    expect_log("has taken over")
    expect_log("acknowledged it and has lost it", optional=True)

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        asked: list[bytes] = []

        async def stand_still(number: int, call: Call) -> None:
            if HOST.get() is life and call.kind == "delete" and parse_shard_key(call.key) is not None:
                if not asked:
                    life.frozen = True
                asked.append(call.key)
                # It was sent, so it arrives, whether the sender still waits for the answer or not.
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.checkpoint()
                stage.cluster.world.data[number - 1].remove(call.key)

        stage.cluster.before = stand_still
        await stage.write(life, "f", 8, "o")
        await stage.snapshot(life, "old", 600)
        for letter in "abcdefgh":
            if not life.frozen:
                await stage.write(life, "f", 8, letter)
                await stage.sync(life, 20)
                await trio.sleep(2)
        assert life.frozen, "the schedule did not happen"
        assert life.flushing.flusher is not None
        graveyard = life.flushing.flusher._upkeep.dead.graveyard
        permitted = {dead.pack_id for dead in graveyard.permitted(99)}
        assert permitted
        second = stage.new_machine()
        await stage.take_over(second, 600)
        other = await stage.up(second)
        await stage.snapshot(other, "found", 600)
        await stage.write(other, "g", 8, "b")
        await stage.publish(other)
        kept = stage.ledger.heads[stage.ledger.published[-1][1]].kept
        assert [generation.pins for generation in kept if generation.pins] == [("old",), ("found",)]
        await trio.sleep(3600)
        assert not stage.cluster.deleted_by.get(life.name)
        thaw(life)
        await stage.write(life, "f", 8, "z")
        await trio.sleep(120)
        assert life.fenced is not None
        assert stage.cluster.deleted_by[life.name], "the old owner did not go on with what it was at"
        assert stage.cluster.deleted_by[life.name] <= permitted

    live(scratch, story)


def test_a_copy_that_came_late_stays_as_long_as_its_pack_is_named(scratch: Path, expect_log) -> None:
    """A shard that arrived and was not acknowledged was stored elsewhere too; A stands still, B takes over.

    The surplus copy becomes the one that is needed: nobody has deleted it, whatever A did when it went on.
    """
    expect_log("has taken over")
    expect_log("acknowledged it and has lost it", optional=True)

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        stage.cluster.faults[1].fail_after = 1.0
        stage.cluster.faulty.add(1)
        for name in ("keep", "it", "all"):
            await stage.write(life, name, 8, "k")
            await stage.publish(life)
        stage.cluster.heal()
        surplus = _surplus(stage, life, 1)
        assert surplus, "the schedule did not happen"
        await _dead_packs(stage, life)
        life.frozen = True
        second = stage.new_machine()
        await stage.take_over(second, 600)
        other = await stage.up(second)
        await _dead_packs(stage, other)
        thaw(life)
        await _collect(life)
        await _collect(other)
        await trio.sleep(120)
        assert life.fenced is not None
        for key, servers in surplus.items():
            assert stage.cluster.world.data[0].peek(key) is not None
            # Of four shards that are two, one of them the surplus copy.
            for server in servers:
                stage.cluster.faults[server].down = True
                stage.cluster.faulty.add(server)
            await stage.evict(other)
            for name in ("keep", "it", "all"):
                assert await stage.applications.read(other, name, 0, 8 * 4096)
            stage.cluster.heal()
            await trio.sleep(60)

    live(scratch, story, code=(2, 2, 6))


def _surplus(stage: Directed, life: Life, server: int) -> dict[bytes, list[int]]:
    """Shards of files' packs that a server has and that count elsewhere: the servers to lose so that it is needed."""
    assert life.store is not None
    found = {}
    for _, value in life.store.scan(Table.PACKS, b"", None):
        row = PackRow.decode(value)
        for number, place in enumerate(row.placement):
            key = shard_key(stage.cluster.world.keys.fsid, row.owner_epoch, row.pack_id, number)
            if row.kind == PackKind.DATA and row.live and place != server and stage.cluster.server(server).peek(key):
                others = [other for other in row.placement if other not in (place, server)]
                found[key] = [place, *others[: len(row.placement) - 2]]
    return found


def test_heads_that_were_given_up_cost_no_published_generation_its_packs(scratch: Path, expect_log) -> None:
    """h1 is published, h2 and h3 are sent to one backend each and given up with a crash; then packs are collected."""
    expect_log("acknowledged it and has lost it", optional=True)

    async def story(stage: Directed) -> None:
        cluster, ledger = stage.cluster, stage.ledger
        life = await stage.up(stage.first)
        for letter in "ab":
            await stage.write(life, "f", 8, letter)
            await stage.publish(life)
        published = ledger.published[-1][1]
        image = (ledger.heads[published].snapshot, ledger.heads[published].deltas)
        needed = live_packs(life)
        given_up = []
        for reached in (1, 2):

            async def only_one(number: int, call: Call) -> None:
                if call.kind == "set" and parse_head_key(call.key) is not None and number != reached:  # noqa: B023
                    raise BackendUnavailable(f"backend {number}: the head does not arrive")

            cluster.before = only_one
            await stage.write(life, "f", 8, str(reached))
            await stage.sync(life, 120)
            given_up.append(max(ledger.heads))
            assert given_up[-1] not in {ref for _, ref in ledger.published}
            life.cut_power()
            await life.ended.wait()
            cluster.before = at_once
            stage.mount(stage.first, frozenset({reached}))
            life = await stage.up(stage.first)
            first = ledger.heads[ledger.published[-1][1]]
            assert (first.snapshot, first.deltas) == image, "the head was found again"
        assert len(set(given_up)) == 2
        life.cut_off = frozenset()
        await stage.write(life, "f", 8, "x")
        await stage.publish(life)
        await _collect(life)
        await trio.sleep(60)
        newest = ledger.heads[ledger.published[-1][1]]
        kept = [generation.head for generation in newest.kept]
        assert any((ledger.heads[ref].snapshot, ledger.heads[ref].deltas) == image for ref in kept)
        assert set(given_up).isdisjoint(kept)
        assert needed.isdisjoint(cluster.deleted)
        checks.kept_restore(stage, newest)
        for letter in "pqr":
            await stage.write(life, "f", 8, letter)
            await stage.publish(life)
            await _collect(life)
            await trio.sleep(60)
        assert needed <= cluster.deleted, "and once nothing keeps them they go"

    live(scratch, story)


def test_a_head_that_lands_after_a_takeover_is_no_newest_one(scratch: Path, expect_log) -> None:
    """B owns while A's head is on its way; B collects, also what that head needs; then it lands everywhere."""
    expect_log("has taken over")

    async def story(stage: Directed) -> None:
        cluster, ledger = stage.cluster, stage.ledger
        life = await stage.up(stage.first)
        await stage.write(life, "f", 8, "a")
        await stage.publish(life)
        go_on = trio.Event()

        async def hold_heads(number: int, call: Call) -> None:
            if HOST.get() is life and call.kind == "set" and parse_head_key(call.key) is not None:
                await go_on.wait()

        cluster.before = hold_heads
        await stage.write(life, "f", 8, "late")
        await stage.sync(life, 10)
        late = max(ledger.heads)
        assert late > ledger.published[-1][1]
        packs = {pack.ref.pack_id for pack, _ in packs_of(ledger.heads[late])}
        packs -= {pack.ref.pack_id for pack, _ in packs_of(ledger.heads[ledger.published[-1][1]])}
        assert packs
        life.frozen = True
        second = stage.new_machine()
        await stage.take_over(second, 600)
        other = await stage.up(second)
        for round in range(40):
            if packs <= cluster.deleted:
                break
            await stage.write(other, "f", 8, "bcdefgh"[round % 7])
            await stage.publish(other)
            await _collect(other)
            await trio.sleep(60)
        assert packs <= cluster.deleted_by[other.name], "the new owner keeps what the late head needs"
        key = head_key(cluster.world.keys.fsid, late)
        assert not any(cluster.world.control_of(number).peek(key) for number in cluster.numbers)
        go_on.set()
        thaw(life)
        await trio.sleep(5)
        entries = [entry.number for entry in cluster.world.fleet.entries]
        assert all(cluster.world.control_of(number).peek(key) for number in entries), "the head did not land"
        await checks.at_the_end(stage, "restorer-beside-it")
        await trio.sleep(120)
        assert life.fenced is not None

    live(scratch, story)


def test_a_rollback_meets_appends_that_no_commit_has(scratch: Path) -> None:
    """An older generation has a smaller write number, and the old journal is there again: nothing of it is replayed.

    The power goes right after the new store took its place, and the disk has the removed journal files still.
    """

    async def story(stage: Directed) -> None:
        machine = stage.first
        life = await stage.up(machine)
        for letter in "ab":
            await stage.write(life, "f", 8, letter)
            await stage.publish(life)
        await life.committer.commit()
        await stage.applications.create(life, "journaled")
        await stage.fsync(life, 60)
        assert life.store is not None and life.flushing.flusher is not None
        number, committed = life.store.local(JOURNAL_KEY), life.store.layers.committed_write_number
        assert number is not None
        journals: dict[str, bytes] = {}

        def keep() -> None:
            for path in journal_paths(machine.directory):
                journals[path.name] = path.read_bytes()

        def lose_power() -> None:
            for name, content in journals.items():
                (machine.directory / name).write_bytes(content)
            host = HOST.get()
            assert isinstance(host, Life)
            host.die()

        failpoints.arm("rollback.built", keep)
        failpoints.arm("restore.renamed", lose_power)
        assert life.flushing.flusher.generations is not None
        target = life.flushing.flusher.generations.base.head.kept[0]
        version = stage.ledger.version_of[target.head]
        await stage.roll_back(life, target, 600)
        failpoints.disarm_all()
        frames = [frame for content in journals.values() for frame in decode_frames(content, number)]
        assert frames, "the appends were gone before the store was replaced"
        assert committed < life.store.write_number
        again = await stage.up(machine)
        assert again.version == version

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


def test_a_backend_that_the_new_owner_took_in_stays_what_it_is(scratch: Path, expect_log) -> None:
    """A stands still right before it gives a new server its identity; B takes over and takes the server in; A goes on.

    With A's identity the server would be a stranger to B, and every shard on it out of reach.
    """
    expect_log("has taken over")

    async def story(stage: Directed) -> None:
        cluster = stage.cluster
        life = await stage.up(stage.first)
        await stage.write(life, "f", 8, "a")
        await stage.publish(life)
        configuration = Configuration(cluster)
        configuration.listed += sorted(cluster.spares)
        applied: list[Life] = []

        async def apply(life: Life) -> None:
            await configuration.apply(life)
            applied.append(life)

        def stand_still() -> None:
            life.frozen = life.frozen or HOST.get() is life

        failpoints.arm("join.records", stand_still)
        await stage.in_life(life, lambda: apply(life), 60)
        assert life.frozen, "the schedule did not happen"
        second = stage.new_machine()
        await stage.take_over(second, 600)
        other = await stage.up(second)
        await stage.in_life(other, lambda: apply(other), 600)
        assert applied == [other]
        for name in "ghi":
            await stage.write(other, name, 8, "b")
            await stage.publish(other)
        thaw(life)
        await stage.write(life, "f", 8, "z")
        await trio.sleep(120)
        assert life.fenced is not None and applied == [other]
        keys = cluster.world.keys
        key = identity_key(keys.fsid)
        (fleet,) = stage.ledger.heads[stage.ledger.published[-1][1]].fleets
        for entry in fleet.entries:
            assert open_identity(key, cluster.server(entry.number).peek(key) or b"", keys).identity == entry.identity

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


def test_two_copies_of_a_machine_that_draw_the_same_bytes_seal_nothing_else_with_them(scratch: Path) -> None:
    """Neither knows of the other, and they write the same at first: a key and nonce that come again seal the same."""

    async def story(stage: Directed) -> None:
        first = stage.first
        life = await stage.up(first)
        life.cut_power()
        await life.ended.wait()
        twin = stage.clone(first)
        world, published = stage.cluster.world, list(stage.ledger.published)
        images = [(store, store.copy()) for store in (*world.data, *world.control)]
        for machine, letters in ((first, "same"), (twin, "sane")):
            # The second finds the backends as the first found them.
            for store, image in images:
                store.go_back_to(image)
            stage.ledger.published[:] = published
            stage.cluster.deleted.clear()
            before = stage.seals.repeated
            life = await stage.up(machine)
            for letter in letters:
                await stage.write(life, "f", 8, letter)
                await stage.publish(life)
            life.cut_power()
            await life.ended.wait()
        assert stage.seals.repeated > before, "they did not draw the same bytes"

    live(scratch, story)
