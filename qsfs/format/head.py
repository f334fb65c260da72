"""Heads: the small sealed record that names a generation, the root of everything remote."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from blake3 import blake3

from qsfs.clock import Clock
from qsfs.errors import Corrupt
from qsfs.format import schema
from qsfs.format.extent import PackKind, PackRef
from qsfs.format.fleet import Fleet, FleetEntry, pack_fleet, take_fleet
from qsfs.format.keys import KeyRing
from qsfs.format.owner import (
    Owner,
    OwnerRecord,
    open_owner_record,
    owner_key,
    pack_owner,
    parse_owner_key,
    seal_owner_record,
    take_owner,
)
from qsfs.format.seal import open_sealed, require_readable, seal
from qsfs.format.units import DIGEST_SIZE, FSID_SIZE, ID_SIZE, KEY_PREFIX, PAGE, Buffer, ObjectKind, make_key

HEAD_PREFIX = KEY_PREFIX + b"h:"
_KEY = struct.Struct(">16sQ16sQ32s")
_SCHEMA = 1
_SCHEMA_RANGES = 2
_MAX_PIN_NAME = 255
_UNSTORED = -1


@dataclass(frozen=True, order=True, slots=True)
class HeadRef:
    """Names one head: its owner, its generation, and the BLAKE3 of its sealed bytes.

    Ordered as heads are: the largest (owner, generation) is the newest.
    """

    owner: Owner
    generation: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class MetadataPack:
    """A pack of metadata rows.

    `placement` holds for each shard the number of the fleet entry that stores it, -1 for none;
    `chunks` is the number of chunks in the pack.
    """

    ref: PackRef
    placement: tuple[int, ...]
    chunks: int


@dataclass(frozen=True, slots=True)
class SnapshotRange:
    """A stretch of the snapshot: the rows at positions from `start` to where the next range starts.

    `packs` counts its metadata packs, which follow those of the range before it.  Deltas from index
    `since` on apply to it; what older ones hold in it is in its packs, or was replaced there.
    """

    start: bytes
    packs: int
    since: int


@dataclass(frozen=True, slots=True)
class KeptGeneration:
    """A generation that may be mounted, with the names of the pins that hold it (none: only recent)."""

    head: HeadRef
    time_ns: int
    pins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """A generation: the image of the whole file system at a cut.

    `predecessor` is the head that the same mount sent before this one, or the head that it took
    over.  `fleets` is one, or two (old, new) while the fleet changes.  `snapshot` and each of
    `deltas` are read in order: later rows replace earlier ones.  `ranges` says which part of the rows
    each pack of the snapshot holds; empty: there is one range, to which every delta applies.
    """

    fsid: bytes
    owner: Owner
    generation: int
    time_ns: int
    write_number: int
    predecessor: HeadRef | None
    fleets: tuple[Fleet, ...]
    kept: tuple[KeptGeneration, ...]
    snapshot: tuple[MetadataPack, ...]
    deltas: tuple[tuple[MetadataPack, ...], ...]
    counters: Mapping[str, int] = field(default_factory=dict)
    block_size: int = 16384
    schema_version: int = 1
    ranges: tuple[SnapshotRange, ...] = ()


@dataclass(frozen=True, slots=True)
class SealedHead:
    """A head as it is sent: `value` goes to `key` on every backend, the same bytes at each retry."""

    key: bytes
    value: bytes
    ref: HeadRef


@dataclass(frozen=True, slots=True)
class HeadKey:
    """What the key of a head says."""

    fsid: bytes
    ref: HeadRef


def head_key(fsid: bytes, ref: HeadRef) -> bytes:
    """The key (87 bytes) of a head.  It holds the digest, so no head ever overwrites another."""
    owner = ref.owner
    return make_key(HEAD_PREFIX, _KEY, fsid, owner.epoch, owner.mount_id, ref.generation, ref.digest)


def parse_head_key(key: bytes) -> HeadKey | None:
    """What `key` says, or None if it is not the key of a head."""
    if not key.startswith(HEAD_PREFIX) or len(key) != len(HEAD_PREFIX) + _KEY.size:
        return None
    fsid, epoch, mount_id, generation, digest = _KEY.unpack_from(key, len(HEAD_PREFIX))
    return HeadKey(fsid, HeadRef(Owner(epoch, mount_id), generation, digest))


def seal_head(head: Head, keys: KeyRing, clock: Clock) -> SealedHead:
    """Seals `head`, having read it back from the bytes that will be sent.

    `LimitExceeded` if it does not fit into one value: too many metadata packs or kept generations.
    """
    value = seal(ObjectKind.HEAD, _encode(head), keys, clock)
    ref = HeadRef(head.owner, head.generation, blake3(value).digest())
    sealed = SealedHead(head_key(head.fsid, ref), value, ref)
    require_readable(
        head, lambda: open_head(sealed.key, value, keys), f"the head of generation {head.generation}"
    )
    return sealed


def open_head(key: bytes, value: Buffer, keys: KeyRing) -> Head:
    """The head at `key`; `Corrupt` unless it is exactly the one that this key names.

    `FormatMismatch` if it is, but written by a newer version.
    """
    what = f"head at key {key.hex()}"
    named = parse_head_key(key)
    if named is None or named.ref.digest != blake3(value).digest():
        raise Corrupt(f"{what}: is another value than this key names")
    head = _decode(open_sealed(ObjectKind.HEAD, value, keys, what), what)
    if named != HeadKey(keys.fsid, HeadRef(head.owner, head.generation, named.ref.digest)):
        raise Corrupt(f"{what}: is another head than this key names")
    return head


def _encode(head: Head) -> bytes:
    ranges: list[object] = [[[part.start, part.packs, part.since] for part in head.ranges]] if head.ranges else []
    return schema.pack(
        [
            _SCHEMA_RANGES if ranges else _SCHEMA,
            head.fsid,
            pack_owner(head.owner),
            head.generation,
            head.time_ns,
            head.write_number,
            None if head.predecessor is None else _pack_ref(head.predecessor),
            [pack_fleet(fleet) for fleet in head.fleets],
            [[_pack_ref(kept.head), kept.time_ns, list(kept.pins)] for kept in head.kept],
            [_pack_metadata(pack) for pack in head.snapshot],
            [[_pack_metadata(pack) for pack in delta] for delta in head.deltas],
            dict(sorted(head.counters.items())),
            head.block_size,
            head.schema_version,
            *ranges,
        ]
    )


def _decode(plaintext: bytes, what: str) -> Head:
    fields = schema.record_of(plaintext, {_SCHEMA: 14, _SCHEMA_RANGES: 15}, what)
    head = Head(
        fsid=fields.binary(FSID_SIZE),
        owner=take_owner(fields.any(), what),
        generation=fields.integer(),
        time_ns=fields.integer(),
        write_number=fields.integer(),
        predecessor=_take_optional_ref(fields.any(), what),
        fleets=tuple(take_fleet(item, what) for item in fields.array()),
        kept=tuple(_take_kept(item, what) for item in fields.array()),
        snapshot=tuple(_take_metadata(item, what) for item in fields.array()),
        deltas=tuple(_take_delta(item, what) for item in fields.array()),
        counters=_take_counters(fields.mapping(), what),
        block_size=fields.integer(PAGE, schema.U32),
        schema_version=fields.integer(1, schema.U32),
        ranges=() if fields.complete else _take_ranges(fields.array(), what),
    )
    _check_ranges(head, what)
    if len(head.fleets) not in (1, 2) or head.block_size % PAGE:
        raise Corrupt(f"{what}: {len(head.fleets)} fleets or a block of {head.block_size} bytes cannot be")
    return head


def _pack_ref(ref: HeadRef) -> list[object]:
    return [pack_owner(ref.owner), ref.generation, ref.digest]


def _take_optional_ref(value: object, what: str) -> HeadRef | None:
    return None if value is None else _take_ref(value, what)


def _take_ref(value: object, what: str) -> HeadRef:
    fields = schema.Fields(value, 3, what)
    return HeadRef(take_owner(fields.any(), what), fields.integer(), fields.binary(DIGEST_SIZE))


def _take_kept(value: object, what: str) -> KeptGeneration:
    fields = schema.Fields(value, 3, what)
    head, time_ns = _take_ref(fields.any(), what), fields.integer()
    pins = fields.array()
    names = schema.Fields(pins, len(pins), what)
    return KeptGeneration(head, time_ns, tuple(names.text(_MAX_PIN_NAME) for _ in pins))


def _pack_metadata(pack: MetadataPack) -> list[object]:
    ref = pack.ref
    return [
        ref.pack_id,
        ref.digest,
        int(ref.kind),
        ref.key_number,
        ref.owner_epoch,
        ref.body_length,
        ref.shard_size,
        list(pack.placement),
        pack.chunks,
    ]


def _take_metadata(value: object, what: str) -> MetadataPack:
    fields = schema.Fields(value, 9, what)
    ref = PackRef(
        pack_id=fields.binary(ID_SIZE),
        digest=fields.binary(DIGEST_SIZE),
        kind=PackKind(fields.integer(PackKind.METADATA, PackKind.METADATA)),
        key_number=fields.integer(1, schema.U32),
        owner_epoch=fields.integer(),
        body_length=fields.integer(1),
        shard_size=fields.integer(1, schema.U32),
    )
    numbers = fields.array()
    places = schema.Fields(numbers, len(numbers), what)
    placement = tuple(places.integer(_UNSTORED, schema.U16) for _ in numbers)
    if ref.body_length % ref.shard_size or not ref.k <= len(placement) <= 256:
        raise Corrupt(f"{what}: metadata pack {ref.pack_id.hex()} has sizes that cannot be")
    return MetadataPack(ref, placement, fields.integer(0, schema.U32))


def _take_delta(value: object, what: str) -> tuple[MetadataPack, ...]:
    if type(value) is not list:
        raise Corrupt(f"{what}: a delta is not an array")
    return tuple(_take_metadata(item, what) for item in value)


def _take_ranges(values: list[object], what: str) -> tuple[SnapshotRange, ...]:
    ranges = []
    for value in values:
        fields = schema.Fields(value, 3, what)
        ranges.append(SnapshotRange(fields.binary(), fields.integer(0, schema.U32), fields.integer(0, schema.U32)))
    if not ranges:
        raise Corrupt(f"{what}: has no range of rows")
    return tuple(ranges)


def _check_ranges(head: Head, what: str) -> None:
    """Raises `Corrupt` unless the ranges hold every row and every pack of the snapshot once."""
    if not head.ranges:
        return
    starts = [part.start for part in head.ranges]
    if (
        starts[0] != b""
        or any(one >= two for one, two in pairwise(starts))
        or sum(part.packs for part in head.ranges) != len(head.snapshot)
        or any(part.since > len(head.deltas) for part in head.ranges)
    ):
        raise Corrupt(f"{what}: its ranges of rows do not fit together")


def _take_counters(values: Mapping[str, object], what: str) -> dict[str, int]:
    counters: dict[str, int] = {}
    for name, value in values.items():
        counters[name] = schema.Fields([value], 1, what).integer()
    return counters


__all__ = [
    "HEAD_PREFIX",
    "Fleet",
    "FleetEntry",
    "Head",
    "HeadKey",
    "HeadRef",
    "KeptGeneration",
    "MetadataPack",
    "Owner",
    "OwnerRecord",
    "SealedHead",
    "SnapshotRange",
    "head_key",
    "open_head",
    "open_owner_record",
    "owner_key",
    "parse_head_key",
    "parse_owner_key",
    "seal_head",
    "seal_owner_record",
]
