"""Packs: extents sealed one by one, and an index that explains the pack without any database.

The body, k shards of equal size laid end to end:

    sealed extents   in order of ordinal; zero bytes may lie between them
    zero bytes
    sealed index     directly before the trailer
    sealed trailer   the last 32 bytes: where the index begins, its length, the number of extents

One key seals the whole pack; the nonce is the position: 0 the trailer, 1 the index, 2 + ordinal
an extent.  The pack's digest is the keyed BLAKE3 of everything that is sealed, in the order
extents, index, trailer; the trailer and the index give all lengths, so it reads in one way only.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3
from cryptography.exceptions import InvalidTag

from qsfs.clock import Clock
from qsfs.errors import Corrupt, FormatMismatch, LimitExceeded, QsfsBug
from qsfs.format import compression
from qsfs.format.erasure import CodeParams
from qsfs.format.extent import ExtentEntry, PackKind, PackRef, PlainExtent
from qsfs.format.keys import KeyRing
from qsfs.format.layout import place_extents
from qsfs.format.seal import new_object_id, nonce
from qsfs.format.units import FORMAT_VERSION, MAX_SHARD, PAGE, TAG_SIZE, Buffer

_TRAILER = struct.Struct(">QII")
TRAILER_SIZE = _TRAILER.size + TAG_SIZE
"""Bytes of the sealed trailer at the end of a body (32)."""

_INDEX_HEADER = struct.Struct(">HHIQI")
_INDEX_ENTRY = struct.Struct(">QQIQIIIB")
_EXTENT_AAD = struct.Struct(">HB16s16sIQQIQIIB")
_PART_AAD = struct.Struct(">HB16s16sQ")
_INDEX_SCHEMA = 1

_TRAILER_POSITION = 0
_INDEX_POSITION = 1
_FIRST_EXTENT_POSITION = 2


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack ready to be cut into shards."""

    ref: PackRef
    body: bytes
    entries: tuple[ExtentEntry, ...]


def build_pack(
    kind: PackKind,
    extents: Iterable[PlainExtent],
    *,
    keys: KeyRing,
    code: CodeParams,
    owner_epoch: int,
    clock: Clock,
    level: int = 1,
) -> Pack:
    """Compresses and seals `extents` into one pack under the current master key.

    Their data must not change during the call: the key of the pack comes from them.
    `LimitExceeded` if its shards would be larger than a backend should hold.
    """
    plain = list(extents)
    packed = [compression.compress(extent.data, level) for extent in plain]
    lengths = [len(data) + TAG_SIZE for _, data in packed]
    index_length = _INDEX_HEADER.size + len(plain) * _INDEX_ENTRY.size + TAG_SIZE
    offsets, shard_size = place_extents(lengths, index_length + TRAILER_SIZE, code.k)
    if shard_size > MAX_SHARD:
        raise LimitExceeded(
            f"shards of {shard_size} bytes exceed the limit of {MAX_SHARD}: use smaller packs"
        )
    body_length = shard_size * code.k
    entries = tuple(
        ExtentEntry(
            ordinal,
            extent.inode,
            extent.first_page,
            extent.pages,
            extent.write_number,
            offset,
            length,
            len(extent.data),
            codec,
        )
        for ordinal, (extent, (codec, _), offset, length) in enumerate(
            zip(plain, packed, offsets, lengths, strict=True)
        )
    )
    _require_entries(kind, entries)
    index_offset = body_length - TRAILER_SIZE - index_length
    index = _encode_index(entries, code.k, shard_size, owner_epoch)
    trailer = _TRAILER.pack(index_offset, index_length, len(entries))

    number = keys.current.number
    hasher = blake3(key=keys.digest_key(number))
    for _, data in packed:
        hasher.update(data)
    digest = hasher.update(index).update(trailer).digest()
    pack_id = new_object_id(digest, clock)
    ref = PackRef(pack_id, digest, kind, number, owner_epoch, body_length, shard_size)

    cipher = keys.cipher(number, FORMAT_VERSION, kind, pack_id, digest)
    parts: list[bytes] = []
    end = 0
    for entry, (_, data) in zip(entries, packed, strict=True):
        if entry.offset > end:
            parts.append(bytes(entry.offset - end))
        end = entry.offset + entry.sealed_length
        position = nonce(_FIRST_EXTENT_POSITION + entry.ordinal)
        parts.append(cipher.encrypt(position, data, _extent_aad(keys.fsid, ref, entry)))
    parts.append(bytes(index_offset - end))
    for part, plaintext in ((_INDEX_POSITION, index), (_TRAILER_POSITION, trailer)):
        parts.append(cipher.encrypt(nonce(part), plaintext, _part_aad(keys.fsid, ref, part)))
    return Pack(ref, b"".join(parts), entries)


def open_extent(keys: KeyRing, ref: PackRef, entry: ExtentEntry, sealed: Buffer) -> bytes:
    """The plain bytes of one extent, given its `entry.sealed_length` sealed bytes.

    `Corrupt` unless they are what was sealed at this place of this pack for these pages.
    """
    return compression.decompress(entry.codec, _open_sealed(keys, ref, entry, sealed), entry.plain_length)


def index_offset(keys: KeyRing, ref: PackRef, tail: Buffer) -> int:
    """Where in the body the index begins, given at least the last `TRAILER_SIZE` bytes of the body.

    `Corrupt` if the trailer does not authenticate.
    """
    offset, _, _ = _open_trailer(keys, ref, tail)[0]
    return offset


def open_index(keys: KeyRing, ref: PackRef, body_or_tail: Buffer) -> tuple[ExtentEntry, ...]:
    """The pack's own list of its extents, given the body or a tail of it that holds the index.

    Ask `index_offset` first how long a tail must be.  `Corrupt` if it is too short, or if index or
    trailer do not authenticate.
    """
    return _open_index(keys, ref, body_or_tail)[0]


def open_body(keys: KeyRing, ref: PackRef, body: Buffer) -> Iterator[tuple[ExtentEntry, bytes]]:
    """Every extent of a whole body with its plain bytes, in order.

    The digest and the padding are checked before the end is reached: what was yielded counts only
    once the iterator is exhausted without `Corrupt`.
    """
    if len(body) != ref.body_length:
        raise Corrupt(f"{_name(ref)}: {len(body)} bytes instead of {ref.body_length}")
    view = memoryview(body)
    entries, index, trailer = _open_index(keys, ref, view)
    hasher = blake3(key=keys.digest_key(ref.key_number))
    position = 0
    for entry in entries:
        _require_zeros(ref, view[position : entry.offset])
        position = entry.offset + entry.sealed_length
        data = _open_sealed(keys, ref, entry, view[entry.offset : position])
        hasher.update(data)
        yield entry, compression.decompress(entry.codec, data, entry.plain_length)
    _require_zeros(ref, view[position : ref.body_length - TRAILER_SIZE - len(index) - TAG_SIZE])
    digest = hasher.update(index).update(trailer).digest()
    if not hmac.compare_digest(digest, ref.digest):
        raise Corrupt(f"{_name(ref)}: its digest does not fit its contents")


def verify_body(keys: KeyRing, ref: PackRef, body: Buffer) -> tuple[ExtentEntry, ...]:
    """Opens every extent, checks index, padding and digest; `Corrupt` names what is wrong."""
    return tuple(entry for entry, _ in open_body(keys, ref, body))


def _encode_index(entries: Sequence[ExtentEntry], k: int, shard_size: int, owner_epoch: int) -> bytes:
    try:
        parts = [_INDEX_HEADER.pack(_INDEX_SCHEMA, k, shard_size, owner_epoch, len(entries))]
        parts.extend(
            _INDEX_ENTRY.pack(
                e.inode,
                e.first_page,
                e.pages,
                e.write_number,
                e.offset,
                e.sealed_length,
                e.plain_length,
                e.codec,
            )
            for e in entries
        )
    except struct.error as error:
        raise QsfsBug(f"an extent has a number that the index cannot hold: {error}") from error
    return b"".join(parts)


def _decode_index(ref: PackRef, index: bytes, count: int) -> tuple[ExtentEntry, ...]:
    if len(index) != _INDEX_HEADER.size + count * _INDEX_ENTRY.size:
        raise Corrupt(f"{_name(ref)}: its index does not have {count} entries")
    schema, k, shard_size, owner_epoch, entries = _INDEX_HEADER.unpack_from(index)
    if schema > _INDEX_SCHEMA:
        raise FormatMismatch(f"{_name(ref)}: its index has schema {schema}; use a newer qsfs")
    expected = (_INDEX_SCHEMA, ref.k, ref.shard_size, ref.owner_epoch, count)
    if (schema, k, shard_size, owner_epoch, entries) != expected:
        raise Corrupt(f"{_name(ref)}: its index does not fit what refers to it")
    end = ref.body_length - TRAILER_SIZE - TAG_SIZE - len(index)
    found: list[ExtentEntry] = []
    position = 0
    rows = _INDEX_ENTRY.iter_unpack(memoryview(index)[_INDEX_HEADER.size :])
    for ordinal, row in enumerate(rows):
        entry = ExtentEntry(ordinal, *row)
        if not position <= entry.offset or entry.sealed_length < TAG_SIZE:
            raise Corrupt(f"{_name(ref)}: extents {ordinal - 1} and {ordinal} overlap in its index")
        if ref.kind is PackKind.DATA and entry.plain_length != entry.pages * PAGE:
            raise Corrupt(
                f"{_name(ref)}: extent {ordinal} has {entry.plain_length} bytes in {entry.pages} pages"
            )
        position = entry.offset + entry.sealed_length
        found.append(entry)
    if position > end:
        raise Corrupt(f"{_name(ref)}: its extents overlap its index")
    return tuple(found)


def _open_trailer(keys: KeyRing, ref: PackRef, tail: Buffer) -> tuple[tuple[int, int, int], bytes]:
    if len(tail) < TRAILER_SIZE or len(tail) > ref.body_length:
        raise Corrupt(f"{_name(ref)}: {len(tail)} bytes cannot be the end of its body")
    trailer = _decrypt(keys, ref, _TRAILER_POSITION, memoryview(tail)[-TRAILER_SIZE:], "trailer")
    offset, length, count = _TRAILER.unpack(trailer)
    if length < TAG_SIZE or offset + length != ref.body_length - TRAILER_SIZE:
        raise Corrupt(f"{_name(ref)}: its trailer places the index outside of the body")
    return (offset, length, count), trailer


def _open_index(keys: KeyRing, ref: PackRef, tail: Buffer) -> tuple[tuple[ExtentEntry, ...], bytes, bytes]:
    (_, length, count), trailer = _open_trailer(keys, ref, tail)
    if len(tail) < TRAILER_SIZE + length:
        raise Corrupt(f"{_name(ref)}: its index begins before the last {len(tail)} bytes")
    start = len(tail) - TRAILER_SIZE - length
    sealed = memoryview(tail)[start : start + length]
    index = _decrypt(keys, ref, _INDEX_POSITION, sealed, "index")
    return _decode_index(ref, index, count), index, trailer


def _decrypt(keys: KeyRing, ref: PackRef, position: int, sealed: memoryview, part: str) -> bytes:
    cipher = keys.cipher(ref.key_number, FORMAT_VERSION, ref.kind, ref.pack_id, ref.digest)
    try:
        return cipher.decrypt(nonce(position), sealed, _part_aad(keys.fsid, ref, position))
    except InvalidTag:
        raise Corrupt(f"{_name(ref)}: its {part} does not authenticate") from None


def _open_sealed(keys: KeyRing, ref: PackRef, entry: ExtentEntry, sealed: Buffer) -> bytes:
    if len(sealed) != entry.sealed_length or entry.sealed_length < TAG_SIZE:
        wanted = entry.sealed_length
        raise Corrupt(f"{_name(ref)}: extent {entry.ordinal} has {len(sealed)} bytes, not {wanted}")
    cipher = keys.cipher(ref.key_number, FORMAT_VERSION, ref.kind, ref.pack_id, ref.digest)
    position = nonce(_FIRST_EXTENT_POSITION + entry.ordinal)
    try:
        return cipher.decrypt(position, sealed, _extent_aad(keys.fsid, ref, entry))
    except (InvalidTag, struct.error, OverflowError):
        raise Corrupt(f"{_name(ref)}: extent {entry.ordinal} does not authenticate") from None


def _extent_aad(fsid: bytes, ref: PackRef, entry: ExtentEntry) -> bytes:
    return _EXTENT_AAD.pack(
        FORMAT_VERSION,
        ref.kind,
        fsid,
        ref.pack_id,
        entry.ordinal,
        entry.inode,
        entry.first_page,
        entry.pages,
        entry.write_number,
        entry.sealed_length,
        entry.plain_length,
        entry.codec,
    )


def _part_aad(fsid: bytes, ref: PackRef, position: int) -> bytes:
    return _PART_AAD.pack(FORMAT_VERSION, ref.kind, fsid, ref.pack_id, position)


def _require_entries(kind: PackKind, entries: Sequence[ExtentEntry]) -> None:
    data = kind is PackKind.DATA
    for entry in entries:
        if data:
            good = entry.pages >= 1 and entry.plain_length == entry.pages * PAGE
        else:
            good = entry.inode == 0 and entry.pages == 0
        if not good:
            raise QsfsBug(f"{entry} cannot be in a {kind.name} pack")


def _require_zeros(ref: PackRef, gap: memoryview) -> None:
    if gap != bytes(len(gap)):
        raise Corrupt(f"{_name(ref)}: its padding is not zero")


def _name(ref: PackRef) -> str:
    return f"pack {ref.pack_id.hex()}"


__all__ = [
    "TRAILER_SIZE",
    "ExtentEntry",
    "Pack",
    "PackKind",
    "PackRef",
    "PlainExtent",
    "build_pack",
    "index_offset",
    "open_body",
    "open_extent",
    "open_index",
    "verify_body",
]
