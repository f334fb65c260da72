"""Archives: one file as a stream of packs in n shard files, without a file system or backends.

A shard file is, integers big-endian:

    label      4096  what archive this is, and which of its shard files
    shards           the values (see `shard`) with this file's number of packs 0, 1, 2, ...
    label      4096  the same again

A label is:

    magic             8  `QSFSFILE`
    version           2
    shard number      2
    superblock length 2
    manifest length   2
    superblock           (see `superblock`): the archive's id, code and key slot
    manifest             a sealed value (see `seal`) of kind 16
    zeros
    checksum         32  plain BLAKE3 of everything before

Each archive has an id and a master key of its own.  Its packs hold pages of inode 1 in order, and their owner
epoch is their position in the stream, so every shard is authenticated at its place.  All shard files have the
k-th shard at the same offset.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from qsfs.clock import Clock
from qsfs.errors import Corrupt, FormatMismatch, KeyFileError, LimitExceeded, QsfsBug
from qsfs.format import schema
from qsfs.format.erasure import CodeParams
from qsfs.format.extent import PackKind, PlainExtent
from qsfs.format.keys import KeyRing
from qsfs.format.pack import Pack, build_pack
from qsfs.format.seal import open_sealed, require_readable, seal
from qsfs.format.shard import OVERHEAD
from qsfs.format.superblock import (
    Superblock,
    create_superblock,
    encode_superblock,
    open_superblock,
    superblock_fsid,
)
from qsfs.format.units import DIGEST_SIZE, FSID_SIZE, MAX_EXTENT, PACK_TARGET_PER_SHARD, PAGE, Buffer, ObjectKind

MAGIC = b"QSFSFILE"
"""The first eight bytes of a shard file."""
VERSION = 1
LABEL_SIZE = 4096
"""Bytes of the label at the beginning of a shard file, and of the same at its end."""
INODE = 1
"""The inode of all extents of an archive."""
MAX_NAME = 255
"""Bytes in the longest name that is kept."""

PUBLIC_SECRET = blake3(b"", derive_key_context="qsfs 1 archive that anyone may read").digest()
"""What archives made without a key are sealed with: it finds damage, and hides nothing."""

_HEADER = struct.Struct(">8sHHHH")
_CHECKSUM_SIZE = 32
_SCHEMA = 1
_WHAT = "manifest"
_MOST_IN_SHARDS = 16 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive holds.

    `length` bytes in `packs` packs, `digest` the plain BLAKE3 of them; `name`, permission bits and time of
    change of the file that was encoded.
    """

    archive_id: bytes
    length: int
    packs: int
    digest: bytes
    name: bytes
    mode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Label:
    """The label of one shard file as it lies there: its number is a hint, the shards authenticate theirs."""

    archive_id: bytes
    number: int
    superblock: bytes
    manifest: bytes


@dataclass(frozen=True, slots=True)
class Archive:
    """What a key opens of a label; `public`: no key is needed."""

    superblock: Superblock
    keys: KeyRing
    manifest: Manifest
    public: bool

    @property
    def code(self) -> CodeParams:
        """The erasure code of all packs."""
        return self.superblock.code


def create_archive(secret: bytes, code: CodeParams, clock: Clock) -> tuple[Superblock, KeyRing]:
    """A new id and a new master key, wrapped under a key file's `secret` (or `PUBLIC_SECRET`)."""
    return create_superblock(secret, code=code, clock=clock, block_size=PAGE, label="archive")


def pack_bytes(code: CodeParams) -> int:
    """Plain bytes of each pack but the last: whole pages, 256 KiB for each data shard unless n is large."""
    shard = min(PACK_TARGET_PER_SHARD, _MOST_IN_SHARDS // code.n // PAGE * PAGE)
    return code.k * shard


def build_archive_pack(
    position: int, first_page: int, data: Buffer, *, keys: KeyRing, code: CodeParams, clock: Clock, level: int
) -> Pack:
    """Pack number `position` of a stream, with `data` from `first_page` on, padded with zeros to whole pages."""
    view = memoryview(data)
    extents = []
    for start in range(0, len(view), MAX_EXTENT):
        part: Buffer = view[start : start + MAX_EXTENT]
        if len(part) % PAGE:
            part = bytes(part) + bytes(-len(part) % PAGE)
        extents.append(PlainExtent(INODE, first_page + start // PAGE, len(part) // PAGE, 0, part))
    return build_pack(PackKind.DATA, extents, keys=keys, code=code, owner_epoch=position, clock=clock, level=level)


def encode_label(superblock: Superblock, keys: KeyRing, manifest: Manifest, clock: Clock) -> Iterator[bytes]:
    """The labels of shard files 0 to n - 1.  `LimitExceeded` if the name is too long."""
    if len(manifest.name) > MAX_NAME:
        raise LimitExceeded(f"a name of {len(manifest.name)} bytes is longer than {MAX_NAME}; give a shorter one")
    encoded = encode_superblock(superblock, keys, clock)
    plaintext = schema.pack(
        [
            _SCHEMA,
            manifest.archive_id,
            manifest.length,
            manifest.packs,
            manifest.digest,
            manifest.name,
            manifest.mode,
            manifest.mtime_ns,
        ]
    )
    sealed = seal(ObjectKind.ARCHIVE, plaintext, keys, clock)
    require_readable(manifest, lambda: _open_manifest(sealed, keys), "a manifest")
    if _HEADER.size + len(encoded) + len(sealed) + _CHECKSUM_SIZE > LABEL_SIZE:
        raise QsfsBug(f"a superblock of {len(encoded)} and a manifest of {len(sealed)} bytes fit no label")
    for number in range(superblock.code.n):
        label = _HEADER.pack(MAGIC, VERSION, number, len(encoded), len(sealed)) + encoded + sealed
        label += bytes(LABEL_SIZE - _CHECKSUM_SIZE - len(label))
        yield label + blake3(label).digest()


def read_label(value: Buffer, what: str) -> Label:
    """The label in `value`, without a key.

    `Corrupt` if it rotted or is something else, `FormatMismatch` if a newer version wrote it.
    """
    data = bytes(value)
    if len(data) != LABEL_SIZE or data[:8] != MAGIC:
        raise Corrupt(f"{what}: does not begin like a shard file")
    if blake3(data[:-_CHECKSUM_SIZE]).digest() != data[-_CHECKSUM_SIZE:]:
        raise Corrupt(f"{what}: the checksum of its label does not fit")
    _, version, number, superblock, manifest = _HEADER.unpack_from(data)
    if version != VERSION:
        raise FormatMismatch(f"{what}: has version {version}, this qsfs reads {VERSION}: use the qsfs that wrote it")
    start = _HEADER.size + superblock
    if start + manifest > LABEL_SIZE - _CHECKSUM_SIZE:
        raise Corrupt(f"{what}: its label contradicts itself")
    encoded = data[_HEADER.size : start]
    return Label(superblock_fsid(encoded), number, encoded, data[start : start + manifest])


def open_label(label: Label, secret: bytes) -> Archive:
    """What a key file's `secret` opens of a label.

    `KeyFileError` for another key, `Corrupt` or `FormatMismatch` for what is not what its holder wrote.
    """
    superblock, keys = open_superblock(label.superblock, secret)
    manifest = _open_manifest(label.manifest, keys)
    size = pack_bytes(superblock.code)
    if label.number >= superblock.code.n or manifest.packs != -(-manifest.length // size):
        raise Corrupt(f"archive {keys.fsid.hex()}: its label contradicts its superblock")
    return Archive(superblock, keys, manifest, secret == PUBLIC_SECRET)


def is_public(label: Label) -> bool:
    """Whether the archive was made without a key."""
    try:
        open_superblock(label.superblock, PUBLIC_SECRET)
    except KeyFileError:
        return False
    return True


def shard_file_bytes(shard_sizes: int, packs: int) -> int:
    """Bytes of a shard file whose `packs` shards have `shard_sizes` bytes of payload together."""
    return 2 * LABEL_SIZE + shard_sizes + packs * OVERHEAD


def _open_manifest(sealed: bytes, keys: KeyRing) -> Manifest:
    fields = schema.record(open_sealed(ObjectKind.ARCHIVE, sealed, keys, _WHAT), _SCHEMA, 8, _WHAT)
    manifest = Manifest(
        archive_id=fields.binary(FSID_SIZE),
        length=fields.integer(),
        packs=fields.integer(),
        digest=fields.binary(DIGEST_SIZE),
        name=fields.binary(),
        mode=fields.integer(0, 0o7777),
        mtime_ns=fields.integer(),
    )
    if manifest.archive_id != keys.fsid or len(manifest.name) > MAX_NAME:
        raise Corrupt("manifest: belongs to another archive, or its name is too long")
    return manifest
