"""Shards: one piece of a pack, one value on one backend.

A value is, integers big-endian:

    preamble       28  magic, version, kind 8, zero, file system id, master key's number
    owner epoch     8
    pack id        16
    pack digest    32
    pack kind       1
    codec           1  of the erasure code
    shard number    2
    k, n            2, 2
    body length     8
    shard size      4
    payload            shard size bytes of the body, or of parity
    tag            32  keyed BLAKE3 of everything before it

In all versions the preamble comes first and the tag last.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

from blake3 import blake3

from qsfs.errors import Corrupt, QsfsBug
from qsfs.format.erasure import CODEC_NAMES, CODEC_NUMBERS, Code
from qsfs.format.extent import PackKind, PackRef
from qsfs.format.keys import KeyRing
from qsfs.format.pack import Pack
from qsfs.format.seal import require_version
from qsfs.format.units import (
    FORMAT_VERSION,
    KEY_PREFIX,
    MAX_SHARD,
    PREAMBLE_SIZE,
    Buffer,
    ObjectKind,
    Preamble,
    make_key,
)

_REST = struct.Struct(">Q16s32sBBHHHQI")
HEADER_SIZE = PREAMBLE_SIZE + _REST.size
"""Bytes before the payload (104)."""
SHARD_TAG_SIZE = 32
OVERHEAD = HEADER_SIZE + SHARD_TAG_SIZE
"""Bytes that a shard's value has beyond its payload (136)."""

SHARD_PREFIX = KEY_PREFIX + b"s:"
_KEY = struct.Struct(">16sQ16sH")


@dataclass(frozen=True, slots=True)
class ShardKey:
    """What the key of a shard says."""

    fsid: bytes
    owner_epoch: int
    pack_id: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Shard:
    """An authenticated shard; `payload` is a view into the value that was opened."""

    ref: PackRef
    number: int
    k: int
    n: int
    codec: str
    payload: memoryview


def shard_key(fsid: bytes, owner_epoch: int, pack_id: bytes, number: int) -> bytes:
    """The key (49 bytes) under which shard `number` of a pack lies on its backend."""
    return make_key(SHARD_PREFIX, _KEY, fsid, owner_epoch, pack_id, number)


def parse_shard_key(key: bytes) -> ShardKey | None:
    """What `key` says, or None if it is not the key of a shard."""
    if not key.startswith(SHARD_PREFIX) or len(key) != len(SHARD_PREFIX) + _KEY.size:
        return None
    return ShardKey(*_KEY.unpack_from(key, len(SHARD_PREFIX)))


@dataclass(frozen=True, slots=True)
class ShardClaim:
    """What the first bytes of a shard's value claim, before anything authenticates them."""

    fsid: bytes
    owner_epoch: int
    number: int
    k: int
    n: int
    shard_size: int


def peek_shard(value: Buffer) -> ShardClaim | None:
    """What a value claims that begins with the header of a shard of this version, None if it does not."""
    if len(value) < HEADER_SIZE:
        return None
    try:
        preamble = Preamble.decode(value, "shard")
    except Corrupt:
        return None
    if preamble.version != FORMAT_VERSION or preamble.kind != ObjectKind.SHARD:
        return None
    epoch, _, _, _, _, number, k, n, body_length, size = _REST.unpack_from(value, PREAMBLE_SIZE)
    if not (1 <= k <= n <= 256 and number < n and 0 < size <= MAX_SHARD and body_length == k * size):
        return None
    return ShardClaim(preamble.fsid, epoch, number, k, n, size)


def encode_shards(pack: Pack, code: Code, keys: KeyRing) -> list[bytes]:
    """The n values of a pack, by shard number: k pieces of its body, then the parity."""
    params, ref = code.params, pack.ref
    if ref.body_length != params.k * ref.shard_size or len(pack.body) != ref.body_length:
        raise QsfsBug(f"pack {ref.pack_id.hex()} was not built for {params}")
    view = memoryview(pack.body)
    data: list[Buffer] = [view[i * ref.shard_size : (i + 1) * ref.shard_size] for i in range(params.k)]
    payloads = [*data, *code.encode(data)]
    return [encode_shard(ref, number, payload, code, keys) for number, payload in enumerate(payloads)]


def encode_shard(ref: PackRef, number: int, payload: Buffer, code: Code, keys: KeyRing) -> bytes:
    """The value of one shard, byte for byte what `encode_shards` gives: for repair."""
    params = code.params
    if len(payload) != ref.shard_size or not 0 <= number < params.n or ref.k != params.k:
        raise QsfsBug(f"shard {number} of pack {ref.pack_id.hex()} does not fit {params}")
    preamble = Preamble(FORMAT_VERSION, ObjectKind.SHARD, keys.fsid, ref.key_number)
    header = preamble.encode() + _REST.pack(
        ref.owner_epoch,
        ref.pack_id,
        ref.digest,
        ref.kind,
        CODEC_NUMBERS[params.codec],
        number,
        params.k,
        params.n,
        ref.body_length,
        ref.shard_size,
    )
    tag = blake3(header, key=keys.tag_key(ref.key_number)).update(payload).digest()
    return b"".join((header, payload, tag))


def open_shard(value: Buffer, keys: KeyRing, *, key: bytes | None = None) -> Shard:
    """The shard in `value`; with `key`, only if it is the shard that this key names.

    `Corrupt` unless it is exactly what a holder of the master key wrote for this file system;
    `FormatMismatch` if it is, but in a newer version.
    """
    what = "shard" if key is None else f"shard at key {key.hex()}"
    preamble = Preamble.decode(value, what)
    if preamble.kind != ObjectKind.SHARD:
        raise Corrupt(f"{what}: is a value of kind {preamble.kind}")
    if preamble.fsid != keys.fsid:
        raise Corrupt(f"{what}: belongs to file system {preamble.fsid.hex()}, not {keys.fsid.hex()}")
    if len(value) < OVERHEAD:
        raise Corrupt(f"{what}: cut short to {len(value)} bytes")
    view = memoryview(value)
    tag = blake3(view[:-SHARD_TAG_SIZE], key=keys.tag_key(preamble.key_number)).digest()
    if not hmac.compare_digest(tag, view[-SHARD_TAG_SIZE:]):
        raise Corrupt(f"{what}: does not authenticate")
    require_version(preamble.version, what)
    epoch, pack_id, digest, kind, codec, number, k, n, body_length, shard_size = _REST.unpack_from(
        value, PREAMBLE_SIZE
    )
    if (
        kind not in (PackKind.DATA, PackKind.METADATA)
        or codec not in CODEC_NAMES
        or not 1 <= k <= n <= 256
        or not number < n
        or shard_size == 0
        or body_length != k * shard_size
        or len(value) != shard_size + OVERHEAD
    ):
        raise Corrupt(f"{what}: its header contradicts itself")
    ref = PackRef(pack_id, digest, PackKind(kind), preamble.key_number, epoch, body_length, shard_size)
    if key is not None and key != shard_key(keys.fsid, epoch, pack_id, number):
        raise Corrupt(f"{what}: is shard {number} of pack {pack_id.hex()} instead")
    return Shard(ref, number, k, n, CODEC_NAMES[codec], view[HEADER_SIZE:-SHARD_TAG_SIZE])
