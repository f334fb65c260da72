"""What a restore reads: the newest head, how sure that is, and which generations a head keeps."""

from __future__ import annotations

import dataclasses

import pytest
import trio

from qsfs.backend.memory import MemoryBackend
from qsfs.errors import BackendUnavailable, ConfigError, Corrupt, NotFound, QuorumUnavailable, SplitHeads
from qsfs.format.fleet import Fleet
from qsfs.format.head import HeadRef, KeptGeneration, Owner, head_key
from qsfs.remote.identity import Stranger
from qsfs.remote.kept import kept_of_first, kept_with
from qsfs.remote.members import Candidate
from qsfs.remote.newest import describe_head
from qsfs.remote.survey import Found, Timing, fetch_head, find_newest
from tests.remote.harness import FSID, TIMING, Machine, World, make_head, make_world, plant

OLD, NEW = Owner(1, b"o" * 16), Owner(2, b"n" * 16)


async def find(world: World, *lost: int, machine: Machine | None = None, **options: object) -> Found:
    machine = machine or Machine(world, "restorer")
    machine.cut_off(*lost)
    return await find_newest(
        machine.members, machine.records, world.code, machine.clock, TIMING, **{"tries": 2, **options}
    )


async def test_every_reachable_backend_is_read_and_the_tolerance_printed(autojump_clock):
    """N = 6, Q = 4: with five answers two of them may be lost, stale or lying."""
    world = await make_world(6, m=2)
    old = plant(world, make_head(world, OLD, 9)).ref
    newest = plant(world, make_head(world, NEW, 9, old), (1, 2, 3, 4)).ref
    found = await find(world, 1)
    assert found.ref == newest and found.judgement.withstands == 2
    assert found.sentences()[:2] == (
        f"The newest head is generation 9 of epoch 2 (digest {newest.digest.hex()[:8]}); "
        "5 of 6 backends answered.",
        "This holds even if 2 of those have lost it, are stale or lie.",
    )
    assert found.sentences()[2].startswith("Not answered: backend host1")


@pytest.mark.parametrize("lost", [(1, 2, 3), (4, 5, 6), (1, 3, 5)])
async def test_a_published_head_is_found_with_as_many_lost_as_are_tolerated(autojump_clock, lost):
    world = await make_world(6, m=2)
    newest = plant(world, make_head(world, OLD, 9), (1, 2, 3, 4)).ref
    found = await find(world, *lost)
    assert found.ref == newest and found.judgement.withstands == 0


async def test_with_too_few_answers_a_newer_head_cannot_be_ruled_out(autojump_clock):
    world = await make_world(6, m=2)
    plant(world, make_head(world, OLD, 9))
    found = await find(world, 1, 2, 3, 4)
    assert found.judgement.withstands == -1
    assert "1 more must answer before a newer generation" in found.sentences()[1]


async def test_no_answer_no_head_and_a_rotten_head_are_three_results(autojump_clock):
    world = await make_world(3)
    with pytest.raises(NotFound, match="none of the 3 backends holds a head"):
        await find(world)
    with pytest.raises(QuorumUnavailable, match="not every backend answered: backend host2"):
        await find(world, 2)
    sealed = plant(world, make_head(world, OLD, 9), (1,))
    world.control_of(1).rot(sealed.key, lambda value: value[:-1] + b"?")
    with pytest.raises(Corrupt, match="1 backends list heads, and none authenticates"):
        await find(world)


async def test_dead_backends_are_given_up_after_some_tries_and_silent_ones_at_the_deadline(autojump_clock):
    world = await make_world(3)
    plant(world, make_head(world, OLD, 9))
    begin = trio.current_time()
    await find(world, 1)
    assert trio.current_time() - begin < 2
    machine = Machine(world, timing=Timing(attempt=1e9))
    machine.backends[2].delay = lambda call: 1e9
    found = await find_newest(
        machine.members, machine.records, world.code, machine.clock, machine.timing, deadline_seconds=9
    )
    assert trio.current_time() - begin < 12
    assert found.judgement.counted == {1, 3}


async def test_a_backend_that_fails_once_is_asked_again(autojump_clock):
    world = await make_world(3)
    plant(world, make_head(world, OLD, 9))
    machine = Machine(world)
    failed: list[str] = []

    def once(call: str, key: bytes) -> None:
        if not failed:
            failed.append(call)
            raise BackendUnavailable("once")

    machine.backends[2].gate = once
    assert (await find(world, machine=machine)).judgement.counted == {1, 2, 3}


async def test_the_count_is_against_the_fleet_that_the_newest_head_names(autojump_clock):
    world = await make_world(5)
    entries = world.fleet.entries
    head = make_head(world, OLD, 9, fleets=(Fleet(2, entries[2:]),))
    plant(world, head, (3, 4))
    found = await find(world, 5)
    assert found.judgement.withstands == 0
    assert "2 of 3 backends answered" in found.sentences()[0]


async def test_entries_that_no_configured_backend_is_are_named(autojump_clock):
    world = await make_world(3)
    other = dataclasses.replace(world.fleet.entries[0], number=9, identity=b"9" * 16, address="gone:1")
    plant(world, make_head(world, OLD, 9, fleets=(Fleet(2, (*world.fleet.entries, other)),)), (1, 2, 3))
    found = await find(world)
    assert found.missing == (other,)
    assert "Not configured: gone:1/qsfs (entry 9)." in found.sentences()
    backend = MemoryBackend(world.data[0])
    silent = Stranger(Candidate("gone:1", "qsfs", backend, lambda _: backend), BackendUnavailable("no"))
    assert not any("Not configured" in sentence for sentence in found.sentences([silent])), "the caller tells of it"


async def test_a_rotten_newer_head_makes_its_backend_not_count(autojump_clock):
    world = await make_world(3)
    plant(world, make_head(world, OLD, 9))
    newer = plant(world, make_head(world, OLD, 10), (1,))
    world.control_of(1).rot(newer.key, lambda value: value[:-1] + b"?")
    found = await find(world)
    assert found.ref.generation == 9 and found.judgement.counted == {2, 3}
    assert found.sentences()[-1].startswith("Not counted: ")


async def test_two_lines_stop_a_restore_until_a_person_names_one(autojump_clock):
    world = await make_world(3)
    one = plant(world, make_head(world, OLD, 9)).ref
    two = plant(world, make_head(world, OLD, 9, counters={"by": 2})).ref
    with pytest.raises(SplitHeads):
        await find(world)
    for chosen, other in ((one, two), (two, one)):
        found = await find(world, chosen=chosen.digest.hex()[:8])
        assert (found.ref, found.rejected, found.judgement.splits) == (chosen, {other}, ())
        assert f"Not chosen: {describe_head(other)}, which is left behind." in found.sentences()
    with pytest.raises(NotFound, match=f"{one.digest.hex()[:8]}.*--generation names an older"):
        await find(world, chosen=HeadRef(OLD, 9, bytes(32)).digest.hex())
    with pytest.raises(QuorumUnavailable, match="not every backend answered"):
        await find(world, 3, chosen=HeadRef(OLD, 9, bytes(32)).digest.hex())
    with pytest.raises(ConfigError, match=f"{two.digest.hex()}.*give more of it"):
        await find(world, chosen="")


async def test_what_a_person_chooses_against_takes_all_heads_of_its_line_along(autojump_clock):
    """The rejected line has more heads than its last, which was listed, and may be the longer one."""
    world = await make_world(3)
    root = plant(world, make_head(world, OLD, 9)).ref
    mine = plant(world, make_head(world, OLD, 10, root)).ref
    theirs = plant(world, make_head(world, OLD, 10, root, counters={"by": 2})).ref
    last = plant(world, make_head(world, OLD, 11, theirs, counters={"by": 2})).ref
    with pytest.raises(SplitHeads) as caught:
        await find(world)
    assert caught.value.digests == (last.digest.hex(), mine.digest.hex()), "the ends of the lines, the newest first"
    found = await find(world, chosen=mine.digest.hex())
    assert (found.ref, found.rejected) == (mine, {theirs, last})
    found = await find(world, chosen=last.digest.hex())
    assert (found.ref, found.rejected) == (last, {mine})


async def test_what_needs_no_single_head_gets_the_last_of_each_line(autojump_clock):
    world = await make_world(3)
    one = make_head(world, OLD, 9)
    two = make_head(world, OLD, 9, counters={"by": 2})
    for head in (one, two):
        plant(world, head)
    found = await find(world, any_line=True)
    assert found.head in (one, two) and [found.head, *found.lines] in ([one, two], [two, one])
    assert "two copies of one machine" in found.sentences()[-1]
    assert (await find(world, any_line=True, chosen=found.ref.digest.hex())).lines == ()


async def test_a_head_that_left_memory_is_read_from_any_backend_that_still_has_it(autojump_clock):
    world = await make_world(3)
    ref = plant(world, make_head(world, OLD, 9)).ref
    machine = Machine(world)
    found = await find(world, machine=machine)
    fresh = Machine(world)
    readings = list(found.survey.readings.values())
    world.control_of(1).lose(head_key(FSID, ref))
    world.control_of(2).rot(head_key(FSID, ref), lambda value: b"rot")
    assert await fetch_head(fresh.members, readings, ref, fresh.records, TIMING) == found.head
    world.control_of(3).lose(head_key(FSID, ref))
    fresh = Machine(world)
    with pytest.raises(QuorumUnavailable, match="has no value"):
        await fetch_head(fresh.members, readings, ref, fresh.records, TIMING)


def generation(number: int, *pins: str, owner: Owner = NEW) -> KeptGeneration:
    return KeptGeneration(HeadRef(owner, number, bytes([number]) * 32), number, pins)


def test_two_published_generations_and_the_pinned_ones_are_kept():
    published = [generation(number) for number in range(1, 6)]
    pins = {generation(2).head: ("upgrade", "manual")}
    kept = kept_with(published[:4], published, pins)
    assert kept == (generation(2, "upgrade", "manual"), generation(4), generation(5))
    assert kept_with(kept, published, {}) == (generation(4), generation(5))


def test_a_pin_does_not_bring_back_what_is_not_kept():
    published = [generation(4), generation(5)]
    assert kept_with((generation(3),), published, {generation(1).head: ("late",)}) == (
        generation(4),
        generation(5),
    )
    assert kept_with((generation(3),), published, {generation(3).head: ("in time",)})[0] == generation(
        3, "in time"
    )


async def test_a_new_owner_keeps_what_it_took_over_until_it_has_published_twice(autojump_clock):
    world = await make_world(3)
    found = make_head(world, OLD, 9, kept=(generation(7, owner=OLD), generation(8, owner=OLD)), time_ns=9)
    ref = generation(9, owner=OLD).head
    first = kept_of_first(found, ref)
    assert [kept.head.generation for kept in first] == [7, 8, 9]
    own = generation(9)
    assert [kept.head for kept in kept_with(first, [own], {})] == [ref, own.head]
    assert [kept.head for kept in kept_with(first, [own, generation(10)], {})] == [
        own.head,
        generation(10).head,
    ]
