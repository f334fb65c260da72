"""Archives: vectors open as docs/format.md says and are written the same way again; labels refuse what is wrong."""

from __future__ import annotations

import json
import struct

import msgpack
import pytest
import zfec
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, FormatMismatch, KeyFileError, LimitExceeded
from qsfs.format.archive import (
    LABEL_SIZE,
    PUBLIC_SECRET,
    Manifest,
    create_archive,
    encode_label,
    open_label,
    pack_bytes,
    read_label,
)
from qsfs.format.erasure import CodeParams
from qsfs.format.units import PAGE
from tests.format import archive_vector
from tests.format.make_vectors import VECTORS
from tests.format.test_independent import hkdf, object_cipher, plain_digest, read_sealed

CODE = CodeParams(2, 3)


def stored() -> list[bytes]:
    vectors = json.loads((VECTORS / "archive-1.json").read_text(encoding="utf-8"))
    return [bytes.fromhex(file) for file in vectors["files"]]


def test_shard_files_are_written_as_the_vectors_say():
    assert [bytes.fromhex(file) for file in archive_vector.made()["files"]] == stored()


def test_the_vectors_read_by_what_the_page_of_formats_says_alone():
    """Nothing of the package's own readers is used."""
    payloads = {}
    for number, file in enumerate(stored()):
        label, shard = file[:4096], file[4096:-4096]
        assert file[-4096:] == label and blake3(label[:-32]).digest() == label[-32:]
        magic, version, hint, long, manifest_long = struct.unpack(">8sHHHH", label[:16])
        assert (magic, version, hint) == (b"QSFSFILE", 1, number)
        superblock, sealed = label[16 : 16 + long], label[16 + long : 16 + long + manifest_long]
        assert not label[16 + long + manifest_long : -32].strip(b"\0")
        archive_id, (public_length,) = superblock[8:24], struct.unpack(">I", superblock[24:28])
        _, ((slot, _, params, key_number, nonce, wrapped),) = msgpack.unpackb(superblock[32 : 32 + public_length])
        bound = struct.pack(">II", slot, key_number) + params["salt"]
        wrapping = AESGCM(hkdf(archive_vector.SECRET, archive_id, b"qsfs slot" + bound))
        master = wrapping.decrypt(nonce, wrapped, archive_id + bound)
        parameters = read_sealed(superblock[32 + public_length : -32], 7, archive_id, {1: master})
        assert (parameters[1:5], parameters[6]) == ([2, 3, "zfec", 4096], "archive")
        manifest = read_sealed(sealed, 16, archive_id, {1: master})
        digest = blake3(archive_vector.CONTENT).digest()
        assert manifest == [1, archive_id, 4090, 1, digest, archive_vector.NAME, 0o640, 1_700_000_000_000_000_000]

        _, epoch, pack_id, pack_digest, kind, codec, shard_number, k, n, length, size = struct.unpack(
            ">IQ16s32sBBHHHQI", shard[24:104]
        )
        assert (epoch, kind, codec, shard_number, k, n, length) == (0, 1, 1, number, 2, 3, 2 * size)
        tag_key = hkdf(master, archive_id, b"qsfs shard tag" + struct.pack(">I", 1))
        assert blake3(shard[:-32], key=tag_key).digest() == shard[-32:]
        payloads[number] = shard[104:-32]

    body = b"".join(zfec.Decoder(2, 3).decode([payloads[2], payloads[1]], [2, 1]))
    assert body == payloads[0] + payloads[1]
    cipher = object_cipher(master, archive_id, 1, 1, pack_id, pack_digest)
    pack = struct.pack(">HB", 1, 1) + archive_id + pack_id
    trailer = cipher.decrypt(bytes(12), body[-32:], pack + struct.pack(">Q", 0))
    index_at, index_length, count = struct.unpack(">QII", trailer)
    index = cipher.decrypt(
        (1).to_bytes(12, "big"), body[index_at : index_at + index_length], pack + struct.pack(">Q", 1)
    )
    (extent,) = struct.iter_unpack(">QQIQIIIB", index[20:])
    inode, first, pages, written, offset, sealed_length, plain, compressed = extent
    assert (count, inode, first, pages, written, plain, compressed) == (1, 1, 0, 1, 0, PAGE, 0)
    aad = pack + struct.pack(">IQQIQIIB", 0, inode, first, pages, written, sealed_length, plain, compressed)
    data = cipher.decrypt((2).to_bytes(12, "big"), body[offset : offset + sealed_length], aad)
    assert data == archive_vector.CONTENT + bytes(6)
    assert plain_digest(master, archive_id, 1, data + index + trailer) == pack_digest


@pytest.mark.parametrize(
    ("k", "n", "size"),
    [(16, 20, 16 << 18), (1, 2, 1 << 18), (20, 100, 20 * 163840), (64, 64, 64 << 18), (255, 256, 255 << 16)],
)
def test_the_size_of_packs_is_fixed_for_each_code(k, n, size):
    """Where the bytes of pack p lie in the file follows from it: it can never change."""
    assert pack_bytes(CodeParams(k, n)) == size


def labels(secret: bytes = b"s" * 32, seed: int = 1, **changes) -> list[bytes]:
    clock = FixedClock(seed)
    superblock, keys = create_archive(secret, CODE, clock)
    values = {"length": 5, "packs": 1, "digest": bytes(32), "name": b"n", "mode": 0o600, "mtime_ns": 7}
    return list(encode_label(superblock, keys, Manifest(keys.fsid, **{**values, **changes}), clock))


def test_every_changed_bit_of_a_label_is_noticed_without_a_key():
    label = labels()[1]
    assert read_label(label, "x").number == 1
    for at in range(0, LABEL_SIZE, 3):
        with pytest.raises((Corrupt, FormatMismatch)):
            read_label(label[:at] + bytes([label[at] ^ 1]) + label[at + 1 :], "x")


def rechecked(label: bytes) -> bytes:
    return label[:-32] + blake3(label[:-32]).digest()


def test_a_label_put_together_from_two_archives_does_not_open():
    """The plain checksum can be made by anyone; the seals cannot."""
    first, second = read_label(labels()[0], "x"), read_label(labels(seed=2)[0], "x")
    mixed = labels()[0].replace(first.manifest, second.manifest)
    with pytest.raises(Corrupt):
        open_label(read_label(rechecked(mixed), "x"), b"s" * 32)


def test_a_newer_label_is_a_mismatch():
    label = labels()[0]
    with pytest.raises(FormatMismatch, match="has version 2"):
        read_label(rechecked(label[:8] + b"\0\2" + label[10:]), "x")


def test_a_manifest_whose_packs_are_not_its_length_is_refused():
    with pytest.raises(Corrupt):
        open_label(read_label(labels(packs=2)[0], "x"), b"s" * 32)


def test_only_the_key_opens_and_a_public_archive_is_not_taken_for_one_with_a_key():
    with pytest.raises(KeyFileError):
        open_label(read_label(labels()[0], "x"), b"t" * 32)
    public = read_label(labels(PUBLIC_SECRET)[0], "x")
    assert open_label(public, PUBLIC_SECRET).manifest.length == 5
    with pytest.raises(KeyFileError):
        open_label(public, b"s" * 32)


def test_the_longest_name_fits_and_a_longer_one_is_refused():
    assert open_label(read_label(labels(name=b"n" * 255)[2], "x"), b"s" * 32).manifest.name == b"n" * 255
    with pytest.raises(LimitExceeded):
        labels(name=b"n" * 256)
