"""What one shard file says of itself, without and with the key."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

from qsfs.codec.survey import ShardFile
from qsfs.errors import Corrupt, FormatMismatch
from qsfs.format.archive import LABEL_SIZE, PUBLIC_SECRET, Archive, Label, is_public, open_label
from qsfs.format.keys import KeyRing
from qsfs.format.shard import HEADER_SIZE, OVERHEAD, open_shard, peek_shard


def inspect_file(file: ShardFile, secret: bytes | None) -> dict[str, Any]:
    """All that `file` tells, by name; what is sealed only with the `secret` of its key, or if it has none.

    `KeyFileError` if the secret is that of another key.
    """
    told: dict[str, Any] = {"file": str(file.path), "bytes": file.size, "problems": list(file.problems)}
    if file.newer is not None:
        told["problems"].append(str(file.newer))
    if file.archive_id is None:
        told["problems"].append("not a shard file, or rotten beyond recognition")
        return told
    told |= {"archive": file.archive_id.hex(), "shard": file.number}
    archive = None
    if file.labels:
        label = file.labels[0]
        told["key"] = "none: anyone may read it" if is_public(label) else "a key file"
        archive = _open(label, secret)
    if archive is not None:
        manifest = archive.manifest
        told |= {
            "data_shards": archive.code.k,
            "parity_shards": archive.code.m,
            "codec": archive.code.codec,
            "encoded": datetime.fromtimestamp(archive.superblock.created_ns // 10**9, UTC).isoformat(),
            "name": os.fsdecode(manifest.name),
            "length": manifest.length,
            "packs": manifest.packs,
            "blake3": manifest.digest.hex(),
        }
    told["shards"] = _shards(file, None if archive is None else archive.keys)
    if archive is not None and told["shards"]["found"] < archive.manifest.packs:
        told["problems"].append("the shards behind these cannot be found by this file alone")
    return told


def _open(label: Label, secret: bytes | None) -> Archive | None:
    if secret is None and not is_public(label):
        return None
    return open_label(label, PUBLIC_SECRET if secret is None else secret)


def _shards(file: ShardFile, keys: KeyRing | None) -> dict[str, Any]:
    """Walks the shards by their own headers; with keys each is authenticated."""
    found = payload = 0
    wrong: list[str] = []
    offset, first = LABEL_SIZE, None
    while True:
        header = file.read(HEADER_SIZE, offset)
        claim = None if isinstance(header, str) else peek_shard(header)
        if claim is None or claim.fsid != file.archive_id:
            break
        first = first or claim
        if keys is not None:
            value = file.read(claim.shard_size + OVERHEAD, offset)
            try:
                if isinstance(value, str):
                    raise Corrupt(value)
                ref = open_shard(value, keys).ref
                if ref.owner_epoch != found:
                    raise Corrupt(f"out of place (it belongs to pack {ref.owner_epoch})")
            except (Corrupt, FormatMismatch) as error:
                wrong.append(f"pack {found}: {error}")
        found, payload, offset = found + 1, payload + claim.shard_size, offset + OVERHEAD + claim.shard_size
    told: dict[str, Any] = {"found": found, "payload_bytes": payload}
    if first is not None and keys is None:
        told["claims"] = f"{first.k} data shards of {first.n}"
    if keys is not None:
        told |= {"authentic": found - len(wrong), "not_good": wrong}
    return told
