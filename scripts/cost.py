"""What a cut uploads for each byte that changed: the part `cost` of `scripts/bench --remote`.

A database's load: pages of 4 KiB all over a file, and a few that change every time, are overwritten
with random bytes, so that compression hides nothing; then `qsfs sync` makes a generation.  What the
servers have stored meanwhile is counted from their data files, keys and values, by what it is.  All
backends take part, so heads count as often as they are stored.
"""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remote import Remote

PAGE = 4096
CUTS = 40
PAGES_A_CUT = 1000
HOT_PAGES = 8
_FILE_HEADER = 16
_RECORD = struct.Struct("<HBBIIQQQ")
_PACK_KIND = 84
KINDS = {b"h": "heads", b"s\x01": "data", b"s\x02": "metadata"}


def measure_cost(remote: Remote, file: Path, size: int) -> dict[str, float]:
    """Bytes stored on all backends for each byte of the pages that changed between two generations."""
    chosen = random.Random(1)
    pages = size // PAGE
    hot = [chosen.randrange(pages) for _ in range(HOT_PAGES)]
    before = stored(remote.directory / "backends")
    changed = 0
    with file.open("r+b", buffering=0) as out:
        for _ in range(CUTS):
            some = {*hot, *(chosen.randrange(pages) for _ in range(min(PAGES_A_CUT, pages // 16)))}
            for page in sorted(some):
                os.pwrite(out.fileno(), os.urandom(PAGE), page * PAGE)
            os.fsync(out.fileno())
            remote.qsfs("sync")
            changed += len(some) * PAGE
    after = stored(remote.directory / "backends")
    kinds = {kind: after[kind] - before[kind] for kind in after}
    return {
        "changed_bytes": changed,
        "cuts": CUTS,
        "stored_per_byte": sum(kinds.values()) / changed,
        **{f"{kind}_per_byte": count / changed for kind, count in sorted(kinds.items())},
        "metadata_bytes_per_page": kinds.get("metadata", 0) / (changed // PAGE),
    }


def stored(directory: Path) -> Counter[str]:
    """Bytes of keys and values in all data files below a directory of servers, by what they are."""
    found: Counter[str] = Counter()
    for path in sorted(directory.glob("**/d*")):
        if path.is_file() and path.name[1:].isdigit():
            for kind, count in _records(path):
                found[kind] += count
    return found


def _records(path: Path) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        at, end = _FILE_HEADER, path.stat().st_size
        while at + _RECORD.size <= end:
            file.seek(at)
            _, _, key_length, value_length, *_ = _RECORD.unpack(file.read(_RECORD.size))
            key = file.read(key_length)
            kind = key[5:6]
            if kind == b"s" and value_length > _PACK_KIND:
                kind += file.read(_PACK_KIND + 1)[-1:]
            yield KINDS.get(kind, "other"), key_length + value_length
            at += _RECORD.size + key_length + value_length
