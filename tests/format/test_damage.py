"""Whatever a backend returns instead of what was written raises `Corrupt`, and nothing else."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
from blake3 import blake3

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, FormatMismatch
from qsfs.format import seal
from qsfs.format.head import head_key
from qsfs.format.shard import shard_key
from qsfs.format.units import PREAMBLE_SIZE, ObjectKind, Preamble
from tests.format import samples
from tests.format.samples import KEYS, OTHER_FSID, OTHER_MASTER, Sample

SAMPLES = samples.samples()
each = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def refused(sample: Sample, key: bytes, value: bytes, keys=KEYS) -> bool:
    with pytest.raises(Corrupt):
        sample.open(key, value, keys)
    return True


@each
def test_the_unchanged_value_opens(sample):
    assert sample.open(sample.key, sample.value, KEYS) == sample.open(
        sample.key, memoryview(bytearray(sample.value)), KEYS
    )


@each
def test_a_flipped_bit_anywhere_is_corrupt(sample):
    """Every byte of a header, of a tag and of a small value; every 61st of a payload."""
    size = len(sample.value)
    places = {*range(min(size, 300)), *range(0, size, 61), *range(max(0, size - 100), size)}
    for place in places:
        for bit in (0x01, 0x80):
            damaged = bytearray(sample.value)
            damaged[place] ^= bit
            refused(sample, sample.key, bytes(damaged))


@each
def test_a_value_cut_short_or_extended_is_corrupt(sample):
    size = len(sample.value)
    for length in {*range(min(size, 300)), *range(0, size, 97), size - 1}:
        refused(sample, sample.key, sample.value[:length])
    refused(sample, sample.key, sample.value + b"\0")
    refused(sample, sample.key, b"")


@each
def test_zeros_and_foreign_values_are_corrupt(sample):
    refused(sample, sample.key, bytes(len(sample.value)))
    refused(sample, sample.key, b"ZDB0" + sample.value[4:])
    refused(sample, sample.key, b"\xff" * len(sample.value))


@each
def test_a_flipped_bit_in_the_key_is_corrupt(sample):
    for place in range(len(sample.key)):
        key = bytearray(sample.key)
        key[place] ^= 1
        refused(sample, bytes(key), sample.value)
    refused(sample, sample.key[:-1], sample.value)
    refused(sample, sample.key + b"\0", sample.value)


def test_a_value_under_the_key_of_another_is_corrupt():
    for one, other in permutations(SAMPLES, 2):
        refused(one, one.key, other.value)
        refused(one, other.key, one.value)


@each
def test_another_file_system_or_another_master_key_does_not_open_it(sample):
    refused(sample, sample.key, sample.value, OTHER_MASTER)
    refused(sample, sample.key, sample.value, OTHER_FSID)
    named = sample.value.replace(samples.FSID, OTHER_FSID.fsid, 1)
    refused(sample, sample.key.replace(samples.FSID, OTHER_FSID.fsid), named, OTHER_FSID)


@each
def test_an_unknown_master_key_number_is_corrupt(sample):
    preamble = Preamble.decode(sample.value, "sample")
    for number in (0, 1, 3, 2**32 - 1):
        forged = dataclasses.replace(preamble, key_number=number).encode()
        refused(sample, sample.key, forged + sample.value[PREAMBLE_SIZE:])


def test_shards_do_not_pass_for_each_other():
    """Swapped between positions of one pack, and between packs of one owner."""
    first, second = samples.data_pack(1), samples.data_pack(8)
    one, other = (samples.encode_shards(pack, samples.Code(samples.CODE), KEYS) for pack in (first, second))
    for number, value in enumerate(one):
        for place in range(len(one)):
            key = shard_key(samples.FSID, 7, first.ref.pack_id, place)
            if place == number:
                assert samples.open_shard(value, KEYS, key=key).number == number
            else:
                with pytest.raises(Corrupt, match="instead"):
                    samples.open_shard(value, KEYS, key=key)
        with pytest.raises(Corrupt, match="instead"):
            samples.open_shard(other[number], KEYS, key=shard_key(samples.FSID, 7, first.ref.pack_id, number))
        with pytest.raises(Corrupt, match="instead"):
            samples.open_shard(value, KEYS, key=shard_key(samples.FSID, 8, first.ref.pack_id, number))


def test_a_head_under_the_key_of_another_generation_is_corrupt():
    sealed = samples.sealed_head()
    for ref in (
        dataclasses.replace(sealed.ref, generation=13),
        dataclasses.replace(sealed.ref, owner=dataclasses.replace(sealed.ref.owner, epoch=8)),
        dataclasses.replace(sealed.ref, owner=dataclasses.replace(sealed.ref.owner, mount_id=b"x" * 16)),
        dataclasses.replace(sealed.ref, digest=b"x" * 32),
    ):
        with pytest.raises(Corrupt):
            samples.open_head(head_key(samples.FSID, ref), sealed.value, KEYS)


def test_a_newer_version_is_believed_only_when_it_authenticates(monkeypatch):
    """A lying backend cannot make this version stop by claiming to hold something newer."""
    for sample in SAMPLES:
        preamble = Preamble.decode(sample.value, "sample")
        forged = dataclasses.replace(preamble, version=2).encode() + sample.value[PREAMBLE_SIZE:]
        refused(sample, sample.key, forged)
    with monkeypatch.context() as newer:
        newer.setattr("qsfs.format.seal.FORMAT_VERSION", 2)
        newer.setattr("qsfs.format.shard.FORMAT_VERSION", 2)
        written = samples.samples()
    for sample in written:
        with pytest.raises(FormatMismatch, match="version 2"):
            sample.open(sample.key, sample.value, KEYS)


@pytest.mark.parametrize(
    "kind", [ObjectKind.HEAD, ObjectKind.OWNER, ObjectKind.IDENTITY, ObjectKind.TOMBSTONE]
)
def test_a_newer_schema_of_a_record_is_a_mismatch(kind):
    from qsfs.format import schema

    plaintext = schema.pack([9, "fields that only a newer version knows"])
    value = seal.seal(kind, plaintext, KEYS, FixedClock(1))
    sample = next(s for s in SAMPLES if s.value[6] == kind)
    key = sample.key
    if kind == ObjectKind.HEAD:
        key = sample.key[:-32] + blake3(value).digest()
    with pytest.raises(FormatMismatch, match="schema 9"):
        sample.open(key, value, KEYS)
