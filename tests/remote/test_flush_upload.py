"""Uploading packs: quorums, sick backends, placement over groups; and the spool's files."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from pathlib import Path

import pytest
import trio
import trio.testing
from xxhash import xxh3_64

from qsfs.errors import BackendFull, Corrupt, FormatMismatch
from qsfs.format.erasure import Code
from qsfs.format.pack import Pack
from qsfs.format.shard import open_shard, shard_key
from qsfs.remote.members import Member, Members
from qsfs.remote.packing import Sealer
from qsfs.remote.placement import FreeSpace, assign, group_count, ranking, score
from qsfs.remote.spool import AbandonedPack, Spool, SpoolFull
from qsfs.remote.upload import Upload, Uploader
from qsfs.store.snapshot import DirtyRun
from tests.remote.harness import FaultyBackend, TrioClock, World, make_head, make_world, plant

PAGE = 4096


class Fleet:
    """Backends, an uploader and packs to upload."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clock = TrioClock(5)
        self.backends = [FaultyBackend(store) for store in world.data]
        self.members = Members(
            Member(entry, backend, FaultyBackend(control), self.clock, identified=True)
            for entry, backend, control in zip(world.fleet.entries, self.backends, world.control, strict=True)
        )
        self.code = Code(world.code)
        self.sealer = Sealer(world.keys, self.code, 1, self.clock)
        self.uploader = Uploader(
            self.members,
            FreeSpace(self.members, self.clock),
            world.code,
            world.keys.fsid,
            self.clock,
            full_grace_seconds=2.0,
        )

    def pack(self) -> Pack:
        return self.sealer.data_pack([DirtyRun(7, 0, (1,), self.clock.random_bytes(PAGE))])

    async def upload(self, pack: Pack | None = None) -> Upload:
        pack = pack or self.pack()
        return await self.uploader.upload(pack.ref, self.sealer.shards(pack))

    def check(self, upload: Upload) -> None:
        """Every shard that has a place lies there, authentic; no backend has two."""
        places = [place for place in upload.placement if place >= 0]
        assert len(set(places)) == len(places)
        for number, place in enumerate(upload.placement):
            if place >= 0:
                key = shard_key(self.world.keys.fsid, 1, upload.ref.pack_id, number)
                value = self.world.data[place - 1].peek(key)
                assert value is not None
                assert open_shard(value, self.world.keys, key=key).number == number


@pytest.fixture
async def fleet() -> Fleet:
    return Fleet(await make_world(24, k=16, m=4))


async def test_a_pack_goes_to_n_backends(fleet: Fleet, autojump_clock):
    """All healthy: full at once."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)
        upload = await fleet.upload()
        assert upload.full
        fleet.check(upload)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("down", [1, 4])
async def test_spares_take_the_place_of_backends_that_are_down(fleet: Fleet, autojump_clock, down):
    """With N >= n + m backends m may be down and packs are still full, without any wait."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)
        for backend in fleet.backends[:down]:
            backend.down = True
        start = trio.current_time()
        for _ in range(4):
            upload = await fleet.upload()
            assert upload.full
            fleet.check(upload)
        assert trio.current_time() == start
        nursery.cancel_scope.cancel()


async def test_a_pack_is_written_with_the_write_quorum(fleet: Fleet, autojump_clock):
    """18 of 20 suffice; what is missing has no place."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)
        for backend in fleet.backends[:6]:
            backend.down = True
        upload = await fleet.upload()
        assert upload.stored == 18
        assert upload.placement.count(-1) == 2
        fleet.check(upload)
        nursery.cancel_scope.cancel()


async def test_a_backend_that_hangs_holds_up_nothing_that_has_its_quorum(fleet: Fleet, autojump_clock):
    """The grace for full, no more; its shard goes on in the background and is told when it comes."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)
        for backend in fleet.backends[:1]:
            backend.delay = lambda call: 20.0 if call == "set" else 0.0
        came: list[list[int]] = []
        start = trio.current_time()
        while True:
            upload = await fleet.upload()
            if not upload.full:
                break
        assert trio.current_time() - start <= 2.0
        upload.when_finished(lambda: came.append(upload.placement))
        await trio.sleep(30)
        assert came
        assert -1 not in came[0]
        fleet.check(upload)
        nursery.cancel_scope.cancel()


async def test_backends_that_hang_are_replaced_where_the_quorum_needs_it(fleet: Fleet, autojump_clock):
    """Nobody waits a minute for a black hole while spares are idle."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)
        for backend in fleet.backends[:4]:
            backend.delay = lambda call: 3600.0 if call == "set" else 0.0
        start = trio.current_time()
        upload = await fleet.upload()
        assert upload.stored >= 18
        assert trio.current_time() - start < 15
        nursery.cancel_scope.cancel()


async def test_an_upload_without_a_quorum_waits_and_goes_on(fleet: Fleet, autojump_clock):
    """It says what it waits for, and ends when enough are back; what is stored is not sent again."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)
        for backend in fleet.backends[:10]:
            backend.down = True
        done: list[Upload] = []

        async def upload() -> None:
            done.append(await fleet.upload())

        nursery.start_soon(upload)
        await trio.sleep(120)
        assert not done
        (reason,) = fleet.uploader.waiting.values()
        assert reason.startswith("14 of the 18 shards")
        assert not fleet.uploader.enough_backends()
        for backend in fleet.backends:
            backend.down = False
        await trio.sleep(60)
        assert done
        assert fleet.uploader.waiting == {}
        sets = Counter(key for backend in fleet.backends for call, key in backend.calls if call == "set")
        assert set(sets.values()) == {1}
        fleet.check(done[0])
        nursery.cancel_scope.cancel()


async def test_a_full_backend_gets_nothing_more(fleet: Fleet, autojump_clock):
    """It answers, so it stays up; others take its shards."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)

        def no_room(call: str, key: bytes) -> None:
            if call == "set":
                raise BackendFull("no room")

        fleet.backends[0].gate = no_room
        for _ in range(3):
            assert (await fleet.upload()).full
        assert not fleet.backends[0].store.keys() or len(fleet.backends[0].store.keys()) == 1
        nursery.cancel_scope.cancel()


async def test_a_cancelled_upload_leaves_nothing_running(fleet: Fleet, autojump_clock):
    """Its shards are garbage, its memory is free."""
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.uploader.run)
        for backend in fleet.backends[:10]:
            backend.down = True
        with trio.move_on_after(5):
            await fleet.upload()
        await trio.testing.wait_all_tasks_blocked()
        assert fleet.uploader.waiting == {}
        calls = sum(len(backend.calls) for backend in fleet.backends)
        await trio.sleep(50)
        assert sum(len([c for c in b.calls if c[0] == "set"]) for b in fleet.backends) <= calls
        nursery.cancel_scope.cancel()


# placement


def group_limits(members: list[Member], n: int) -> int:
    return -(-n // group_count(members))


@pytest.mark.parametrize("groups", [3, 5, 8, 12])
async def test_no_group_gets_more_than_its_part(groups: int, autojump_clock):
    """At most ceil(n / groups) shards of any pack lie in one group."""
    count = 24 // groups * groups
    names = tuple(f"site{i % groups}" for i in range(count))
    world = await make_world(count, k=10, m=4, groups=names)
    fleet = Fleet(world)
    free = FreeSpace(fleet.members, fleet.clock)
    members = list(fleet.members)
    source = random.Random(1)
    for _ in range(50):
        ranked = ranking(source.randbytes(16), members, free)
        chosen = assign(range(14), ranked, [], n=14, groups=groups)
        assert len(chosen) == 14
        assert len({m.number for m in chosen.values()}) == 14
        per_group = Counter(m.entry.group for m in chosen.values())
        assert max(per_group.values()) <= -(-14 // groups)


async def test_the_bound_of_a_group_grows_where_a_pack_could_not_be_placed(autojump_clock):
    """A site that is gone, or groups of different size, do not keep packs from being written."""
    names = tuple("abcd"[i % 4] for i in range(24))
    fleet = Fleet(await make_world(24, k=16, m=4, groups=names))
    free = FreeSpace(fleet.members, fleet.clock)
    left = [member for member in fleet.members if member.entry.group != "a"]
    chosen = assign(range(20), ranking(b"x" * 16, left, free), [], n=20, groups=4)
    assert len(chosen) == 18
    uneven = [m for m in fleet.members if m.entry.group == "a" or m.number % 2]
    chosen = assign(range(12), ranking(b"x" * 16, uneven, free), [], n=12, groups=4)
    assert len(chosen) == 12


async def test_shares_follow_free_space_and_little_moves(autojump_clock):
    """A backend with twice the room takes about twice the shards; one more backend takes only its part."""
    fleet = Fleet(await make_world(12, k=2, m=1))
    free = FreeSpace(fleet.members, fleet.clock)
    await free.refresh()
    free._free = {m.number: (2 << 30 if m.number == 1 else 1 << 30) for m in fleet.members}
    members = list(fleet.members)
    source = random.Random(2)
    packs = [source.randbytes(16) for _ in range(3000)]
    first = Counter(ranking(pack, members, free)[0].number for pack in packs)
    others = sum(first[n] for n in range(2, 13)) / 11
    assert 1.7 < first[1] / others < 2.3
    before = {pack: ranking(pack, members[:-1], free)[0].number for pack in packs}
    moved = [p for p in packs if ranking(p, members, free)[0].number != before[p]]
    assert all(ranking(p, members, free)[0].number == 12 for p in moved)


def test_a_score_depends_on_pack_and_backend_alone():
    assert score(b"a" * 16, b"b" * 16, 2.0) == score(b"a" * 16, b"b" * 16, 2.0)
    assert score(b"a" * 16, b"b" * 16, 2.0) == pytest.approx(2 * score(b"a" * 16, b"b" * 16, 1.0))
    assert score(b"a" * 16, b"b" * 16, 1.0) != score(b"b" * 16, b"a" * 16, 1.0)


# the spool


async def test_a_spool_gives_back_what_was_stored(tmp_path: Path, autojump_clock):
    """Packs until they are dropped; heads across a reopening; nothing beyond its bound."""
    world = await make_world(4)
    fleet = Fleet(world)
    pack = fleet.sealer.data_pack([DirtyRun(1, 0, (1,), b"x" * PAGE)])
    spool = Spool(tmp_path / "spool", 4 << 20)
    spool.write_pack(5, 0, pack.ref, pack.body)
    assert spool.read_pack(5, 0) == pack.body
    sealed = plant(world, make_head(world, _owner(), 5))
    await spool.store_head(sealed)
    again = Spool(tmp_path / "spool", 4 << 20)
    assert again.heads == {sealed.ref: sealed}
    assert again.abandoned == []
    assert not list((tmp_path / "spool").glob("*.pack"))
    again.drop_heads(sealed.ref)
    assert Spool(tmp_path / "spool", 4 << 20).heads == {}
    with pytest.raises(SpoolFull):
        again.write_pack(6, 0, pack.ref, bytes(4 << 20))


async def test_the_room_of_a_spool_is_told_while_a_slow_disk_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock
):
    """The event loop asks, for `status` and the next cut: it must not wait for the flush of a pack."""
    ref = Fleet(await make_world(4)).pack().ref
    spool = Spool(tmp_path / "spool", 1 << 30)
    flushing, go_on = threading.Event(), threading.Event()

    def fsync(_: int) -> None:
        flushing.set()
        go_on.wait(60)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = threading.Thread(target=spool.write_pack, args=[1, 0, ref, bytes(9000)])
    writer.start()
    assert flushing.wait(60)
    asker = threading.Thread(target=spool.room, daemon=True)
    asker.start()
    asker.join(20)
    waited = asker.is_alive()
    go_on.set()
    writer.join()
    assert not waited
    assert spool.used_bytes == 12288
    spool.drop_packs(1)
    assert spool.used_bytes == 0


async def test_packs_of_a_cut_without_a_head_are_abandoned_at_the_next_mount(tmp_path: Path, autojump_clock):
    """And remembered until they are collected."""
    fleet = Fleet(await make_world(4))
    pack = fleet.sealer.data_pack([DirtyRun(1, 0, (1,), b"x" * PAGE)])
    Spool(tmp_path, 4 << 20).write_pack(5, 0, pack.ref, pack.body)
    for _ in range(2):
        spool = Spool(tmp_path, 4 << 20)
        assert [entry.pack_id for entry in spool.abandoned] == [pack.ref.pack_id]
        assert spool.used_bytes == 4096


@pytest.mark.parametrize("damage", ["cut", "flip", "temporary", "name"])
async def test_a_torn_file_of_the_spool_is_removed(tmp_path: Path, autojump_clock, expect_log, damage):
    """It was never needed: nothing was sent of it."""
    world = await make_world(4)
    spool = Spool(tmp_path, 4 << 20)
    sealed = plant(world, make_head(world, _owner(), 5))
    await spool.store_head(sealed)
    (path,) = tmp_path.glob("*.head")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "temporary":
        path.rename(f"{path}.tmp")
    else:
        path.rename(tmp_path / "zz-yy.pack")
    if damage != "temporary":
        expect_log("never needed")
    assert Spool(tmp_path, 4 << 20).heads == {}
    assert list(tmp_path.iterdir()) == []


def _as_version(content: bytes, version: int) -> bytes:
    """A spooled file as a version of qsfs writes it whose descriptions nobody knows here."""
    head = content[:4] + version.to_bytes(2, "little") + content[6:20]
    return head + xxh3_64(head + content[28:]).intdigest().to_bytes(8, "little") + content[28:]


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize("what", ["pack", "head", "abandoned"])
async def test_a_spool_of_another_version_is_refused_and_kept(tmp_path: Path, autojump_clock, what, version):
    """A head in it may be published and not recorded: without it this machine would take itself for a clone."""
    world = await make_world(4)
    spool = Spool(tmp_path, 4 << 20)
    pack = Fleet(world).sealer.data_pack([DirtyRun(1, 0, (1,), b"x" * PAGE)])
    sealed = plant(world, make_head(world, _owner(), 5))
    await spool.store_head(sealed)
    spool.write_pack(6, 0, pack.ref, pack.body)
    spool.set_abandoned([AbandonedPack(b"p" * 16, 3)])
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (changed,) = (path for path in files if what in path.name)
    changed.write_bytes(_as_version(files[changed], version))
    present = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FormatMismatch, match=f"of version {version}.*mount once with the qsfs version that wrote it"):
        Spool(tmp_path, 4 << 20)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == present
    changed.write_bytes(files[changed])
    again = Spool(tmp_path, 4 << 20)
    assert list(again.heads) == [sealed.ref]
    assert [entry.pack_id for entry in again.abandoned] == [b"p" * 16, pack.ref.pack_id]


async def test_a_spool_with_nothing_left_to_do_is_empty(tmp_path: Path, autojump_clock):
    """So that the version which wrote it can hand over to any other."""
    world = await make_world(4)
    spool = Spool(tmp_path, 4 << 20)
    sealed = plant(world, make_head(world, _owner(), 5))
    await spool.store_head(sealed)
    spool.set_abandoned([AbandonedPack(b"p" * 16, 3)])
    spool.drop_heads(sealed.ref)
    spool.set_abandoned([])
    assert list(tmp_path.iterdir()) == []
    assert spool.used_bytes == 0
    assert Spool(tmp_path, 4 << 20).abandoned == []


async def test_a_rotten_version_of_a_spooled_file_is_rot(tmp_path: Path, autojump_clock, expect_log):
    """Nobody is told to look for a qsfs that there never was."""
    world = await make_world(4)
    await Spool(tmp_path, 4 << 20).store_head(plant(world, make_head(world, _owner(), 5)))
    (path,) = tmp_path.glob("*.head")
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\x03" + content[5:])
    expect_log("never needed")
    assert Spool(tmp_path, 4 << 20).heads == {}


async def test_reading_a_damaged_spooled_pack_says_so(tmp_path: Path, autojump_clock):
    """Wrong bytes are never uploaded."""
    fleet = Fleet(await make_world(4))
    pack = fleet.sealer.data_pack([DirtyRun(1, 0, (1,), b"x" * PAGE)])
    spool = Spool(tmp_path, 4 << 20)
    spool.write_pack(5, 0, pack.ref, pack.body)
    (path,) = tmp_path.glob("*.pack")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Corrupt):
        spool.read_pack(5, 0)


def _owner() -> object:
    from qsfs.format.head import Owner

    return Owner(1, b"m" * 16)


