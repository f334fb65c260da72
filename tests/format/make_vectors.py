"""Writes tests/vectors/*.json: the bytes of everything that qsfs writes to backends.

Run `python -m tests.format.make_vectors` only when a new version of the format is added; the
vectors of a version that was released never change.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsfs.clock import FixedClock
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.head import seal_head
from qsfs.format.keys import KeyRing, MasterKey, new_key_file, parse_key_file, wrap_keys
from qsfs.format.pack import PackKind, PlainExtent, build_pack
from qsfs.format.passphrase import KdfCost, Passphrase
from qsfs.format.rows import encode_rows
from qsfs.format.shard import encode_shards, shard_key
from qsfs.format.sheet import sheet_lines
from qsfs.format.slots import wrap
from qsfs.format.superblock import SUPERBLOCK_KEY, create_superblock, encode_superblock, replace_slots
from tests.format import row_samples, samples
from tests.format.samples import CODE, FSID, KEYS

VECTORS = Path(__file__).parent.parent / "vectors"
ROWS = [(0, b"", b""), (7, b"key", b"value"), (255, b"gone", None), (3, bytes(511), b"\xff" * 70)]


def exact() -> dict[str, Any]:
    """Vectors whose bytes depend on nothing but this code and its seeds."""
    data, metadata = samples.data_pack(), samples.metadata_pack()
    text = new_key_file(FixedClock(10).random_bytes)
    clock = FixedClock(11)
    superblock, keys = create_superblock(parse_key_file(text), code=CODE, clock=clock, label="prüf")
    slots = (*superblock.slots, *wrap_keys(b"\x99" * 32, keys, slot_number=2, clock=clock))
    return {
        "key_file": text,
        "superblock": {
            "key": SUPERBLOCK_KEY.hex(),
            "first": encode_superblock(superblock, keys, clock).hex(),
            "two_slots": encode_superblock(replace_slots(superblock, slots), keys, clock).hex(),
        },
        "sealed": {
            sample.name: {"key": sample.key.hex(), "value": sample.value.hex()}
            for sample in samples.samples()
            if "shard" not in sample.name
        },
        "data_pack": _pack(data),
        "metadata_pack": _pack(metadata),
        "rows": [chunk.hex() for chunk in encode_rows(ROWS, 200)],
    }


PASSPHRASE = "Prüfung am grünen See"


def slots() -> dict[str, Any]:
    """A superblock with slots of both kinds, before and after a rotation of the master key; and a sheet."""
    clock = FixedClock(13)
    secret, phrase, cost = b"\x99" * 32, Passphrase(PASSPHRASE), KdfCost(256, 2, 2)
    superblock, keys = create_superblock(secret, code=CODE, clock=clock, label="slots")
    both = (*superblock.slots, *wrap(phrase, keys, slot_number=2, clock=clock, cost=cost))
    second = replace_slots(superblock, both)
    ring = KeyRing(keys.fsid, [keys.current, MasterKey(2, clock.random_bytes(32))])
    rotated = (
        *wrap(secret, ring, slot_number=1, clock=clock),
        *wrap(phrase, ring, slot_number=2, clock=clock, cost=cost),
    )
    return {
        "passphrase": PASSPHRASE,
        "secret": secret.hex(),
        "two_kinds": encode_superblock(second, keys, clock).hex(),
        "rotated": encode_superblock(replace_slots(second, rotated), ring, clock).hex(),
        "masters": [ring.get(number).secret.hex() for number in ring.numbers],
        "sheet": sheet_lines(secret),
    }


def opened() -> dict[str, Any]:
    """Vectors that hold zstd frames, whose bytes may differ between versions of zstd: only opened."""
    extents = [PlainExtent(9, 64, 64, 5, b"qsfs" * 65536), PlainExtent(9, 200, 1, 6, bytes(4096))]
    pack = build_pack(
        PackKind.DATA, extents, keys=KEYS, code=CODE, owner_epoch=7, clock=FixedClock(12), level=3
    )
    return {"compressed_pack": _pack(pack)}


def ranges() -> dict[str, Any]:
    """A head of schema 2: its snapshot is divided into ranges."""
    sealed = seal_head(samples.head_with_ranges(), KEYS, FixedClock(13))
    return {"head": {"key": sealed.key.hex(), "value": sealed.value.hex()}}


def table_rows() -> dict[str, Any]:
    """Rows of the tables that a generation holds, each by itself and all as chunks."""
    return {
        "rows": {
            name: {"table": int(table), "key": key.hex(), "row": None if row is None else row.hex()}
            for name, (table, key, row) in row_samples.ROWS.items()
        },
        "chunks": [chunk.hex() for chunk in encode_rows(row_samples.ROWS.values(), 600)],
    }


def isal() -> dict[str, Any]:
    """The shards of the data pack by the other codec, which pyeclib brings."""
    return {"data_pack": _pack(samples.data_pack(), replace(CODE, codec="isa_l_rs_cauchy"))}


def _pack(pack: Any, code: CodeParams = CODE) -> dict[str, Any]:
    values = encode_shards(pack, Code(code), KEYS)
    return {
        "pack_id": pack.ref.pack_id.hex(),
        "digest": pack.ref.digest.hex(),
        "shards": {
            shard_key(FSID, pack.ref.owner_epoch, pack.ref.pack_id, number).hex(): value.hex()
            for number, value in enumerate(values)
        },
    }


def main() -> None:
    """Writes all files."""
    VECTORS.mkdir(exist_ok=True)
    files = (
        ("format-1.json", exact()),
        ("format-1-zstd.json", opened()),
        ("format-1-isa-l.json", isal()),
        ("format-1-ranges.json", ranges()),
        ("format-1-rows.json", table_rows()),
        ("format-1-slots.json", slots()),
    )
    for name, vectors in files:
        text = json.dumps(vectors, indent=1, ensure_ascii=False, sort_keys=True)
        (VECTORS / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
