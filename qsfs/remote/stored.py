"""A pack as it lies on the backends: what keys and opens it, and where its shards were put."""

from __future__ import annotations

from dataclasses import dataclass

from qsfs.errors import Corrupt
from qsfs.format.erasure import CodeParams
from qsfs.format.extent import ExtentEntry, PackKind, PackRef
from qsfs.format.head import MetadataPack
from qsfs.format.shard import shard_key
from qsfs.format.units import DIGEST_SIZE, ID_SIZE, PAGE
from qsfs.store.schema import ExtentRow, PackRow


@dataclass(frozen=True, slots=True)
class StoredPack:
    """A pack and its placement: for each shard the number of the fleet entry, -1 where none stored it.

    The placement is a hint: any backend may be asked for any shard.
    """

    ref: PackRef
    placement: tuple[int, ...]

    @classmethod
    def of_row(cls, row: PackRow, code: CodeParams) -> StoredPack:
        """The pack of a row of the local store; `Corrupt` if no pack of this code can be meant."""
        try:
            kind = PackKind(row.kind)
        except ValueError:
            raise Corrupt(f"pack {row.pack_id.hex()}: kind {row.kind} is unknown; run 'qsfs fsck'") from None
        ref = PackRef(
            row.pack_id, row.digest, kind, row.key_number, row.owner_epoch, row.body_length, row.shard_size
        )
        return cls(ref, row.placement)._checked(code)

    @classmethod
    def of_metadata(cls, pack: MetadataPack, code: CodeParams) -> StoredPack:
        """A metadata pack that a head lists; `Corrupt` as `of_row`."""
        return cls(pack.ref, pack.placement)._checked(code)

    @property
    def name(self) -> str:
        """The pack's id, for messages."""
        return self.ref.pack_id.hex()

    def key(self, fsid: bytes, number: int) -> bytes:
        """The key of shard `number`."""
        return shard_key(fsid, self.ref.owner_epoch, self.ref.pack_id, number)

    def _checked(self, code: CodeParams) -> StoredPack:
        ref = self.ref
        if (
            len(ref.pack_id) != ID_SIZE
            or len(ref.digest) != DIGEST_SIZE
            or ref.shard_size < 1
            or ref.body_length != ref.shard_size * code.k
            or len(self.placement) != code.n
        ):
            raise Corrupt(
                f"pack {self.name}: its sizes do not fit a code of {code.k} of {code.n}; run 'qsfs fsck'"
            )
        return self


def entry_of(inode: int, row: ExtentRow) -> ExtentEntry:
    """The sealed extent that `row` is a part of, as its pack knows it."""
    return ExtentEntry(
        ordinal=row.ordinal,
        inode=inode,
        first_page=row.first - row.skip,
        pages=row.plain_length // PAGE,
        write_number=row.write_number,
        offset=row.offset,
        sealed_length=row.sealed_length,
        plain_length=row.plain_length,
        codec=row.codec,
    )
