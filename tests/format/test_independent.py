"""`docs/format.md` is complete: a reader written from that page alone opens the vectors.

Nothing of the package is imported here.
"""

from __future__ import annotations

import json
import struct
import unicodedata
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zfec
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

VECTORS = Path(__file__).parent.parent / "vectors"
FSID = bytes(range(16))
MASTERS = {1: b"\x11" * 32, 2: b"\x22" * 32}


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


def hkdf(secret: bytes, fsid: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=fsid, info=info).derive(secret)


def object_cipher(
    master: bytes, fsid: bytes, number: int, kind: int, object_id: bytes, digest: bytes
) -> AESGCM:
    info = b"qsfs object" + struct.pack(">IHB", number, 1, kind) + object_id + digest
    return AESGCM(hkdf(master, fsid, info))


def plain_digest(master: bytes, fsid: bytes, number: int, plaintext: bytes) -> bytes:
    return blake3(plaintext, key=hkdf(master, fsid, b"qsfs digest" + struct.pack(">I", number))).digest()


def read_sealed(value: bytes, kind: int, fsid: bytes, masters: dict[int, bytes]) -> Any:
    assert value[:8] == b"QSFS\x00\x01" + bytes([kind, 0])
    assert value[8:24] == fsid
    (number,) = struct.unpack(">I", value[24:28])
    object_id, digest, (length,) = value[28:44], value[44:76], struct.unpack(">I", value[76:80])
    cipher = object_cipher(masters[number], fsid, number, kind, object_id, digest)
    plaintext = cipher.decrypt(bytes(12), value[80:], value[:80])
    assert len(plaintext) == length
    assert plain_digest(masters[number], fsid, number, plaintext) == digest
    return msgpack.unpackb(plaintext)


@pytest.mark.parametrize(
    ("name", "kind", "prefix", "elements"),
    [
        ("head", 3, b"h", 14),
        ("owner record", 4, b"o", 5),
        ("identity", 5, b"i", 5),
        ("tombstone", 6, b"t", 6),
    ],
)
def test_records_read(name, kind, prefix, elements):
    stored = load("format-1.json")["sealed"][name]
    key, value = bytes.fromhex(stored["key"]), bytes.fromhex(stored["value"])
    record = read_sealed(value, kind, FSID, MASTERS)
    assert (record[0], record[1], len(record)) == (1, FSID, elements)
    assert key.startswith(b"qsfs:" + prefix + b":" + FSID)
    if name == "head":
        epoch, mount_id = record[2]
        owner = struct.pack(">Q", epoch) + mount_id
        assert key[23:] == owner + struct.pack(">Q", record[3]) + blake3(value).digest()


def test_ranges_of_a_snapshot_read():
    stored = load("format-1-ranges.json")["head"]
    record = read_sealed(bytes.fromhex(stored["value"]), 3, FSID, MASTERS)
    assert (record[0], record[1], len(record)) == (2, FSID, 15)
    assert record[14] == [[b"", 2, 0], [b"\x05" + bytes(16), 0, 2], [b"\x06", 1, 1]]
    assert sum(packs for _, packs, _ in record[14]) == len(record[9])


def read_pack(stored: dict[str, Any]) -> list[bytes]:
    shards: dict[int, bytes] = {}
    for hexed_key, hexed in stored["shards"].items():
        key, value = bytes.fromhex(hexed_key), bytes.fromhex(hexed)
        assert value[:8] == b"QSFS\x00\x01\x08\x00"
        assert value[8:24] == FSID
        number, epoch, pack_id, digest, kind, codec, shard, k, n, body_length, size = struct.unpack(
            ">IQ16s32sBBHHHQI", value[24:104]
        )
        assert key == b"qsfs:s:" + FSID + struct.pack(">Q16sH", epoch, pack_id, shard)
        tag_key = hkdf(MASTERS[number], FSID, b"qsfs shard tag" + struct.pack(">I", number))
        assert blake3(value[:-32], key=tag_key).digest() == value[-32:]
        assert (codec, len(value), body_length) == (1, 104 + size + 32, k * size)
        shards[shard] = value[104:-32]
    assert sorted(shards) == list(range(n))
    body = b"".join(shards[i] for i in range(k))
    parity = zfec.Encoder(k, n).encode([shards[i] for i in range(k)], list(range(k, n)))
    assert parity == [shards[i] for i in range(k, n)]

    cipher = object_cipher(MASTERS[number], FSID, number, kind, pack_id, digest)
    bound = struct.pack(">HB", 1, kind) + FSID + pack_id
    trailer = cipher.decrypt(bytes(12), body[-32:], bound + struct.pack(">Q", 0))
    index_at, index_length, count = struct.unpack(">QII", trailer)
    sealed_index = body[index_at : index_at + index_length]
    assert index_at + index_length + 32 == len(body)
    index = cipher.decrypt((1).to_bytes(12, "big"), sealed_index, bound + struct.pack(">Q", 1))
    assert struct.unpack(">HHIQI", index[:20]) == (1, k, size, epoch, count)
    extents, covered, plain = list(struct.iter_unpack(">QQIQIIIB", index[20:])), b"", []
    assert len(extents) == count
    for ordinal, (inode, first, pages, written, offset, sealed, length, compressed) in enumerate(extents):
        aad = bound + struct.pack(
            ">IQQIQIIB", ordinal, inode, first, pages, written, sealed, length, compressed
        )
        assert len(aad) == 76
        data = cipher.decrypt((2 + ordinal).to_bytes(12, "big"), body[offset : offset + sealed], aad)
        covered += data
        plain.append(zstandard.ZstdDecompressor().decompress(data, length) if compressed else data)
        assert len(plain[-1]) == length
    assert plain_digest(MASTERS[number], FSID, number, covered + index + trailer) == digest
    return plain


def test_packs_read():
    stored = load("format-1.json")
    assert [len(data) for data in read_pack(stored["data_pack"])] == [4096, 8192, 4096]
    assert [len(data) for data in read_pack(stored["metadata_pack"])] == [300, 0]
    assert read_pack(load("format-1-zstd.json")["compressed_pack"]) == [b"qsfs" * 65536, bytes(4096)]


def test_rows_read():
    rows: list[Any] = []
    for chunk in map(bytes.fromhex, load("format-1.json")["rows"]):
        assert chunk[0] == 1
        rows += msgpack.unpackb(chunk[1:])
    assert rows[3:9] == [7, b"key", b"value", 255, b"gone", None]


def test_the_superblock_reads():
    stored = load("format-1.json")
    lines = [line for line in stored["key_file"].splitlines() if not line.startswith("#")]
    assert lines[0] == "qsfs-key-1"
    secret = bytes.fromhex(lines[1].removeprefix("secret "))
    check = blake3(secret, derive_key_context="qsfs 1 key file check").hexdigest()[:8]
    assert lines[2] == f"check {check}"

    value = bytes.fromhex(stored["superblock"]["first"])
    assert bytes.fromhex(stored["superblock"]["key"]) == b"qsfs:superblock"
    assert value[:8] == b"QSFS\x00\x01\x07\x00"
    fsid, (public_length, sealed_length) = value[8:24], struct.unpack(">II", value[24:32])
    assert len(value) == 32 + public_length + sealed_length + 32
    assert blake3(value[:-32]).digest() == value[-32:]
    public = value[32 : 32 + public_length]
    schema, ((slot, kind, params, number, nonce, wrapped),) = msgpack.unpackb(public)
    assert (schema, slot, kind, number, nonce) == (1, 1, "keyfile", 1, bytes(12))
    bound = struct.pack(">II", slot, number) + params["salt"]
    master = AESGCM(hkdf(secret, fsid, b"qsfs slot" + bound)).decrypt(nonce, wrapped, fsid + bound)
    sealed = read_sealed(value[32 + public_length : -32], 7, fsid, {1: master})
    assert sealed[:5] == [1, 4, 6, "zfec", 16384]
    assert sealed[6:] == ["prüf", 1, blake3(public).digest()]


def test_slots_of_passphrases_read():
    stored = load("format-1-slots.json")
    value = bytes.fromhex(stored["rotated"])
    fsid, (public_length,) = value[8:24], struct.unpack(">I", value[24:28])
    _, slots = msgpack.unpackb(value[32 : 32 + public_length])
    words = unicodedata.normalize("NFC", stored["passphrase"]).encode()
    masters: dict[str, dict[int, bytes]] = {"keyfile": {}, "argon2id": {}}
    for slot, kind, params, number, nonce, wrapped in slots:
        secret = bytes.fromhex(stored["secret"])
        if kind == "argon2id":
            secret = Argon2id(
                salt=params["salt"],
                length=32,
                iterations=params["iterations"],
                lanes=params["lanes"],
                memory_cost=params["memory_kib"],
            ).derive(words)
        bound = struct.pack(">II", slot, number) + params["salt"]
        cipher = AESGCM(hkdf(secret, fsid, b"qsfs slot" + bound))
        masters[kind][number] = cipher.decrypt(nonce, wrapped, fsid + bound)
    assert masters["keyfile"] == masters["argon2id"]
    sealed = read_sealed(value[32 + public_length : -32], 7, fsid, masters["argon2id"])
    assert sealed[6:8] == ["slots", 3]


def test_a_sheet_reads():
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

    def number(digits: str) -> int:
        return sum(alphabet.index(digit) << (5 * place) for place, digit in enumerate(reversed(digits)))

    stored = load("format-1-slots.json")
    parts = []
    for place, line in enumerate(stored["sheet"], 1):
        head, _, body = line.partition(": ")
        digits = body.replace("-", "")
        parts.append(number(digits[:13]).to_bytes(8, "big"))
        check = blake3(bytes([place]) + parts[-1], derive_key_context="qsfs 1 sheet line").digest()[:2]
        assert (head, number(digits[13:])) == (str(place), int.from_bytes(check, "big") >> 1)
    secret = b"".join(parts[:4])
    assert secret.hex() == stored["secret"]
    assert blake3(secret, derive_key_context="qsfs 1 sheet whole").digest()[:8] == parts[4]
