"""What was written once stays readable, and is written the same way again, byte for byte."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from qsfs.format.erasure import Code, CodeParams
from qsfs.format.keys import parse_key_file
from qsfs.format.pack import open_body
from qsfs.format.passphrase import Passphrase
from qsfs.format.rows import decode_rows
from qsfs.format.shard import Shard, open_shard
from qsfs.format.sheet import parse_sheet
from qsfs.format.superblock import open_superblock
from qsfs.store.schema import (
    REMOTE_TABLES,
    Entry,
    ExtentRow,
    Inode,
    PackRow,
    Table,
    decode_truncations,
    read_plain_u64,
    split_u64,
    split_u64_pair,
)
from tests.format import make_vectors, row_samples, samples
from tests.format.samples import CODE, KEYS

INODE_FIELDS = [field.name for field in fields(Inode)]


def load(name: str) -> Any:
    return json.loads((make_vectors.VECTORS / name).read_text(encoding="utf-8"))


def open_stored(stored: dict[str, Any], code: CodeParams = CODE) -> list[bytes]:
    """The plain extents of a stored pack, from its parity shards and as few others as will do."""
    shards: dict[int, Shard] = {}
    for key, value in stored["shards"].items():
        shard = open_shard(bytes.fromhex(value), KEYS, key=bytes.fromhex(key))
        shards[shard.number] = shard
    have = {number: shards[number].payload for number in (1, 3, 4, 5)}
    body = b"".join(Code(code).decode(have))
    assert body == b"".join(shards[number].payload for number in range(4))
    ref = shards[0].ref
    assert (ref.pack_id.hex(), ref.digest.hex()) == (stored["pack_id"], stored["digest"])
    return [data for _, data in open_body(KEYS, ref, body)]


def test_every_byte_is_written_as_the_vectors_say():
    stored = load("format-1.json")
    made = json.loads(json.dumps(make_vectors.exact()))
    assert made.keys() == stored.keys()
    for name in made:
        assert made[name] == stored[name], f"{name} is written differently than in format 1"


def test_the_other_codec_writes_every_byte_as_its_vectors_say_and_opens_them():
    stored = load("format-1-isa-l.json")
    assert json.loads(json.dumps(make_vectors.isal())) == stored
    extents = open_stored(stored["data_pack"], replace(CODE, codec="isa_l_rs_cauchy"))
    assert extents == open_stored(load("format-1.json")["data_pack"])


def test_stored_packs_open():
    stored = load("format-1.json")
    assert [len(data) for data in open_stored(stored["data_pack"])] == [4096, 8192, 4096]
    assert open_stored(stored["data_pack"])[0] == samples.noise(4096, 1)
    assert open_stored(stored["metadata_pack"]) == [samples.noise(300, 4), b""]


def test_stored_zstd_frames_open():
    assert open_stored(load("format-1-zstd.json")["compressed_pack"]) == [b"qsfs" * 65536, bytes(4096)]


@pytest.mark.parametrize(
    "sample", [s for s in samples.samples() if "shard" not in s.name], ids=lambda s: s.name
)
def test_stored_records_open(sample):
    stored = load("format-1.json")["sealed"][sample.name]
    record = sample.open(bytes.fromhex(stored["key"]), bytes.fromhex(stored["value"]), KEYS)
    assert record == sample.open(sample.key, sample.value, KEYS)


def test_stored_head_says_what_it_said():
    stored = load("format-1.json")["sealed"]["head"]
    sealed = samples.sealed_head()
    assert bytes.fromhex(stored["value"]) == sealed.value
    assert samples.open_head(sealed.key, sealed.value, KEYS) == samples.head()


def test_a_stored_head_with_ranges_opens_and_is_still_written_so():
    stored = load("format-1-ranges.json")["head"]
    key, value = bytes.fromhex(stored["key"]), bytes.fromhex(stored["value"])
    assert samples.open_head(key, value, KEYS) == samples.head_with_ranges()
    assert make_vectors.ranges()["head"] == stored


def test_stored_superblocks_open_with_the_stored_key_file():
    stored = load("format-1.json")
    secret = parse_key_file(stored["key_file"])
    first, keys = open_superblock(bytes.fromhex(stored["superblock"]["first"]), secret)
    second, again = open_superblock(bytes.fromhex(stored["superblock"]["two_slots"]), b"\x99" * 32)
    assert (first.label, first.code, first.block_size, first.revision) == ("prüf", CODE, 16384, 1)
    assert (second.revision, len(second.slots)) == (2, 2)
    assert keys.current == again.current


def test_slots_are_written_as_their_vectors_say_and_open_with_either_secret():
    stored = load("format-1-slots.json")
    assert json.loads(json.dumps(make_vectors.slots())) == stored
    for secret in (bytes.fromhex(stored["secret"]), Passphrase(stored["passphrase"])):
        _, before = open_superblock(bytes.fromhex(stored["two_kinds"]), secret)
        superblock, keys = open_superblock(bytes.fromhex(stored["rotated"]), secret)
        assert (superblock.revision, before.numbers, keys.numbers) == (3, (1,), (1, 2))
        assert [keys.get(number).secret.hex() for number in keys.numbers] == stored["masters"]
    assert parse_sheet("\n".join(stored["sheet"])).hex() == stored["secret"]


def test_stored_rows_decode():
    chunks = load("format-1.json")["rows"]
    assert [row for chunk in chunks for row in decode_rows(bytes.fromhex(chunk))] == make_vectors.ROWS


def test_rows_of_tables_are_written_as_their_vectors_say():
    """These rows lie on backends: the layout of a table that a generation holds never changes."""
    stored = load("format-1-rows.json")
    assert json.loads(json.dumps(make_vectors.table_rows())) == stored
    assert {row["table"] for row in stored["rows"].values()} == REMOTE_TABLES


def test_stored_rows_of_tables_say_what_they_said():
    rows = {
        name: (bytes.fromhex(row["key"]), bytes.fromhex(row["row"] or ""))
        for name, row in load("format-1-rows.json")["rows"].items()
    }
    for name, inode in row_samples.INODES.items():
        key, row = rows[f"inode of a {name}"]
        decoded = Inode.decode(split_u64(key), row)
        assert decoded.number == inode.number
        assert [getattr(decoded, field) for field in INODE_FIELDS] == [getattr(inode, field) for field in INODE_FIELDS]
    assert Entry.decode(rows["entry"][1]) == row_samples.ENTRY
    key, row = rows["extent"]
    assert ExtentRow.decode(split_u64_pair(key)[1], row) == row_samples.EXTENT
    assert ExtentRow.pages_and_pack(row) == (row_samples.EXTENT.pages, row_samples.EXTENT.pack)
    assert PackRow.decode(rows["data pack"][1]) == row_samples.DATA_PACK
    assert PackRow.decode(rows["metadata pack"][1]) == row_samples.METADATA_PACK
    assert decode_truncations(rows["truncations"][1]) == row_samples.TRUNCATIONS
    assert read_plain_u64(rows["counter"][1]) == row_samples.FILE


def test_numbers_of_tables_on_backends_never_change():
    names = ("INODES", "ENTRIES", "XATTRS", "SYMLINKS", "EXTENTS", "PACKS", "TRUNCATIONS", "COUNTERS")
    assert [(table.name, int(table)) for table in sorted(REMOTE_TABLES)] == [
        (name, number) for number, name in enumerate(names, 1)
    ]
    assert all(int(table) >= 32 for table in Table if table not in REMOTE_TABLES)
