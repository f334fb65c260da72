"""Which generation a reader shows, what counts as published, and when one has expired."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import trio

from qsfs.daemon.sightings import Sightings
from qsfs.errors import (
    DataLost,
    GenerationExpired,
    MayHaveExpired,
    NotFound,
    QuorumUnavailable,
    SplitHeads,
    Unavailable,
)
from qsfs.format.head import Head, HeadRef, KeptGeneration, Owner, head_key, parse_head_key, seal_head
from qsfs.format.keys import KeyRing, MasterKey
from qsfs.remote.control import Reading, Records
from qsfs.remote.fetch import Fetcher
from qsfs.remote.quorum import fleet_quorums
from qsfs.remote.readable import Published, Wanted, choose, look, owner_host, published_of, read_head, source_of
from qsfs.remote.restore import restore_into
from qsfs.remote.source import find_source
from qsfs.remote.survey import Timing
from qsfs.store.eviction import Evictor
from qsfs.store.schema import PAGE, InodeFlag, Table, u64
from tests.remote.harness import make_head, plant
from tests.remote.small_fs import LIMITS, OWNER, SECRET, SmallFs, noise

TIMING = Timing(attempt=2.0, retry=0.01, retry_most=0.02, grace=0.2)
NEXT_OWNER = Owner(2, b"second mount's i")


def ref(generation: int, owner: Owner = OWNER) -> HeadRef:
    return HeadRef(owner, generation, bytes((generation, owner.epoch)) * 16)


def head(world, generation: int, kept: tuple[tuple[HeadRef, tuple[str, ...]], ...], owner: Owner = OWNER) -> Head:
    return make_head(world, owner, generation, None, kept=tuple(KeptGeneration(r, 5, pins) for r, pins in kept))


@pytest.fixture
async def fs(scratch):
    made = await SmallFs.make(scratch / "fs")
    yield made
    made.close()


async def test_the_newest_a_number_and_a_name_are_found(fs):
    newest = head(fs.world, 9, ((ref(3), ("old", "mine")), (ref(7), ()), (ref(8), ("new",))))
    assert choose(newest, ref(9), Wanted()) == ref(9)
    assert choose(newest, ref(9), Wanted(generation=9)) == ref(9)
    assert choose(newest, ref(9), Wanted(generation=7)) == ref(7)
    assert choose(newest, ref(9), Wanted(snapshot="mine")) == ref(3)


async def test_what_is_not_kept_is_refused_with_what_is(fs):
    newest = head(fs.world, 9, ((ref(3), ("mine",)), (ref(8), ())))
    with pytest.raises(NotFound, match=r"generation 5 is not kept any more; kept are 3 \(mine\), 8, 9$"):
        choose(newest, ref(9), Wanted(generation=5))
    with pytest.raises(NotFound, match="generation 10 is not there yet; the newest is 9"):
        choose(newest, ref(9), Wanted(generation=10))
    with pytest.raises(NotFound, match='no snapshot "other"; there are: mine'):
        choose(newest, ref(9), Wanted(snapshot="other"))


async def test_of_a_generation_that_a_takeover_repeated_the_newer_head_is_meant(fs):
    newest = head(fs.world, 4, ((ref(4), ()),), NEXT_OWNER)
    assert choose(newest, ref(4, NEXT_OWNER), Wanted(generation=4)) == ref(4, NEXT_OWNER)


def reading(number: int, *heads: HeadRef) -> Reading:
    return Reading(number, frozenset(), frozenset(heads))


async def test_a_head_that_was_only_sent_is_not_published(fs):
    """A reader that followed it could stand on what no restore will ever find."""
    newest = head(fs.world, 9, ((ref(8), ()),))
    quorums = fleet_quorums(newest.fleets, fs.world.code)
    needed = quorums[0].quorum.needed
    few = [reading(number, ref(8), *([ref(9)] if number < needed else [])) for number in range(1, 9)]
    assert published_of(few, ref(9), newest, quorums) == ref(8)
    enough = [reading(number, ref(8), *([ref(9)] if number <= needed else [])) for number in range(1, 9)]
    assert published_of(enough, ref(9), newest, quorums) == ref(9)
    first = head(fs.world, 1, ())
    assert published_of([reading(1, ref(1))], ref(1), first, quorums) is None


async def make_two(fs):
    """Generation 1 holds "a", generation 2 keeps it and holds other bytes; returns both files' bytes."""
    old, new = noise(3 * PAGE), noise(3 * PAGE + 1)[: 3 * PAGE]
    number = fs.remote_file("a", old)
    fs.add_superblock()
    fs.publish()
    first = fs.sealed.ref
    fs.overwrite(number, 0, new)
    fs.commit()
    fs.upload(number)
    fs.publish(2, kept=(KeptGeneration(first, 5, ("mine",)),))
    return number, first, old, new


async def test_an_older_generation_is_read_exactly(fs, scratch):
    """Also what a restore would put beside its name: nobody runs with what a reader shows."""
    number, first, old, _ = await make_two(fs)
    kept = fs.create("unit_file", flags=int(InodeFlag.RESTORE_ASIDE))
    fs.commit()
    fs.publish(3, kept=(KeptGeneration(first, 5, ("mine",)), KeptGeneration(fs.sealed.ref, 6, ())))
    newest = await find_source(fs.candidates(), secret=SECRET, clock=fs.clock, timing=TIMING)
    for wanted, ref_wanted in ((Wanted(snapshot="mine"), first), (Wanted(), fs.sealed.ref)):
        source = await source_of(newest, wanted, TIMING)
        assert source.found.ref == ref_wanted == source.sealed.ref
        target = scratch / f"image-{source.found.ref.generation}"
        target.mkdir()
        await restore_into(target, source, LIMITS, fs.clock, exact=True)
        image = SmallFs(fs.world, target)
        names = [key[8:] for key, _ in image.store.scan(Table.ENTRIES, u64(1), u64(2))]
        assert names == ([b"a"] if wanted.snapshot else [b"a", b"unit_file"])
        if wanted.snapshot:
            async with image.fetching() as fetcher:
                await fetcher.fetch(number, 0, 3)
            assert b"".join(image.read(number, 0, 3)) == old
        else:
            assert image.inode(kept).flags & InodeFlag.RESTORE_ASIDE
        image.close()


async def test_a_head_that_nobody_has_is_told_from_one_that_is_out_of_reach(fs):
    _, first, _, _ = await make_two(fs)
    assert (await read_head(fs.members, first, fs.keys, TIMING))[0].ref == first
    with pytest.raises(NotFound, match="on none of the 8 backends"):
        await read_head(fs.members, ref(1), fs.keys, TIMING)
    fs.members.by_number(3).control.down = True
    with pytest.raises(QuorumUnavailable, match="cannot be read now"):
        await read_head(fs.members, ref(1), fs.keys, TIMING)
    assert (await read_head(fs.members, first, fs.keys, TIMING))[0].ref == first


async def test_looking_finds_the_published_head_and_what_it_keeps(fs):
    _, first, _, _ = await make_two(fs)
    seen = await look(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING)
    assert seen.ref == fs.sealed.ref and seen.keeps(first) and seen.keeps(seen.ref) and not seen.keeps(ref(1))
    assert not seen.hidden
    # A newer head that does not open: of a master key that this process does not hold, or a lie.
    fs.world.control[2].put(head_key(fs.keys.fsid, ref(9)), b"not a head that opens")
    again = await look(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING)
    assert again.ref == seen.ref and "1 backend may hold newer heads" in again.hidden
    assert await owner_host(fs.members, OWNER, fs.keys, TIMING) == ""
    fs.record_base()
    assert await owner_host(fs.members, OWNER, fs.keys, TIMING) == "host"
    for member in fs.members:
        member.control.down = True
    with pytest.raises(QuorumUnavailable, match="no head was read"):
        await look(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING, deadline_seconds=5)


async def test_a_reader_of_a_chosen_head_goes_on_looking_past_those_it_was_chosen_against(fs):
    """It learns when its generation expires; a head that nobody chose against stops it as any other reader."""
    await make_two(fs)
    chosen, head = fs.sealed.ref, fs.head
    other = plant(fs.world, dataclasses.replace(head, time_ns=head.time_ns + 1)).ref

    async def see() -> Published:
        rejected = {other}
        return await look(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING, rejected=rejected)

    with pytest.raises(SplitHeads):
        await look(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING)
    assert (await see()).ref == chosen
    plant(fs.world, dataclasses.replace(head, time_ns=head.time_ns + 2))
    with pytest.raises(SplitHeads):
        await see()


@pytest.mark.parametrize(
    ("verdict", "silent", "kind"),
    [
        pytest.param(GenerationExpired("generation 1 expired: remount"), 0, GenerationExpired, id="not kept, gone"),
        pytest.param(MayHaveExpired("generation 1 may have: remount"), 0, MayHaveExpired, id="nobody knows, gone"),
        pytest.param(None, 0, DataLost, id="kept, gone: damage"),
        pytest.param(GenerationExpired("generation 1 expired: remount"), 4, Unavailable, id="not kept, but unknown"),
    ],
)
async def test_expired_is_told_from_damage_and_from_silence(
    fs, caplog, autojump_clock, expect_log, verdict, silent, kind
):
    """The newest head says what is kept; what backends lack alone says nothing."""

    async def judge():
        return verdict

    expect_log(r"pack [0-9a-f]{32}, shard \d: .*absent", logging.WARNING)
    expect_log(r"inode \d+, page 0: ", logging.ERROR)
    number = fs.remote_file("a", noise(3 * PAGE))
    [pack] = [int.from_bytes(key, "big") for key, _ in fs.store.scan(Table.PACKS, b"", None)]
    for place, key in fs.shard_keys(pack):
        fs.world.data[place - 1].remove(key)
    for place in range(1, silent + 1):
        fs.backends[place].down = True
    fetcher = Fetcher(
        fs.store,
        fs.reader(),
        fs,
        fs.transient,
        deadline_seconds=1.0,
        expired=judge,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(fetcher.run)
        with pytest.raises(kind) as caught:
            await fetcher.fetch(number, 0, 3)
        nursery.cancel_scope.cancel()
    assert type(caught.value) is kind
    assert (": remount (pack " in str(caught.value)) == (kind in (GenerationExpired, MayHaveExpired))
    assert fetcher.expired_reads == (kind is GenerationExpired)
    assert any(str(caught.value) in record.getMessage() for record in caplog.records)


def sightings_of(fs, published: Published) -> Sightings:
    return Sightings(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING, published)


async def test_data_that_are_gone_are_judged_by_a_look_that_comes_after(fs, autojump_clock):
    """What was known is from before: the generation may have expired between two looks.  Readers share a look."""
    _, first, _, _ = await make_two(fs)
    sightings = sightings_of(fs, await look(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING))
    assert await sightings.expired(first) is None, "kept, so it is damage"
    fs.publish(3)
    await trio.sleep(60)
    found = []

    async def ask() -> None:
        found.append(await sightings.expired(first))

    before = sum(call == "scan" for member in fs.members for call, _ in member.control.calls)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert len(found) == 20 and all(isinstance(one, GenerationExpired) for one in found)
    scans = sum(call == "scan" for member in fs.members for call, _ in member.control.calls) - before
    assert scans <= 3 * len(fs.members)


async def test_nobody_calls_it_damage_while_the_newest_head_cannot_be_read(fs, autojump_clock):
    """The master key was rotated elsewhere: newer heads do not open here, and may not keep the generation any more."""
    _, first, _, _ = await make_two(fs)
    sightings = sightings_of(fs, await look(fs.members, Records(fs.keys), fs.world.code, fs.clock, TIMING))
    rotated = make_head(fs.world, OWNER, 3)
    keys = KeyRing(fs.keys.fsid, [MasterKey(2, b"r" * 32)])
    sealed = seal_head(rotated, keys, fs.clock)
    for store in fs.world.control:
        store.put(sealed.key, sealed.value)
    told = await sightings.expired(first)
    assert isinstance(told, MayHaveExpired)
    assert "generation 1 may have expired" in str(told) and "if the master key was rotated, remount" in str(told)
    for store in fs.world.control:
        for key in list(store.keys()):
            if (named := parse_head_key(key)) and named.ref != sealed.ref:
                store.lose(key)
    await trio.sleep(60)
    assert isinstance(await sightings.expired(first), MayHaveExpired)
    for member in fs.members:
        member.control.down = True
    await trio.sleep(60)
    told = await sightings.expired(first)
    assert isinstance(told, MayHaveExpired) and "connection refused" in str(told)


async def test_a_reader_evicts_whatever_it_has(fs):
    """Packs that were never looked at a second time, and files that are pinned where they are written."""
    number = fs.write("a", noise(8 * PAGE), flags=int(InodeFlag.PINNED))
    fs.commit()
    fs.upload(number)
    assert not any(Evictor(fs.store).step(100, 100, recent_too=True, written_will_do=True).blocks for _ in range(3))
    evictor = Evictor(fs.store, all_remote=True)
    assert sum(evictor.step(100, 100, recent_too=True, written_will_do=False).blocks for _ in range(3)) == 2
