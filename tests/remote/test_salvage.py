"""Backends that lose what they had acknowledged: what the cache still has is neither evicted nor given up."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import replace

import pytest
import trio

import tests.remote.flushing
from qsfs.daemon.syncing import _full as wait_until_full
from qsfs.errors import BackendUnavailable, Corrupt, DataLost, Unavailable
from qsfs.format.erasure import Code
from qsfs.format.extent import ExtentEntry, PackKind
from qsfs.format.shard import parse_shard_key
from qsfs.remote import salvage as salvage_module
from qsfs.remote.chain import listed_ids
from qsfs.remote.flush import Flusher
from qsfs.remote.members import State
from qsfs.remote.metadata import RefreshUpload
from qsfs.remote.reader import PackReader
from qsfs.remote.salvage import Salvage
from qsfs.remote.second_look import SecondLook
from qsfs.remote.stored import StoredPack, entry_of
from qsfs.store.dropping import Dropper, Stays
from qsfs.store.eviction import Evictor
from qsfs.store.packs import set_placement
from qsfs.store.schema import PAGE, PackRow, PackState, Table, u64
from tests.remote.flush_machine import DirectReader, FlushMachine, restore
from tests.remote.flushing import flushing, pack_rows, page, until
from tests.remote.harness import World

EXPECTED = (
    "gone|lacks shards|fewer shards than it needs|acknowledged|cannot be read any more|shards that are left|"
    "fail their checksum"
)


def lose(world: World, row: PackRow, leave: int) -> None:
    """All but the last `leave` shards of a pack go, with what their backends had not written to their disks."""
    lose_shards(world, row, range(len(row.placement) - leave))


def lose_shards(world: World, row: PackRow, shards: Iterable[int]) -> None:
    """These shards of a pack go."""
    for shard in shards:
        store = world.data[row.placement[shard] - 1]
        for key in list(store.keys()):
            named = parse_shard_key(key)
            if named is not None and named.pack_id == row.pack_id:
                store.lose(key)


async def written(flusher: Flusher, machine: FlushMachine) -> tuple[int, PackRow]:
    """A published file "a" of 16 pages, and the pack that it lies in."""
    machine.write(machine.create("a"), 0, page("x") * 16)
    await flusher.sync()
    return next((number, row) for number, row in pack_rows(machine).items() if row.live == 16 * PAGE)


@pytest.mark.parametrize("leave", [0, 1])
async def test_what_is_local_of_a_lost_pack_is_uploaded_anew(
    world: World, machine: FlushMachine, clock, expect_log, leave: int
):
    """Fewer shards are left than it takes; the next generation has the data again, in full packs."""
    expect_log("gone|lacks shards|fewer shards than it needs|acknowledged", optional=True)
    async with flushing(machine) as flusher:
        number, row = await written(flusher, machine)
        lose(world, row, leave)
        await until(lambda: number not in pack_rows(machine) or not pack_rows(machine)[number].live)
        await flusher.sync()
        await until(lambda: not machine.context.ledger.incomplete)
        assert restore(world).files["a"] == page("x") * 16


async def test_a_page_whose_local_bytes_are_damaged_is_not_uploaded(
    world: World, machine: FlushMachine, clock, expect_log
):
    """It alone is lost: the others are uploaded anew, and generations go on."""
    expect_log(EXPECTED)
    async with flushing(machine) as flusher:
        number, row = await written(flusher, machine)
        await machine.committer.commit()
        damage(machine, next(iter(machine.store.scan(Table.VALUES, b"", None)))[0])
        lose(world, row, 1)
        await until(lambda: flusher._upkeep.salvage.local_pages)
        await until(lambda: pack_rows(machine)[number].live == PAGE)
        before = flusher.status()["generation"]
        machine.create("b")
        await flusher.sync()
        assert flusher.status()["generation"] > before


@pytest.mark.parametrize("state", [PackState.LOOKED, PackState.LOOKED | PackState.FULL])
async def test_no_look_and_no_eviction_takes_too_few_shards_for_enough(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log, state: PackState
):
    """However short the cache is of room, and whatever row an older version has left."""
    expect_log("gone|lacks shards|fewer shards than it needs|acknowledged|short of room", optional=True)
    async with flushing(machine, quiet_seconds=3600, cut_seconds=86400) as flusher:
        number, row = await written(flusher, machine)
        monkeypatch.setattr(flusher._upkeep._completer, "complete_packs", nothing)
        lose(world, row, 1)
        monkeypatch.setattr(Flusher, "short_of_room", property(lambda self: True))
        await trio.sleep(600)
        found = pack_rows(machine)[number]
        assert found.placement.count(-1) == 3
        assert not found.state & PackState.LOOKED
        few = replace(found, state=int(state & ~PackState.FULL))
        machine.store.layers.put(Table.PACKS, u64(number), few.encode())
        await machine.committer.commit()
        evictor = Evictor(machine.store)
        for _ in range(3):
            done = evictor.step(1000, 1000, recent_too=True, written_will_do=True, start_too=True)
            assert not done.bytes


async def test_what_was_recorded_and_is_not_committed_is_uploaded_anew_too(machine: FlushMachine, clock, expect_log):
    """Backends may lose a pack as soon as they have it."""
    expect_log("fewer shards than it needs")
    async with machine.mounted():
        machine.write(machine.create("a"), 0, page("x") * 16)
        await machine.committer.commit()
        await machine.precopy()
        number = next(number for number, row in pack_rows(machine).items() if row.kind == PackKind.DATA)
        assert machine.store.dirty
        salvage = Salvage(machine.context, DirectReader(machine.world), short_of_room=lambda: False)
        machine.context.ledger.lost.add(number)
        with machine.store.extents.recording(number):
            await salvage.work()
            assert not salvage.local_pages, "more of it may be recorded yet"
        await salvage.work()
        assert salvage.local_pages == 16


async def test_what_enough_backends_have_is_enough_for_who_is_short_of_room(machine: FlushMachine, clock):
    """And is looked at again until all of them have answered: only then a backend may be retired for it."""
    async with machine.mounted():
        machine.write(machine.create("a"), 0, page("x") * 16)
        await machine.committer.commit()
        await machine.precopy()
        number, row = next((n, row) for n, row in pack_rows(machine).items() if row.kind == PackKind.DATA)
        ledger, look = machine.context.ledger, SecondLook(machine.context)
        away = machine.backends[row.placement[0] - 1]
        away.down = True
        await trio.sleep(machine.look_seconds + 1)
        await look.look(100, written_too=False)
        assert not pack_rows(machine)[number].state & PackState.LOOKED
        await trio.sleep(60)
        await look.look(100, written_too=True)
        found = pack_rows(machine)[number]
        assert found.state & PackState.LOOKED and not found.looked_at
        assert number in ledger.looks
        await machine.committer.commit()
        await trio.sleep(60)
        await look.look(100, written_too=True)
        assert not machine.store.dirty, "what is known is not written again"
        away.down = False
        await trio.sleep(60)
        await look.look(100, written_too=True)
        assert pack_rows(machine)[number].looked_at
        assert number not in ledger.looks


async def test_what_only_a_lost_metadata_pack_held_is_written_anew(
    world: World, machine: FlushMachine, clock, expect_log
):
    """The snapshot's and a delta's, also where nothing is written any more: a restore elsewhere has all again."""
    expect_log("gone|lacks shards|fewer shards than it needs|acknowledged", optional=True)
    async with flushing(machine, cut_seconds=30) as flusher:
        for name in "abc":
            machine.write(machine.create(name), 0, page(name))
            await flusher.sync()
        chain = flusher.generations.chain
        assert chain.deltas
        for pack in chain.all_packs():
            lose(world, pack_rows(machine)[pack.number], 1)
        lost = {pack.ref.pack_id for pack in chain.all_packs()}
        await until(lambda: lost.isdisjoint(listed_ids(flusher.generations.base.head)))
        await until(lambda: not machine.context.ledger.incomplete)
        assert restore(world).files == {name: page(name) for name in "abc"}
        base = flusher.generations.base
        await trio.sleep(3000)
        assert flusher.generations.base.head.generation <= base.head.generation + 1, "then it is at rest"


KINDS = ("rescued", "unreadable")


class LostPack:
    """a pack of files of 2 pages, all only remote; of its shards the first is left, which holds data."""

    def __init__(self, machine: FlushMachine) -> None:
        self.machine = machine
        self.files: dict[int, bytes] = {}
        self.number = 0
        self.row: PackRow

    async def upload(self, flusher: Flusher) -> None:
        chance = random.Random(3)
        for name in "abcdefgh":
            number = self.machine.create(name)
            self.files[number] = chance.randbytes(2 * PAGE)
            self.machine.write(number, 0, self.files[number])
        await flusher.sync()
        (self.number, self.row), = ((n, row) for n, row in pack_rows(self.machine).items() if row.live == 16 * PAGE)

    async def lose(self) -> None:
        for number in self.files:
            self.machine.evict(number)
        await self.machine.committer.commit()
        self.lose_shards()

    def lose_shards(self) -> None:
        lose_shards(self.machine.world, self.row, (1, 2, 3))

    def readable(self) -> set[int]:
        """The files whose bytes can be had; those that can are right."""
        found = set()
        for number, data in self.files.items():
            try:
                assert self.machine.content(number) == data
            except AssertionError as error:
                assert "is lost" in str(error)
                continue
            found.add(number)
        return found

    def left_in_it(self) -> set[int]:
        """The files of which something lies in the lost pack."""
        return {
            number for number in self.files
            if any(row.pack == self.number for row in self.machine.store.extents.overlapping(number, 0, 2))
        }  # fmt: skip


async def test_what_lies_in_shards_that_are_left_is_read_and_uploaded_anew(
    world: World, machine: FlushMachine, clock, expect_log
):
    """More shards are gone than the code can replace, and nothing is local: what can be read is saved and told."""
    expect_log(EXPECTED)
    lost = LostPack(machine)
    async with flushing(machine) as flusher:
        await lost.upload(flusher)
        await lost.lose()
        await until(lambda: flusher.status()["lost"]["rescued_bytes"])
        await until(lambda: not flusher.status()["lost"]["packs_to_read"])
        await flusher.sync()
        await machine.committer.commit()
        report = flusher.status()["lost"]
        assert report["packs"] == 1 and not report["local_bytes"]
        assert report["rescued_bytes"] + report["unreadable_bytes"] == 16 * PAGE
        gone = lost.left_in_it()
        assert gone and len(gone) * 2 * PAGE == report["unreadable_bytes"]
        with pytest.raises(DataLost, match="1 pack lost more shards"):
            await wait_until_full(flusher)
        for number in lost.files:
            machine.evict(number)
        assert lost.readable() == lost.files.keys() - gone
        names = dict(zip("abcdefgh", lost.files, strict=True))
        for name, number in names.items():
            if number in gone:
                machine.unlink(name, number)
        await flusher.sync()
        assert restore(world).files == {n: lost.files[i] for n, i in names.items() if i not in gone}


async def test_who_is_short_of_room_reads_lost_packs_later(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """What is saved of them is dirty, and must not take the room that writers wait for."""
    expect_log(EXPECTED + "|short of room")
    lost = LostPack(machine)
    short = True
    async with flushing(machine) as flusher:
        await lost.upload(flusher)
        monkeypatch.setattr(Flusher, "short_of_room", property(lambda self: short))
        await lost.lose()
        await until(lambda: flusher.status()["lost"]["packs_to_read"])
        await trio.sleep(600)
        assert not flusher.status()["lost"]["rescued_bytes"]
        short = False
        await until(lambda: flusher.status()["lost"]["rescued_bytes"])


async def test_no_more_than_a_part_of_lost_packs_is_on_its_way(machine: FlushMachine, clock, expect_log):
    """The next extent is read once what was marked lies in other packs."""
    expect_log(EXPECTED)
    lost = LostPack(machine)
    async with flushing(machine) as flusher:
        await lost.upload(flusher)
        salvage = flusher._upkeep.salvage
        salvage._most_bytes = PAGE
        seen = set()

        def marked() -> set[int]:
            return {n for n in lost.files if any(
                (block := machine.store.blocks.state(n, b)) is not None and block.dirty for b in (0,)
            )}  # fmt: skip

        await lost.lose()
        while not flusher.status()["lost"]["unreadable_bytes"]:
            seen.add(frozenset(marked()))
            await trio.sleep(0.25)
        assert max(map(len, seen)) == 1
        assert len(seen) > 2, "more than one of them was saved"


@pytest.mark.parametrize("error", [Unavailable("silence"), Corrupt("what nobody expects")])
async def test_backends_that_do_not_answer_are_asked_again(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log, error: Exception
):
    """What could not be read now is not taken for gone, and no error ends the mount."""
    expect_log(EXPECTED)
    lost = LostPack(machine)
    async with flushing(machine) as flusher:
        await lost.upload(flusher)
        reader = flusher._upkeep.salvage._reader
        asked = 0
        shards = reader.shards

        async def silent(pack, wanted):
            nonlocal asked
            asked += 1
            if asked < 3:
                raise error
            return await shards(pack, wanted)

        await lost.lose()
        await until(lambda: machine.context.ledger.lost)
        monkeypatch.setattr(reader, "shards", silent)
        await until(lambda: flusher.status()["lost"]["rescued_bytes"])
        assert asked > 3


async def test_what_is_damaged_here_is_read_from_shards_that_are_left(machine: FlushMachine, clock, expect_log):
    """All is local; bytes that rotted here and lie in a shard that is left are not lost."""
    expect_log(EXPECTED)
    lost = LostPack(machine)
    async with flushing(machine) as flusher:
        await lost.upload(flusher)
        await machine.committer.commit()
        for key, _ in list(machine.store.scan(Table.VALUES, b"", None)):
            damage(machine, key)
        lost.lose_shards()
        await until(lambda: flusher.status()["lost"]["unreadable_bytes"])
        report = flusher.status()["lost"]
        total = report["local_bytes"] + report["rescued_bytes"] + report["unreadable_bytes"]
        assert total == 16 * PAGE and report["rescued_bytes"] >= 4 * PAGE
        saved = report["local_bytes"] + report["rescued_bytes"]
        await until(lambda: pack_rows(machine)[lost.number].live == 16 * PAGE - saved)


def give_up(machine: FlushMachine, number: int, shards: Iterable[int]) -> None:
    """What is done to the row of a pack whose backends were given up; its shards there are gone."""
    row = pack_rows(machine)[number]
    lose_shards(machine.world, row, shards)
    placement = tuple(-1 if shard in shards else place for shard, place in enumerate(row.placement))
    changed = set_placement(machine.store, number, placement, machine.clock.time_ns())
    assert changed is not None
    machine.context.ledger.note(number, changed)


async def test_lost_metadata_are_known_before_anything_is_read(world: World, machine: FlushMachine, clock, expect_log):
    """However many packs wait to be completed: a sync does not vouch for a head by which nothing can be restored."""
    expect_log(EXPECTED, optional=True)
    async with flushing(machine, cut_seconds=86400, rewrite_below=0.0) as flusher:
        for number in range(12):
            machine.write(machine.create(f"f{number}"), 0, random.Random(number).randbytes(16 * PAGE))
            await flusher.sync()
        pack = flusher.generations.chain.all_packs()[-1]
        for number, row in sorted(pack_rows(machine).items()):
            if not row.unnamed_since_ns:
                give_up(machine, number, (1, 2, 3) if number == pack.number else (1,))
        completed = flusher._upkeep._completer.completed
        await flusher.sync()
        assert flusher._upkeep._completer.completed < completed + len(pack_rows(machine))
        assert pack.ref.pack_id not in listed_ids(flusher.generations.base.head)
        assert len(restore(world).files) == 12


async def test_metadata_on_backends_that_left_are_known_as_lost_before_their_rows_say_so(
    machine: FlushMachine, clock, expect_log
):
    """Rows are brought up to date in steps, which takes its time."""
    expect_log(EXPECTED)
    async with flushing(machine, cut_seconds=86400) as flusher:
        machine.write(machine.create("a"), 0, page("a"))
        await flusher.sync()
        ids = listed_ids(flusher.generations.base.head)
        row = next(row for row in pack_rows(machine).values() if row.pack_id in ids)
        for place in row.placement[1:]:
            machine.fleet_members.remove(place)
        await flusher._upkeep.look_at_metadata()
        assert flusher._upkeep.lost_is_named
        assert any("metadata" in what for what in flusher.status()["waiting"])


async def test_heads_wait_for_the_renewal_that_makes_them_readable(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """Else one would be published every ten seconds, which helps nobody."""
    expect_log(EXPECTED)

    async def never(_: object) -> None:
        await trio.sleep_forever()

    async with flushing(machine, cut_seconds=86400) as flusher:
        machine.write(machine.create("a"), 0, page("a"))
        await flusher.sync()
        monkeypatch.setattr(RefreshUpload, "run", never)
        for pack in flusher.generations.chain.all_packs():
            lose(world, pack_rows(machine)[pack.number], 1)
        await until(lambda: flusher._upkeep.lost_is_named)
        before = flusher.generations.base.head.generation
        await trio.sleep(3600)
        assert flusher.generations.base.head.generation <= before + 1


@pytest.mark.parametrize("silent", [False, True])
async def test_lost_packs_do_not_hold_up_those_that_can_be_completed(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log, silent: bool
):
    """Not even where one more backend is silent, and nobody can say for sure that they are lost."""
    expect_log(EXPECTED, optional=True)
    monkeypatch.setattr(tests.remote.flushing, "DirectReader", lambda world: reader)
    reader = PackReader(machine.members(), world.keys, Code(world.code))
    async with trio.open_nursery() as nursery, flushing(machine, rewrite_below=0.0) as flusher:
        reader.members = machine.fleet_members
        await nursery.start(reader.run)
        for number in range(8):
            machine.write(machine.create(f"f{number}"), 0, random.Random(number).randbytes(16 * PAGE))
        await flusher.sync()
        await trio.sleep(300)
        data = [number for number, row in pack_rows(machine).items() if row.live and row.kind == PackKind.DATA]
        machine.backends[5].down = silent
        await until(lambda: (machine.fleet_members.by_number(6).state is State.DOWN) is silent)  # type: ignore[union-attr]
        for index, number in enumerate(data):
            give_up(machine, number, (1, 2, 3) if index % 2 else (1,))
        begin = trio.current_time()
        ledger = machine.context.ledger
        needed = [n for n in data[::2] if silent and 6 in pack_rows(machine)[n].placement]
        await until(lambda: not ledger.incomplete.keys() & (set(data[::2]) - set(needed)))
        await until(lambda: not any(pack_rows(machine)[number].live for number in data[1::2]))
        assert trio.current_time() - begin < 120
        nursery.cancel_scope.cancel()


async def test_a_shard_of_which_nobody_knows_holds_up_nothing_else(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """One pack's second data shard may be on a backend that is silent: the first is read, and all other packs are."""
    expect_log(EXPECTED)
    async with flushing(machine, rewrite_below=0.0) as flusher:
        files = {machine.create(name): random.Random(name).randbytes(2 * PAGE) for name in "abcdefghijklmnop"}
        for number, data in files.items():
            machine.write(number, 0, data)
        await flusher.sync()
        packs = {n: row for n, row in pack_rows(machine).items() if row.live == 16 * PAGE}
        assert len(packs) == 2
        for number in files:
            machine.evict(number)
        await machine.committer.commit()
        reader = flusher._upkeep.salvage._reader
        shards = reader.shards

        async def silent(pack: StoredPack, wanted: Collection[int]) -> dict[int, memoryview]:
            if pack.ref.pack_id == packs[min(packs)].pack_id and 1 in wanted:
                await trio.sleep_forever()
            return await shards(pack, wanted)

        monkeypatch.setattr(reader, "shards", silent)
        for number in packs:
            give_up(machine, number, (1, 2, 3))
        await until(lambda: flusher.status()["lost"]["unreadable_packs"] == 1)
        await until(lambda: flusher.status()["lost"]["rescued_bytes"] >= 2 * 6 * PAGE)
        assert flusher.status()["lost"]["packs_to_read"] == 1, "what is not known is not called gone"


async def test_a_pack_that_comes_back_is_lost_no_more(
    world: World, machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """An old copy of a backend was found: the alarm ends, and a second loss is dealt with like the first."""
    expect_log(EXPECTED)
    monkeypatch.setattr(salvage_module, "_LOST_RETRY_SECONDS", 1e9)
    lost = LostPack(machine)
    async with flushing(machine, rewrite_below=0.0) as flusher:
        await lost.upload(flusher)
        before = [{key: store.peek(key) for key in list(store.keys())} for store in world.data]
        await lost.lose()
        await until(lambda: flusher.status()["lost"]["unreadable_bytes"])
        gone = machine.fleet_members.by_number(lost.row.placement[1])
        assert gone is not None
        machine.backends[gone.number - 1].down = True
        while gone.state is not State.DOWN:
            gone.failed(BackendUnavailable("its disk is being copied"))
        await trio.sleep(5)
        for store, old in zip(world.data, before, strict=True):
            for key in set(old).difference(store.keys()):
                store.put(key, old[key])
        machine.backends[gone.number - 1].down = False
        gone.succeeded()
        begin = trio.current_time()
        await until(lambda: lost.number not in machine.context.ledger.incomplete)
        assert trio.current_time() - begin < 200, "whoever answers again is asked soon"
        await until(lambda: not flusher.status()["lost"]["packs"])
        assert not flusher.status()["lost"]["unreadable_bytes"]
        rescued = flusher.status()["lost"]["rescued_bytes"]
        give_up(machine, lost.number, (0, 2, 3))
        await until(lambda: flusher.status()["lost"]["rescued_bytes"] > rescued)


async def test_what_is_read_of_a_lost_pack_meanwhile_is_uploaded_anew_too(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """Also while there is no room to read more of it: it is not fetched again, and must not stay for ever."""
    expect_log(EXPECTED + "|short of room")
    lost = LostPack(machine)
    short = True
    async with flushing(machine, rewrite_below=0.0) as flusher:
        await lost.upload(flusher)
        monkeypatch.setattr(Flusher, "short_of_room", property(lambda self: short))
        await lost.lose()
        await until(lambda: flusher.status()["lost"]["packs_to_read"])
        readable = next(number for number in lost.files if is_left(lost, number))
        row = next(machine.store.extents.overlapping(readable, 0, 2))
        machine.store.blocks.install(machine.inode(readable), 0, lost.files[readable], row)
        await until(lambda: flusher.status()["lost"]["local_bytes"] == 2 * PAGE)
        await until(lambda: readable not in lost.left_in_it())
        assert not flusher.status()["lost"]["rescued_bytes"]


async def test_who_waits_for_room_holds_up_nobody_who_would_make_it(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """The cache fills with what is read of lost packs, while one is saved: it can be evicted only once it is marked."""
    expect_log(EXPECTED + "|short of room")
    lost = LostPack(machine)
    short = False
    async with flushing(machine, rewrite_below=0.0) as flusher:
        await lost.upload(flusher)
        monkeypatch.setattr(Flusher, "short_of_room", property(lambda self: short))
        salvage = flusher._upkeep.salvage
        mark, marked = salvage._anew.mark, []

        async def then_short(number: int, pack: StoredPack, entry: ExtentEntry) -> int:
            nonlocal short
            short = True
            marked.append(entry.inode)
            return await mark(number, pack, entry)

        monkeypatch.setattr(salvage._anew, "mark", then_short)
        await lost.lose()
        await until(lambda: marked)
        readable = next(number for number in lost.files if is_left(lost, number) and number not in marked)
        row = next(machine.store.extents.overlapping(readable, 0, 2))
        machine.store.blocks.install(machine.inode(readable), 0, lost.files[readable], row)
        await until(lambda: readable not in lost.left_in_it())
        assert len(marked) == 1


def is_left(lost: LostPack, number: int) -> bool:
    """Whether a file can be read from the shards that are left."""
    row = next(lost.machine.store.extents.overlapping(number, 0, 2))
    pack = StoredPack.of_row(lost.row, lost.machine.world.code)
    return set(entry_of(number, row).shards(pack.ref)) == {0}


async def test_the_only_copy_of_what_lies_on_backends_that_left_is_not_evicted(
    machine: FlushMachine, clock, expect_log
):
    """Rows are full and looked at until they are brought up to date, and that takes its time."""
    expect_log(EXPECTED, optional=True)
    lost = LostPack(machine)
    async with flushing(machine, rewrite_below=0.0) as flusher:
        await lost.upload(flusher)
        await trio.sleep(300)
        for place in lost.row.placement[1:]:
            machine.fleet_members.remove(place)
        done = Evictor(machine.store).step(1000, 1000, recent_too=True, written_will_do=True, start_too=True)
        assert not done.bytes
        dropper = Dropper(machine.store)
        for number in lost.files:
            dropper.step(machine.inode(number), 0, 100)
        assert not dropper.dropped and dropper.stays == {Stays.NOT_FULL: 16}


async def test_what_was_saved_is_counted_though_reading_on_fails(
    machine: FlushMachine, monkeypatch: pytest.MonkeyPatch, clock, expect_log
):
    """And metadata packs are no data packs."""
    expect_log(EXPECTED)
    lost = LostPack(machine)
    async with flushing(machine) as flusher:
        await lost.upload(flusher)
        mark, calls = flusher._upkeep.salvage._anew.mark, 0

        async def once(*arguments: object) -> int:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise Unavailable("silence")
            return await mark(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(flusher._upkeep.salvage._anew, "mark", once)
        await lost.lose()
        await until(lambda: flusher.status()["lost"]["unreadable_bytes"])
        await until(lambda: sum(flusher.status()["lost"][f"{what}_bytes"] for what in KINDS) == 16 * PAGE)
        assert flusher.status()["lost"]["packs"] == 1
        for pack in flusher.generations.chain.all_packs():
            give_up(machine, pack.number, (0, 1, 2))
        await until(lambda: flusher.status()["lost"]["metadata_packs"])
        assert flusher.status()["lost"]["packs"] == 1


def damage(machine: FlushMachine, block: bytes) -> None:
    """Changes a bit of the first page of a block in the local store."""
    environment = machine.store.environment
    values = environment.databases[Table.VALUES]
    with environment.write() as txn:
        value = bytearray(txn.get(block, db=values))
        value[0] ^= 1
        txn.put(block, bytes(value), db=values)
    machine.store.layers.renew_view()


async def nothing(most: int) -> int:
    await trio.lowlevel.checkpoint()
    return 0
