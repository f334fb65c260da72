"""Compression never changes a byte, is left out where it does not pay, and trusts no frame."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.errors import Corrupt
from qsfs.format.compression import CODEC_RAW, CODEC_ZSTD, compress, decompress
from tests.format.samples import noise


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.binary(max_size=2000), st.integers(1, 200), st.integers(1, 9))
def test_what_is_compressed_comes_back(unit, repeats, level):
    data = unit * repeats
    codec, packed = compress(memoryview(data), level)
    assert len(packed) <= len(data)
    assert decompress(codec, packed, len(data)) == data


@pytest.mark.parametrize("size", [0, 1, 15, 100, 4096, 65536, 262144])
def test_what_does_not_compress_is_kept_as_it_is(size):
    data = noise(size)
    codec, packed = compress(data)
    assert codec == CODEC_RAW
    assert packed is data


@pytest.mark.parametrize("size", [4096, 65536, 262144])
def test_what_saves_less_than_a_sixteenth_is_kept_as_it_is(size):
    saves_a_little = noise(size - size // 32) + bytes(size // 32)
    saves_enough = noise(size - size // 6) + bytes(size // 6)
    assert compress(saves_a_little)[0] == CODEC_RAW
    assert compress(saves_enough)[0] == CODEC_ZSTD


def test_a_page_that_compresses_is_compressed():
    codec, packed = compress(bytes(4096))
    assert (codec, len(packed) < 64) == (CODEC_ZSTD, True)


def frame(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(1, **options).compress(data)


@pytest.mark.parametrize(
    ("codec", "data", "length"),
    [
        (CODEC_RAW, b"abc", 4),
        (CODEC_RAW, b"abc", 2),
        (2, b"abc", 3),
        (255, b"", 0),
        (CODEC_ZSTD, b"", 0),
        (CODEC_ZSTD, b"not a frame at all", 10),
        (CODEC_ZSTD, frame(bytes(100)), 100),
        (CODEC_ZSTD, frame(bytes(2**26)), 100),
        (CODEC_ZSTD, frame(bytes(100), write_content_size=False), 99),
        (CODEC_ZSTD, frame(bytes(100), write_content_size=False), 101),
        (CODEC_ZSTD, frame(bytes(2**26), write_content_size=False), 100),
        (CODEC_ZSTD, frame(bytes(100), write_content_size=False)[:-1], 100),
        (CODEC_ZSTD, frame(bytes(100), write_content_size=False) + b"x", 100),
        (CODEC_ZSTD, frame(bytes(100), write_content_size=False) * 2, 200),
    ],
)
def test_a_frame_that_was_not_written_here_is_corrupt(codec, data, length):
    with pytest.raises(Corrupt):
        decompress(codec, data, length)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.booleans())
def test_hostile_frames_are_only_ever_corrupt(data, length, header):
    try:
        plain = decompress(CODEC_ZSTD, (b"\x28\xb5\x2f\xfd" if header else b"") + data, length)
    except Corrupt:
        return
    assert len(plain) == length
