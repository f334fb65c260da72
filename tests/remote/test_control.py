"""Reading owner records and heads: only what authenticates counts, unknown and absent stay apart."""

from __future__ import annotations

import pytest

from qsfs.backend.memory import MemoryBackend
from qsfs.errors import BackendRefused, BackendUnavailable, FormatMismatch
from qsfs.format import seal as seal_module
from qsfs.format.head import HeadRef, Owner, head_key
from qsfs.format.owner import OwnerRecord, owner_key, seal_owner_record
from qsfs.remote import control
from qsfs.remote.control import ControlIndex, Records, list_control, read_control
from tests.remote.harness import FSID, FaultyBackend, World, make_head, make_world, plant

OLD, NEW = Owner(1, b"o" * 16), Owner(2, b"n" * 16)


def record(world: World, owner: Owner, number: int = 1) -> bytes:
    """Puts an owner record on a backend; its key."""
    key, value = seal_owner_record(OwnerRecord(FSID, owner, 1, "other-host"), world.keys, world.clock)
    world.control_of(number).put(key, value)
    return key


async def read(world: World, records: Records | None = None, index: ControlIndex | None = None, **options):
    backend = FaultyBackend(world.control_of(1))
    async with backend.session() as session:
        reading = await read_control(session, 1, records or Records(world.keys), index, **options)
    return reading, backend


async def test_the_largest_owner_and_all_heads_of_the_newest_owner_are_read(autojump_clock):
    world = await make_world(1)
    record(world, OLD), record(world, NEW)
    old = plant(world, make_head(world, OLD, 9)).ref
    first = plant(world, make_head(world, NEW, 9, old)).ref
    second = plant(world, make_head(world, NEW, 10, first)).ref
    reading, backend = await read(world)
    assert reading.owners == {NEW}
    assert reading.heads == {first, second}
    assert reading.unproven == ()
    assert ("get", head_key(FSID, old)) not in backend.calls, "older owners' heads are not fetched"


async def test_an_empty_namespace_is_a_reading_with_nothing_in_it(autojump_clock):
    reading, _ = await read(await make_world(1))
    assert reading.owners == reading.heads == frozenset()


async def test_what_has_authenticated_once_is_not_fetched_again(autojump_clock):
    world = await make_world(1)
    record(world, NEW)
    plant(world, make_head(world, NEW, 1))
    records = Records(world.keys)
    first, _ = await read(world, records)
    again, backend = await read(world, records)
    assert again == first
    assert not [call for call, _ in backend.calls if call == "get"]


async def test_a_claim_counts_only_once_its_value_authenticates(autojump_clock):
    """Anybody can write a key with a huge epoch; it is named as unproven, and the rest still counts."""
    world = await make_world(1)
    record(world, OLD)
    head = plant(world, make_head(world, OLD, 3)).ref
    forged = Owner(2**63, b"f" * 16)
    world.control_of(1).put(owner_key(FSID, forged), b"not sealed")
    world.control_of(1).put(head_key(FSID, HeadRef(forged, 1, b"d" * 32)), b"not sealed")
    reading, _ = await read(world)
    assert reading.owners == {OLD} and reading.heads == {head}
    assert {claim if isinstance(claim, Owner) else claim.owner for claim, _ in reading.unproven} == {forged}


async def test_a_rotten_record_is_proven_by_a_copy_elsewhere(autojump_clock):
    world = await make_world(2)
    key = record(world, NEW)
    record(world, OLD)
    records = Records(world.keys)
    await read(world, records)
    world.control_of(1).rot(key, lambda value: value[:-1] + b"x")
    reading, _ = await read(world, records)
    assert reading.owners == {NEW} and not reading.unproven
    reading, _ = await read(world)
    assert reading.owners == {OLD} and reading.unproven[0][0] == NEW


async def test_other_file_systems_and_other_keys_are_no_claims(autojump_clock):
    world = await make_world(1)
    stranger = owner_key(b"z" * 16, NEW)
    for key in (stranger, b"something else", b"qsfs:o:short"):
        world.control_of(1).put(key, b"?")
    reading, backend = await read(world)
    assert not reading.owners and not reading.unproven
    assert not [call for call, _ in backend.calls if call == "get"]


async def test_a_record_of_a_newer_version_stops_everything(autojump_clock, monkeypatch):
    """It authenticates, so a newer qsfs is at work: this one must not decide anything next to it."""
    world = await make_world(1)
    monkeypatch.setattr(seal_module, "FORMAT_VERSION", 2)
    record(world, NEW)
    monkeypatch.undo()
    with pytest.raises(FormatMismatch):
        await read(world)


async def test_a_backend_that_lists_endless_forgeries_is_given_up(autojump_clock, monkeypatch):
    world = await make_world(1)
    for epoch in range(10, 10 + control.MAX_UNPROVEN + 1):
        world.control_of(1).put(owner_key(FSID, Owner(epoch, b"f" * 16)), b"?")
    with pytest.raises(BackendUnavailable, match="do not authenticate"):
        await read(world)
    monkeypatch.setattr(control, "MAX_CLAIMS", 5)
    with pytest.raises(BackendUnavailable, match="lists more than 5"):
        await read(world)


async def test_a_backend_that_does_not_list_what_it_acknowledged_is_not_believed(autojump_clock):
    world = await make_world(1)
    key = record(world, NEW)
    await read(world, written=key)
    world.control_of(1).lose(key)
    with pytest.raises(BackendUnavailable, match="does not list it"):
        await read(world, written=key)


async def test_a_shared_namespace_is_listed_from_where_the_last_listing_ended(autojump_clock):
    world = await make_world(1, shared=True)
    store = world.control_of(1)
    for number in range(50):
        store.put(b"qsfs:s:%d" % number, b"shard")
    first = record(world, OLD)
    index = ControlIndex()
    await read(world, index=index)
    assert index.keys == {first}
    record(world, NEW)
    reading, backend = await read(world, index=index)
    assert reading.owners == {NEW}
    assert len([call for call, _ in backend.calls if call == "scan"]) == 2


async def test_a_listing_that_breaks_off_goes_on_where_it_was(autojump_clock):
    world = await make_world(1, shared=True)
    for number in range(40):
        world.control_of(1).put(b"qsfs:s:%d" % number, b"shard")
    record(world, NEW)
    index, backend = ControlIndex(), FaultyBackend(world.control_of(1))
    pages = 0

    def gate(call: str, key: bytes) -> None:
        nonlocal pages
        pages += call == "scan"
        if pages == 6:
            raise BackendUnavailable("broken off")

    backend.gate = gate
    async with backend.session() as session:
        with pytest.raises(BackendUnavailable):
            await list_control(session, FSID, index)
        pages = 100
        assert (await list_control(session, FSID, index)).owners == {NEW}
    assert pages < 100 + 12


async def test_a_cursor_of_another_namespace_starts_the_listing_over(autojump_clock):
    """The backend was re-created: all of it is listed, and what was known of the old one is forgotten."""
    world = await make_world(1, shared=True)
    record(world, NEW)
    index = ControlIndex(b"a cursor of the old one", [owner_key(FSID, Owner(9, b"9" * 16))])
    reading, _ = await read(world, index=index)
    assert reading.owners == {NEW} and not reading.unproven


async def test_a_refusal_without_a_cursor_is_passed_on(autojump_clock):
    world = await make_world(1, shared=True)
    backend = FaultyBackend(world.control_of(1))

    def gate(call: str, key: bytes) -> None:
        if call == "scan":
            raise BackendRefused("frozen")

    backend.gate = gate
    async with backend.session() as session:
        with pytest.raises(BackendRefused):
            await list_control(session, FSID, ControlIndex())


async def test_what_a_shared_namespace_no_longer_holds_is_forgotten(autojump_clock):
    """A deleted record is asked for once more, and not again."""
    world = await make_world(1, shared=True)
    key = record(world, NEW)
    index = ControlIndex()
    await read(world, index=index)
    world.control_of(1).lose(key)
    reading, backend = await read(world, index=index)
    assert not reading.owners and not reading.unproven and not index.keys
    assert backend.calls.count(("get", key)) == 1
    reading, backend = await read(world, index=index)
    assert backend.calls.count(("get", key)) == 0


async def test_a_restore_lists_the_newest_first_and_everything(autojump_clock):
    """A head stored long ago may be the newest: the listing does not stop at the first head."""
    world = await make_world(1, shared=True)
    newest = plant(world, make_head(world, NEW, 5)).ref
    for number in range(30):
        world.control_of(1).put(b"qsfs:s:%d" % number, b"shard")
    plant(world, make_head(world, OLD, 99))
    reading, backend = await read(world, index=ControlIndex(), newest_first=True)
    assert max(reading.heads) == newest
    assert {call for call, _ in backend.calls} >= {"rscan"} and "scan" not in {
        call for call, _ in backend.calls
    }


async def test_what_is_deleted_between_listing_and_reading_is_listed_anew(autojump_clock):
    """A slow reader: the head that it listed was superseded and deleted; it finds the newer one."""
    for shared in (False, True):
        world = await make_world(1, shared=shared)
        old = plant(world, make_head(world, OLD, 3))
        backend, later = FaultyBackend(world.control_of(1)), make_head(world, OLD, 4, old.ref)

        def overtaken(call: str, key: bytes, world=world, old=old, later=later) -> None:
            if (call, key) == ("get", old.key):
                plant(world, later)
                world.control_of(1).lose(old.key)

        backend.gate = overtaken
        async with backend.session() as session:
            index = ControlIndex() if shared else None
            reading = await read_control(session, 1, Records(world.keys), index)
        assert [head.generation for head in reading.heads] == [4] and not reading.unproven


async def test_a_value_that_is_never_there_is_unproven_after_some_listings(autojump_clock):
    world = await make_world(1)
    store = world.control_of(1)
    sealed = plant(world, make_head(world, OLD, 3))

    class Hollow(FaultyBackend):
        async def get(self, key: bytes) -> bytes | None:
            return None

    reading = await read_control(Hollow(store), 1, Records(world.keys))
    assert not reading.heads and [claim for claim, _ in reading.unproven] == [sealed.ref]


async def test_the_last_head_read_stays_in_memory_and_many_do_not(autojump_clock):
    world = await make_world(1)
    refs = []
    for generation in range(1, 20):
        refs.append(plant(world, make_head(world, NEW, generation, refs[-1] if refs else None)).ref)
    records = Records(world.keys)
    async with MemoryBackend(world.control_of(1)).session() as session:
        for ref in refs:
            await records.head(session, ref)
        assert records.held(refs[-1]) is not None and records.held(refs[0]) is None
        assert (await records.prove(session, refs[0])).ref == refs[0]
        assert (await records.head(session, refs[0])).generation == 1
