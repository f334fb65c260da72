"""Compression of extents: zstd unless it does not pay."""

from __future__ import annotations

import threading

import zstandard

from qsfs.errors import Corrupt
from qsfs.format.units import Buffer

CODEC_RAW = 0
"""The bytes as they are."""
CODEC_ZSTD = 1
"""One zstd frame without content size, checksum or dictionary."""

_SAMPLE = 2048
_SAMPLES = 8
_WORTH_SAMPLING = 4 * _SAMPLES * _SAMPLE
_LEAST_SAVING = 1 / 16

_local = threading.local()


def compress(data: Buffer, level: int = 1) -> tuple[int, Buffer]:
    """(codec, bytes): a zstd frame if it saves at least a sixteenth, else `data` itself.

    Of what is larger than 64 KiB, eight samples of 2 KiB are tried first: what compresses by a few
    per cent only (pages of hashes) is the slowest of all to compress.
    """
    size = len(data)
    compressor = _compressor(level)
    limit = size - int(size * _LEAST_SAVING)
    if size >= _WORTH_SAMPLING:
        view = memoryview(data)
        step = (size - _SAMPLE) // (_SAMPLES - 1)
        sample = b"".join(view[i * step : i * step + _SAMPLE] for i in range(_SAMPLES))
        if len(compressor.compress(sample)) > len(sample) * (1 - _LEAST_SAVING / 2):
            return CODEC_RAW, data
    frame = compressor.compress(data)
    return (CODEC_ZSTD, frame) if len(frame) < size and len(frame) <= limit else (CODEC_RAW, data)


def decompress(codec: int, data: Buffer, plain_length: int) -> bytes:
    """The `plain_length` bytes that `data` stands for; `Corrupt` if it is anything else.

    Never allocates more than `plain_length`, whatever the frame claims.
    """
    if codec == CODEC_RAW:
        plain = bytes(data)
    elif codec == CODEC_ZSTD:
        try:
            if zstandard.frame_content_size(data) >= 0:
                raise Corrupt("a zstd frame carries a content size, which qsfs never writes")
            plain = _decompressor().decompress(data, max_output_size=plain_length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Corrupt(f"a zstd frame of {len(data)} bytes does not decompress: {error}") from None
    else:
        raise Corrupt(f"unknown compression codec {codec}")
    if len(plain) != plain_length:
        raise Corrupt(f"an extent decompresses to {len(plain)} bytes instead of {plain_length}")
    return plain


def _compressor(level: int) -> zstandard.ZstdCompressor:
    cache: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in cache:
        cache[level] = zstandard.ZstdCompressor(level, write_content_size=False, write_checksum=False)
    return cache[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    decompressor: zstandard.ZstdDecompressor | None = _local.__dict__.get("decompressor")
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    return decompressor
