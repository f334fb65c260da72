"""What extents and packs are called: the records that other layers keep in their tables."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from qsfs.format.units import Buffer, ObjectKind


class PackKind(IntEnum):
    """What a pack holds."""

    DATA = ObjectKind.DATA_PACK
    METADATA = ObjectKind.METADATA_PACK


@dataclass(frozen=True, slots=True)
class PlainExtent:
    """What goes into a pack as one unit.

    DATA: `pages` pages of `inode` from `first_page`, `len(data) == pages * 4096`.
    METADATA: inode 0, `first_page` the chunk's number, pages 0, any length.
    """

    inode: int
    first_page: int
    pages: int
    write_number: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class ExtentEntry:
    """Where a sealed extent lies in its pack's body, and what it is.  Lengths and offset in bytes."""

    ordinal: int
    inode: int
    first_page: int
    pages: int
    write_number: int
    offset: int
    sealed_length: int
    plain_length: int
    codec: int

    def shards(self, ref: PackRef) -> range:
        """The numbers of the data shards of `ref` that hold this extent."""
        last = self.offset + max(self.sealed_length, 1) - 1
        return range(self.offset // ref.shard_size, last // ref.shard_size + 1)


@dataclass(frozen=True, slots=True)
class PackRef:
    """All that is needed to find, key and open a pack.  `body_length == k * shard_size`."""

    pack_id: bytes
    digest: bytes
    kind: PackKind
    key_number: int
    owner_epoch: int
    body_length: int
    shard_size: int

    @property
    def k(self) -> int:
        """The number of data shards."""
        return self.body_length // self.shard_size
