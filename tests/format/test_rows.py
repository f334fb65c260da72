"""Rows come back in order, chunks keep to their size, hostile chunks are only ever corrupt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.errors import Corrupt, FormatMismatch, QsfsBug
from qsfs.format import schema
from qsfs.format.rows import decode_rows, encode_rows

rows = st.lists(
    st.tuples(st.integers(0, 255), st.binary(max_size=40), st.none() | st.binary(max_size=300)), max_size=60
)


@settings(max_examples=200, derandomize=True)
@given(rows, st.integers(1, 2000))
def test_rows_come_back_and_chunks_keep_to_their_size(given_rows, chunk_bytes):
    chunks = list(encode_rows(iter(given_rows), chunk_bytes))
    decoded = [list(decode_rows(memoryview(chunk))) for chunk in chunks]
    assert [row for chunk in decoded for row in chunk] == given_rows
    for chunk, contents in zip(chunks, decoded, strict=True):
        assert contents
        assert len(chunk) <= chunk_bytes or len(contents) == 1


def test_no_rows_are_no_chunks():
    assert list(encode_rows([], 1000)) == []


def test_a_table_number_out_of_range_is_a_bug():
    for table in (-1, 256):
        with pytest.raises(QsfsBug):
            list(encode_rows([(table, b"", b"")], 100))


@pytest.mark.parametrize(
    "contents",
    [
        [1],
        [1, b"key"],
        ["1", b"key", b"value"],
        [True, b"key", b"value"],
        [256, b"key", b"value"],
        [-1, b"key", b"value"],
        [1, "key", b"value"],
        [1, b"key", "value"],
        [1, b"key", 5],
        [1, None, b"value"],
        {},
        5,
        None,
    ],
)
def test_what_is_no_row_is_corrupt(contents):
    with pytest.raises(Corrupt):
        list(decode_rows(b"\x01" + schema.pack(contents)))


def test_a_newer_chunk_is_a_mismatch_and_version_zero_is_corrupt():
    with pytest.raises(FormatMismatch):
        list(decode_rows(b"\x02anything"))
    for chunk in (b"", b"\x00" + schema.pack([]), b"\x01"):
        with pytest.raises(Corrupt):
            list(decode_rows(chunk))


@settings(max_examples=300, derandomize=True)
@given(st.binary(max_size=200))
def test_hostile_chunks_are_only_ever_corrupt(data):
    try:
        list(decode_rows(b"\x01" + data))
    except Corrupt:
        return
