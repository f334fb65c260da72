"""Heads keep every field, name themselves by their bytes, and refuse what cannot be."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, FormatMismatch, LimitExceeded, QsfsBug
from qsfs.format import head as heads
from qsfs.format import schema, seal
from qsfs.format.fleet import Fleet
from qsfs.format.head import HeadRef, Owner, SnapshotRange, head_key, open_head, parse_head_key, seal_head
from qsfs.format.identity import identity_key, parse_identity_key, parse_tombstone_key, tombstone_key
from qsfs.format.owner import owner_key, parse_owner_key
from qsfs.format.shard import ShardKey, parse_shard_key, shard_key
from qsfs.format.superblock import SUPERBLOCK_KEY
from qsfs.format.units import KEY_PREFIX, ObjectKind
from tests.format.samples import FSID, KEYS, OWNER, head, head_with_ranges, samples, sealed_head

PARSERS = (parse_head_key, parse_owner_key, parse_shard_key, parse_identity_key, parse_tombstone_key)
PLAIN = seal.open_sealed(ObjectKind.HEAD, sealed_head().value, KEYS, "head")


def sealed_as_head(plaintext: bytes) -> tuple[bytes, bytes]:
    """(key, value) of any plaintext, sealed as the head that its key names."""
    value = seal.seal(ObjectKind.HEAD, plaintext, KEYS, FixedClock(1))
    return head_key(FSID, HeadRef(OWNER, 12, blake3(value).digest())), value


def test_a_head_comes_back_with_every_field():
    sealed = sealed_head()
    assert open_head(sealed.key, sealed.value, KEYS) == head()
    assert parse_head_key(sealed.key) == heads.HeadKey(FSID, sealed.ref)
    assert sealed.ref == HeadRef(OWNER, 12, blake3(sealed.value).digest())
    assert head().fleets[0].entry(3) == head().fleets[0].entries[2]
    assert head().fleets[0].entry(4) is None


def test_a_head_with_ranges_comes_back():
    sealed = seal_head(head_with_ranges(), KEYS, FixedClock(1))
    assert open_head(sealed.key, sealed.value, KEYS) == head_with_ranges()


def ranges(*parts: tuple[bytes, int, int]) -> tuple[SnapshotRange, ...]:
    return tuple(SnapshotRange(*part) for part in parts)


@pytest.mark.parametrize(
    "parts",
    [
        ranges((b"a", 3, 0)),
        ranges((b"", 1, 0), (b"a", 1, 0)),
        ranges((b"", 1, 0), (b"a", 3, 0)),
        ranges((b"", 1, 0), (b"b", 1, 0), (b"a", 1, 0)),
        ranges((b"", 1, 0), (b"a", 1, 0), (b"a", 1, 0)),
        ranges((b"", 1, 0), (b"a", 2, 3)),
        ranges((b"", -1, 0), (b"a", 4, 0)),
    ],
    ids=str,
)
def test_ranges_that_do_not_hold_every_row_and_pack_once_are_never_sent(parts):
    with pytest.raises(QsfsBug):
        seal_head(dataclasses.replace(head_with_ranges(), ranges=parts), KEYS, FixedClock(1))


def test_ranges_in_a_record_of_the_older_schema_are_damage():
    record = msgpack.unpackb(PLAIN)
    for damaged in ([*record, [[b"", 2, 0]]], [2, *record[1:]], [2, *record[1:], []]):
        with pytest.raises(Corrupt):
            open_head(*sealed_as_head(schema.pack(damaged)), KEYS)


def test_the_first_head_has_no_predecessor():
    first = dataclasses.replace(head(), predecessor=None, kept=(), snapshot=(), deltas=(), counters={})
    sealed = seal_head(first, KEYS, FixedClock(1))
    assert open_head(sealed.key, sealed.value, KEYS) == first


def test_two_heads_of_one_generation_lie_at_two_keys():
    """Nothing overwrites anything: neither another content nor another sealing of the same."""
    one = seal_head(head(), KEYS, FixedClock(1))
    two = seal_head(head(), KEYS, FixedClock(2))
    three = seal_head(dataclasses.replace(head(), time_ns=1), KEYS, FixedClock(1))
    assert len({one.key, two.key, three.key}) == 3


def test_heads_are_ordered_by_owner_then_generation():
    older, newer = Owner(2, b"\xff" * 16), Owner(3, b"\x00" * 16)
    refs = [HeadRef(older, 9, b"\xff"), HeadRef(newer, 1, b"a"), HeadRef(Owner(3, b"\x01" * 16), 0, b"")]
    assert sorted([refs[2], refs[0], refs[1]]) == refs


@pytest.mark.parametrize(
    "change",
    [
        {"fleets": ()},
        {"fleets": (Fleet(1, ()),) * 3},
        {"fleets": (Fleet(1, head().fleets[0].entries[::-1]),)},
        {"fleets": (Fleet(1, head().fleets[0].entries[:1] * 2),)},
        {"generation": -1},
        {"generation": 2**64},
        {"block_size": 1000},
        {"block_size": 0},
        {"counters": {"bytes": -1}},
        {"owner": Owner(1, b"short")},
        {"predecessor": HeadRef(OWNER, 1, b"short")},
        {"snapshot": (dataclasses.replace(head().snapshot[0], placement=(1, 2, 3)),)},
        {"snapshot": (dataclasses.replace(head().snapshot[0], placement=(1, 2, 3, -2)),)},
        {"kept": (dataclasses.replace(head().kept[0], pins=("x" * 256,)),)},
        {"kept": (dataclasses.replace(head().kept[0], pins=("\udcff",)),)},
        {"fsid": b"another fs id 16"},
        {"owner": Owner(-1, b"m" * 16)},
    ],
    ids=str,
)
def test_a_head_that_could_not_be_read_is_never_sent(change):
    with pytest.raises(QsfsBug):
        seal_head(dataclasses.replace(head(), **change), KEYS, FixedClock(1))


def test_a_head_too_large_for_a_backend_is_refused():
    with pytest.raises(LimitExceeded, match="head"):
        seal_head(dataclasses.replace(head(), snapshot=head().snapshot * 80_000), KEYS, FixedClock(1))


def test_a_head_with_thousands_of_packs_and_pins_stays_small():
    kept = tuple(dataclasses.replace(head().kept[0], pins=(f"pin-{i}",)) for i in range(1000))
    large = dataclasses.replace(head(), snapshot=head().snapshot * 1000, kept=kept)
    assert len(seal_head(large, KEYS, FixedClock(1)).value) < 400_000


def test_keys_begin_alike_are_short_and_parse_as_one_kind_only():
    ref = HeadRef(Owner(2**64 - 1, b"o" * 16), 2**64 - 1, b"d" * 32)
    made = {
        head_key(FSID, ref): heads.HeadKey(FSID, ref),
        owner_key(FSID, ref.owner): heads.parse_owner_key(owner_key(FSID, ref.owner)),
        shard_key(FSID, 2**64 - 1, b"p" * 16, 255): ShardKey(FSID, 2**64 - 1, b"p" * 16, 255),
        identity_key(FSID): FSID,
        tombstone_key(FSID): FSID,
    }
    for key, meaning in made.items():
        assert key.startswith(KEY_PREFIX)
        assert len(key) < 255
        found = [parsed for parse in PARSERS if (parsed := parse(key)) is not None]
        assert found == [meaning]
        assert all(parse(key[:-1]) is None and parse(key + b"x") is None for parse in PARSERS)
        assert all(parse(b"x" + key) is None for parse in PARSERS)
    for foreign in (b"", b"qsfs:", SUPERBLOCK_KEY, b"dump.rdb", bytes(255)):
        assert all(parse(foreign) is None for parse in PARSERS)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=40)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=16)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=30,
)
places = st.lists(st.integers(0, 13), min_size=1, max_size=6)


def substituted(tree: object, path: list[int], value: object) -> object:
    """`tree` with the element at `path` (wrapping around) replaced by `value`."""
    if not path or not isinstance(tree, list) or not tree:
        return value
    place = path[0] % len(tree)
    return [substituted(item, path[1:], value) if i == place else item for i, item in enumerate(tree)]


@settings(max_examples=400, derandomize=True, deadline=None)
@given(places, values)
def test_any_field_replaced_by_anything_is_only_ever_corrupt_or_valid(path, value):
    """Sealed under the right key, by a version with a bug: still never another exception."""
    tree = substituted(schema.unpack(PLAIN, "head"), path, value)
    key, sealed = sealed_as_head(schema.pack(tree))
    try:
        opened = open_head(key, sealed, KEYS)
    except (Corrupt, FormatMismatch):
        return
    assert seal_head(opened, KEYS, FixedClock(1)).ref.generation == 12


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(0, len(PLAIN) - 1), st.binary(max_size=9))
def test_any_bytes_in_a_plaintext_are_only_ever_corrupt_or_valid(place, junk):
    key, sealed = sealed_as_head(PLAIN[:place] + junk + PLAIN[place + len(junk) :])
    try:
        open_head(key, sealed, KEYS)
    except (Corrupt, FormatMismatch):
        return


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.sampled_from([s for s in samples() if s.name in ("owner record", "identity", "tombstone")]),
    places,
    values,
)
def test_small_records_with_any_field_replaced_are_only_ever_corrupt_or_valid(sample, path, value):
    kind = ObjectKind(sample.value[6])
    tree = schema.unpack(seal.open_sealed(kind, sample.value, KEYS, "record"), "record")
    sealed = seal.seal(kind, schema.pack(substituted(tree, path, value)), KEYS, FixedClock(1))
    try:
        sample.open(sample.key, sealed, KEYS)
    except (Corrupt, FormatMismatch):
        return


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.sampled_from(samples()), st.binary(max_size=300), st.integers(0, 120))
def test_hostile_values_are_only_ever_corrupt(sample, junk, kept):
    """Whatever follows however much of a right beginning."""
    if (value := sample.value[:kept] + junk) != sample.value:
        with pytest.raises(Corrupt):
            sample.open(sample.key, value, KEYS)
