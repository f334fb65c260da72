"""Packs give back what was put in, explain themselves, and open nothing that was not sealed."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, FormatMismatch, LimitExceeded, QsfsBug
from qsfs.format import pack as packs
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.layout import place_extents
from qsfs.format.pack import (
    TRAILER_SIZE,
    PackKind,
    PlainExtent,
    build_pack,
    index_offset,
    open_body,
    open_extent,
    open_index,
    verify_body,
)
from qsfs.format.shard import encode_shard, encode_shards, open_shard
from qsfs.format.units import MAX_SHARD, PAGE
from tests.format.samples import CODE, KEYS, OTHER_FSID, OTHER_MASTER, data_pack, metadata_pack, noise

U64 = st.integers(0, 2**64 - 1)


def build(extents, code=CODE, kind=PackKind.DATA, seed=1, owner_epoch=7, keys=KEYS):
    return build_pack(kind, extents, keys=keys, code=code, owner_epoch=owner_epoch, clock=FixedClock(seed))


def page_extent(draw_data):
    inode, first, pages, number, compressible = draw_data
    data = (b"ab" if compressible else noise(2, pages)) * (pages * PAGE // 2)
    return PlainExtent(
        inode, first, pages, number, data if compressible else noise(pages * PAGE, number % 97)
    )


data_extents = st.lists(
    st.tuples(U64, U64, st.integers(1, 9), U64, st.booleans()).map(page_extent), max_size=12
)
metadata_chunks = st.lists(st.binary(max_size=3000), max_size=8).map(
    lambda chunks: [PlainExtent(0, i, 0, 0, chunk) for i, chunk in enumerate(chunks)]
)
codes = st.tuples(st.integers(1, 20), st.integers(0, 6)).map(lambda kn: CodeParams(kn[0], kn[0] + kn[1]))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.one_of(
        st.tuples(st.just(PackKind.DATA), data_extents),
        st.tuples(st.just(PackKind.METADATA), metadata_chunks),
    ),
    codes,
    st.randoms(use_true_random=False),
)
def test_any_k_shards_give_back_every_extent(contents, params, source):
    kind, extents = contents
    pack = build(extents, params, kind)
    code = Code(params)
    shards = [open_shard(value, KEYS) for value in encode_shards(pack, code, KEYS)]
    chosen = source.sample(shards, params.k)
    body = b"".join(code.decode({shard.number: shard.payload for shard in chosen}))
    assert body == pack.body
    ref = chosen[0].ref
    assert ref == pack.ref
    found = list(open_body(KEYS, ref, body))
    assert [entry for entry, _ in found] == list(pack.entries) == list(verify_body(KEYS, ref, body))
    assert [
        PlainExtent(entry.inode, entry.first_page, entry.pages, entry.write_number, data)
        for entry, data in found
    ] == extents
    for entry, extent in zip(pack.entries, extents, strict=True):
        sealed = body[entry.offset : entry.offset + entry.sealed_length]
        assert open_extent(KEYS, ref, entry, sealed) == extent.data
    missing = set(range(params.n)) - {shard.number for shard in chosen}
    rebuilt = code.rebuild({shard.number: shard.payload for shard in chosen}, missing)
    for number in missing:
        value = encode_shard(ref, number, rebuilt[number], code, KEYS)
        assert open_shard(value, KEYS) == shards[number]


def test_a_repaired_shard_is_byte_for_byte_the_one_that_was_lost():
    pack, code = data_pack(), Code(CODE)
    values = encode_shards(pack, code, KEYS)
    have = {number: open_shard(values[number], KEYS).payload for number in (2, 3, 4, 5)}
    for number, payload in code.rebuild(have, range(6)).items():
        assert encode_shard(pack.ref, number, payload, code, KEYS) == values[number]


def test_a_pack_explains_itself_from_its_end():
    """The index opens from a tail that holds it, and `index_offset` says how long a tail that is."""
    pack = data_pack()
    start = index_offset(KEYS, pack.ref, pack.body[-TRAILER_SIZE:])
    assert open_index(KEYS, pack.ref, pack.body[start:]) == pack.entries
    assert open_index(KEYS, pack.ref, pack.body) == pack.entries
    with pytest.raises(Corrupt, match="index begins before"):
        open_index(KEYS, pack.ref, pack.body[start + 1 :])
    with pytest.raises(Corrupt):
        index_offset(KEYS, pack.ref, pack.body[-TRAILER_SIZE + 1 :])


def test_a_flipped_bit_anywhere_in_a_body_is_corrupt():
    """Also in the padding, which no seal covers."""
    pack = metadata_pack()
    for place in range(len(pack.body)):
        body = bytearray(pack.body)
        body[place] ^= 1
        with pytest.raises(Corrupt):
            verify_body(KEYS, pack.ref, body)
    for length in (0, 1, len(pack.body) - 1):
        with pytest.raises(Corrupt):
            verify_body(KEYS, pack.ref, pack.body[:length])
    with pytest.raises(Corrupt):
        verify_body(KEYS, pack.ref, pack.body + b"\0")


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(packs.ExtentEntry) if field.name != "offset"]
)
def test_an_extent_opens_only_as_what_it_was_sealed_as(field):
    """Associated data bind every field of an extent: a row that was changed locally opens nothing."""
    pack = data_pack()
    entry = pack.entries[1]
    sealed = pack.body[entry.offset : entry.offset + entry.sealed_length]
    for value in (getattr(entry, field) ^ 1, getattr(entry, field) + 2**80):
        with pytest.raises(Corrupt):
            open_extent(KEYS, pack.ref, dataclasses.replace(entry, **{field: value}), sealed)
    assert len(open_extent(KEYS, pack.ref, entry, sealed)) == 2 * PAGE


def test_extents_do_not_pass_for_each_other():
    """Extents of equal length swapped within a pack, or taken from another pack."""
    pack, other = data_pack(1), data_pack(2)
    first, last = pack.entries[0], pack.entries[2]
    assert first.sealed_length == last.sealed_length
    with pytest.raises(Corrupt):
        open_extent(KEYS, pack.ref, first, pack.body[last.offset : last.offset + last.sealed_length])
    with pytest.raises(Corrupt):
        open_extent(KEYS, pack.ref, first, other.body[first.offset : first.offset + first.sealed_length])


@pytest.mark.parametrize("keys", [OTHER_MASTER, OTHER_FSID])
def test_a_pack_opens_only_under_its_own_keys(keys):
    pack = data_pack()
    entry = pack.entries[0]
    with pytest.raises(Corrupt):
        open_extent(keys, pack.ref, entry, pack.body[entry.offset : entry.offset + entry.sealed_length])
    with pytest.raises(Corrupt):
        open_index(keys, pack.ref, pack.body)


@pytest.mark.parametrize(
    "change",
    [
        {"pack_id": b"x" * 16},
        {"digest": b"x" * 32},
        {"kind": PackKind.METADATA},
        {"key_number": 1},
        {"key_number": 99},
        {"owner_epoch": 8},
        {"body_length": 4096},
        {"shard_size": 64},
    ],
    ids=str,
)
def test_a_pack_opens_only_by_its_own_reference(change):
    pack = data_pack()
    with pytest.raises(Corrupt):
        verify_body(KEYS, dataclasses.replace(pack.ref, **change), pack.body)


def forged_pack(entries, *, schema=1, count=None, digest=None, end=b""):
    """A pack of one shard that a holder of the key sealed wrongly."""
    rows = b"".join(struct.pack(">QQIQIIIB", *dataclasses.astuple(entry)[1:]) for entry in entries)
    size = 1024
    index = struct.pack(">HHIQI", schema, 1, size, 7, len(entries)) + rows + end
    sealed_length = len(index) + 16
    trailer = struct.pack(
        ">QII", size - TRAILER_SIZE - sealed_length, sealed_length, len(entries) if count is None else count
    )
    digest = digest or blake3(index + trailer, key=KEYS.digest_key(2)).digest()
    ref = packs.PackRef(b"p" * 16, digest, PackKind.DATA, 2, 7, size, size)
    cipher = KEYS.cipher(2, 1, PackKind.DATA, ref.pack_id, ref.digest)
    aad = [struct.pack(">HB16s16sQ", 1, 1, KEYS.fsid, ref.pack_id, position) for position in (0, 1)]
    tail = cipher.encrypt((1).to_bytes(12, "big"), index, aad[1]) + cipher.encrypt(bytes(12), trailer, aad[0])
    return ref, bytes(size - len(tail)) + tail


def test_an_index_that_contradicts_itself_is_corrupt():
    """Even sealed under the right key: a bug of one version must not crash another."""
    entry = packs.ExtentEntry(0, 1, 0, 1, 1, 0, 16 + PAGE, PAGE, 0)
    fits = dataclasses.replace(entry, sealed_length=100)
    ref, body = forged_pack([])
    assert verify_body(KEYS, ref, body) == ()
    for wrong in (
        forged_pack([entry]),
        forged_pack([dataclasses.replace(fits, sealed_length=15)]),
        forged_pack([dataclasses.replace(fits, plain_length=PAGE + 1)]),
        forged_pack([fits, dataclasses.replace(fits, offset=99)]),
        forged_pack([fits], count=2),
        forged_pack([], count=2**32 - 1),
        forged_pack([], schema=0),
        forged_pack([], end=b"x"),
        forged_pack([], digest=b"d" * 32),
    ):
        with pytest.raises(Corrupt):
            verify_body(KEYS, *wrong)
    with pytest.raises(FormatMismatch):
        verify_body(KEYS, *forged_pack([], schema=2))


def test_the_same_clock_gives_the_same_bytes():
    assert data_pack(4) == data_pack(4)
    assert data_pack(4).ref.pack_id != data_pack(5).ref.pack_id


def test_a_full_pack_keeps_each_extent_in_one_shard():
    """A cold read of a full extent that does not compress costs one GET."""
    pack = build([PlainExtent(1, i * 64, 64, i, noise(64 * PAGE, i)) for i in range(16)], CodeParams(16, 20))
    assert all(len(entry.shards(pack.ref)) == 1 for entry in pack.entries)
    assert pack.ref.shard_size <= 64 * PAGE * 33 // 32


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.integers(16, 300_000), max_size=80), st.integers(64, 5000), st.integers(1, 20))
def test_extents_lie_in_order_apart_and_in_few_shards(lengths, tail, k):
    offsets, shard_size = place_extents(lengths, tail, k)
    total = sum(lengths) + tail
    assert shard_size * k <= total + total // 64 + 64 * k
    end = 0
    for offset, length in zip(offsets, lengths, strict=True):
        assert offset >= end
        end = offset + length
        if length <= shard_size:
            assert (end - 1) // shard_size - offset // shard_size <= 1
    assert end + tail <= shard_size * k


@pytest.mark.parametrize(
    ("kind", "extent"),
    [
        (PackKind.DATA, PlainExtent(1, 0, 1, 1, b"short")),
        (PackKind.DATA, PlainExtent(1, 0, 0, 1, b"")),
        (PackKind.METADATA, PlainExtent(1, 0, 0, 1, b"rows")),
        (PackKind.METADATA, PlainExtent(0, 0, 1, 1, bytes(PAGE))),
        (PackKind.DATA, PlainExtent(-1, 0, 1, 1, bytes(PAGE))),
        (PackKind.DATA, PlainExtent(1, 2**64, 1, 1, bytes(PAGE))),
    ],
)
def test_what_is_no_extent_is_not_sealed(kind, extent):
    with pytest.raises(QsfsBug):
        build([extent], kind=kind)


def test_a_pack_too_large_for_a_backend_is_refused():
    with pytest.raises(LimitExceeded, match="smaller packs"):
        build([PlainExtent(0, 0, 0, 0, noise(MAX_SHARD + 1))], CodeParams(1, 2), PackKind.METADATA)


def test_threads_share_keys_and_compressors():
    import concurrent.futures

    extents = [PlainExtent(1, i, 1, i, (b"%d" % i) * 4096) for i in range(4)]
    extents = [dataclasses.replace(e, data=bytes(e.data[:PAGE])) for e in extents]
    expected = [build(extents, seed=seed) for seed in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda seed: build(extents, seed=seed), range(40))) == expected
        assert all(pool.map(lambda pack: verify_body(KEYS, pack.ref, pack.body) == pack.entries, expected))
