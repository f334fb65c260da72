"""Each field is checked for its exact type, length and range."""

from __future__ import annotations

import pytest

from qsfs.errors import Corrupt, FormatMismatch, QsfsBug
from qsfs.format import schema
from qsfs.format.schema import Fields


@pytest.mark.parametrize(
    ("value", "take"),
    [
        (True, lambda fields: fields.integer()),
        (1.0, lambda fields: fields.integer()),
        (-1, lambda fields: fields.integer()),
        (9, lambda fields: fields.integer(0, 8)),
        ("a", lambda fields: fields.binary()),
        (b"abc", lambda fields: fields.binary(2)),
        (b"a", lambda fields: fields.text()),
        ("abc", lambda fields: fields.text(2)),
        ({}, lambda fields: fields.array()),
        ([], lambda fields: fields.mapping()),
        ({1: 2}, lambda fields: fields.mapping()),
    ],
)
def test_what_is_not_asked_for_is_corrupt(value, take):
    with pytest.raises(Corrupt, match="thing: element 0 is not"):
        take(Fields([value], 1, "thing"))


@pytest.mark.parametrize("value", [None, {}, (1,), [1, 2], b"", []])
def test_an_array_of_another_length_is_corrupt(value):
    with pytest.raises(Corrupt):
        Fields(value, 1, "thing")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91",
        b"\x90\x90",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xa1\xff",
        b"\x81\x91\x01\x01",
        b"\xd7\xff" + b"\xff" * 8,
        b"\x91" * 5000 + b"\x01",
    ],
)
def test_broken_msgpack_is_corrupt(data):
    with pytest.raises(Corrupt):
        schema.record(data, 1, 2, "thing")


def test_a_higher_schema_is_a_mismatch_and_a_lower_one_corrupt():
    with pytest.raises(FormatMismatch):
        schema.record(schema.pack([2, 1, 1, 1]), 1, 2, "thing")
    with pytest.raises(Corrupt):
        schema.record(schema.pack([0, 1]), 1, 2, "thing")
    with pytest.raises(Corrupt):
        schema.record(schema.pack([True, 1]), 1, 2, "thing")


@pytest.mark.parametrize("value", [2**64, "\udcff", object()])
def test_what_cannot_be_encoded_is_a_bug(value):
    with pytest.raises(QsfsBug):
        schema.pack([value])
