"""A superblock is found without its id, opens with any of its key files, and is replaced whole."""

from __future__ import annotations

import dataclasses

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, FormatMismatch, KeyFileError, LimitExceeded, QsfsBug
from qsfs.format import schema
from qsfs.format.erasure import CodeParams
from qsfs.format.keys import KeyRing, KeySlot, MasterKey, wrap_keys
from qsfs.format.superblock import (
    SUPERBLOCK_KEY,
    create_superblock,
    encode_superblock,
    open_superblock,
    replace_slots,
    superblock_fsid,
)

SECRET, OTHER = b"s" * 32, b"o" * 32
SUPERBLOCK, KEYS = create_superblock(
    SECRET, code=CodeParams(16, 20), clock=FixedClock(1), block_size=8192, label="node 7"
)
VALUE = encode_superblock(SUPERBLOCK, KEYS, FixedClock(2))


def checksummed(body: bytes) -> bytes:
    """`body` as one who does not have the key could forge it."""
    return body + blake3(body).digest()


def test_a_superblock_comes_back_with_its_master_key():
    opened, keys = open_superblock(VALUE, SECRET)
    assert opened == SUPERBLOCK
    assert (keys.fsid, keys.numbers, keys.current) == (SUPERBLOCK.fsid, (1,), KEYS.current)
    assert superblock_fsid(VALUE) == SUPERBLOCK.fsid
    assert SUPERBLOCK_KEY == b"qsfs:superblock"


def test_the_label_and_the_parameters_are_not_readable_without_the_key():
    assert b"node" not in VALUE
    assert b"zfec" not in VALUE
    assert KEYS.current.secret not in VALUE


def test_a_wrong_key_file_is_told_from_damage():
    with pytest.raises(KeyFileError, match="opens no key slot"):
        open_superblock(VALUE, OTHER)


def test_a_flipped_bit_anywhere_is_corrupt_or_foreign():
    for place in range(len(VALUE)):
        damaged = bytearray(VALUE)
        damaged[place] ^= 1
        with pytest.raises(FormatMismatch if place < 4 else Corrupt):
            open_superblock(bytes(damaged), SECRET)


def test_a_superblock_cut_short_or_extended_is_refused():
    for length in range(len(VALUE)):
        with pytest.raises(FormatMismatch if length < 4 else Corrupt):
            open_superblock(VALUE[:length], SECRET)
    with pytest.raises(Corrupt):
        open_superblock(VALUE + b"\0", SECRET)


def test_something_else_at_its_key_is_foreign():
    for value in (b"", b"REDIS0011", bytes(300)):
        with pytest.raises(FormatMismatch, match="not a qsfs superblock"):
            superblock_fsid(value)


def test_a_newer_version_is_a_mismatch():
    newer = checksummed(VALUE[:4] + b"\x00\x02" + VALUE[6:-32])
    with pytest.raises(FormatMismatch, match="format version 2"):
        open_superblock(newer, SECRET)


def test_one_without_the_key_can_change_nothing_unnoticed():
    """The checksum can be forged; the seal and the slots can not."""
    body = VALUE[:-32]
    for place in range(6, len(body)):
        forged = checksummed(body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        with pytest.raises((Corrupt, KeyFileError, FormatMismatch)):
            open_superblock(forged, SECRET)


def test_slots_cannot_be_taken_from_another_revision():
    second = replace_slots(
        SUPERBLOCK, (*SUPERBLOCK.slots, *wrap_keys(OTHER, KEYS, slot_number=2, clock=FixedClock(3)))
    )
    value = encode_superblock(second, KEYS, FixedClock(4))
    start, lengths = 32, [int.from_bytes(v[24:28], "big") for v in (VALUE, value)]
    mixed = (
        value[:24]
        + VALUE[24:28]
        + value[28:32]
        + VALUE[start : start + lengths[0]]
        + value[start + lengths[1] : -32]
    )
    with pytest.raises(Corrupt, match="not those that it was sealed with"):
        open_superblock(checksummed(mixed), SECRET)


def test_a_second_key_file_opens_the_same_file_system():
    slots = (*SUPERBLOCK.slots, *wrap_keys(OTHER, KEYS, slot_number=2, clock=FixedClock(3)))
    value = encode_superblock(replace_slots(SUPERBLOCK, slots), KEYS, FixedClock(4))
    for secret in (SECRET, OTHER):
        opened, keys = open_superblock(value, secret)
        assert opened.slots == slots
        assert opened.revision == 2
        assert keys.current == KEYS.current
    removed = encode_superblock(replace_slots(opened, slots[1:]), KEYS, FixedClock(5))
    assert open_superblock(removed, OTHER)[0].revision == 3
    with pytest.raises(KeyFileError):
        open_superblock(removed, SECRET)


def test_after_a_rotation_of_the_master_key_old_and_new_objects_open():
    ring = KeyRing(SUPERBLOCK.fsid, [KEYS.current, MasterKey(2, b"2" * 32)])
    slots = wrap_keys(SECRET, ring, slot_number=1, clock=FixedClock(3))
    value = encode_superblock(replace_slots(SUPERBLOCK, slots), ring, FixedClock(4))
    _, keys = open_superblock(value, SECRET)
    assert (keys.numbers, keys.current, keys.get(1)) == ((1, 2), ring.current, KEYS.current)


def test_a_key_file_left_behind_by_a_rotation_is_told_so():
    ring = KeyRing(SUPERBLOCK.fsid, [KEYS.current, MasterKey(2, b"2" * 32)])
    slots = (*SUPERBLOCK.slots, *wrap_keys(OTHER, ring, slot_number=2, clock=FixedClock(3)))
    value = encode_superblock(replace_slots(SUPERBLOCK, slots), ring, FixedClock(4))
    with pytest.raises(KeyFileError, match="present key file"):
        open_superblock(value, SECRET)


def test_slots_of_kinds_that_are_not_known_yet_are_kept():
    params = {"iterations": 3, "lanes": 4, "memory_kib": 65536, "salt": b"x" * 32}
    slots = (
        KeySlot(2, "argon2id", params, 1, bytes(12), b"w" * 48),
        KeySlot(3, "tpm2", {"pcrs": "7"}, 1, bytes(12), b""),
        *SUPERBLOCK.slots,
    )
    opened, _ = open_superblock(
        encode_superblock(replace_slots(SUPERBLOCK, slots), KEYS, FixedClock(4)), SECRET
    )
    assert opened.slots == slots
    with pytest.raises(KeyFileError, match="argon2id"):
        open_superblock(encode_superblock(replace_slots(SUPERBLOCK, slots), KEYS, FixedClock(4)), OTHER)


def test_two_file_systems_differ_also_under_one_key_file():
    other, _ = create_superblock(SECRET, code=CodeParams(4, 6), clock=FixedClock(9))
    assert other.fsid != SUPERBLOCK.fsid
    assert other.slots[0].wrapped != SUPERBLOCK.slots[0].wrapped


def test_a_superblock_too_large_for_a_backend_is_refused():
    huge = KeySlot(2, "other", {"blob": bytes(9_000_000)}, 1, bytes(12), b"")
    with pytest.raises(LimitExceeded):
        encode_superblock(replace_slots(SUPERBLOCK, (huge,)), KEYS, FixedClock(4))


junk = st.none() | st.integers(-5, 2**33) | st.binary(max_size=20) | st.text(max_size=8)
public_parts = st.lists(junk | st.dictionaries(st.text(max_size=4), junk, max_size=2), max_size=8)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.one_of(public_parts, st.lists(public_parts, max_size=3)), st.integers(0, 2))
def test_hostile_key_slots_are_only_ever_refused(slots, version):
    public = schema.pack([version, slots])
    header = VALUE[:24] + len(public).to_bytes(4, "big") + VALUE[28:32]
    sealed = VALUE[32 + int.from_bytes(VALUE[24:28], "big") : -32]
    with pytest.raises((Corrupt, FormatMismatch, KeyFileError)):
        open_superblock(checksummed(header + public + sealed), SECRET)


def test_a_superblock_that_could_not_be_read_is_never_written():
    slot = SUPERBLOCK.slots[0]
    for change in (
        {"block_size": 1000},
        {"label": "x" * 2000},
        {"fsid": b"another fs id 16"},
        {"created_ns": -1},
        {"slots": (dataclasses.replace(slot, nonce=b""),)},
        {"slots": (dataclasses.replace(slot, params={"salt": None}),)},
    ):
        with pytest.raises(QsfsBug):
            encode_superblock(dataclasses.replace(SUPERBLOCK, **change), KEYS, FixedClock(4))


def test_an_opened_superblock_can_be_written_again():
    opened, keys = open_superblock(VALUE, SECRET)
    again = encode_superblock(dataclasses.replace(opened, revision=5), keys, FixedClock(6))
    assert open_superblock(again, SECRET)[0] == dataclasses.replace(SUPERBLOCK, revision=5)
