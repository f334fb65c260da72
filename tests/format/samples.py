"""One of each thing that the format knows, made from a seeded clock: for vectors and for damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qsfs.clock import FixedClock
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.fleet import Fleet, FleetEntry
from qsfs.format.head import (
    Head,
    HeadRef,
    KeptGeneration,
    MetadataPack,
    Owner,
    OwnerRecord,
    SealedHead,
    SnapshotRange,
    open_head,
    open_owner_record,
    seal_head,
    seal_owner_record,
)
from qsfs.format.identity import (
    BackendIdentity,
    Tombstone,
    open_identity,
    open_tombstone,
    seal_identity,
    seal_tombstone,
)
from qsfs.format.keys import KeyRing, MasterKey
from qsfs.format.pack import Pack, PackKind, PlainExtent, build_pack
from qsfs.format.shard import encode_shards, open_shard, shard_key
from qsfs.format.units import PAGE, Buffer

FSID = bytes(range(16))
KEYS = KeyRing(FSID, [MasterKey(1, b"\x11" * 32), MasterKey(2, b"\x22" * 32)])
"""The newest key of `KEYS` has number 2."""
OTHER_MASTER = KeyRing(FSID, [MasterKey(1, b"\x77" * 32), MasterKey(2, b"\x78" * 32)])
OTHER_FSID = KeyRing(b"another fs id 16", [MasterKey(1, b"\x11" * 32), MasterKey(2, b"\x22" * 32)])
CODE = CodeParams(4, 6)
OWNER = Owner(7, b"mount id 16 byte")
TIME = 1_700_000_000_123_456_789


def noise(count: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return FixedClock(1000 + seed).random_bytes(count)


def data_pack(seed: int = 1, keys: KeyRing = KEYS) -> Pack:
    """Three extents that do not compress: 1, 2 and 1 pages."""
    extents = [
        PlainExtent(5, 0, 1, 100, noise(PAGE, 1)),
        PlainExtent(5, 2**51, 2, 101, noise(2 * PAGE, 2)),
        PlainExtent(2**63, 9, 1, 2**64 - 1, noise(PAGE, 3)),
    ]
    return build_pack(PackKind.DATA, extents, keys=keys, code=CODE, owner_epoch=7, clock=FixedClock(seed))


def metadata_pack(seed: int = 2) -> Pack:
    """Two chunks, one of them empty."""
    extents = [PlainExtent(0, 0, 0, 0, noise(300, 4)), PlainExtent(0, 1, 0, 0, b"")]
    return build_pack(PackKind.METADATA, extents, keys=KEYS, code=CODE, owner_epoch=7, clock=FixedClock(seed))


def head(generation: int = 12) -> Head:
    """A head in which every field holds something."""
    entries = tuple(
        FleetEntry(
            number=number,
            identity=bytes([number]) * 16,
            address=f"192.0.2.{number}:9900",
            namespace="qsfs",
            control_namespace="qsfs-control" if number % 2 else "",
            group=f"site-{number % 3}",
            node=f"node-{number}",
            weight=1 + number,
            state="active" if number != 3 else "draining",
        )
        for number in (0, 1, 3, 5, 8, 9)
    )
    before = HeadRef(OWNER, generation - 1, b"\xaa" * 32)
    pack = MetadataPack(metadata_pack().ref, (0, 1, 3, -1, 8, 9), 2)
    return Head(
        fsid=FSID,
        owner=OWNER,
        generation=generation,
        time_ns=TIME,
        write_number=2**40,
        predecessor=before,
        fleets=(Fleet(1, entries[:-1]), Fleet(2, entries)),
        kept=(
            KeptGeneration(before, TIME - 1, ()),
            KeptGeneration(HeadRef(Owner(3, b"m" * 16), 2, b"\xbb" * 32), TIME - 2, ("höhe", "b")),
        ),
        snapshot=(pack, pack),
        deltas=((pack,), ()),
        counters={"inodes": 5, "bytes": 2**63},
        block_size=16384,
        schema_version=3,
    )


def sealed_head() -> SealedHead:
    """The sealed form of `head()`."""
    return seal_head(head(), KEYS, FixedClock(3))


def head_with_ranges() -> Head:
    """A head whose snapshot is divided, which makes it a record of schema 2."""
    pack = head().snapshot[0]
    ranges = (SnapshotRange(b"", 2, 0), SnapshotRange(b"\x05" + bytes(16), 0, 2), SnapshotRange(b"\x06", 1, 1))
    return replace(head(), snapshot=(pack, pack, pack), ranges=ranges)


@dataclass(frozen=True)
class Sample:
    """A value as it lies on a backend, and how it is opened."""

    name: str
    key: bytes
    value: bytes
    open: Callable[[bytes, Buffer, KeyRing], object]


def samples() -> list[Sample]:
    """Each kind of value that is authenticated under the master key."""
    pack = data_pack()
    shards = encode_shards(pack, Code(CODE), KEYS)
    owner = seal_owner_record(OwnerRecord(FSID, OWNER, TIME, "nöde"), KEYS, FixedClock(4))
    identity = seal_identity(BackendIdentity(FSID, b"i" * 16, 3, "qsfs-control"), KEYS, FixedClock(5))
    tombstone = seal_tombstone(Tombstone(FSID, b"i" * 16, 3, TIME, "replaced"), KEYS, FixedClock(6))
    sealed = sealed_head()
    return [
        Sample("data shard", shard_key(FSID, 7, pack.ref.pack_id, 1), shards[1], open_shard_at),
        Sample("parity shard", shard_key(FSID, 7, pack.ref.pack_id, 5), shards[5], open_shard_at),
        Sample("head", sealed.key, sealed.value, open_head),
        Sample("owner record", *owner, open_owner_record),
        Sample("identity", *identity, open_identity),
        Sample("tombstone", *tombstone, open_tombstone),
    ]


def open_shard_at(key: bytes, value: Buffer, keys: KeyRing) -> object:
    """`open_shard` in the order of arguments of the others."""
    return open_shard(value, keys, key=key)
